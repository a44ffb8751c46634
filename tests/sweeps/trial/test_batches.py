"""Micro-batches under a token budget, and the order of rows."""

from array import array
from random import Random

import pytest

from sweeps.spec import TrainSpec
from sweeps.trial import batches
from sweeps.trial.data import TokenRow


def rows(*lengths: int, given: int = 1) -> list[TokenRow]:
    return [TokenRow(array("i", range(1, length + 1)), given) for length in lengths]


@pytest.mark.parametrize("budget", [1, 7, 64, 200, 10_000])
def test_every_row_is_in_exactly_one_group(budget: int) -> None:
    lengths = [Random(3).randint(2, 90) for _ in range(50)]
    groups = batches.rectangles(lengths, budget)
    assert sorted(position for group in groups for position in group) == list(range(50))


@pytest.mark.parametrize("budget", [90, 128, 1000])
def test_a_group_with_its_padding_stays_within_the_budget(budget: int) -> None:
    lengths = [Random(3).randint(2, 90) for _ in range(50)]
    for group in batches.rectangles(lengths, budget):
        assert len(group) * max(lengths[position] for position in group) <= budget


def test_a_longer_row_never_shares_a_budget_it_breaks() -> None:
    assert batches.rectangles([100, 3, 3], budget=50) == [[0], [1, 2]]


def test_rows_of_like_length_share_a_group() -> None:
    assert batches.rectangles([2, 9, 2, 9], budget=18) == [[1, 3], [0, 2]]


def test_padding_is_on_the_right_and_never_a_label() -> None:
    (batch,) = batches.micro_batches(rows(4, 2), budget=100)
    assert batch.ids.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0]]
    assert batch.labels.tolist() == [[2, 3, 4], [2, batches.IGNORED, batches.IGNORED]]
    assert batch.tokens == 6


def test_given_tokens_are_never_labels() -> None:
    (batch,) = batches.micro_batches(rows(4, given=3), budget=100)
    assert batch.labels.tolist() == [[batches.IGNORED, batches.IGNORED, 4]]


def test_the_order_of_rows_comes_from_the_seed_alone() -> None:
    train = TrainSpec(batch_size=4, samples=40, seed=7)
    assert batches.row_order(20, train, 10) == batches.row_order(20, train, 10)
    other = train.model_copy(update={"seed": 8})
    assert batches.row_order(20, train, 10) != batches.row_order(20, other, 10)


def test_a_longer_trial_begins_with_the_same_steps() -> None:
    for sampling in ("replacement", "epochs"):
        train = TrainSpec(batch_size=4, samples=40, sampling=sampling)
        assert batches.row_order(20, train, 10)[:3] == batches.row_order(20, train, 3)


def test_epochs_show_every_row_once_a_pass() -> None:
    train = TrainSpec(batch_size=5, samples=40, sampling="epochs")
    picks = [pick for step in batches.row_order(20, train, 8) for pick in step]
    assert sorted(picks[:20]) == sorted(picks[20:]) == list(range(20))
    assert picks[:20] != picks[20:]


def test_replacement_repeats_rows_within_a_pass() -> None:
    train = TrainSpec(batch_size=100, samples=100)
    (picks,) = batches.row_order(100, train, 1)
    assert len(set(picks)) < 100
