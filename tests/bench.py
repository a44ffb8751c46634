"""A few invented rows of each of the article's benchmarks, in the hub's columns; a model that records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

Row = dict[str, Any]


def _truthful(question: str, right: Sequence[str], wrong: Sequence[str]) -> Row:
    def targets(good: Sequence[str]) -> Row:
        return {"choices": [*good, *wrong], "labels": [1] * len(good) + [0] * len(wrong)}

    return {"question": question, "mc1_targets": targets(right[:1]), "mc2_targets": targets(right)}


_TRUTHFUL = [
    _truthful("Do fish sleep?", ["Yes.", "They rest."], ["No."]),
    _truthful("Is glass a liquid?", ["No."], ["Yes.", "At night."]),
]


def _arithmetic(left: int, right: int) -> Row:
    return {"context": f"\n\nQ: What is {left} minus {right}?\n\nA:", "completion": f" {left - right}"}


def _facts(question: str, answer: int) -> Row:
    return {
        "question": question,
        "subject": "s",
        "choices": ["one", "two", "three", "four"],
        "answer": answer,
    }


ROWS: Mapping[str, Sequence[Row]] = {
    "truthfulqa_mc1": _TRUTHFUL,
    "truthfulqa_mc2": _TRUTHFUL,
    "arithmetic_2ds": [_arithmetic(17, 14), _arithmetic(90, 3), _arithmetic(5, 61)],
    "arithmetic_4ds": [_arithmetic(1234, 99), _arithmetic(8, 7000), _arithmetic(4040, 4)],
    "blimp_causative": [
        {"sentence_good": "Ann broke the cup.", "sentence_bad": "Ann fell the cup."},
        {"sentence_good": "Bo opens a door.", "sentence_bad": "Bo arrives a door."},
        {"sentence_good": "Cy rolled it.", "sentence_bad": "Cy slept it."},
        {"sentence_good": "Di melts ice.", "sentence_bad": "Di exists ice."},
    ],
    "mmlu_global_facts": [_facts("How many moons?", 0), _facts("How many seas?", 2), _facts("How many?", 3)],
    "mmlu_global_facts_dev": [_facts("How many suns?", 0), _facts("How many wheels?", 3), _facts("Legs?", 1)],
}


def write_rows(folder: Path, *names: str) -> Path:
    """`<name>.jsonl` in `folder` for each name, or for all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ROWS:
        write_jsonl(folder / f"{name}.jsonl", ROWS[name])
    return folder


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class RecordingLM(LM):
    """Says `loglikelihood(context, continuation)` to every request, and keeps them all in `asked`."""

    device = None

    def __init__(
        self, loglikelihood: Callable[[str, str], float] = lambda _, answer: -float(len(answer))
    ) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []
        self._loglikelihood = loglikelihood

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(self._loglikelihood(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [self._loglikelihood("", request.args[0]) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return ["7" for _ in requests]
