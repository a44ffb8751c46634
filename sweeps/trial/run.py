"""One trial from its spec to its `result.json`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sweeps.errors import EvaluationFailed, OutOfMemory, failure_class
from sweeps.result import Failure, Measured, Outcome, Progress, Score, TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial import data as instructions
from sweeps.trial.adapter import Adapter, attach
from sweeps.trial.base import Base, Resident, make_optimizer
from sweeps.trial.budget import token_budget
from sweeps.trial.evaluate import check, evaluate
from sweeps.trial.finetune import Trained, finetune
from sweeps.trial.measure import MemoryMeter, Stopwatch
from sweeps.trial.paths import TrialFolder, write_whole
from sweeps.trial.rng import TrialRng

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval")


@dataclass
class _Account:
    """What is known of a trial so far, whatever happens to it next."""

    started: float = field(default_factory=time.perf_counter)
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
        return TrialResult(
            outcome=outcome,
            scores=self.scores,
            train_loss=self.trained.train_loss,
            eval_loss=self.trained.eval_loss,
            steps=self.trained.step,
            trainable_params=self.trainable_params,
            measured=self._measured(),
            failure=failure,
            notes=tuple(self.notes),
            environment=_environment(self.device),
            data_digest=self.data_digest,
        )

    def _measured(self) -> Measured:
        for watch in (self.load, self.evaluation, self.trained.watch):
            watch.pause()
        meter = self.meter
        return Measured(
            peak_memory_gb=meter.peak_gb if meter else None,
            peak_accelerator_allocated_gb=meter.allocated_gb if meter else None,
            peak_accelerator_reserved_gb=meter.reserved_gb if meter else None,
            peak_host_gb=meter.host_gb if meter else None,
            wall_seconds=time.perf_counter() - self.started,
            load_seconds=self.load.seconds,
            train_seconds=self.trained.watch.seconds,
            eval_seconds=self.evaluation.seconds,
            trained_tokens=self.trained.tokens,
            tokens_per_second=self.trained.tokens_per_second,
        )


def run_trial(spec: TrialSpec, resident: Resident, folder: Path | str) -> Generator[Progress, None, None]:
    """Run one trial on the resident base, reporting as it goes; always leaves `result.json`.

    An exception is a result: it is classified and written, not raised. A caller that closes the iterator
    early leaves a trial that is `interrupted`. The base is left as it was, without any adapter.
    """
    files = TrialFolder(folder)
    files.result.unlink(missing_ok=True)
    files.write_spec(spec)
    account = _Account()
    outcome: Outcome = "interrupted"  # where the iterator is closed, or the process is asked to stop
    failure = None
    try:
        yield from _run(spec, resident, files, account)
        outcome = "completed"
    except Exception as error:
        outcome = "failed"
        failure = Failure(
            kind=failure_class(_as_ours(error)), message=_message(error), traceback=traceback.format_exc()
        )
    finally:
        files.write_result(account.result(outcome, failure))
        if account.meter is not None:
            account.meter.close()


def _run(spec: TrialSpec, resident: Resident, files: TrialFolder, account: _Account) -> Iterator[Progress]:
    yield Progress(phase="loading")
    account.load.start()
    base = resident.get(spec.model)
    account.load.pause()
    account.meter = MemoryMeter(base.device)
    account.device = base.device_name
    account.notes += base.notes
    if spec.train is None:
        yield from _evaluate(spec, base, base.model, files, account)
        return

    account.load.start()
    check(spec.evaluate)
    rows = instructions.tokenize(instructions.read_rows(spec.data), spec.data, base.tokenizer)
    account.data_digest = rows.digest
    account.notes.append(
        f"data: {len(rows.train)} rows to train on, {len(rows.held_out)} held out, {rows.truncated} cut at "
        f"max_length (digest {rows.digest})"
    )
    with attach(base, spec.lora, spec.train.seed) as adapter:
        account.load.pause()
        account.trainable_params = adapter.trainable_params
        account.notes += adapter.notes
        yield from _train(spec, base, adapter, rows, account)
        yield Progress(phase="saving", step=spec.steps, steps=spec.steps)
        adapter.save(files.adapter)
        yield from _evaluate(spec, base, adapter.model, files, account)


def _train(
    spec: TrialSpec, base: Base, adapter: Adapter, rows: instructions.TokenData, account: _Account
) -> Iterator[Progress]:
    assert spec.train is not None
    if spec.train.gradient_checkpointing:
        adapter.enable_gradient_checkpointing()
    budget, announced = token_budget(spec.train, base.model.config, base.dtype, base.device)
    account.trained.token_budget = budget
    account.notes.append(announced)
    rng = TrialRng(spec.train.seed, base.device)
    yield Progress(phase="training", steps=spec.steps, notes=tuple(account.notes))
    for progress in finetune(
        adapter.model, adapter.parameters(), rows, spec, rng, make_optimizer, account.trained
    ):
        assert account.meter is not None
        yield progress.model_copy(update={"peak_memory_gb": account.meter.peak_gb})
    if account.trained.token_budget < budget:
        account.notes.append(f"token budget {account.trained.token_budget}: halved when memory ran out")


def _evaluate(
    spec: TrialSpec, base: Base, model: torch.nn.Module, files: TrialFolder, account: _Account
) -> Iterator[Progress]:
    if not spec.evaluate.tasks:
        return
    yield Progress(phase="evaluating", step=spec.steps, steps=spec.steps, notes=tuple(account.notes))
    account.evaluation.start()
    evaluation = evaluate(model, base.tokenizer, spec.evaluate)
    account.evaluation.pause()
    account.scores = evaluation.scores
    write_whole(files.evaluation, evaluation.to_json())


def _as_ours(error: Exception) -> Exception:
    """Torch's own out-of-memory error, wherever it comes from, is ours."""
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

    def __call__(self, spec: TrialSpec, folder: Path) -> Generator[Progress, None, None]:
        return run_trial(spec, self._resident, folder)
