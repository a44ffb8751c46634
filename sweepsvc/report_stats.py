"""Whether two trials differ on the same documents; mean and spread of repeats; what nothing dominates."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NOISE = 0.05
"""A difference with a p-value from here on is within noise."""

MOST_FLIPPED = 14
"""Up to so many documents that differ, every flip of their signs is tried: 2**14 sums."""


@dataclass(frozen=True)
class Paired:
    """A two-sided paired test over `documents` documents, of which `differing` were answered differently."""

    test: str
    p_value: float
    documents: int
    differing: int

    @property
    def within_noise(self) -> bool:
        return self.p_value >= NOISE


def paired_test(one: Sequence[float], other: Sequence[float]) -> Paired:
    """How often chance alone would part two trials so far, given their scores on the same documents.

    Right or wrong: McNemar's exact test. Any other score: every flip of the signs of the differences where
    few documents differ, else Student's t of the differences.
    """
    if len(one) != len(other) or not one:
        raise ValueError(
            f"the same documents are needed, got {len(one)} and {len(other)}; leave the test out"
        )
    apart = [b - a for a, b in zip(one, other, strict=True) if a != b]
    if set(one) | set(other) <= {0.0, 1.0}:
        test, p_value = "McNemar, exact", _mcnemar(sum(gap > 0 for gap in apart), len(apart))
    elif len(apart) <= MOST_FLIPPED:
        test, p_value = "sign flips, exact", _sign_flips(apart)
    else:
        test, p_value = "paired t", _paired_t([b - a for a, b in zip(one, other, strict=True)])
    return Paired(test, p_value, len(one), len(apart))


def paired_means(gaps: Sequence[Mapping[str, Sequence[float]]]) -> Paired | None:
    """How often chance alone would part two trials' mean scores so far: Student's t of the difference.

    `gaps` has for each benchmark, by document, what one trial scored above the other. The difference is the
    mean of the benchmarks' mean gaps; its variance the sum of theirs over the square of their number, a
    benchmark's being its documents' over their count. Documents that benchmarks share are no independent
    evidence: each counts once, with all that it adds to the difference. None where a benchmark has fewer than
    two documents.
    """
    flat = [[gap for values in one.values() for gap in values] for one in gaps]
    if not gaps or any(len(one) < 2 for one in flat):
        return None
    means = [math.fsum(one) / len(one) for one in flat]
    added: dict[str, float] = {}  # by each document to the difference, beside what is expected
    for one, values, mean in zip(gaps, flat, means, strict=True):
        scale = 1 / math.sqrt(len(values) * (len(values) - 1))
        for document, there in one.items():
            added[document] = added.get(document, 0.0) + scale * math.fsum(gap - mean for gap in there)
    error = math.sqrt(math.fsum(gap * gap for gap in added.values())) / len(gaps)
    p_value = _two_sided(math.fsum(means) / len(gaps), error, len(added) - len(gaps), sum(map(len, flat)))
    return Paired("paired t of means", p_value, len(added), sum(gap != 0 for one in flat for gap in one))


def _two_sided(difference: float, error: float, freedom: int, documents: int) -> float:
    from scipy.special import stdtr

    if difference == 0:
        return 1.0
    if error == 0:  # the same gap everywhere: as in a paired t
        return float(2.0 ** (1 - documents))
    return float(2 * stdtr(max(1, freedom), -abs(difference / error)))


def _mcnemar(won: int, apart: int) -> float:
    """Twice the smaller tail of a fair coin thrown once for each document that differs, at most 1."""
    term, tail = 1, 0
    for k in range(min(won, apart - won) + 1):
        tail += term
        term = term * (apart - k) // (k + 1)
    return min(1.0, 2 * tail / 2**apart)  # of integers, so exact for any number of documents


def _sign_flips(apart: Sequence[float]) -> float:
    seen = abs(math.fsum(apart))
    sums = (
        abs(math.fsum(sign * gap for sign, gap in zip(signs, apart, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(apart))
    )
    return sum(total >= seen * (1 - 1e-12) for total in sums) / 2 ** len(apart)


def _paired_t(gaps: Sequence[float]) -> float:
    from scipy.special import stdtr

    spread = statistics.stdev(gaps)
    if spread == 0:  # the same gap everywhere: t is infinite, and the signs alone still say this much
        return float(2.0 ** (1 - len(gaps)))
    t = statistics.fmean(gaps) / (spread / math.sqrt(len(gaps)))
    return float(2 * stdtr(len(gaps) - 1, -abs(t)))


@dataclass(frozen=True)
class Spread:
    """Of `count` repeats: mean, sample standard deviation (None for one), lowest and highest."""

    count: int
    mean: float
    deviation: float | None
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of no values."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(len(values), statistics.fmean(values), deviation, min(values), max(values))


def front(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """For each point whether no other is at least as high in every coordinate and higher in one."""
    return [not any(_dominates(other, point) for other in points) for point in points]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
