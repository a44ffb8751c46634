"""Trials that do what their seed says, for tests of a scheduler: importable by its workers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from sweeps.result import Failure, Progress, TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial.keeping import Keeping
from sweeps.trial.paths import TrialFolder

ALONE = Keeping()
COMPLETES, FAILS, DIES, RAISES, HANGS = 0, 1, 2, 3, 4


class ScriptedTrials:
    """A runner that counts its trials: `train_loss` of the report is how many it ran before."""

    def __init__(self) -> None:
        self._ran = 0

    def __call__(self, spec: TrialSpec, folder: Path, keeping: Keeping = ALONE) -> Iterator[Progress]:
        assert spec.train is not None
        seed = spec.train.seed
        files = TrialFolder(folder)
        files.write_spec(spec)
        began = time.monotonic()
        visible = f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}"
        yield Progress(phase="training", step=1, steps=2, train_loss=float(self._ran), notes=(visible,))
        self._ran += 1
        if seed == DIES:
            os._exit(9)
        if seed == RAISES:
            raise RuntimeError("no result was written")
        while seed == HANGS:
            assert time.monotonic() - began < 60, "nobody has ended it"
            time.sleep(0.05)
            if keeping.should_stop():
                files.write_result(TrialResult(outcome="interrupted"))
                return
            yield Progress(phase="training", step=1, steps=2)
        failure = Failure(kind="diverged", message="the loss must stay finite") if seed == FAILS else None
        files.write_result(TrialResult(outcome="failed" if failure else "completed", failure=failure))
        yield Progress(phase="saving", step=2, steps=2)
