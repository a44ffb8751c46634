"""What a model must compute to score many texts that begin alike: each shared beginning once.

Sorted by their tokens, texts that share a beginning stand together, in the order in which their tree of
prefixes is walked depth first: how many tokens each has in common with the one before it says all of that
tree. A stretch of the sorted texts, each without what it has in common with the one before, becomes one row
of tokens; a token there sees those that stand on its own branch and no other. What very many texts begin with
is computed once, before them: their trunk.

Nothing here knows of a model. Costs are counted in tokens: one is what the linear layers do for one token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

_PASS_TOKENS = (
    64  # a forward pass costs this much besides its tokens, roughly: layers are called, batches split
)
_LONGEST_ROW = 4096
_LEAST_REPEATED = 8  # tokens that a row without a trunk repeats, at the least reckoned
_KEYS_PER_TOKEN = 4  # a batch attends to at most so many times its budget of keys, trunks included


class Request(NamedTuple):
    """A text, and how many of its last tokens are scored: at least one, and not the first."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model is given: the last token predicts nothing that is asked."""
        return self.tokens[:-1]

    @property
    def first(self) -> int:
        """The place of the first input that predicts a scored token."""
        return len(self.tokens) - 1 - self.scored


@dataclass(frozen=True, eq=False)
class Row:
    """Branches of one tree one after the other, behind a trunk. All arrays are of whole numbers.

    Of each token: `tokens`, its `depths` (how many tokens stand before it on its branch, the trunk's
    included), and `ends`, the place behind the last token that stands on a branch through it: a token i sees
    a token j of the row exactly if j <= i < ends[j].

    Of each prediction that is asked: `at`, the place of the token that predicts, `targets`, what it should
    predict, and `requests`, for which request.
    """

    tokens: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    requests: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether it has one branch only, as an ordinary row has."""
        return bool((self.ends == len(self)).all())

    def sees(self) -> np.ndarray:
        """(T, T): whether the token of a line sees that of a column."""
        places = np.arange(len(self))
        return (places[None, :] <= places[:, None]) & (places[:, None] < self.ends[None, :])


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that go through the model together, behind one trunk."""

    trunk: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def needs_mask(self) -> bool:
        """Whether its tokens see other than what stands before them in their row, as ordinary rows' do."""
        return bool(self.trunk) or not all(row.is_chain for row in self.rows)

    @property
    def width(self) -> int:
        """Tokens of its longest row."""
        return max(map(len, self.rows))


@dataclass(frozen=True, eq=False)
class Plan:
    """Batches that answer all requests. Those with one trunk follow one another."""

    batches: tuple[Batch, ...]
    requests: tuple[Request, ...]

    @cached_property
    def tokens(self) -> int:
        """Tokens that the model computes, padding and trunks included."""
        trunks = {batch.trunk for batch in self.batches}
        return sum(map(len, trunks)) + sum(len(batch.rows) * batch.width for batch in self.batches)

    @cached_property
    def plain_tokens(self) -> int:
        """Tokens that it would compute if each request were a row of its own, without padding."""
        return sum(len(request.tokens) - 1 for request in self.requests)


def make_plan(requests: Sequence[Request], budget: int, pair_cost: float) -> Plan:
    """Batches of at most `budget` tokens, padding included; one row alone may be longer.

    `pair_cost` is what a token pays for each token that stands in its row or trunk, seen or masked: it keeps
    rows short in which many unrelated branches would stand side by side. Equal requests give equal plans.
    """
    requests = tuple(requests)
    order = sorted(range(len(requests)), key=lambda number: requests[number].inputs)
    batches: list[Batch] = []
    for depth, numbers in _trunks(requests, order, budget, pair_cost):
        trunk = requests[numbers[0]].inputs[:depth]
        stretches = _cut([requests[number] for number in numbers], depth, budget, pair_cost)
        rows = [_row(requests, numbers[begin:end], depth) for begin, end in stretches]
        batches += (Batch(trunk, tuple(group)) for group in _together(rows, depth, budget))
    return Plan(tuple(batches), requests)


# --- trunks -----------------------------------------------------------------------------------------


@dataclass
class _Node:
    """A beginning of `depth` tokens that the sorted texts from `begin` to before `end` share."""

    depth: int
    begin: int
    end: int
    children: list[_Node]


def _trunks(
    requests: Sequence[Request], order: Sequence[int], budget: int, pair_cost: float
) -> Iterator[tuple[int, list[int]]]:
    """A trunk's depth and the requests behind it, in their order; each request once, depth 0 is no trunk.

    A beginning becomes a trunk if computing it once, in a pass of its own, is cheaper than in each row that
    it would stand in; from the shortest to the longest, so that a deeper one takes what it is better for.
    """
    shared = _shared([requests[number].inputs for number in order])
    new = np.array([len(requests[number].inputs) for number in order]) - shared
    below = np.concatenate([[0], np.cumsum(new)])  # tokens of the tree, from the first text on
    firsts = np.array([requests[number].first for number in order])
    trunk_of: np.ndarray = np.zeros(len(order), dtype=np.int64)
    waiting = [(_nodes(shared), 0)]
    while waiting:
        node, depth = waiting.pop()
        # What is scored is never within a trunk: it would have to be read there for each of its rows.
        reachable = min(node.depth, int(firsts[node.begin : node.end].min())) if node.depth > depth else 0
        tokens = below[node.end] - below[node.begin + 1] + new[node.begin] + shared[node.begin] - reachable
        # In rows of n tokens that repeat r, one costs r/n + n * pair_cost more: least where both are equal.
        best = math.sqrt(max(reachable, _LEAST_REPEATED) / pair_cost)
        rows = tokens / min(best, budget, _LONGEST_ROW)
        if reachable > depth and rows * (reachable - depth) > reachable + _PASS_TOKENS:
            depth = reachable
            trunk_of[node.begin : node.end] = depth
        waiting += ((child, depth) for child in node.children)
    yield from _grouped(order, trunk_of, shared)


def _grouped(
    order: Sequence[int], trunk_of: np.ndarray, shared: np.ndarray
) -> Iterator[tuple[int, list[int]]]:
    """The requests of each trunk, even where those of a deeper trunk stand between them."""
    open_trunks: list[tuple[int, list[int]]] = [(0, [])]
    for place, number in enumerate(order):
        while open_trunks[-1][0] > min(shared[place], trunk_of[place]):
            yield open_trunks.pop()
        if trunk_of[place] > open_trunks[-1][0]:
            open_trunks.append((int(trunk_of[place]), []))
        open_trunks[-1][1].append(number)
    yield from (trunk for trunk in reversed(open_trunks) if trunk[1])


def _nodes(shared: np.ndarray) -> _Node:
    """The inner nodes of the tree of prefixes, from how much each sorted text shares with the one before."""
    root = _Node(0, 0, len(shared), [])
    path = [root]
    for place in range(1, len(shared) + 1):
        depth = int(shared[place]) if place < len(shared) else 0
        begin = place - 1
        last: _Node | None = None
        while path[-1].depth > depth:
            last = path.pop()
            last.end, begin = place, last.begin
            if path[-1].depth >= depth:
                path[-1].children.append(last)
                last = None
        if path[-1].depth < depth:
            path.append(_Node(depth, begin, place, [last] if last else []))
    return root


def _shared(texts: Sequence[tuple[int, ...]]) -> np.ndarray:
    """How many tokens each text has in common with the one before it; 0 for the first."""
    return np.array([0, *(_common(one, other) for one, other in itertools.pairwise(texts))])


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])


# --- rows -------------------------------------------------------------------------------------------


def _cut(group: Sequence[Request], depth: int, budget: int, pair_cost: float) -> list[tuple[int, int]]:
    """Where to cut sorted requests into rows, at the least cost: a row repeats what it shares with others.

    The cheapest way to cut the first n requests, for each n in turn, from those for fewer.
    """
    texts = [request.inputs for request in group]
    lengths = np.array([len(text) for text in texts]) - depth
    new = lengths - np.maximum(_shared(texts) - depth, 0)
    ahead = np.concatenate([[0], np.cumsum(new)])
    begins = lengths - new - ahead[:-1]  # a row from i to before j has begins[i] + ahead[j] tokens
    longest = min(budget, _LONGEST_ROW)
    cost = np.zeros(len(texts) + 1)
    came_from: np.ndarray = np.zeros(len(texts) + 1, dtype=np.int64)
    low = 0
    for end in range(1, len(texts) + 1):
        while low < end - 1 and ahead[end] - ahead[low + 1] > longest:
            low += 1
        sizes = begins[low:end] + ahead[end]
        costs = cost[low:end] + sizes * (1 + pair_cost * (depth + sizes))
        costs[:-1][sizes[:-1] > longest] = math.inf
        best = int(costs.argmin())
        came_from[end], cost[end] = low + best, costs[best]
    cuts, end = [], len(texts)
    while end:
        cuts.append((int(came_from[end]), end))
        end = cuts[-1][0]
    return cuts[::-1]


def _row(requests: Sequence[Request], numbers: Sequence[int], depth: int) -> Row:
    """One row of the sorted requests `numbers`, whose first `depth` inputs are in the trunk."""
    texts = [requests[number].inputs for number in numbers]
    shared = np.maximum(_shared(texts), depth)
    tokens: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    branch: list[int] = []  # the places in the row of the current text's tokens
    at: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, text, common in zip(numbers, texts, shared.tolist(), strict=True):
        for place in branch[common - depth :]:
            ends[place] = len(tokens)
        del branch[common - depth :]
        branch += range(len(tokens), len(tokens) + len(text) - common)
        tokens += text[common:]
        depths += range(common, len(text))
        ends += [0] * (len(text) - common)
        request = requests[number]
        at += branch[request.first - depth :]
        targets += request.tokens[-request.scored :]
        owners += [number] * request.scored
    for place in branch:
        ends[place] = len(tokens)
    return Row(*(np.array(column, dtype=np.int64) for column in (tokens, depths, ends, at, targets, owners)))


def _together(rows: Sequence[Row], depth: int, budget: int) -> Iterator[list[Row]]:
    """Rows of like length together: ordinary rows, which need no mask, apart from those with branches."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.is_chain, -len(row))):
        width = max(len(batch[0]), 1) if batch else len(row)
        count = len(batch) + 1
        is_full = count * width > budget or count * (depth + width) > _KEYS_PER_TOKEN * max(budget, depth)
        if batch and (is_full or row.is_chain != batch[0].is_chain):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
