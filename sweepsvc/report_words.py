"""The words of a report: one structure, from which the page, the Markdown and the CSV take every number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sweeps.result import Failure
from sweepsvc.protocols import Importance, Report, TrialState
from sweepsvc.report_documents import Outcome
from sweepsvc.report_stats import Paired, Spread

LOWER_IS_BETTER = frozenset(
    ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter", "wer", "mse")
)
"""Metrics of lm-eval of which less is better, as its own tasks say."""


@dataclass(frozen=True)
class Evidence:
    """What lies beside the study: each trial's documents and reports by its key, and the rest as text."""

    documents: Mapping[str, Mapping[str, Outcome]] = field(default_factory=dict)
    reports: Mapping[str, Sequence[Report]] = field(default_factory=dict)
    importance: Importance = field(default_factory=lambda: Importance({}, why_not="it was not asked for"))
    made_at: str = ""
    command: str = ""


@dataclass(frozen=True)
class Cell:
    """One score; `difference` is to the trial's baseline, `untested` why that has no paired test."""

    value: float
    stderr: float | None
    metric: str
    documents: int
    difference: float | None = None
    paired: Paired | None = None
    untested: str = ""

    @property
    def within_noise(self) -> bool:
        return self.paired is not None and self.paired.within_noise

    @property
    def better(self) -> bool | None:
        """Whether the difference is to the good; None without one."""
        if not self.difference:
            return None
        return (self.difference > 0) != (self.metric in LOWER_IS_BETTER)


def mean_cell(
    value: float | None, difference: float | None, paired: Paired | None, untested: str
) -> Cell | None:
    """A mean over benchmarks; None of None."""
    if value is None:
        return None
    return Cell(value, None, "mean", 0, difference, paired, untested)


@dataclass(frozen=True)
class Row:
    """One trial or baseline. What a trial that has not completed did not come to is empty or None."""

    key: str
    state: TrialState
    is_baseline: bool
    repeat: int
    attempts: int
    setbacks: Sequence[str]
    settings: Mapping[str, str]
    fields: Mapping[str, Any]
    r: int | None
    alpha: float | None
    alpha_written: str
    trainable_params: int | None = None
    cells: Mapping[str, Cell] = field(default_factory=dict)
    mean: float | None = None
    mean_difference: float | None = None
    mean_paired: Paired | None = None
    mean_untested: str = ""
    headline: float | None = None
    headline_stderr: float | None = None
    objective: float | None = None
    peak_memory_gb: float | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    wall_seconds: float | None = None
    failure: Failure | None = None
    baseline: str | None = None
    is_best: bool = False
    on_front: bool = False

    @property
    def completed(self) -> bool:
        return self.state == "completed"

    @property
    def mean_cell(self) -> Cell | None:
        """The mean score as a cell, without a standard error: benchmarks may share documents."""
        return mean_cell(self.mean, self.mean_difference, self.mean_paired, self.mean_untested)

    @property
    def seconds(self) -> float | None:
        """What training took; of a trial that trains nothing, all of it."""
        return self.train_seconds or self.wall_seconds

    @property
    def alpha_over_r(self) -> float | None:
        return None if self.r is None or self.alpha is None else self.alpha / self.r


@dataclass(frozen=True)
class Repeats:
    """Trials that differ in their seed alone. Those that did not complete are in no spread."""

    settings: Mapping[str, str]
    keys: tuple[str, ...]
    left_out: tuple[str, ...]
    spreads: Mapping[str, Spread]


@dataclass(frozen=True)
class SweepReport:
    """Everything that is said of one sweep.

    `near_best` are the trials that a paired test cannot tell from the best one, where the objective is a
    score or the mean of them.
    """

    sweep_id: str
    name: str
    state: str
    sampler: str
    source: str
    text: str
    overrides: tuple[str, ...]
    file_digest: str
    objective_metric: str
    maximize: bool
    headline: str
    paths: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    near_best: tuple[str, ...]
    repeats: tuple[Repeats, ...]
    facts: Mapping[str, str]
    environment: Mapping[str, Mapping[str, tuple[str, ...]]]
    notes: Mapping[str, tuple[str, ...]]
    evidence: Evidence

    @cached_property
    def baselines(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.is_baseline)

    @cached_property
    def trials(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.is_baseline)

    @cached_property
    def completed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.trials if row.completed)

    @cached_property
    def best(self) -> Row | None:
        return next((row for row in self.trials if row.is_best), None)

    @cached_property
    def failed(self) -> Mapping[str, tuple[Row, ...]]:
        """Trials and baselines that failed, by class."""
        kinds = dict.fromkeys(row.failure.kind for row in self.rows if row.failure)
        return {
            kind: tuple(row for row in self.rows if row.failure and row.failure.kind == kind)
            for kind in kinds
        }

    @cached_property
    def untested(self) -> Mapping[str, tuple[str, ...]]:
        """Why differences have no paired test, with the cells that have none: `3 facts`.

        A mean is there only if its benchmarks are not, which have the same reason.
        """
        cells = [
            (cell.untested, f"{row.key} {task}")
            for row in self.rows
            for task, cell in row.cells.items()
            if cell.untested
        ]
        means = [
            (row.mean_untested, f"{row.key} mean")
            for row in self.rows
            if row.mean_untested and not any(cell.untested for cell in row.cells.values())
        ]
        return inverted([*cells, *means])

    @cached_property
    def tests(self) -> tuple[str, ...]:
        tested = [cell.paired for row in self.rows for cell in row.cells.values()]
        tested += [row.mean_paired for row in self.rows]
        return tuple(dict.fromkeys(paired.test for paired in tested if paired))


def inverted(pairs: Iterable[tuple[Any, str]]) -> dict[Any, tuple[str, ...]]:
    """The keys that go with each value."""
    found: dict[Any, list[str]] = {}
    for value, key in pairs:
        found.setdefault(value, []).append(key)
    return {value: tuple(keys) for value, keys in found.items()}


def said(value: Any) -> str:
    """A value of a field as one would write it in a sweep file, with every digit: 16, null, [a, b]."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(said, value))}]"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)
