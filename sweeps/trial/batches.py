"""Token rows -> optimiser steps -> micro-batches under a token budget.

The step's gradient is a sum over its rows, so no choice of micro-batches changes the mathematics (law L1).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from sweeps.spec import TrainSpec
from sweeps.trial.data import TokenRow

Weighting = Literal["sample", "token"]

# What a forward and backward costs however few its tokens are, in tokens: kernels that are launched, weights
# that are dequantised. On a CPU as measured with SmolLM2 (`docs/benchmarks.md`); on CUDA what a plan's fitted
# constants (`duration.py`) say of a 7B model on an A100, rounded down: 32 blocks of 3.5 ms, in which it would
# train some 650 tokens.
CALL_TOKENS = {"cpu": 150, "cuda": 512}

CPU_CEILING = 2048
"""Tokens: more at once are no faster on a CPU, they only leave its caches."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward-backward: rows padded on the right to the longest of them.

    `ids` (B, T). What is predicted, and nothing else, N tokens in all: `places` (N,) are the positions in the
    flattened ids whose output predicts them, `targets` (N,) the tokens, `weights` (N,) in float32 what the
    loss of each counts in the mean over the whole step: those of a step add up to 1.
    There is no attention mask: in a causal model no token sees the padding on its right.
    """

    ids: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """On the device; to CUDA without waiting for it, by way of memory that stays where it is."""
        tensors = [self.ids, self.places, self.targets, self.weights]
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def row_order(rows: int, train: TrainSpec, steps: int) -> list[list[int]]:
    """The rows of every step, from the seed alone, so that a resumed trial needs only its step number."""
    draw = random.Random(train.seed)
    wanted = steps * train.batch_size
    if train.sampling == "replacement":
        picks = draw.choices(range(rows), k=wanted)
    else:
        picks = []
        while len(picks) < wanted:
            picks += draw.sample(range(rows), rows)
    return [picks[start : start + train.batch_size] for start in range(0, wanted, train.batch_size)]


def rectangles(
    lengths: Sequence[int], budget: int, call_tokens: int = CALL_TOKENS["cuda"]
) -> list[list[int]]:
    """Cut the rows, longest first, into groups of which rows x longest stays within `budget` tokens.

    A row that is longer than the budget gets a group of its own. Of all such cuts this is the one with the
    least work, padding included, where a group costs `call_tokens` tokens more than its own.
    Returns positions in `lengths`.
    """
    by_length = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    sizes = [lengths[position] for position in by_length]
    count = len(sizes)
    least = [0] * (count + 1)  # the work of all rows from here on
    size = [0] * count  # of the group that begins here
    for start in reversed(range(count)):
        longest = sizes[start]
        most = min(max(1, budget // longest), count - start)
        work, size[start] = min((rows * longest + least[start + rows], -rows) for rows in range(1, most + 1))
        least[start] = work + call_tokens
    groups: list[list[int]] = []
    start = 0
    while start < count:
        groups.append(by_length[start : start - size[start]])
        start -= size[start]
    return groups


def micro_batches(
    rows: Sequence[TokenRow], budget: int, weighting: Weighting = "sample", device: str = "cpu"
) -> Iterator[MicroBatch]:
    """The rows of one step as micro-batches under the budget.

    Every row weighs the same in the step's mean loss, or every predicted token, in whichever micro-batch.
    """
    parts = len(rows) if weighting == "sample" else sum(row.predicted for row in rows)
    for group in rectangles([len(row) for row in rows], budget, CALL_TOKENS[device]):
        yield _padded([rows[position] for position in group], parts, weighting)


def _padded(rows: Sequence[TokenRow], parts: int, weighting: Weighting) -> MicroBatch:
    longest = max(len(row) for row in rows)
    ids: Any = np.zeros((len(rows), longest), dtype=np.int64)  # (B, T)
    places: list[Any] = []
    targets: list[Any] = []
    weights: list[Any] = []
    for position, row in enumerate(rows):
        tokens = np.asarray(row.ids)
        ids[position, : len(row)] = tokens
        start = position * longest - 1  # of the outputs that predict this row's tokens
        places.append(np.arange(start + row.given, start + len(row)))
        targets.append(tokens[row.given :])
        weight = 1 / (parts * row.predicted) if weighting == "sample" else 1 / parts
        weights.append(np.full(row.predicted, weight, dtype=np.float32))
    return MicroBatch(
        torch.from_numpy(ids),
        torch.from_numpy(np.concatenate(places)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        torch.from_numpy(np.concatenate(weights)),
    )
