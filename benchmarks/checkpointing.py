"""What checkpoints cost one trial: the seconds and bytes of each, and their share of the training time.

    python -m benchmarks.checkpointing                # the quickstart's first trial: SmolLM2, nf4
    python -m benchmarks.checkpointing --tiny         # a tiny random model, in seconds
    python -m benchmarks.checkpointing --minutes 0.5

The trial is trained twice: with a checkpoint of its last step alone, and with one every so many minutes (0:
after every step). The share at the default interval is reckoned from the slowest write: the interval is then
the default one, or 100 times that write, whichever is longer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sweeps.result import TrialResult
from sweeps.spec import EvaluateSpec, TrialSpec
from sweeps.sweep import CHECKPOINT_MINUTES
from sweeps.sweepfile import load_sweep
from sweeps.trial.base import Resident
from sweeps.trial.checkpoint import Checkpoints
from sweeps.trial.keeping import Keeping
from sweeps.trial.paths import TrialFolder
from sweeps.trial.run import run_trial

QUICKSTART = Path(__file__).parent.parent / "search_spaces" / "quickstart.yaml"


class Writes:
    """Takes the time and the size of each checkpoint."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bytes: list[int] = []

    def watched(self) -> Any:
        """Inside the block, every checkpoint that is written."""
        real = Checkpoints.write

        def write(
            checkpoints: Checkpoints,
            step: int,
            tensors: Mapping[str, torch.Tensor],
            values: Mapping[str, Any],
        ) -> Path:
            start = time.perf_counter()
            path = real(checkpoints, step, tensors, values)
            self.seconds.append(time.perf_counter() - start)
            self.bytes.append(sum(file.stat().st_size for file in path.iterdir()))
            return path

        return mock.patch.object(Checkpoints, "write", write)


def quickstart() -> TrialSpec:
    """The first trial of the quickstart, without its benchmark."""
    sweep = load_sweep(QUICKSTART, task_names=lambda _: ("facts",))
    spec = sweep.resolve(sweep.search.space.first()).spec
    return spec.model_copy(update={"evaluate": EvaluateSpec(tasks=())})


def tiny(place: Path) -> TrialSpec:
    """A trial of 40 steps on a tiny random model."""
    from tests.tiny import save_rows, save_tiny_model, tiny_spec

    model, rows = save_tiny_model(place / "model"), save_rows(place / "rows.json")
    return tiny_spec(model, rows, **{"train.samples": 160, "train.eval_every": 0})


def train(spec: TrialSpec, resident: Resident, folder: Path, minutes: float) -> TrialResult:
    for _ in run_trial(spec, resident, folder, Keeping(checkpoint_minutes=minutes)):
        pass
    result = TrialFolder(folder).read_result()
    assert result is not None
    assert result.outcome == "completed", result.failure
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--minutes", type=float, default=0.0)
    given = parser.parse_args()
    torch.set_num_threads(2)
    writes, resident = Writes(), Resident()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        spec = tiny(place) if given.tiny else quickstart()
        train(spec, resident, place / "warm", CHECKPOINT_MINUTES)
        without = train(spec, resident, place / "without", 1e6).measured.train_seconds
        with writes.watched():
            kept = train(spec, resident, place / "with", given.minutes).measured.train_seconds
    each, slowest = statistics.median(writes.seconds), max(writes.seconds)
    interval = max(60 * CHECKPOINT_MINUTES, 100 * slowest)
    print(
        f"{spec.steps} steps: {without:.2f} s without checkpoints, {kept:.2f} s with {len(writes.seconds)}\n"
        f"one checkpoint: median {each:.4f} s, slowest {slowest:.4f} s, {max(writes.bytes) / 1e6:.2f} MB\n"
        f"at the default interval ({CHECKPOINT_MINUTES:g} minutes): {100 * slowest / interval:.3f} % of the "
        "training time"
    )


if __name__ == "__main__":
    main()
