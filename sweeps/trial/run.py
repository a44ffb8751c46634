"""One trial from its spec to its `result.json`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sweeps.errors import BadData, EvaluationFailed, Interrupted, OutOfMemory, failure_class
from sweeps.result import Failure, Measured, Outcome, Progress, Score, TrialResult
from sweeps.spec import ModelSpec, TrialSpec
from sweeps.trial.adapter import Adapter, attach
from sweeps.trial.base import Base, Resident
from sweeps.trial.begin import Begun, begin, choose_here
from sweeps.trial.causes import disk_full
from sweeps.trial.checkpoint import Checkpoint, Checkpoints, Keeper
from sweeps.trial.data import TokenData
from sweeps.trial.evaluate import check, evaluate
from sweeps.trial.finetune import Trained, finetune
from sweeps.trial.keeping import Keeping
from sweeps.trial.lock import WAIT_SECONDS, FolderLock
from sweeps.trial.measure import MemoryMeter, Stopwatch
from sweeps.trial.merge import merge
from sweeps.trial.outline import Outline, outline_of
from sweeps.trial.paths import TrialFolder, remove, write_whole
from sweeps.trial.tokencache import prepare

_DEFAULT_KEEPING = Keeping()
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval")


@dataclass
class _Account:
    """What is known of a trial so far, whatever happens to it next.

    `earlier` is what the attempts before this one measured, as far as their last checkpoint knows it.
    """

    started: float = field(default_factory=time.perf_counter)
    earlier: Measured = field(default_factory=Measured)
    meter: MemoryMeter | None = None
    load: Stopwatch = field(default_factory=Stopwatch)
    evaluation: Stopwatch = field(default_factory=Stopwatch)
    trained: Trained = field(default_factory=Trained)
    trainable_params: int = 0
    scores: dict[str, Score] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    device: str = ""
    data_digest: str | None = None

    def result(self, outcome: Outcome, failure: Failure | None = None) -> TrialResult:
        for watch in (self.load, self.evaluation, self.trained.watch):
            watch.pause()
        return TrialResult(
            outcome=outcome,
            scores=self.scores,
            train_loss=self.trained.train_loss,
            eval_loss=self.trained.eval_loss,
            steps=self.trained.step,
            trainable_params=self.trainable_params,
            measured=self.measured(),
            failure=failure,
            notes=tuple(self.notes),
            environment=_environment(self.device),
            data_digest=self.data_digest,
        )

    def measured(self) -> Measured:
        meter, earlier = self.meter, self.earlier
        return Measured(
            peak_memory_gb=_higher(earlier.peak_memory_gb, meter.peak_gb if meter else None),
            peak_accelerator_allocated_gb=_higher(
                earlier.peak_accelerator_allocated_gb, meter.allocated_gb if meter else None
            ),
            peak_accelerator_reserved_gb=_higher(
                earlier.peak_accelerator_reserved_gb, meter.reserved_gb if meter else None
            ),
            peak_host_gb=_higher(earlier.peak_host_gb, meter.host_gb if meter else None),
            wall_seconds=earlier.wall_seconds + time.perf_counter() - self.started,
            load_seconds=earlier.load_seconds + self.load.seconds,
            train_seconds=self.trained.seconds,
            eval_seconds=earlier.eval_seconds + self.evaluation.seconds,
            trained_tokens=self.trained.tokens,
            tokens_per_second=self.trained.tokens_per_second,
        )

    def stop_metering(self) -> None:
        """The peaks so far are the trial's, whatever the process holds from here on."""
        peaks = {name: peak for name, peak in self.measured() if "peak" in name}
        self.earlier = self.earlier.model_copy(update=peaks)
        if self.meter is not None:
            self.meter.close()
            self.meter = None

    def for_checkpoint(self, begun: Begun) -> dict[str, Any]:
        """What the next attempt must know beside the training's own state."""
        return {
            "first_budget": begun.first_budget,
            "gradient_checkpointing": begun.recomputes,
            "compiled": begun.compiles,
            "data_digest": self.data_digest,
            "measured": self.measured().model_dump(mode="json"),
            "notes": list(self.notes),
        }

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Add what the attempts before this one took and said. Raises `BadData` if they had other data."""
        if checkpoint.values["data_digest"] != self.data_digest:
            raise BadData(
                "a trial goes on with the rows that it began with, got digest "
                f"{self.data_digest} where its checkpoint has {checkpoint.values['data_digest']}; put the "
                "data back, or `resume --from-scratch`"
            )
        self.earlier = Measured.model_validate(checkpoint.values["measured"])
        self.notes += [note for note in checkpoint.values["notes"] if note not in self.notes]


def _higher(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)


def run_trial(
    spec: TrialSpec, resident: Resident, folder: Path | str, keeping: Keeping = _DEFAULT_KEEPING
) -> Generator[Progress, None, None]:
    """Run one trial on the resident base, reporting as it goes; always leaves `result.json`.

    A trial that has completed in `folder` is not run again: nothing is reported, its result stays. One that
    was cut goes on from its last checkpoint.

    An exception is a result: it is classified and written, not raised. A caller that closes the iterator
    early leaves a trial that is `interrupted`, as `keeping.should_stop` does. The base is left as it was,
    without any adapter.

    Raised is only what leaves no result of ours to write: `OSError` where that itself cannot be written; and,
    where another process runs in the folder, `TrialError` if it does not end in time, `Interrupted` if we are
    asked to stop before.
    """
    files = TrialFolder(folder)
    lock = FolderLock(files.lock)
    if not lock.take():
        waits = f"waits up to {WAIT_SECONDS:g} s for {lock.holder}, which runs in {files.path}"
        yield Progress(phase="loading", notes=(waits,))
        lock.wait(keeping.should_stop)
    with lock:
        if files.is_final(spec):
            _drop_checkpoints(files)  # of a process that was killed before it could
            return
        yield from _attempt(spec, resident, files, keeping)


def _attempt(
    spec: TrialSpec, resident: Resident, files: TrialFolder, keeping: Keeping
) -> Generator[Progress, None, None]:
    account = _Account()
    outcome: Outcome = "interrupted"  # where the iterator is closed, or the process is told to end at once
    failure = None
    try:
        files.begin(spec)
        yield from _run(spec, resident, files, account, keeping)
        outcome = "completed"
    except Interrupted:
        pass
    except Exception as error:  # an exception is a result, and a bug of ours is one too
        outcome = "failed"
        ours = _as_ours(error, files)
        failure = Failure(kind=failure_class(ours), message=_message(ours), traceback=traceback.format_exc())
    finally:
        try:
            files.write_result(account.result(outcome, failure))
        finally:
            if account.meter is not None:
                account.meter.close()
    if outcome == "completed":
        _drop_checkpoints(files)


def _drop_checkpoints(files: TrialFolder) -> None:
    """Of a trial that has completed, which it has whether they can be removed or not."""
    with contextlib.suppress(OSError):
        remove(files.checkpoints)


def _run(
    spec: TrialSpec, resident: Resident, files: TrialFolder, account: _Account, keeping: Keeping
) -> Iterator[Progress]:
    yield Progress(phase="loading")
    account.load.start()
    # Without training the model that is scored is all that is needed.
    merges = spec.evaluate.weights == "merged"
    base = resident.get(spec.model.unquantised() if merges and spec.train is None else spec.model)
    account.load.pause()
    account.meter = MemoryMeter(base.device)
    account.device = base.device_name
    account.notes += base.notes
    _stop_if_asked(keeping)
    if spec.train is None:
        yield from _evaluate(spec, base, base.model, files, account, keeping)
        return

    account.load.start()
    check(spec.evaluate)
    rows, said = prepare(spec.data, base.tokenizer)
    account.data_digest = rows.digest
    account.notes += said
    outline = outline_of(base.model)  # while it is bare
    with attach(base, spec.lora, spec.train.seed) as adapter:
        account.load.pause()
        account.trainable_params = adapter.trainable_params
        account.notes += adapter.notes
        yield from _train(spec, base, outline, adapter, rows, files, account, keeping)
        yield Progress(phase="saving", step=spec.steps, steps=spec.steps)
        adapter.save(files.adapter)
        if not merges:
            yield from _evaluate(spec, base, adapter.model, files, account, keeping)
    if merges and spec.evaluate.tasks:
        yield from _evaluate_merged(spec, base.device, files, account, keeping)


def _train(
    spec: TrialSpec,
    base: Base,
    outline: Outline,
    adapter: Adapter,
    rows: TokenData,
    files: TrialFolder,
    account: _Account,
    keeping: Keeping,
) -> Iterator[Progress]:
    assert spec.train is not None
    trained, notes = account.trained, account.notes
    checkpoints = Checkpoints(files.checkpoints, spec.digest, base.device.type)
    checkpoint, refused = checkpoints.newest()
    if checkpoint is not None:
        account.go_on_from(checkpoint)
    at = checkpoint or choose_here(outline, adapter, spec, max(map(len, rows.train)))
    begun = begin(adapter, rows.train, spec, trained, at)
    notes += [note for note in (*refused, *begun.notes) if note not in notes]
    keeper = Keeper(checkpoints, keeping, lambda: account.for_checkpoint(begun), notes, trained.step)

    yield Progress(phase="training", step=trained.step, steps=spec.steps, notes=tuple(notes))
    _stop_if_asked(keeping)
    said = len(notes)
    # Closed with us, and not whenever its memory is taken back: it then writes a checkpoint.
    steps = finetune(adapter.model, begun.loss, begun.training, rows, spec, keeper)
    with contextlib.closing(steps) as reports:
        for progress in reports:
            news, said = tuple(notes[said:]), len(notes)
            yield progress.model_copy(
                update={"peak_memory_gb": account.measured().peak_memory_gb, "notes": news}
            )
    if trained.token_budget < begun.first_budget:
        notes.append(f"token budget {trained.token_budget}: halved when memory ran out")
    notes += begun.loss.remarks


def _evaluate(
    spec: TrialSpec,
    base: Base,
    model: torch.nn.Module,
    files: TrialFolder,
    account: _Account,
    keeping: Keeping,
) -> Iterator[Progress]:
    if not spec.evaluate.tasks:
        return
    yield Progress(phase="evaluating", step=spec.steps, steps=spec.steps, notes=tuple(account.notes))
    account.evaluation.start()
    evaluation = evaluate(model, base.tokenizer, spec.evaluate, keeping.should_stop)
    account.evaluation.pause()
    account.notes += evaluation.notes
    account.scores = evaluation.scores
    write_whole(files.evaluation, evaluation.to_json())


def _evaluate_merged(
    spec: TrialSpec, device: torch.device, files: TrialFolder, account: _Account, keeping: Keeping
) -> Iterator[Progress]:
    """Score the saved adapter in the unquantised base: a copy for that time, beside the resident one.

    The copy's memory is no part of the trial's peak, which people compare for what training takes.
    """
    yield Progress(phase="loading", step=spec.steps, steps=spec.steps)
    _stop_if_asked(keeping)
    account.stop_metering()
    meter = MemoryMeter(device)
    copy = Resident(device)  # nothing else holds the copy, so that it is gone once dropped
    model = spec.model.unquantised()
    try:
        account.load.start()
        _merge(copy, model, files.adapter)
        account.load.pause()
        account.notes.append(
            "scored: the unquantised base with the adapter merged into it, set by evaluate.weights"
        )
        yield from _evaluate(spec, copy.get(model), copy.get(model).model, files, account, keeping)
        account.notes.append(
            f"scoring the merged copy took up to {meter.peak_gb:.2f} GB, which peak_memory_gb leaves out"
        )
    finally:
        meter.close()
        copy.drop()


def _merge(copy: Resident, model: ModelSpec, adapter: Path) -> None:
    try:
        merge(copy.get(model).model, adapter)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            "evaluate.weights=merged needs room for the unquantised base beside the resident one, got "
            f"{_message(OutOfMemory(str(error)))!r}; the adapter is kept; take a larger GPU, or say trained"
        ) from error


def _stop_if_asked(keeping: Keeping) -> None:
    if keeping.should_stop():
        raise Interrupted("asked to stop")


def _as_ours(error: Exception, files: TrialFolder) -> Exception:
    """A full disk and torch's own out-of-memory error, wherever they come from, are ours."""
    if (full := disk_full(error, files.path)) is not None:
        return full
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError):
            return OutOfMemory(str(cause))
        cause = cause.__cause__ if isinstance(error, EvaluationFailed) else None
    return error


def _message(error: Exception) -> str:
    """One line for people."""
    text = str(error).strip() or "no message"
    first = text.splitlines()[0]
    return first if failure_class(error) != "bug" else f"{type(error).__name__}: {first}"


def _environment(device: str) -> dict[str, str]:
    """What the numbers were made with: versions, device, host."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "cpus": str(os.cpu_count()),
    }


class TrialRunner:
    """Runs one trial after another in one process, on a base that stays."""

    def __init__(self) -> None:
        self._resident = Resident()

    def __call__(
        self, spec: TrialSpec, folder: Path, keeping: Keeping = _DEFAULT_KEEPING
    ) -> Generator[Progress, None, None]:
        return run_trial(spec, self._resident, folder, keeping)
