"""Domains and spaces: labels, sizes, combinations, and the trials that picks resolve to."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from sweeps.errors import InvalidTrial, InvalidValue
from sweeps.rule import read_value
from sweeps.space import Choices, Option, Range, Space, field_value, settled
from sweeps.spec import FIELDS, TrialSpec


def choices(path: str, *raw: Any) -> Choices:
    return Choices(tuple(Option.of(read_value(path, value)) for value in raw))


def rank_alpha() -> Space:
    return Space(
        {
            "lora.r": choices("lora.r", 8, 16, 256),
            "lora.alpha": choices("lora.alpha", "2*r", "r", "r/2", 1),
        }
    )


# --- options and choices


def test_a_label_is_something_that_a_sampler_can_hold() -> None:
    raw = {
        "lora.alpha": ("2*r", 16, 0.5),
        "lora.targets": ("all", ["q_proj", "v_proj"]),
        "model.trust_remote_code": (True, False),
        "data.max_length": (None, 512),
    }
    for path, values in raw.items():
        for label in choices(path, *values).labels():
            assert label is None or isinstance(label, str | int | float | bool)


def test_a_rule_is_labelled_by_its_text_a_list_by_its_json_and_a_constant_by_itself() -> None:
    assert list(choices("lora.alpha", " 2*r", 1).labels()) == ["2*r", 1]
    assert list(choices("lora.targets", "all", ["q_proj"]).labels()) == ["all", '["q_proj"]']


def test_labels_survive_json() -> None:
    for path, values in {"lora.alpha": ("2*r", 1, 0.1), "data.max_length": (None, 9)}.items():
        labels = list(choices(path, *values).labels())
        assert json.loads(json.dumps(labels)) == labels


def test_a_label_finds_its_option_and_true_is_not_one() -> None:
    domain = choices("lora.alpha", "2*r", 1)
    assert domain.value(1) == 1
    assert domain.value("2*r").text == "2*r"
    with pytest.raises(InvalidValue, match=r"one of 2\*r, 1 is needed, got true"):
        domain.value(True)
    with pytest.raises(InvalidValue, match="got '1'"):
        domain.value("1")


@pytest.mark.parametrize("raw", [(8, 8), (8, 8.0), ("2*r", "2 * r"), (1, 2, 1)])
def test_choices_that_say_the_same_are_refused(raw: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidValue, match="choices must differ"):
        choices("lora.alpha", *raw)


def test_no_choice_at_all_is_refused() -> None:
    with pytest.raises(InvalidValue, match="at least one choice is needed, got none"):
        Choices(())


# --- ranges


def test_a_stepped_range_lists_its_grid_in_exact_decimals() -> None:
    assert list(Range(0.0, 0.3, step=0.1).labels()) == [0.0, 0.1, 0.2, 0.3]
    assert list(Range(1e-5, 5e-5, step=1e-5).labels()) == [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]


def test_the_high_end_is_lowered_to_what_the_step_reaches() -> None:
    assert Range(1, 10, step=2, integer=True).high == 9
    assert Range(0.0, 0.35, step=0.1).high == 0.3


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_an_integer_range_is_pythons_range(step: int) -> None:
    for low, high in itertools.combinations(range(-4, 12, 3), 2):
        if high - low >= step:
            domain = Range(low, high, step=step, integer=True)
            assert list(domain.labels()) == list(range(low, high + 1, step))
            assert domain.size == len(range(low, high + 1, step))


def test_an_integer_range_without_a_step_is_countable_and_a_continuous_one_is_not() -> None:
    assert Range(1, 4, integer=True).size == 4
    assert Range(1.0, 4.0).size is None
    assert Range(1e-5, 1e-3, log=True).size is None


def test_a_large_integer_stays_the_very_same_number() -> None:
    domain = Range(0, 2**62, integer=True)
    assert domain.value(2**62 - 1) == 2**62 - 1
    assert domain.value(2**53 + 1) == 2**53 + 1


def test_a_range_of_a_billion_numbers_costs_nothing_until_it_is_listed() -> None:
    assert Range(1, 10**9, integer=True).size == 10**9
    assert list(itertools.islice(Range(1, 10**9, integer=True).labels(), 2)) == [1, 2]


def test_a_number_beside_the_grid_by_a_rounding_error_lies_on_it() -> None:
    drifted = 0.1 + 0.1 + 0.1
    assert drifted != 0.3
    assert Range(0.0, 0.3, step=0.1).value(drifted) == 0.3


@pytest.mark.parametrize("label", [0.05, 0.4, -0.1, "0.1", None, True, float("nan"), float("inf")])
def test_a_label_outside_the_range_is_refused(label: Any) -> None:
    with pytest.raises(InvalidValue, match=r"a number from 0\.0 to 0\.3 by 0\.1 is needed"):
        Range(0.0, 0.3, step=0.1).value(label)


def test_an_integer_range_gives_integers_even_for_a_float_label() -> None:
    value = Range(1, 9, integer=True).value(4.0)
    assert value == 4
    assert type(value) is int


@pytest.mark.parametrize(
    ("arguments", "law"),
    [
        ({"low": 2, "high": 1}, "low < high must hold, got low=2, high=1"),
        ({"low": 1, "high": 1}, "low < high"),
        ({"low": 0.0, "high": 1.0, "log": True}, "low > 0 must hold for a log range, got low=0.0"),
        ({"low": -1.0, "high": 1.0, "log": True}, "low > 0"),
        ({"low": 0, "high": 1, "step": 0}, "step > 0 must hold, got step=0"),
        ({"low": 0, "high": 1, "step": -0.1}, "step > 0"),
        ({"low": 1, "high": 2, "step": 0.1, "log": True}, "step and log exclude each other"),
        ({"low": 0.0, "high": 0.1, "step": 0.5}, "step <= high - low must hold"),
        ({"low": 0.5, "high": 4, "integer": True}, "whole ends and steps, got low=0.5"),
    ],
)
def test_a_range_that_breaks_a_law_cannot_be_made(arguments: dict[str, Any], law: str) -> None:
    with pytest.raises(InvalidValue, match=law):
        Range(**arguments)


# --- spaces


def test_combinations_hold_every_combination_exactly_once_in_the_same_order() -> None:
    space = Space(
        {
            "lora.r": choices("lora.r", 8, 16),
            "lora.alpha": choices("lora.alpha", "2*r", 1),
            "lora.dropout": Range(0.0, 0.2, step=0.1),
        }
    )
    expected = [
        {"lora.r": r, "lora.alpha": alpha, "lora.dropout": dropout}
        for r, alpha, dropout in itertools.product([8, 16], ["2*r", 1], [0.0, 0.1, 0.2])
    ]
    assert list(space.combinations()) == expected
    assert list(space.combinations()) == expected
    assert all(list(picks) == list(space) for picks in space.combinations())
    assert space.size == len(expected) == 12


def test_an_empty_space_holds_exactly_one_trial() -> None:
    assert Space().size == 1
    assert list(Space().combinations()) == [{}]
    assert Space().resolve({}, {}).spec == TrialSpec()


def test_a_continuous_space_has_no_size_and_cannot_be_listed() -> None:
    space = Space({"lora.dropout": Range(0.0, 0.5), "lora.r": choices("lora.r", 8)})
    assert space.size is None
    with pytest.raises(InvalidValue, match=r"lora\.dropout is continuous; add a step"):
        next(space.combinations())


def test_a_huge_space_is_listed_lazily() -> None:
    space = Space({"train.seed": Range(0, 10**12, integer=True), "lora.r": choices("lora.r", 8, 16)})
    assert space.size == 2 * (10**12 + 1)
    assert next(space.combinations()) == {"train.seed": 0, "lora.r": 8}


# --- resolving


def test_picks_resolve_to_the_trial_its_values_and_how_they_were_written() -> None:
    resolved = rank_alpha().resolve({"lora.dropout": 0.1}, {"lora.r": 256, "lora.alpha": "2*r"})
    assert (resolved.spec.lora.r, resolved.spec.lora.alpha, resolved.spec.lora.dropout) == (256, 512.0, 0.1)
    assert resolved.params == {"lora.r": 256, "lora.alpha": 512.0}
    assert resolved.rules == {"lora.alpha": "2*r"}


def test_a_constant_beside_rules_is_listed_as_a_rule_by_its_own_text() -> None:
    assert rank_alpha().resolve({}, {"lora.r": 8, "lora.alpha": 1}).rules == {"lora.alpha": "1"}


def test_a_field_without_rules_is_not_listed_among_them() -> None:
    space = Space({"lora.alpha": choices("lora.alpha", 1, 2)})
    assert space.resolve({}, {"lora.alpha": 1}).rules == {}


def test_every_combination_of_rank_and_alpha_resolves_to_its_arithmetic() -> None:
    expected = {"2*r": lambda r: 2 * r, "r": lambda r: r, "r/2": lambda r: r / 2, 1: lambda r: 1}
    for picks in rank_alpha().combinations():
        spec = rank_alpha().resolve({}, picks).spec
        assert spec.lora.r == picks["lora.r"]
        assert spec.lora.alpha == expected[picks["lora.alpha"]](spec.lora.r)  # type: ignore[index]


def test_a_rule_of_the_template_is_resolved_and_listed_too() -> None:
    template = {"lora.r": 8, "lora.alpha": read_value("lora.alpha", "2*r")}
    resolved = Space().resolve(template, {})
    assert resolved.spec.lora.alpha == 16
    assert resolved.rules == {"lora.alpha": "2*r"}
    assert resolved.params == {}


def test_the_space_takes_the_place_of_the_template() -> None:
    template = {"lora.r": 4, "lora.alpha": read_value("lora.alpha", "2*r")}
    space = Space({"lora.r": choices("lora.r", 64), "lora.alpha": choices("lora.alpha", 3)})
    resolved = space.resolve(template, {"lora.r": 64, "lora.alpha": 3})
    assert (resolved.spec.lora.r, resolved.spec.lora.alpha) == (64, 3)
    assert resolved.rules == {}


def test_rules_are_computed_through_rules_whatever_their_order() -> None:
    template = {
        "train.samples": read_value("train.samples", "batch_size * 200"),
        "train.batch_size": read_value("train.batch_size", "2 * lora.r"),
        "lora.r": read_value("lora.r", "alpha / 2"),
        "lora.alpha": 32,
    }
    assert settled(template) == {
        "train.samples": 6400,
        "train.batch_size": 32,
        "lora.r": 16,
        "lora.alpha": 32,
    }


def test_a_rule_over_a_field_that_nobody_set_takes_its_default() -> None:
    resolved = Space().resolve({"lora.alpha": read_value("lora.alpha", "2*r")}, {})
    assert resolved.spec.lora.alpha == 2 * FIELDS["lora.r"].default


def test_a_circle_of_rules_is_named_once_from_whichever_field_it_is_entered() -> None:
    template = {
        "lora.r": read_value("lora.r", "alpha"),
        "lora.alpha": read_value("lora.alpha", "2*r"),
        "lora.dropout": read_value("lora.dropout", "1/r"),
    }
    with pytest.raises(InvalidTrial) as caught:
        Space().resolve(template, {})
    [fault] = caught.value.faults
    assert "lora.alpha -> lora.r -> lora.alpha; write a number for one" in fault.message


def test_every_rule_that_fails_is_reported_not_only_the_first() -> None:
    template = {
        "lora.alpha": read_value("lora.alpha", "1/(r-8)"),
        "schedule.warmup_steps": read_value("schedule.warmup_steps", "lora.r/3"),
    }
    with pytest.raises(InvalidTrial) as caught:
        Space().resolve(template, {})
    assert [fault.path for fault in caught.value.faults] == ["lora.alpha", "schedule.warmup_steps"]


def test_a_law_between_fields_is_told_in_our_words() -> None:
    with pytest.raises(InvalidTrial, match=r"schedule\.warmup_steps < steps must hold, got warmup_steps=100"):
        Space().resolve({"train.samples": 1280}, {})
    with pytest.raises(InvalidTrial, match=r"^data: exactly one of id and path must be set"):
        Space().resolve({"data.id": "x", "data.path": "/x"}, {})


def test_a_value_that_the_field_does_not_take_is_told_in_our_words() -> None:
    with pytest.raises(InvalidTrial, match=r"^lora\.r: an integer > 0 is needed, got -8$"):
        Space().resolve({"lora.r": -8}, {})


@pytest.mark.parametrize("picks", [{}, {"lora.r": 8}, {"lora.r": 8, "lora.alpha": 1, "lora.dropout": 0.1}])
def test_picks_must_cover_the_space_exactly(picks: dict[str, Any]) -> None:
    with pytest.raises(InvalidTrial, match=r"a pick is needed for each of lora\.r, lora\.alpha"):
        rank_alpha().resolve({}, picks)


def test_a_pick_that_is_not_of_the_space_is_refused_with_what_there_is() -> None:
    with pytest.raises(InvalidTrial, match=r"lora\.r: one of 8, 16, 256 is needed, got 9"):
        rank_alpha().resolve({}, {"lora.r": 9, "lora.alpha": 1})


def test_a_list_is_resolved_from_its_label() -> None:
    space = Space({"lora.targets": choices("lora.targets", "all", ["q_proj", "v_proj"])})
    resolved = space.resolve({}, {"lora.targets": '["q_proj", "v_proj"]'})
    assert resolved.spec.lora.targets == ("q_proj", "v_proj")
    assert resolved.params == {"lora.targets": ("q_proj", "v_proj")}


def test_different_picks_may_resolve_to_the_same_trial() -> None:
    space = Space({"lora.r": choices("lora.r", 8, 16), "lora.alpha": choices("lora.alpha", "2*r", 16)})
    by_rule = space.resolve({}, {"lora.r": 8, "lora.alpha": "2*r"})
    by_constant = space.resolve({}, {"lora.r": 8, "lora.alpha": 16})
    assert by_rule.spec.digest == by_constant.spec.digest
    assert by_rule.rules != by_constant.rules


def test_a_trial_without_training_has_no_rules_over_training() -> None:
    template = {"train": None, "lora.r": read_value("lora.r", "samples/1000")}
    with pytest.raises(InvalidTrial, match=r"needs train\.samples, which a trial without training lacks"):
        Space().resolve(template, {})
    assert Space().resolve({"train": None}, {}).spec.train is None


def test_a_field_value_is_found_by_its_path() -> None:
    assert field_value(TrialSpec(), "lora.r") == 8
    assert field_value(TrialSpec().untrained(), "train.samples") is None
