"""Rules: what they compute, which fields their names mean, and what they refuse."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from typing import Any

import pytest

from sweeps.errors import InvalidValue
from sweeps.rule import LONGEST_RULE, Rule, read_value


def computed(text: str, path: str = "lora.alpha", **values: Any) -> float:
    rule = Rule.parse(text, path)
    return rule.value({need: values[need.replace(".", "_")] for need in rule.needs})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2*r", 16),
        ("r/2", 4.0),
        ("lora.r ** 0.5", math.sqrt(8)),
        ("(r + 1) * 2 - 3", 15),
        ("r // 3", 2),
        ("r % 5", 3),
        ("-(-r)", 8),
        ("+r", 8),
        ("min(r, 4)", 4),
        ("max(r, 4, 11)", 11),
        ("round(r / 3)", 3),
        ("sqrt(2 * r)", 4.0),
        ("log2(r)", 3.0),
        ("2 ** 10", 1024),
        ("1_0 + 1.5e1", 25.0),
        (" 2 *  r ", 16),
    ],
)
def test_a_rule_computes_what_it_says(text: str, number: float) -> None:
    assert computed(text, lora_r=8) == pytest.approx(number)


def test_a_rule_agrees_with_python_on_every_pair_of_operators() -> None:
    for one, other in itertools.product(["+", "-", "*", "/", "//", "%", "**"], repeat=2):
        text = f"9 {one} r {other} 2"
        expected = eval(text, {"r": 3})  # the reference, on a text of ours
        if expected > 0:
            assert computed(text, lora_r=3) == expected, text


def test_a_bare_name_means_the_field_of_the_same_section_first() -> None:
    assert Rule.parse("2*r", "lora.alpha").needs == ("lora.r",)
    assert Rule.parse("batch_size", "train.log_every").needs == ("train.batch_size",)
    assert Rule.parse("batch_size", "evaluate.limit").needs == ("evaluate.batch_size",)


def test_a_bare_name_means_a_field_elsewhere_if_only_one_has_it() -> None:
    assert Rule.parse("samples / 1000", "schedule.warmup_steps").needs == ("train.samples",)


def test_a_bare_name_that_two_other_sections_have_is_refused_and_both_are_named() -> None:
    with pytest.raises(InvalidValue, match=r"train\.batch_size or evaluate\.batch_size.*in full"):
        Rule.parse("batch_size", "lora.alpha")


def test_needs_lists_each_field_once_in_the_order_of_the_text() -> None:
    assert Rule.parse("dropout + r * lora.r", "lora.alpha").needs == ("lora.dropout", "lora.r")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must not be empty"),
        ("2r", "write it like"),
        ("2*", "write it like"),
        ("r r", "write it like"),
        ("r^2", r"write \*\* for \^"),
        ("2*rang", "unknown name 'rang'.*such as lora.r"),
        ("2*rr", "unknown name 'rr'.*did you mean r"),
        ("2*lora.rr", "did you mean lora.r"),
        ("trial.lora.r", "did you mean lora.r"),
        ("model.id", "model.id holds text.*list the values"),
        ("model.trust_remote_code + 1", "holds bool"),
        ("__import__('os').system('true')", "a rule holds numbers"),
        ("__import__(r)", "unknown function '__import__'; there is min, max, round, sqrt, log2"),
        ("squrt(r)", "did you mean sqrt"),
        ("r.__class__", "unknown name 'r.__class__'"),
        ("(1).real", "a rule holds numbers"),
        ("min(r)", r"min\(\) takes two numbers or more, got 1"),
        ("round(r, 1)", r"round\(\) takes one number, got 2"),
        ("max(r, key=r)", "got 'max"),
        ("min(r, *r)", "a rule holds numbers"),
        ("[r][0]", "a rule holds numbers"),
        ("r if r else 2", "a rule holds numbers"),
        ("r > 2", "a rule holds numbers"),
        ("r or 2", "a rule holds numbers"),
        ("not r", "a rule holds numbers"),
        ("~r", "a rule holds numbers"),
        ("r << 9", "a rule holds numbers"),
        ("lambda: r", "a rule holds numbers"),
        ("(r := 3)", "a rule holds numbers"),
        ("'16'", "a rule holds numbers"),
        ("f'{r}'", "a rule holds numbers"),
        ("True", "a rule holds numbers"),
        ("1j", "a rule holds numbers"),
        ("None", "a rule holds numbers"),
        ("r\x00", "write it like"),
        ("1or r", "a rule holds numbers"),
    ],
)
def test_what_is_no_arithmetic_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidValue, match=reason):
        Rule.parse(text, "lora.alpha")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1/(r-8)", "'1/\\(r-8\\)' does not with lora.r=8: it divides by zero"),
        ("r // 0", "divides by zero"),
        ("r % 0", "divides by zero"),
        ("0 ** -r", "divides by zero"),
        ("(-r) ** 0.5", "not a real number"),
        ("sqrt(-r)", "not a real number"),
        ("log2(r - 8)", "not a real number"),
        ("9**9**9**9", "too large"),
        ("1e300 * 1e300", "it is inf"),
        ("1e400", "it is inf"),
        ("1e400 - 1e400", "it is nan"),
        ("round(1e400)", "too large"),
        ("2**1000 * 2**1000", "too large"),
        ("9.0 ** 999", "too large"),
        ("r - 8", "a number > 0 is needed, got 0 from 'r - 8' with lora.r=8"),
        ("-r", "a number > 0 is needed, got -8"),
    ],
)
def test_a_rule_without_a_number_that_the_field_takes_says_why(text: str, reason: str) -> None:
    with pytest.raises(InvalidValue, match=reason):
        computed(text, lora_r=8)


def test_a_rule_that_is_meant_to_keep_us_busy_is_refused_at_once() -> None:
    towers = ["9**9**9**9**9", "2**2**2**2**2**2**2", "(9**300)**(9**300)", "-" * 150 + "(9**9**9)"]
    texts = [*towers, "(" * 100 + "r" + ")" * 100, "+".join("r" * 100), "r" * 1_000_000, "9" * LONGEST_RULE]
    start = time.perf_counter()
    for text in texts:
        with pytest.raises(InvalidValue):
            computed(text, "train.samples", lora_r=0)
    assert time.perf_counter() - start < 1


def test_pythons_advice_about_its_syntax_is_not_passed_on() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for text in ("1or r", "1if r else 2", "'\\d'"):
            with pytest.raises(InvalidValue):
                Rule.parse(text, "lora.alpha")
    assert heard == []


def test_a_rule_has_a_longest_length() -> None:
    longest = "10" + "+r" * (LONGEST_RULE // 2 - 1)
    assert len(longest) == LONGEST_RULE
    assert computed(longest, lora_r=1) == 10 + LONGEST_RULE // 2 - 1
    with pytest.raises(InvalidValue, match=f"at most {LONGEST_RULE} characters, got {LONGEST_RULE + 1}"):
        Rule.parse("r" + "+0" * (LONGEST_RULE // 2), "lora.alpha")


def test_an_integer_field_takes_no_more_bits_than_a_database_holds() -> None:
    assert computed("2**62", "train.samples") == 2**62
    with pytest.raises(InvalidValue, match="at most 63 bits, '2\\*\\*63' gives"):
        computed("2**63", "train.samples")


def test_an_integer_field_takes_a_whole_result_only() -> None:
    assert computed("alpha/2", "lora.r", lora_alpha=16) == 8
    assert type(computed("alpha/2", "lora.r", lora_alpha=16)) is int
    with pytest.raises(InvalidValue, match=r"'alpha/2' gives 8\.5 with lora\.alpha=17; write round"):
        computed("alpha/2", "lora.r", lora_alpha=17)


def test_an_integer_field_forgives_the_rounding_of_floats() -> None:
    assert 0.1 * 3 * 10 != 3
    assert computed("dropout * 3 * 10", "lora.r", lora_dropout=0.1) == 3


def test_a_rule_over_a_value_that_is_no_number_says_so() -> None:
    with pytest.raises(InvalidValue, match=r"needs train\.token_budget, got 'auto'; write a number"):
        computed("token_budget", "train.samples", train_token_budget="auto")
    with pytest.raises(InvalidValue, match="got true"):
        computed("r", lora_r=True)


def test_rules_that_differ_in_spaces_only_are_the_same_when_compared() -> None:
    assert Rule.parse("2*r", "lora.alpha").canonical == Rule.parse(" (2 * r)", "lora.alpha").canonical
    assert Rule.parse("2*r", "lora.alpha").canonical != Rule.parse("r*2", "lora.alpha").canonical


def test_text_on_a_number_field_is_a_rule_unless_the_field_knows_the_word() -> None:
    assert read_value("train.token_budget", "auto") == "auto"
    assert read_value("train.token_budget", "2*batch_size").needs == ("train.batch_size",)
    assert read_value("model.quantization", "fp4") == "fp4"


def test_text_on_a_number_field_that_is_no_rule_names_both_possibilities() -> None:
    with pytest.raises(InvalidValue, match="an integer > 0 or a rule is needed: unknown name 'many'"):
        read_value("lora.r", "many")
