"""What the pictures of a report show, as numbers. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sweepsvc.report_words import Row, SweepReport, said

MOST_ON_A_SIDE = 16
"""Of a map; a range that is searched evenly has as many values as there are trials."""


@dataclass(frozen=True)
class HeatCell:
    """The trials with one r and one alpha: `value` is None where none of them completed.

    `how` says what the value is of: one trial, the mean of repeats, or the best of trials that differ
    otherwise too.
    """

    keys: tuple[str, ...]
    value: float | None
    how: str


@dataclass(frozen=True)
class HeatMap:
    """`cells[r, alpha]`; alphas are as they were written (2*r) where any was a rule."""

    rs: tuple[int, ...]
    alphas: tuple[str, ...]
    cells: dict[tuple[int, str], HeatCell]
    low: float
    high: float

    def share(self, value: float) -> float:
        """Where the value stands between the lowest and the highest, 0 to 1."""
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 1.0


def heat_map(report: SweepReport) -> HeatMap | str:
    """The map of the headline score over r and alpha, or why there is none."""
    rows = [row for row in report.trials if row.r is not None and row.alpha is not None]
    alphas = _alphas(rows)
    cells: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        assert row.r is not None
        cells.setdefault((row.r, alphas[row.key]), []).append(row)
    if len(cells) < 2:
        return "r and alpha have one value each"
    rs, written = {r for r, _ in cells}, {alpha for _, alpha in cells}
    if max(len(rs), len(written)) > MOST_ON_A_SIDE:
        return (
            f"r has {len(rs)} values and alpha {len(written)}, of which a map has room for {MOST_ON_A_SIDE}"
        )
    made = {place: _heat_cell(group, report) for place, group in cells.items()}
    values = [cell.value for cell in made.values() if cell.value is not None]
    if not values:
        return f"no completed trial has {report.headline}"
    order = sorted({(row.alpha or 0.0, alphas[row.key]) for row in rows}, reverse=True)
    return HeatMap(
        rs=tuple(sorted(rs)),
        alphas=tuple(dict.fromkeys(alpha for _, alpha in order)),
        cells=made,
        low=min(values),
        high=max(values),
    )


def _alphas(rows: Sequence[Row]) -> dict[str, str]:
    """Each trial's alpha as the map names it."""
    has_rules = any(row.alpha_written != said(row.alpha) for row in rows)
    return {row.key: row.alpha_written if has_rules else said(row.alpha) for row in rows}


def _heat_cell(rows: Sequence[Row], report: SweepReport) -> HeatCell:
    done = [row for row in rows if row.headline is not None]
    keys = tuple(row.key for row in rows)
    if not done:
        return HeatCell(keys, None, ", ".join(dict.fromkeys(row.state for row in rows)))
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in done:
        assert row.headline is not None
        groups.setdefault(tuple(said(row.fields.get(path)) for path in report.paths), []).append(row.headline)
    means = [statistics.fmean(values) for values in groups.values()]
    if len(means) > 1:
        pick = max if headline_up(report) else min
        return HeatCell(keys, pick(means), f"best of {len(means)}")
    return HeatCell(keys, means[0], f"mean of {len(done)}" if len(done) > 1 else "")


def headline_up(report: SweepReport) -> bool:
    """Whether more of the headline number is better."""
    return report.maximize if report.headline == report.objective_metric else True


@dataclass(frozen=True)
class Curve:
    """One trial's losses by step; `held_out` is on rows that it did not train on."""

    key: str
    label: str
    completed: bool
    is_best: bool
    train: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]


def curves(report: SweepReport) -> list[Curve]:
    """Every trial of which a loss was heard, whatever became of it."""
    made = [_curve(row, report) for row in report.trials]
    return [curve for curve in made if curve.train or curve.held_out]


def _curve(row: Row, report: SweepReport) -> Curve:
    heard = [one.progress for one in report.evidence.reports.get(row.key, ())]

    def points(name: str) -> tuple[tuple[int, float], ...]:
        pairs = [(progress.step, getattr(progress, name)) for progress in heard]
        return tuple((step, value) for step, value in pairs if value is not None and math.isfinite(value))

    label = row.key if row.completed else f"{row.key} {row.state}"
    return Curve(row.key, label, row.completed, row.is_best, points("train_loss"), points("eval_loss"))
