"""What a trial will need and take, told before it is paid for: `predict(spec, device)`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sweeps.devices import Device
from sweeps.spec import TrialSpec
from sweeps.trial.budget import Room, choose, with_recomputing
from sweeps.trial.calibration import Calibration
from sweeps.trial.duration import Pace, scoring_seconds, training_seconds
from sweeps.trial.estimate import outline, trainable_params
from sweeps.trial.lengths import RowLengths, Scoring, row_lengths, scoring
from sweeps.trial.memory import Memory, Widths, base_bytes, scoring_memory, training_memory, widths
from sweeps.trial.outline import Outline
from sweeps.trial.scoring import token_budget as scoring_budget

# A benchmark whose rows nobody counted is taken to have rows like the longest of the article's.
_UNKNOWN_LONGEST = 256
_PLENTY = 1e15


@dataclass(frozen=True)
class Prediction:
    """Of one trial. What cannot be told is None; `notes` say what was assumed.

    `memory` is its peak at `token_budget`; `least_gb` is the peak with one row at a time, down to which a
    trial goes before it gives up, so that it `fits` where that does. A copy of the base that the trial is
    scored in counts for that, and not for its peak, as in a trial's own result.
    """

    trainable_params: int
    memory: Memory
    least_gb: float
    token_budget: int | None
    fits: bool | None
    train_seconds: float | None
    eval_seconds: float | None
    notes: tuple[str, ...]

    @property
    def peak_memory_gb(self) -> float:
        """Decimal GB, as `max_memory_allocated` would say."""
        return self.memory.total / 1e9

    @property
    def seconds(self) -> float | None:
        """Training and evaluation, as far as they are known; None if neither is."""
        known = [part for part in (self.train_seconds, self.eval_seconds) if part is not None]
        return sum(known) if known else None


def predict(
    spec: TrialSpec, device: Device | None, on_cpu: bool = False, calibration: Calibration | None = None
) -> Prediction:
    """Memory on whatever it is, and whether it fits and how long it takes on `device`.

    A `calibration` corrects all of it, and tells how long it takes on the CPU that it was measured on.
    Raises `BadModel` if the architecture cannot be known here, `BadData` for a data file that cannot be read.
    """
    shapes = outline(spec.model)
    width = widths(spec, on_cpu)
    trainable = trainable_params(spec)
    spec = _with_checkpointing(shapes, spec, width, trainable, device, on_cpu)
    asked, unknown = scoring(spec.evaluate)
    batch_tokens = scoring_budget(spec.evaluate, on_cpu)
    scored_tokens = _in_a_batch(asked, bool(unknown), batch_tokens)
    peak = scoring_memory(shapes, spec, width, scored_tokens)
    notes = ["on a CPU the process's own memory comes on top"] if on_cpu else []
    notes += [f"no time of evaluation: nobody counted the rows of {', '.join(unknown)}"] if unknown else []
    pace, factors = _pace(device, width, calibration), _Factors.of(calibration)
    if device is not None and pace is None:
        notes.append("no times for float32: the table of devices knows their speed in bfloat16")
    least, budget, train_seconds = peak, None, None
    if spec.train is not None:
        rows = row_lengths(spec.data)
        budget = _budget(shapes, spec, width, trainable, device, rows, on_cpu, factors.memory)
        peak = _higher(peak, _peak(shapes, spec, width, budget, rows))
        least = _higher(least, _peak(shapes, spec, width, rows.longest, rows))
        notes += [rows.source] if rows.source else []
        if pace is not None:
            train_seconds = training_seconds(shapes, spec, trainable, pace, budget, rows) * factors.time
        elif device is None and not on_cpu and spec.train.token_budget == "auto":
            notes.append(
                "memory is told for micro-batches of one row: the token budget depends on the device"
            )
    notes += [calibration.note] if calibration is not None else []
    least_bytes = least.total
    if spec.train is not None and spec.evaluate.weights == "merged":
        copy = scoring_memory(shapes, spec.untrained(), width, scored_tokens).total
        least_bytes = max(least_bytes, base_bytes(shapes, spec, width) + copy)
        notes.append(f"scored in an unquantised copy, which takes {copy / 1e9:.1f} GB beside the base")
    eval_seconds = None
    if pace is not None and not unknown:
        eval_seconds = scoring_seconds(shapes, spec, trainable, pace, asked, batch_tokens) * factors.eval_time
    least_bytes *= factors.memory
    return Prediction(
        trainable_params=trainable,
        memory=_times(peak, factors.memory),
        least_gb=least_bytes / 1e9,
        token_budget=budget,
        fits=least_bytes <= device.usable_bytes if device is not None else None,
        train_seconds=train_seconds,
        eval_seconds=eval_seconds,
        notes=tuple(notes),
    )


def _in_a_batch(asked: Scoring, has_unknown: bool, batch_tokens: int) -> int:
    """Tokens of the largest batch that is scored: a row of its own may be longer than a batch should be."""
    longest = max(asked.longest, _UNKNOWN_LONGEST if has_unknown else 0)
    return max(longest, batch_tokens if has_unknown else min(batch_tokens, math.ceil(asked.computed)))


@dataclass(frozen=True)
class _Factors:
    """Measured over predicted; 1 for what was not measured."""

    time: float
    eval_time: float
    memory: float

    @classmethod
    def of(cls, calibration: Calibration | None) -> _Factors:
        if calibration is None:
            return cls(1.0, 1.0, 1.0)
        return cls(
            calibration.time_factor or 1.0, calibration.eval_time_factor, calibration.memory_factor or 1.0
        )


def _pace(device: Device | None, width: Widths, calibration: Calibration | None) -> Pace | None:
    """Of a device as the table has it, in 16 bits alone; of a CPU as it was measured."""
    if device is not None:
        return Pace.of(device) if width.model == 2 else None
    return calibration.pace if calibration is not None else None


def _times(memory: Memory, factor: float) -> Memory:
    """Every part of it: which of them a measured peak differs in is not known."""
    return Memory(**{name: size * factor for name, size in memory.parts().items()})


def _higher(one: Memory, other: Memory) -> Memory:
    return max(one, other, key=lambda memory: memory.total)


def _peak(shapes: Outline, spec: TrialSpec, width: Widths, budget: int, rows: RowLengths) -> Memory:
    """With micro-batches of up to `budget` tokens: of the longest rows, but no more rows than a step has."""
    assert spec.train is not None
    tokens = max(rows.longest, min(budget, spec.train.batch_size * rows.longest))
    return training_memory(shapes, spec, width, tokens, rows.longest)


def _budget(
    shapes: Outline,
    spec: TrialSpec,
    width: Widths,
    trainable: int,
    device: Device | None,
    rows: RowLengths,
    on_cpu: bool,
    memory_factor: float,
) -> int:
    """The token budget that the trial would end with on the device; one row at a time if none is named.

    It starts as the trial's own, and is halved while a step would run out of memory, as the loop does.
    """
    assert spec.train is not None
    if device is None and not on_cpu and spec.train.token_budget == "auto":
        return rows.longest
    room = _room(shapes, spec, width, trainable, device, on_cpu)
    budget = choose(shapes, spec, width, rows.longest, room).token_budget
    while device is not None and budget > rows.longest:
        if _peak(shapes, spec, width, budget, rows).total * memory_factor <= device.usable_bytes:
            break
        budget = max(rows.longest, budget // 2)
    return budget


def _with_checkpointing(
    shapes: Outline, spec: TrialSpec, width: Widths, trainable: int, device: Device | None, on_cpu: bool
) -> TrialSpec:
    """The spec with `gradient_checkpointing: auto` decided as the trial does on the device, off without."""
    if spec.train is None or spec.train.gradient_checkpointing != "auto":
        return spec
    room = _room(shapes, spec, width, trainable, device, on_cpu)
    longest = row_lengths(spec.data).longest
    return with_recomputing(spec, choose(shapes, spec, width, longest, room).recomputes)


def _room(
    shapes: Outline, spec: TrialSpec, width: Widths, trainable: int, device: Device | None, on_cpu: bool
) -> Room:
    """Beside the base and the adapter; where no device is named, memory is taken to be enough."""
    usable = device.usable_bytes if device is not None else _PLENTY
    return Room(usable - base_bytes(shapes, spec, width) - trainable * width.adapter, on_cpu)
