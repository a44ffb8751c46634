"""Rows that mean nothing, in the form of the real ones, for where the real ones are not on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sweeps.prompts import RESPONSE, read_prompt
from sweeps.spec import DataSpec

_THINGS = ("river", "harbour", "bridge", "market", "tower", "garden", "mill", "forest")
_COUNT = len(_THINGS)


def alpaca_rows() -> list[dict[str, str]]:
    """Instructions in the Alpaca columns, every other one with an input."""
    return [
        {
            "instruction": f"Describe the {thing} in one sentence." if number % 2 else f"What is a {thing}?",
            "input": f"It lies north of the {other}, and is as old as the town." if number % 2 else "",
            "output": f"The {thing} is a place that people visit when they have been to the {other}.",
        }
        for number, (thing, other) in enumerate(_pairs() * 3)
    ]


def instruction_rows(data: DataSpec) -> list[dict[str, str]]:
    """The same under the columns that `data` names, with a text for each field of its prompt."""
    fields = (*read_prompt(data.prompt).fields, RESPONSE)
    return [
        {data.columns.get(name, name): row.get(name, f"the {name} of a town") for name in fields}
        for row in alpaca_rows()
    ]


def benchmark_rows(task: str) -> list[dict[str, Any]]:
    """Documents of one of the article's benchmarks, in the columns of the hub's dataset."""
    make = _MAKERS[task]
    return [make(number, thing, other) for number, (thing, other) in enumerate(_pairs())]


def _pairs() -> list[tuple[str, str]]:
    return list(zip(_THINGS, (*_THINGS[1:], _THINGS[0]), strict=True))


def _truthfulqa(number: int, thing: str, other: str) -> dict[str, Any]:
    choices = [f"A {thing} is no {other}.", f"A {thing} is a {other}.", f"Every {other} is a {thing}."]
    return {
        "question": f"Is a {thing} a {other}?",
        "mc1_targets": {"choices": choices, "labels": [1, 0, 0]},
        "mc2_targets": {"choices": [*choices, "They are not the same."], "labels": [1, 0, 0, 1]},
    }


def _subtraction(digits: int) -> Callable[[int, str, str], dict[str, Any]]:
    def row(number: int, thing: str, other: str) -> dict[str, Any]:
        high = 10**digits - 1 - number
        low = high // 3
        return {"context": f"\n\nQ: What is {high} minus {low}?\n\nA:", "completion": f" {high - low}"}

    return row


def _blimp(number: int, thing: str, other: str) -> dict[str, Any]:
    return {
        "sentence_good": f"The child breaks the {thing}.",
        "sentence_bad": f"The child appears the {thing}.",
        "field": "syntax",
        "linguistics_term": "argument_structure",
        "UID": "causative",
        "simple_LM_method": True,
        "one_prefix_method": False,
        "two_prefix_method": False,
        "lexically_identical": False,
        "pair_id": number,
    }


def _mmlu(number: int, thing: str, other: str) -> dict[str, Any]:
    return {
        "question": f"How many towns have a {thing} beside the {other}?",
        "subject": "global_facts",
        "choices": ["None", "One in ten", "Half of them", "All of them"],
        "answer": number % 4,
    }


_MAKERS: dict[str, Callable[[int, str, str], dict[str, Any]]] = {
    "truthfulqa_mc1": _truthfulqa,
    "truthfulqa_mc2": _truthfulqa,
    "arithmetic_2ds": _subtraction(2),
    "arithmetic_4ds": _subtraction(4),
    "blimp_causative": _blimp,
    "mmlu_global_facts": _mmlu,
}
