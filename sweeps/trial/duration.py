"""How long a trial takes on a named device: floating-point operations, bytes that must move, and a floor.

Two constants are fitted, each to one run of the article on Llama-2-7B (`docs/planning.md`); all other figures
are the device's own or counted.
"""

from __future__ import annotations

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

_FORWARD_SHARE = 1 / 3  # of BLOCK_SECONDS: a backward pass launches about twice as many kernels


def training_seconds(
    outline: Outline, spec: TrialSpec, trainable: int, device: Device, budget: int, rows: RowLengths
) -> float:
    """Of all steps under a token budget, with the held-out losses in between."""
    assert spec.train is not None
    train = spec.train
    micro_batches, tokens = step_shape(rows, train.batch_size, budget)
    passes = 2 + bool(train.gradient_checkpointing)  # forward, backward, and forward again
    # A frozen weight costs 2 operations a token forward, 2 for its input's gradient; a trained one 2 more.
    operations = 2 * passes * outline.linear_params + (2 * passes + 2) * trainable
    one_step = tokens * operations / _operations_per_second(device)
    one_step += micro_batches * outline.blocks * BLOCK_SECONDS * passes / 2
    one_step += micro_batches * passes * _dequantising_seconds(outline, spec, device)
    return spec.steps * one_step + _held_out_seconds(outline, spec, trainable, device, budget, rows)


def _held_out_seconds(
    outline: Outline, spec: TrialSpec, trainable: int, device: Device, budget: int, rows: RowLengths
) -> float:
    assert spec.train is not None
    count = min(spec.train.eval_rows, round(spec.data.held_out * rows.rows))
    if not count:
        return 0.0
    evaluations = -(-spec.steps // spec.train.eval_every) if spec.train.eval_every else 1
    micro_batches, tokens = step_shape(rows, count, budget)
    return evaluations * _forward_seconds(outline, spec, trainable, device, micro_batches, tokens)


def scoring_seconds(
    outline: Outline, spec: TrialSpec, trainable: int, device: Device, asked: Scoring
) -> float:
    """Of the benchmarks: every request is one row that goes forward in full, in batches of rows alike."""
    batches = asked.requests / spec.evaluate.batch_size
    return _forward_seconds(outline, spec, trainable, device, batches, asked.tokens)


def _forward_seconds(
    outline: Outline, spec: TrialSpec, trainable: int, device: Device, batches: float, tokens: float
) -> float:
    computing = tokens * 2 * (outline.linear_params + trainable) / _operations_per_second(device)
    launching = batches * outline.blocks * BLOCK_SECONDS * _FORWARD_SHARE
    return computing + launching + batches * _dequantising_seconds(outline, spec, device)


def _operations_per_second(device: Device) -> float:
    return device.bf16_tflops * 1e12 * UTILISATION


def _dequantising_seconds(outline: Outline, spec: TrialSpec, device: Device) -> float:
    """Of every 4-bit weight once: read packed, written in 16 bits, and read again by the product."""
    moved = four_bit_params(outline, spec) * (0.5 + 2 + 2)
    return moved / (device.bandwidth_gb_per_s * 1e9 * DEQUANTISING_SHARE)
