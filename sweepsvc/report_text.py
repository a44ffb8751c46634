"""A report as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sweepsvc.report_compare import Comparison
from sweepsvc.report_stats import NOISE, Spread
from sweepsvc.report_words import Cell, Row, SweepReport, said

NOISE_MARK = "≈"
COSTS = ("trainable", "peak GB", "train s", "total s")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~#])")


# --- CSV --------------------------------------------------------------------------------------------


def as_csv(comparison: Comparison) -> str:
    """A line for each trial, baselines first, with every digit; what a trial has not is empty."""
    columns = _csv_columns(comparison)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for report in comparison.reports:
        for row in report.rows:
            writer.writerow({name: _csv_cell(value) for name, value in _csv_row(report, row).items()})
    return text.getvalue()


def _csv_columns(comparison: Comparison) -> list[str]:
    rows = [_csv_row(report, row) for report in comparison.reports for row in report.rows]
    names = dict.fromkeys(name for row in rows for name in row)
    last = ("failure", "message")
    return [*(name for name in names if name not in last), *last]


def _csv_row(report: SweepReport, row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {
        "sweep": report.sweep_id,
        "trial": row.key,
        "state": row.state,
        "best": row.is_best,
        "repeat": row.repeat,
        **{path: said(row.fields[path]) for path in report.paths if path in row.fields},
        "lora.alpha_over_r": row.alpha_over_r,
        "trainable_params": row.trainable_params,
        "objective": row.objective,
    }
    for task in report.tasks:
        cell = row.cells.get(task)
        values |= {
            f"score.{task}": cell and cell.value,
            f"score_stderr.{task}": cell and cell.stderr,
            f"difference.{task}": cell and cell.difference,
            f"p_value.{task}": cell and cell.paired and cell.paired.p_value,
        }
    values |= {
        "score.mean": row.mean,
        **(_mean_csv(row) if len(report.tasks) > 1 else {}),
        "peak_memory_gb": row.peak_memory_gb,
        "train_seconds": row.train_seconds,
        "eval_seconds": row.eval_seconds,
        "wall_seconds": row.wall_seconds,
        "attempts": row.attempts,
    }
    if row.failure:
        values |= {"failure": row.failure.kind, "message": row.failure.message}
    return values


def _mean_csv(row: Row) -> dict[str, Any]:
    return {
        "difference.mean": row.mean_difference,
        "p_value.mean": row.mean_paired and row.mean_paired.p_value,
    }


def _csv_cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is made a text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return "" if value is None else value


# --- Markdown ---------------------------------------------------------------------------------------


def as_markdown(comparison: Comparison) -> str:
    """The tables of the page, for a merge request or a wiki."""
    lines: list[str] = []
    for report in comparison.reports:
        lines += _sweep_lines(report)
    if len(comparison.reports) > 1:
        lines += _comparison_lines(comparison)
    return "\n".join(lines).rstrip() + "\n"


def _sweep_lines(report: SweepReport) -> list[str]:
    lines = [
        f"# {_md(report.name)}",
        "",
        f"{_md(report.sweep_id)}: {report.state}. {_md(summary(report))}",
        "",
    ]
    lines += [*_table(*result_table(report)), "", *(f"- {_md(line)}" for line in legend(report)), ""]
    if report.repeats:
        lines += ["## Repeats", "", *_table(*repeats_table(report)), ""]
    if report.failed:
        lines += ["## Failures", "", *_table(*failures_table(report)), ""]
    lines += ["## Importance", ""]
    importance = report.evidence.importance
    shares = [[path, f"{share:.2f}"] for path, share in importance.shares.items()]
    lines += [*(_table(["field", "share"], shares) if shares else [f"Not shown: {importance.why_not}."]), ""]
    command = report.evidence.command.replace("\n", "\n    ")  # all of it stays in the block of code
    lines += ["## To repeat it", "", f"    {command}", ""]
    facts = [[name, fact] for name, fact in report.facts.items()]
    facts += [[name, _with_keys(values)] for name, values in report.environment.items()]
    return [*lines, *_table(["environment", ""], facts), ""]


def _comparison_lines(comparison: Comparison) -> list[str]:
    lines = ["# Side by side", "", *_table(*side_table(comparison)), ""]
    names = [report.sweep_id for report in comparison.reports]
    differing = {**comparison.differing, **comparison.environment}
    if differing:
        rows = [[name, *values] for name, values in differing.items()]
        lines += ["## What differs", "", *_table(["", *names], rows), ""]
    return lines


Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def result_table(report: SweepReport) -> Table:
    """Head and rows; a score is `0.278 ± 0.076 (+0.111 ≈)`."""
    several = len(report.tasks) > 1
    head = ["trial", *report.paths, *report.tasks, *(["mean"] if several else []), *COSTS]
    rows = [
        [
            trial_name(row),
            *(row.settings.get(path, "") for path in report.paths),
            *(score_text(row.cells.get(task)) for task in report.tasks),
            *([score_text(row.mean_cell)] if several else []),
            *(number(value, digits) for value, digits in costs(row)),
        ]
        for row in report.rows
    ]
    return head, rows


def costs(row: Row) -> list[tuple[float | None, int]]:
    """The numbers under `COSTS`, each with its digits behind the point."""
    return [
        (row.trainable_params, 0),
        (row.peak_memory_gb, 2),
        (row.train_seconds, 1),
        (row.wall_seconds, 1),
    ]


def trial_name(row: Row) -> str:
    """`3 best`, `4 failed: diverged`."""
    repeat = f" repeat {row.repeat}" if row.repeat else ""
    state = "" if row.completed else f" {row.state}"
    return f"{row.key}{repeat}{' best' if row.is_best else ''}{state}" + (
        f": {row.failure.kind}" if row.failure else ""
    )


def score_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    stderr = f" ± {cell.stderr:.3f}" if cell.stderr is not None else ""
    if cell.difference is None:
        return f"{cell.value:.3f}{stderr}"
    return f"{cell.value:.3f}{stderr} ({cell.difference:+.3f}{' ' + NOISE_MARK if cell.within_noise else ''})"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def repeats_table(report: SweepReport) -> Table:
    columns = list(dict.fromkeys(name for group in report.repeats for name in group.spreads))
    rows = [
        [
            ", ".join(f"{path}={value}" for path, value in group.settings.items()),
            ", ".join(group.keys),
            ", ".join(group.left_out),
            *(_spread_text(group.spreads.get(name)) for name in columns),
        ]
        for group in report.repeats
    ]
    return ["settings", "trials", "left out", *columns], rows


def _spread_text(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if spread.deviation is None:
        return f"{spread.mean:.3f} (one)"
    return f"{spread.mean:.3f} ± {spread.deviation:.3f} ({spread.lowest:.3f} to {spread.highest:.3f})"


def failures_table(report: SweepReport) -> Table:
    rows = [
        [kind, str(len(failed)), ", ".join(row.key for row in failed), failed[0].failure.message]
        for kind, failed in report.failed.items()
        if failed[0].failure
    ]
    return ["class", "trials", "which", "what the first said"], rows


def side_table(comparison: Comparison) -> Table:
    columns = [(i, column) for column in comparison.columns for i in range(len(comparison.reports))]
    head = [f"{task} {comparison.reports[i].sweep_id}" for i, task in columns]
    rows = []
    for one in comparison.matched:
        settings = [one.settings.get(path, "") for path in comparison.paths]
        sides = [one.sides[i].get(task) for i, task in columns]
        texts = [
            ""
            if side is None
            else score_text(side.cell)
            if side.cell
            else f"{side.mean:.3f} (mean of {len(side.keys)})"
            for side in sides
        ]
        rows.append([one.name, *settings, *texts])
    return ["", *comparison.paths, *head], rows


def summary(report: SweepReport) -> str:
    """One sentence: how many trials completed, and which was best."""
    total, done = len(report.trials), len(report.completed)
    if not done:
        return f"No trial of {total} completed: there is nothing to compare."
    best = report.best
    if best is None or best.objective is None:
        return (
            f"{done} of {total} trials completed; none has a finite {report.objective_metric} to rank it by."
        )
    picks = ", ".join(f"{path} {value}" for path, value in best.settings.items())
    aim = "highest" if report.maximize else "lowest"
    value = f"{report.objective_metric}: {best.objective:.4g}"
    near = f" Within noise of it, trials {shortened(report.near_best)}." if report.near_best else ""
    return f"{done} of {total} trials completed; {aim} {value}, trial {best.key} ({picks}).{near}"


def legend(report: SweepReport) -> list[str]:
    """How the table is to be read, as far as it says it."""
    lines = []
    if any(cell.stderr is not None for row in report.rows for cell in row.cells.values()):
        lines.append("± is the standard error over a benchmark's documents.")
    if any(row.baseline for row in report.trials):
        lines.append("With a sign: the difference to the baseline, the untouched base model.")
    if report.tests:
        lines.append(
            f"{NOISE_MARK}: within noise, p >= {NOISE} by a paired test over the same documents "
            f"({'; '.join(report.tests)}). Each pair is tested alone: of twenty differences that are noise, "
            "one is unmarked by chance, and the best of many trials looks better than it is."
        )
    for why, cells in report.untested.items():
        lines.append(f"Not tested, so without a mark: {shortened(cells)}: {why}.")
    if len(report.tasks) > 1:
        lines.append(
            "A mean over benchmarks has no standard error: they may share documents. The test of its "
            "difference counts a document that they share once."
        )
    if any(not row.completed for row in report.rows):
        lines.append("A trial that has not completed has no scores, and is in no mean and no ranking.")
    return lines


def shortened(names: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _with_keys(values: Mapping[str, tuple[str, ...]]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} (trials {shortened(keys)})" for value, keys in values.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [[_md(text) for text in row] for row in (head, *rows)]
    ruled = [lines[0], ["---"] * len(head), *lines[1:]]
    return [f"| {' | '.join(line)} |" for line in ruled]


def _md(text: str) -> str:
    """Text that Markdown leaves as it is: no markup, no HTML, no second line."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", plain)
