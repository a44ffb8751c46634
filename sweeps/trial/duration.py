"""How long a trial takes: floating-point operations, bytes that must move, and a floor.

For a device of the table two constants are fitted, each to one run of the article on Llama-2-7B
(`docs/planning.md`); all other figures are the device's own or counted. A CPU has no such figures: its pace
is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sweeps.devices import Device
from sweeps.spec import TrialSpec
from sweeps.trial.lengths import RowLengths, Scoring, step_shape
from sweeps.trial.memory import four_bit_params
from sweeps.trial.outline import Outline

# The share of a device's peak that a transformer's matrix products reach: between the 42 % and the 57 % that
# Korthikanti et al. 2022 (table 5) measured for training on A100s. Not fitted.
UTILISATION = 0.5

# Fitted to the article's bf16 LoRA on q and v (6,685.75 s): what a block costs in one forward-backward by
# launching small kernels from Python, however few its tokens are. The article's checkpoints are in it too.
BLOCK_SECONDS = 3.5e-3

# Fitted to the article's nf4 run (10,059.53 s): the share of the bandwidth that dequantising reaches.
DEQUANTISING_SHARE = 0.55

_FORWARD_SHARE = 1 / 3  # of a block's seconds: a backward pass launches about twice as many kernels


@dataclass(frozen=True)
class Pace:
    """How fast it goes on a `kind` of device, as torch names it: operations, a block's kernels, the bytes
    that dequantising moves."""

    kind: str
    operations_per_second: float
    block_seconds: float
    moved_bytes_per_second: float

    @classmethod
    def of(cls, device: Device) -> Pace:
        """That of a device of the table."""
        return cls(
            kind="cuda",
            operations_per_second=device.bf16_tflops * 1e12 * UTILISATION,
            block_seconds=BLOCK_SECONDS,
            moved_bytes_per_second=device.bandwidth_gb_per_s * 1e9 * DEQUANTISING_SHARE,
        )

    @classmethod
    def measured(cls, operations_per_second: float) -> Pace:
        """That of a CPU, in which all that a step takes is spread over its operations."""
        return cls("cpu", operations_per_second, block_seconds=0.0, moved_bytes_per_second=math.inf)


@dataclass(frozen=True)
class Work:
    """Micro-batches, or batches that are scored, and the tokens in them, padding included."""

    micro_batches: float
    tokens: float


def training_seconds(
    outline: Outline, spec: TrialSpec, trainable: int, pace: Pace, budget: int, rows: RowLengths
) -> float:
    """Of all steps under a token budget, with the held-out losses in between."""
    assert spec.train is not None
    work = Work(*step_shape(rows, spec.train.batch_size, budget, pace.kind))
    one_step = backward_seconds(outline, spec, trainable, pace, work)
    return spec.steps * one_step + _held_out_seconds(outline, spec, trainable, pace, budget, rows)


def backward_seconds(outline: Outline, spec: TrialSpec, trainable: int, pace: Pace, work: Work) -> float:
    """Of work that goes forward and backward."""
    passes = _passes(spec)
    one = training_operations(outline, spec, trainable, work) / pace.operations_per_second
    one += work.micro_batches * outline.blocks * pace.block_seconds * passes / 2
    return one + work.micro_batches * passes * _dequantising_seconds(outline, spec, pace)


def training_operations(outline: Outline, spec: TrialSpec, trainable: int, work: Work) -> float:
    """Floating-point operations of work that goes forward and backward."""
    passes = _passes(spec)
    # A frozen weight costs 2 operations a token forward, 2 for its input's gradient; a trained one 2 more.
    return work.tokens * (2 * passes * outline.linear_params + (2 * passes + 2) * trainable)


def _passes(spec: TrialSpec) -> int:
    """Forward, backward, and forward again where activations are recomputed."""
    assert spec.train is not None
    return 2 + bool(spec.train.gradient_checkpointing)


def _held_out_seconds(
    outline: Outline, spec: TrialSpec, trainable: int, pace: Pace, budget: int, rows: RowLengths
) -> float:
    assert spec.train is not None
    count = min(spec.train.eval_rows, round(spec.data.held_out * rows.rows))
    if not count:
        return 0.0
    evaluations = -(-spec.steps // spec.train.eval_every) if spec.train.eval_every else 1
    work = Work(*step_shape(rows, count, budget, pace.kind))
    return evaluations * forward_seconds(outline, spec, trainable, pace, work)


def scoring_seconds(
    outline: Outline, spec: TrialSpec, trainable: int, pace: Pace, asked: Scoring, batch_tokens: int
) -> float:
    """Of the benchmarks: what requests share goes forward once, in batches of so many tokens."""
    work = Work(math.ceil(asked.computed / batch_tokens), asked.computed)
    return forward_seconds(outline, spec, trainable, pace, work)


def forward_seconds(outline: Outline, spec: TrialSpec, trainable: int, pace: Pace, work: Work) -> float:
    """Of work that only goes forward."""
    computing = work.tokens * 2 * (outline.linear_params + trainable) / pace.operations_per_second
    launching = work.micro_batches * outline.blocks * pace.block_seconds * _FORWARD_SHARE
    return computing + launching + work.micro_batches * _dequantising_seconds(outline, spec, pace)


def _dequantising_seconds(outline: Outline, spec: TrialSpec, pace: Pace) -> float:
    """Of every 4-bit weight once: read packed, written in 16 bits, and read again by the product."""
    return four_bit_params(outline, spec) * (0.5 + 2 + 2) / pace.moved_bytes_per_second
