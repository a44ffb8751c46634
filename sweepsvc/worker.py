"""What a worker process does: one trial after another, on the base model that it keeps."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import socket
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from sweeps.collecting import importing
from sweeps.errors import Interrupted, TrialError, failure_class
from sweeps.result import Failure, Progress, TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial.cache import cache_home
from sweeps.trial.causes import disk_full
from sweeps.trial.keeping import Keeping
from sweeps.trial.paths import TrialFolder

if TYPE_CHECKING:
    from sweepsvc.mirror import Mirror, Storage


class Runner(Protocol):
    """What a worker keeps from trial to trial."""

    def __call__(
        self, spec: TrialSpec, folder: Path, keeping: Keeping
    ) -> Generator[Progress, None, None]: ...


class TrialFailed(TrialError):
    """Ends a trial such that its worker is thrown away: after an error nothing in it is trusted."""


@dataclass(frozen=True)
class Kept:
    """Where a worker finds its sweep, as plain text: it is sent there.

    `stop` is the file that asks trials to stop; `storage` is the address of the store in which the trials'
    folders are kept, "" where workers and driver share them.
    """

    sweep_id: str = ""
    stop: str = ""
    storage: str = ""


class Worker:
    """One worker process.

    `runner` names, as `module:name`, the class that is made once and called for every trial. `threads` is
    how many a trial computes with, the library's choice for None. The running trial writes a checkpoint and
    ends when its sweep is to stop, or this process hears a SIGTERM.
    """

    def __init__(
        self,
        runner: str,
        threads: int | None,
        on_cpu: bool,
        checkpoint_minutes: float,
        kept: Mapping[str, str],
    ) -> None:
        if on_cpu:  # Ray leaves the GPUs visible to an actor that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        with importing():
            if threads:
                import torch

                torch.set_num_threads(threads)
            self._runner: Runner = _named(runner)()
        self._checkpoint_minutes = checkpoint_minutes
        self._kept = Kept(**kept)
        self._storage: Storage | None = None
        if self._kept.stop and not self._kept.storage and not Path(self._kept.stop).parent.is_dir():
            raise OSError(  # a machine that joined later: what it wrote, nobody would find
                f"every machine must share the sweep's folder, got none at {Path(self._kept.stop).parent} on "
                f"{socket.gethostname()}; mount it there, or take the machine out of the cluster"
            )
        if self._kept.storage:
            from sweepsvc.mirror import Storage

            self._storage = Storage(self._kept.storage)
        self._preempted = False
        self._trial: Generator[Progress, None, None] | None = None
        signal.signal(signal.SIGTERM, self._hear)  # from whoever takes the node: a notice, then a SIGKILL

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._preempted = True

    def _should_stop(self) -> bool:
        if self._preempted or (self._kept.stop and Path(self._kept.stop).exists()):
            return True
        return self._storage is not None and self._storage.asks_to_stop(self._kept.sweep_id)

    def begin(self, trial: Mapping[str, str]) -> None:
        """Take up a trial, its `spec` as JSON and its `folder`, after the one before."""
        self.close()
        self._preempted = False  # the notice was for the trial before; what comes goes on until it is taken
        self._folder = Path(trial["folder"])
        spec = TrialSpec.model_validate_json(trial["spec"])
        keeping = Keeping(self._checkpoint_minutes, self._should_stop)
        if self._storage is None:
            self._trial = self._runner(spec, self._folder, keeping)
            return
        key = self._folder.name
        self._folder = cache_home() / "trials" / self._kept.sweep_id / key
        mirror = self._storage.trial(self._kept.sweep_id, key, self._folder)
        self._trial = _mirrored(mirror, lambda: self._runner(spec, self._folder, keeping))

    def step(self) -> dict[str, Any]:
        """One report; the last carries the result, after everything the trial had to do."""
        assert self._trial is not None, "begin comes before step"
        try:
            progress = next(self._trial, None)
        except (Interrupted, TrialError, OSError) as error:
            return self._without_a_file(error)
        except Exception as error:  # a runner writes its failures itself, unless it is broken
            TrialFolder(self._folder).write_result(_failed(error))
            raise
        if progress is not None:
            return {"progress": progress.model_dump_json()}
        result = TrialFolder(self._folder).read_result()
        assert result is not None
        if result.outcome == "failed":
            raise TrialFailed(result.failure.message if result.failure else "")
        return _last(result)

    def _without_a_file(self, error: Exception) -> dict[str, Any]:
        """The end of a trial that could not write it: no space is left, or another process has the folder."""
        if isinstance(error, Interrupted):
            return _last(TrialResult(outcome="interrupted"))
        full = disk_full(error, self._folder)
        if full is not None:
            return _last(_failed(full))
        if isinstance(error, TrialError) and error.kind != "bug":  # the store's
            return _last(_failed(error))
        raise error

    def close(self) -> None:
        """Leave the trial; one that has not ended is interrupted."""
        if self._trial is not None:
            self._trial.close()
        if self._storage is not None and self._trial is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # it is in the store


def _mirrored(
    mirror: Mirror, run: Callable[[], Generator[Progress, None, None]]
) -> Generator[Progress, None, None]:
    """Run a trial in a folder of this machine that is kept in a store."""
    mirror.claim()
    mirror.pull()
    if mirror.notes:
        yield Progress(phase="loading", notes=tuple(mirror.notes))
    reports = run()
    try:
        for progress in reports:
            note = mirror.keep_up()
            yield progress if note is None else progress.model_copy(update={"notes": (*progress.notes, note)})
        mirror.finish()
    except GeneratorExit:
        reports.close()  # it writes a checkpoint and its last word
        with contextlib.suppress(TrialError, OSError):
            mirror.finish()
        raise
    finally:
        reports.close()


def _last(result: TrialResult) -> dict[str, Any]:
    return {"result": result.model_dump_json(), "done": True}


def _failed(error: Exception) -> TrialResult:
    kind = failure_class(error)
    message = f"{type(error).__name__}: {error}" if kind == "bug" else str(error)
    failure = Failure(kind=kind, message=message, traceback=traceback.format_exc())
    return TrialResult(outcome="failed", failure=failure)


def _named(path: str) -> Callable[[], Any]:
    module, name = path.split(":")
    factory: Callable[[], Any] = getattr(importlib.import_module(module), name)
    return factory
