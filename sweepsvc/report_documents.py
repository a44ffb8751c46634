"""Each document's score, from a trial's `evaluation.json`, and whether two trials may be compared by them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.result import Score
from sweepsvc.report_stats import Paired, paired_means, paired_test


@dataclass(frozen=True)
class Documents:
    """The documents of one benchmark by their hashes, and what a trial scored on each."""

    hashes: tuple[str, ...]
    scores: tuple[float, ...]


Outcome = Documents | str
"""Documents, or why there are none to compare by."""

NO_FILE = "there is no evaluation.json"


def read_documents(file: Path, scores: Mapping[str, Score]) -> Mapping[str, Outcome]:
    """What `file` says of each benchmark of `scores`, which are the study's."""
    try:
        evaluation = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return dict.fromkeys(scores, NO_FILE)
    except (OSError, ValueError):
        return dict.fromkeys(scores, "evaluation.json cannot be read")
    return {task: documents_of(evaluation, task, score) for task, score in scores.items()}


def documents_of(evaluation: Any, task: str, score: Score) -> Outcome:
    """The documents behind `score`; only where their mean is the score, else they are of something else."""
    try:
        parts = list(_members(evaluation, task))
        columns = [_column(evaluation["tasks"][part], score.metric) for part in parts]
        hashes = [
            f"{part}/{one}" for part in parts for one in evaluation["tasks"][part]["per_document"]["doc_hash"]
        ]
    except (KeyError, TypeError, AttributeError):
        return "evaluation.json has no scores by document"
    values = [value for column in columns for value in column]
    pairs = [(one, value) for one, value in zip(hashes, values, strict=False) if value is not None]
    numbers = [float(value) for _, value in pairs if isinstance(value, int | float) and math.isfinite(value)]
    if len(hashes) != len(values) or not numbers or len(numbers) != len(pairs):
        return "its score is not a mean over documents"
    if not math.isclose(math.fsum(numbers) / len(numbers), score.value, rel_tol=1e-6, abs_tol=1e-9):
        return "its score is not the mean of the scores in evaluation.json"
    return Documents(tuple(one for one, _ in pairs), tuple(numbers))


def _members(evaluation: Any, task: str) -> Iterator[str]:
    """The benchmarks in a group, those in its groups included; the benchmark itself if it is none."""
    if task in evaluation["tasks"]:
        yield task
        return
    for member in evaluation["groups"][task]["members"]:
        yield from _members(evaluation, member)


def _column(report: Any, metric: str) -> list[Any]:
    key = next((key for key in report["metrics"] if key.partition(",")[0] == metric), "")
    column: list[Any] = report["per_document"][key]
    return column


def compare(base: Outcome, trial: Outcome) -> Paired | str:
    """The paired test of a trial against what it is compared with, or why there is none."""
    if isinstance(base, str):
        return f"of what it is compared with: {base}"
    if isinstance(trial, str):
        return trial
    if base.hashes != trial.hashes:
        return "the documents are not the same"
    return paired_test(base.scores, trial.scores)


def compare_means(pairs: Sequence[tuple[Outcome, Outcome]]) -> Paired | str:
    """The paired test of a trial's mean score against what it is compared with, or why there is none.

    `pairs` has for each benchmark what it is compared with, and the trial.
    """
    gaps = []
    for base, trial in pairs:
        tested = compare(base, trial)
        if isinstance(tested, str):
            return tested
        assert isinstance(base, Documents)
        assert isinstance(trial, Documents)
        gaps.append(_gaps(base, trial))
    return paired_means(gaps) or "a benchmark has fewer than two documents"


def _gaps(base: Documents, trial: Documents) -> dict[str, list[float]]:
    """By the document's own hash, whichever benchmark asks about it."""
    found: dict[str, list[float]] = {}
    for name, before, after in zip(base.hashes, base.scores, trial.scores, strict=True):
        found.setdefault(name.rpartition("/")[2], []).append(after - before)
    return found
