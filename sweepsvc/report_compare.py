"""Sweeps side by side: the trials that have the same settings, and the settings that the sweeps differ in."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.sweep import MEAN_SCORE
from sweepsvc.report import against, of_a_baseline
from sweepsvc.report_documents import NO_FILE, Outcome, compare_means
from sweepsvc.report_stats import Paired
from sweepsvc.report_words import Cell, Row, SweepReport, mean_cell, said


@dataclass(frozen=True)
class Side:
    """One sweep's score at some settings: of one trial a cell, of several repeats their mean.

    A cell's difference, and the test of it, is to the first sweep's.
    """

    keys: tuple[str, ...]
    mean: float
    cell: Cell | None = None


@dataclass(frozen=True)
class Matched:
    """Settings with each sweep's side by benchmark, and by `score.mean` where all have the same several.

    A sweep without a completed trial there has none.
    """

    name: str
    settings: Mapping[str, str]
    sides: tuple[Mapping[str, Side], ...]


@dataclass(frozen=True)
class Comparison:
    """`differing` has each sweep's values of a field, `environment` of a fact, in the order of `reports`."""

    reports: tuple[SweepReport, ...]
    paths: tuple[str, ...]
    tasks: tuple[str, ...]
    matched: tuple[Matched, ...]
    differing: Mapping[str, tuple[str, ...]]
    environment: Mapping[str, tuple[str, ...]]

    @property
    def columns(self) -> tuple[str, ...]:
        """The benchmarks, and their mean where all sweeps have the same several."""
        return (*self.tasks, *([MEAN_SCORE] if _share_benchmarks(self.reports) else []))


def _share_benchmarks(reports: Sequence[SweepReport]) -> bool:
    tasks = {frozenset(report.tasks) for report in reports}
    return len(tasks) == 1 and len(next(iter(tasks))) > 1


def compared(reports: Sequence[SweepReport]) -> Comparison:
    """The sweeps side by side, in the order of `reports`."""
    paths = tuple(dict.fromkeys(path for report in reports for path in report.paths))
    keys = dict.fromkeys(_match(row, paths) for report in reports for row in report.rows)
    matched = [_matched(key, reports, paths) for key in keys]
    return Comparison(
        reports=tuple(reports),
        paths=paths,
        tasks=tuple(dict.fromkeys(task for report in reports for task in report.tasks)),
        matched=tuple(one for one in matched if any(one.sides)),
        differing=_differing(reports, paths),
        environment=_differing_environment(reports),
    )


_Match = tuple[bool, tuple[tuple[str, str], ...]]


def _match(row: Row, paths: Sequence[str]) -> _Match:
    """Equal for rows with the same values of `paths`; `r: 8` is the same in both, however it was written."""
    shown = [path for path in paths if not row.is_baseline or of_a_baseline(path)]
    return row.is_baseline, tuple((path, said(row.fields[path])) for path in shown if path in row.fields)


def _matched(key: _Match, reports: Sequence[SweepReport], paths: Sequence[str]) -> Matched:
    found = [[row for row in report.rows if _match(row, paths) == key] for report in reports]
    first = next((rows for rows in found if rows), [])
    done = [[row for row in rows if row.completed] for rows in found]
    sides = []
    for i, report in enumerate(reports):
        made = {task: _side(task, i, done, reports) for task in report.tasks}
        if _share_benchmarks(reports):
            made[MEAN_SCORE] = _mean_side(i, done, reports)
        sides.append({name: side for name, side in made.items() if side is not None})
    return Matched("baseline" if key[0] else "", first[0].settings, tuple(sides))


def _side(task: str, i: int, done: Sequence[Sequence[Row]], reports: Sequence[SweepReport]) -> Side | None:
    rows = [row for row in done[i] if task in row.cells]
    if not rows:
        return None
    keys = tuple(row.key for row in rows)
    mean = statistics.fmean(row.cells[task].value for row in rows)
    if len(rows) > 1:
        return Side(keys, mean)
    own = rows[0].cells[task]
    cell = Cell(own.value, own.stderr, own.metric, own.documents)
    first = [row for row in done[0] if task in row.cells]
    if i == 0 or len(first) != 1:
        return Side(keys, mean, cell)
    outcomes = _outcome(reports[0], first[0], task), _outcome(reports[i], rows[0], task)
    return Side(keys, mean, against(cell, first[0].cells[task], *outcomes))


def _outcome(report: SweepReport, row: Row, task: str) -> Outcome:
    return report.evidence.documents.get(row.key, {}).get(task, NO_FILE)


def _mean_side(i: int, done: Sequence[Sequence[Row]], reports: Sequence[SweepReport]) -> Side | None:
    """As `_side`, of the means over all benchmarks; of a trial that lacks one of them there is none."""
    tasks = reports[0].tasks
    whole = [[(row, row.mean) for row in rows if row.mean is not None] for rows in done]
    whole = [[(row, mean) for row, mean in rows if set(row.cells) == set(tasks)] for rows in whole]
    if not whole[i]:
        return None
    keys = tuple(row.key for row, _ in whole[i])
    mean = statistics.fmean(mean for _, mean in whole[i])
    if len(keys) > 1:
        return Side(keys, mean)
    if i == 0 or len(whole[0]) != 1:
        return Side(keys, mean, mean_cell(mean, None, None, ""))
    (first, first_mean), (row, _) = whole[0][0], whole[i][0]
    tested = compare_means([(_outcome(reports[0], first, t), _outcome(reports[i], row, t)) for t in tasks])
    paired, why = (tested, "") if isinstance(tested, Paired) else (None, tested)
    return Side(keys, mean, mean_cell(mean, mean - first_mean, paired, why))


def _differing(reports: Sequence[SweepReport], paths: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Fields that no sweep searched; the seeds of repeats are not what is meant."""
    names = dict.fromkeys(name for report in reports for row in report.trials for name in row.fields)
    found = {
        name: tuple(
            _values([row.fields.get(name) for row in report.trials if not row.repeat]) for report in reports
        )
        for name in names
        if name not in paths
    }
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _differing_environment(reports: Sequence[SweepReport]) -> dict[str, tuple[str, ...]]:
    names = dict.fromkeys(name for report in reports for name in report.environment)
    found = {
        name: tuple(_values(list(report.environment.get(name, ()))) for report in reports) for name in names
    }
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _values(values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(said(value) for value in values))
