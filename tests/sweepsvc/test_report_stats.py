"""Paired tests against values worked out by hand or by scipy; spreads; the front."""

from __future__ import annotations

import random

import pytest
from scipy.stats import binomtest, t, ttest_rel

from sweepsvc.report_stats import Spread, front, paired_means, paired_test


def test_mcnemar_counts_only_the_documents_that_differ() -> None:
    one = [1.0] * 20 + [0.0] * 9 + [1.0]
    other = [1.0] * 20 + [1.0] * 9 + [0.0]
    tested = paired_test(one, other)
    assert (tested.test, tested.documents, tested.differing) == ("McNemar, exact", 30, 10)
    assert tested.p_value == pytest.approx(2 * (1 + 10) / 1024)
    assert not tested.within_noise
    assert paired_test(other, one).p_value == tested.p_value


def test_equal_answers_are_noise() -> None:
    assert paired_test([1.0, 0.0], [1.0, 0.0]).p_value == 1.0
    assert paired_test([0.3, 0.2], [0.3, 0.2]).p_value == 1.0


def test_mcnemar_is_exact_for_ten_thousand_documents() -> None:
    one, other = [0.0] * 5150 + [1.0] * 4850, [1.0] * 5150 + [0.0] * 4850
    assert paired_test(one, other).p_value == pytest.approx(binomtest(5150, 10_000).pvalue, rel=1e-9)


def test_few_documents_that_differ_are_flipped_in_every_way() -> None:
    tested = paired_test([0.0] * 5, [0.1, 0.2, 0.3, 0.0, 0.0])
    assert (tested.test, tested.p_value) == ("sign flips, exact", 2 / 8)
    # +++, ++-, and their mirrors: |0.5 + 0.2 - 0.1| is reached by two more
    assert paired_test([0.0] * 3, [0.5, 0.2, -0.1]).p_value == 4 / 8


def test_many_documents_are_tested_as_scipy_does() -> None:
    chance = random.Random(1)
    one = [chance.random() for _ in range(200)]
    other = [value + chance.gauss(0.02, 0.2) for value in one]
    tested = paired_test(one, other)
    assert tested.test == "paired t"
    assert tested.p_value == pytest.approx(ttest_rel(one, other).pvalue, rel=1e-9)


def test_the_same_gap_everywhere_is_no_division_by_zero() -> None:
    assert paired_test([0.0] * 20, [0.5] * 20).p_value == pytest.approx(2.0**-19)


def test_other_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="the same documents are needed, got 2 and 1"):
        paired_test([1.0, 0.0], [1.0])


def by_document(prefix: str, *gaps: float) -> dict[str, list[float]]:
    return {f"{prefix}{i}": [gap] for i, gap in enumerate(gaps)}


def test_a_difference_of_means_over_benchmarks_is_as_sure_as_their_documents_make_it() -> None:
    """By hand: means 1/2 and 1/3, variances of the means (1/3) / 4 and (1/3) / 3, so that the difference of
    5/12 has the standard error sqrt(1/12 + 1/9) / 2 = sqrt(7) / 12."""
    tested = paired_means([by_document("a", 1, 0, 1, 0), by_document("b", 0, 0, 1)])
    assert tested is not None
    assert tested.p_value == pytest.approx(2 * t.sf(5 / 7**0.5, df=7 - 2))
    assert (tested.test, tested.documents, tested.differing) == ("paired t of means", 7, 3)


def test_documents_that_benchmarks_share_are_counted_once() -> None:
    gaps = (0.3, -0.1, 0.2, 0.4, 0.0)
    one = paired_means([by_document("a", *gaps)])
    twice = paired_means([by_document("a", *gaps), by_document("a", *gaps)])
    apart = paired_means([by_document("a", *gaps), by_document("b", *gaps)])
    assert one is not None
    assert twice is not None
    assert apart is not None
    assert one.p_value == pytest.approx(ttest_rel(gaps, [0.0] * 5).pvalue)
    assert apart.p_value < one.p_value < twice.p_value  # one degree of freedom is left out for the second
    assert (twice.documents, apart.documents) == (5, 10)


def test_means_of_equal_answers_are_noise_and_of_one_document_are_not_tested() -> None:
    equal = paired_means([by_document("a", 0, 0, 0), by_document("b", 0, 0)])
    assert equal is not None
    assert equal.p_value == 1.0
    same = paired_means([by_document("a", 0.5, 0.5), by_document("b", 0.5, 0.5)])
    assert same is not None
    assert same.p_value == 2.0**-3
    assert paired_means([by_document("a", 1, 0), by_document("b", 1)]) is None


def test_the_spread_of_one_has_no_deviation_and_of_none_is_none() -> None:
    assert Spread.of([0.5]) == Spread(1, 0.5, None, 0.5, 0.5)
    assert Spread.of([]) is None
    assert Spread.of([0.2, 0.4]) == Spread(2, pytest.approx(0.3), pytest.approx(0.1 * 2**0.5), 0.2, 0.4)


def test_the_front_has_what_nothing_dominates_and_equals_stay() -> None:
    assert front([(1.0, -2.0), (0.9, -2.0), (0.9, -1.0), (1.0, -2.0)]) == [True, False, True, True]
