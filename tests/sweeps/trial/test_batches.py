"""Micro-batches under a token budget, and the order of rows."""

import itertools
from array import array
from random import Random

import pytest
import torch

from sweeps.spec import DataSpec, TrainSpec
from sweeps.trial import batches
from sweeps.trial.data import TokenRow
from sweeps.trial.lengths import row_lengths


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


def work(groups: list[list[int]], lengths: list[int], call_tokens: int) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + call_tokens for group in groups)


@pytest.mark.parametrize("call_tokens", [0, 5, 40, 10_000])
def test_no_other_cut_of_the_sorted_rows_is_less_work(call_tokens: int) -> None:
    lengths = sorted((Random(5).randint(2, 40) for _ in range(10)), reverse=True)
    budget = 90
    cuts = (_cut(list(range(10)), where) for where in itertools.product([False, True], repeat=9))
    fits = (
        groups
        for groups in cuts
        if all(len(group) == 1 or len(group) * lengths[group[0]] <= budget for group in groups)
    )
    least = min(work(groups, lengths, call_tokens) for groups in fits)
    assert work(batches.rectangles(lengths, budget, call_tokens), lengths, call_tokens) == least


def _cut(rows: list[int], cuts: tuple[bool, ...]) -> list[list[int]]:
    groups = [[rows[0]]]
    for row, is_new in zip(rows[1:], cuts, strict=True):
        if is_new:
            groups.append([])
        groups[-1].append(row)
    return groups


@pytest.mark.parametrize(
    ("batch_size", "device", "most"), [(8, "cpu", 0.2), (128, "cpu", 0.08), (128, "cuda", 0.1)]
)
def test_little_of_a_step_on_alpaca_is_padding(batch_size: int, device: str, most: float) -> None:
    """Padded to the longest of its step, half of a batch of 8 would be."""
    lengths, draw = row_lengths(DataSpec()).tokens, Random(1)
    tokens = padded = whole = 0
    for _ in range(20):
        step = draw.choices(lengths, k=batch_size)
        tokens += sum(step)
        padded += work(batches.rectangles(step, 2048, batches.CALL_TOKENS[device]), step, 0)
        whole += batch_size * max(step)
    assert 1 - tokens / padded < most
    assert 1 - tokens / whole > 0.4


def test_padding_is_on_the_right_and_never_a_label() -> None:
    (batch,) = batches.micro_batches(rows(4, 2), budget=100)
    assert batch.ids.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0]]
    assert batch.places.tolist() == [0, 1, 2, 4]
    assert batch.targets.tolist() == [2, 3, 4, 2]


def test_given_tokens_are_never_labels() -> None:
    (batch,) = batches.micro_batches(rows(4, 3, given=3)[:1], budget=100)
    assert (batch.places.tolist(), batch.targets.tolist()) == ([2], [4])


@pytest.mark.parametrize("budget", [1, 12, 100])
def test_every_row_weighs_the_same_or_every_token_over_the_whole_step(budget: int) -> None:
    step = rows(9, 6, 3)
    by_row = torch.cat([batch.weights for batch in batches.micro_batches(step, budget)])
    by_token = torch.cat([batch.weights for batch in batches.micro_batches(step, budget, "token")])
    assert by_row.tolist() == pytest.approx([1 / 24] * 8 + [1 / 15] * 5 + [1 / 6] * 2)
    assert by_token.tolist() == pytest.approx([1 / 15] * 15)


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
