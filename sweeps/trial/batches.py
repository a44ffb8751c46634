"""Token rows -> optimiser steps -> micro-batches under a token budget.

The step's gradient is a sum over its rows, so no choice of micro-batches changes the mathematics (law L1).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sweeps.spec import TrainSpec
from sweeps.trial.data import TokenRow

IGNORED = -100


@dataclass(frozen=True)
class MicroBatch:
    """One forward-backward: rows padded on the right to the longest of them.

    `ids` (B, T); `labels` (B, T - 1) are the next tokens, IGNORED where they are given or behind a row's end.
    There is no attention mask: in a causal model no token sees the padding on its right.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    tokens: int

    @property
    def predicted(self) -> torch.Tensor:
        """How many tokens of each row the loss is taken over: (B,)."""
        return (self.labels != IGNORED).sum(1)

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            self.ids.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.tokens
        )


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


def rectangles(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut the rows, longest first, into groups of which rows x longest stays within `budget` tokens.

    A row that is longer than the budget gets a group of its own. Returns positions in `lengths`.
    """
    by_length = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    groups: list[list[int]] = []
    start = 0
    while start < len(by_length):
        size = max(1, budget // lengths[by_length[start]])
        groups.append(by_length[start : start + size])
        start += size
    return groups


def micro_batches(rows: Sequence[TokenRow], budget: int) -> Iterator[MicroBatch]:
    """The rows of one step as micro-batches under the budget."""
    for group in rectangles([len(row) for row in rows], budget):
        yield _padded([rows[position] for position in group])


def _padded(rows: Sequence[TokenRow]) -> MicroBatch:
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)  # (B, T)
    labels = torch.full((len(rows), longest - 1), IGNORED)  # (B, T - 1)
    for position, row in enumerate(rows):
        tokens = torch.tensor(row.ids, dtype=torch.long)
        ids[position, : len(row)] = tokens
        labels[position, row.given - 1 : len(row) - 1] = tokens[row.given :]
    return MicroBatch(ids, labels, sum(len(row) for row in rows))
