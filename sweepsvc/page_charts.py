"""The pictures of a report as SVG: the one file that imports matplotlib.

They are drawn in stand-in colours, which become the page's own (`var(--ink)`), so that one picture is right
on a light page, on a dark one and in print.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sweeps.sweep import MEAN_SCORE
from sweepsvc.report_compare import Comparison
from sweepsvc.report_views import Curve, curves
from sweepsvc.report_words import Row, SweepReport

INK, MUTED, SURFACE = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0405{number:02x}" for number in range(1, 9))
_VARIABLES = {INK: "--ink", MUTED: "--muted", SURFACE: "--surface"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: to be searched, copied and read aloud
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
}
_SIZE = 4.6, 3.1
MARKERS = "osD^v<>p"
_DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_LONGEST_NAME = 44  # of a sweep, in a legend
DRAWN = 100
"""Most curves in one picture, the best one aside."""

NAMED = 40
"""Most points that have their trial beside them."""

LABELLED = 8
"""Most curves that are told apart by colour and name; of more, the best is shown before the others."""


@dataclass(frozen=True)
class Chart:
    """One picture, or why there is none. `alt` says in words what it shows."""

    title: str
    svg: str = ""
    alt: str = ""
    caption: str = ""
    why_not: str = ""


def charts(report: SweepReport) -> list[Chart]:
    """Every picture of one sweep."""
    drawn = [_alpha_chart, _cost_chart("memory"), _cost_chart("time"), _loss_chart, _importance_chart]
    return [draw(report, number) for number, draw in enumerate(drawn)]


def joint_charts(comparison: Comparison) -> list[Chart]:
    """The pictures of several sweeps together, each sweep with a colour, a shape and a kind of line."""
    memory = _Axis("peak memory, GB", lambda row: row.peak_memory_gb)
    ratio = _Axis("alpha / r", lambda row: row.alpha_over_r, joins=True)
    return [
        _joint_scores("Score against peak memory", comparison, memory, 0),
        _joint_scores("Score against alpha / r", comparison, ratio, 1),
        _joint_losses(comparison, 2),
    ]


# --- one picture ------------------------------------------------------------------------------------


def _draw(number: int, plot: Callable[[Any], None], height: float = _SIZE[1]) -> str:
    """An SVG element, `height` in inches; `number` keeps its ids apart from those of other pictures."""
    # Ids from a salt and no metadata: else random numbers and a date part two reports of the same sweep.
    # From the defaults: else a person's matplotlibrc has its say.
    style = _STYLE | {"svg.hashsalt": "sweepsvc"}
    with matplotlib.style.context(["default", style]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that its own font has not: the browser's has
        figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
        plot(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_the_page(text.getvalue(), f"c{number}-")


def _for_the_page(svg: str, prefix: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<= id=")(?=[^"]*")|(?<=href="#)|(?<=url\(#)', prefix, svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def _log2_axis(axes: Any, values: Sequence[float]) -> None:
    """Ticks at the powers of two between the values, written as 1/4, 2."""
    axes.set_xscale("log", base=2)
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    step = max(1, (high - low) // 6)
    axes.set_xticks([2.0**power for power in range(low, high + 1, step)])
    axes.set_xlim(2.0 ** (low - 0.4), 2.0 ** (high + 0.4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_two(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def power_of_two(value: float) -> str:
    """`1/32`, `2`."""
    return f"{value:g}" if value >= 1 else f"1/{round(1 / value)}"


def _baseline(axes: Any, report: SweepReport) -> None:
    for row in report.baselines:
        if row.headline is not None:
            axes.axhline(row.headline, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                row.key,
                (1, row.headline),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color=MUTED,
                fontsize=8,
            )


def _name(axes: Any, rows: Sequence[Row], x: Callable[[Row], float]) -> None:
    """Each point's trial beside it; of many trials, that of the front's."""
    for row in rows:
        if len(rows) <= NAMED or row.on_front:
            point = x(row), row.headline or 0.0
            axes.annotate(row.key, point, xytext=(5, 4), textcoords="offset points", fontsize=8)


def _listed(rows: Sequence[Row], x: Callable[[Row], float], report: SweepReport) -> str:
    """The points of a picture in words."""
    points = [f"trial {row.key}: {x(row):.4g}, {row.headline:.3f}" for row in rows[:NAMED]]
    return f"{report.headline} of {len(rows)} trials. " + "; ".join(points)


# --- score against alpha / r ------------------------------------------------------------------------


def _alpha_chart(report: SweepReport, number: int) -> Chart:
    title = "Score against alpha / r"
    rows = [row for row in report.completed if row.headline is not None and row.alpha_over_r]
    if len({row.alpha_over_r for row in rows}) < 2:
        return Chart(title, why_not="fewer than two values of alpha / r completed")
    ranks = sorted({row.r for row in rows if row.r is not None})

    def plot(axes: Any) -> None:
        for i, r in enumerate(ranks):
            group = sorted((row for row in rows if row.r == r), key=_ratio)
            colour = SERIES[i % len(SERIES)]
            axes.errorbar(
                [_ratio(row) for row in group],
                [row.headline for row in group],
                yerr=[row.headline_stderr or 0.0 for row in group],
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                linewidth=1,
                elinewidth=0.8,
                capsize=2,
                label=f"r={r}",
            )
        _name(axes, rows, _ratio)
        _baseline(axes, report)
        _log2_axis(axes, [_ratio(row) for row in rows])
        axes.set_xlabel("alpha / r")
        axes.set_ylabel(report.headline)
        axes.legend(fontsize=8, loc="best")

    bars = " Bars: standard errors." if any(row.headline_stderr for row in rows) else ""
    base = " The dashed line: the untouched base." if any(row.headline for row in report.baselines) else ""
    caption = f"Completed trials, by r.{base}{bars}"
    return Chart(title, _draw(number, plot), f"alpha / r, {_listed(rows, _ratio, report)}", caption)


def _ratio(row: Row) -> float:
    return row.alpha_over_r or 0.0


# --- score against memory and time ------------------------------------------------------------------


def _cost_chart(what: str) -> Callable[[SweepReport, int], Chart]:
    unit = "GB" if what == "memory" else "seconds"

    def cost(row: Row) -> float | None:
        return row.peak_memory_gb if what == "memory" else row.seconds

    def value(row: Row) -> float:
        return cost(row) or 0.0

    def draw(report: SweepReport, number: int) -> Chart:
        is_trained = any(row.r is not None for row in report.trials)
        time = "training time" if is_trained else "total time"
        name = "peak memory" if what == "memory" else time
        title = f"Score against {name}"
        rows = [row for row in report.completed if row.headline is not None and cost(row) is not None]
        if not rows:
            return Chart(title, why_not=f"no completed trial has both {report.headline} and {name}")
        shown = sorted((row for row in rows if row.on_front), key=value)

        def plot(axes: Any) -> None:
            others = [row for row in rows if not row.on_front]
            axes.scatter([value(row) for row in others], [row.headline for row in others], s=28, color=MUTED)
            axes.scatter(
                [value(row) for row in shown],
                [row.headline for row in shown],
                s=46,
                color=SERIES[0],
                marker="D",
                label="Pareto front",
            )
            _name(axes, rows, value)
            _baseline(axes, report)
            axes.set_xlabel(f"{name}, {unit}")
            axes.set_ylabel(report.headline)
            axes.margins(0.1)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.legend(fontsize=8, loc="best")

        front = ", ".join(row.key for row in rows if row.on_front)
        caption = (
            f"Diamonds: the Pareto front in score, memory and time together, trials {front}. "
            "No other is as good in all three and better in one."
        )
        return Chart(title, _draw(number, plot), f"{name} in {unit}, {_listed(rows, value, report)}", caption)

    return draw


# --- losses -----------------------------------------------------------------------------------------


def _loss_chart(report: SweepReport, number: int) -> Chart:
    title = "Loss by step"
    heard = curves(report)
    if not heard:
        return Chart(title, why_not="no loss was heard of any trial")
    lines = [line for i, line in enumerate(heard) if i < DRAWN or line.is_best]

    def plot(axes: Any) -> None:
        for i, line in enumerate(lines):
            _plot_curve(axes, line, _curve_style(lines, i))
        _loss_axes(axes, [value for line in lines for _, value in (*line.train, *line.held_out)])
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, ncols=2, loc="upper right")

    held_out = " Dotted: on held-out rows." if any(line.held_out for line in lines) else ""
    cut = (
        " A cross: where a trial ended that did not complete."
        if not all(one.completed for one in lines)
        else ""
    )
    left_out = f" Drawn: the first {DRAWN} trials and the best." if len(lines) < len(heard) else ""
    ends = [f"trial {line.label}: {line.train[-1][1]:.3f}" for line in lines if line.train]
    return Chart(
        title,
        _draw(number, plot),
        f"Training loss by step of {len(lines)} trials. Last losses: {'; '.join(ends[:NAMED])}",
        f"Training loss, each point the mean since the last report.{held_out}{cut}{left_out}",
    )


def _loss_axes(axes: Any, values: Sequence[float]) -> None:
    """Losses that differ by far are told apart on a logarithmic axis."""
    if min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(_some_minor))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")


def _some_minor(value: float, _: Any) -> str:
    """2 and 5 between the powers of ten."""
    first = f"{value:e}"[0]
    return f"{value:g}" if first in "25" else ""


def _curve_style(lines: Sequence[Curve], i: int) -> Mapping[str, Any]:
    line = lines[i]
    if len(lines) <= LABELLED:
        return {"color": SERIES[i], "label": line.label}
    if line.is_best:
        return {"color": SERIES[0], "label": f"{line.label} (best)", "zorder": 3}
    return {"color": MUTED, "linewidth": 0.7, "alpha": 0.7}


def _plot_curve(axes: Any, line: Curve, style: Mapping[str, Any]) -> None:
    if line.train:
        axes.plot(*zip(*line.train, strict=True), **style)
    if line.held_out:
        dotted = {name: value for name, value in style.items() if line.train == () or name != "label"}
        axes.plot(*zip(*line.held_out, strict=True), linestyle=":", marker=".", **dotted)
    if not line.completed:
        last = (line.train or line.held_out)[-1]
        axes.plot(*last, marker="x", markersize=7, color=style["color"])


# --- importance -------------------------------------------------------------------------------------


def _importance_chart(report: SweepReport, number: int) -> Chart:
    title = "Importance of the searched fields"
    found = report.evidence.importance
    if not found.shares:
        return Chart(title, why_not=found.why_not)
    names, shares = list(found.shares)[::-1], list(found.shares.values())[::-1]

    def plot(axes: Any) -> None:
        axes.barh(names, shares, color=SERIES[0], height=0.55)
        for i, share in enumerate(shares):
            axes.annotate(f"{share:.2f}", (share, i), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 1.1)
        axes.set_xlabel(f"share of the variance of {report.objective_metric}")

    said = "; ".join(f"{path} {share:.2f}" for path, share in found.shares.items())
    caption = (
        f"Optuna's fANOVA over {found.trials} completed trials: what share of the objective's variance a "
        "field explains within what was tried. Of few trials it is a hint."
    )
    svg = _draw(number, plot, height=0.9 + 0.4 * len(names))
    return Chart(title, svg, f"Importance: {said}", caption)


# --- several sweeps ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """What scores are drawn against; trials with one rank are joined where their order means something."""

    name: str
    value: Callable[[Row], float | None]
    joins: bool = False

    def of(self, row: Row) -> float:
        return self.value(row) or 0.0


def _look(i: int) -> Mapping[str, Any]:
    """The i-th sweep's colour and shape: shapes alone tell eight sweeps apart."""
    return {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]}


def _joint_scores(title: str, comparison: Comparison, axis: _Axis, number: int) -> Chart:
    reports = comparison.reports
    if (why_not := _no_common_score(reports)) is not None:
        return Chart(title, why_not=why_not)
    drawn = [
        [row for row in report.completed if row.headline is not None and axis.value(row)]
        for report in reports
    ]
    everything = [row for rows in drawn for row in rows]
    if sum(bool(rows) for rows in drawn) < 2:
        return Chart(title, why_not="fewer than two of the sweeps have a completed trial to draw")
    headline = reports[0].headline

    def plot(axes: Any) -> None:
        for i, (report, rows) in enumerate(zip(reports, drawn, strict=True)):
            points = [axis.of(row) for row in rows], [row.headline for row in rows]
            look = _look(i)
            # Open shapes: one over another, both are seen.
            axes.scatter(
                *points,
                s=34,
                marker=look["marker"],
                facecolors="none",
                edgecolors=look["color"],
                linewidths=1.5,
                label=_short(report.sweep_id),
                zorder=3,
            )
        _joint_baselines(axes, reports)
        if axis.joins:
            _join(axes, drawn, axis)
        if len(everything) <= NAMED and not axis.joins:
            _name(axes, everything, axis.of)
        if axis.joins:
            _log2_axis(axes, [axis.of(row) for row in everything])
        else:
            axes.margins(0.1)
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(axis.name)
        axes.set_ylabel(headline)
        _legend_below(axes)

    joined = " Lines join trials of one rank, which stands where they begin." if axis.joins else ""
    has_base = any(row.headline is not None for report in reports for row in report.baselines)
    base = " Dashed and grey: the untouched base." if has_base else ""
    alt = "; ".join(
        f"{report.sweep_id}: {_listed(rows, axis.of, report)}"
        for report, rows in zip(reports, drawn, strict=True)
    )
    caption = f"Completed trials, each sweep with a colour and a shape.{joined}{base}"
    svg = _draw(number, plot, _SIZE[1] + 0.2 * len(reports))
    return Chart(title, svg, f"{axis.name}, {alt}", caption)


def _no_common_score(reports: Sequence[SweepReport]) -> str | None:
    """Why the sweeps' scores are not to be put on one axis."""
    names = dict.fromkeys(report.headline for report in reports)
    if len(names) > 1:
        return f"the sweeps are told by different numbers: {', '.join(names)}"
    if reports[0].headline == MEAN_SCORE and len({frozenset(report.tasks) for report in reports}) > 1:
        return "the mean scores are over different benchmarks"
    return None


def _join(axes: Any, drawn: Sequence[Sequence[Row]], axis: _Axis) -> None:
    """The trials of a sweep with one rank, in their order; of repeats the mean. Where a line begins its rank
    stands: once for all sweeps that begin there."""
    begins: dict[tuple[float, int], list[float]] = {}
    for i, rows in enumerate(drawn):
        style = {"color": SERIES[i % len(SERIES)], "linestyle": _DASHES[i % len(_DASHES)]}
        for r in sorted({row.r for row in rows if row.r is not None}):
            by_place: dict[float, list[float]] = {}
            for row in rows:
                if row.r == r and row.headline is not None:
                    by_place.setdefault(axis.of(row), []).append(row.headline)
            places = sorted(by_place)
            means = [statistics.fmean(by_place[place]) for place in places]
            axes.plot(places, means, linewidth=1, **style)
            begins.setdefault((places[0], r), []).append(means[0])
    _name_ranks(axes, {place: min(values) for place, values in begins.items()})


def _name_ranks(axes: Any, begins: Mapping[tuple[float, int], float]) -> None:
    """`r=8` below where its lines begin; of several that begin at one place, none over another."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.06  # a line of text
    for place in sorted({place for place, _ in begins}):
        there = sorted(((y, r) for (x, r), y in begins.items() if x == place), reverse=True)
        last = math.inf
        for y, r in there:
            last = min(y, last - gap)
            axes.annotate(f"r={r}", (place, last), xytext=(5, -9), textcoords="offset points", fontsize=8)


def _joint_baselines(axes: Any, reports: Sequence[SweepReport]) -> None:
    """A line for each value that an untouched base has."""
    for value in sorted(
        {round(row.headline, 6) for one in reports for row in one.baselines if row.headline is not None}
    ):
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def _joint_losses(comparison: Comparison, number: int) -> Chart:
    title = "Loss by step"
    heard = [[one for one in curves(report) if one.train][:DRAWN] for report in comparison.reports]
    if sum(bool(lines) for lines in heard) < 2:
        return Chart(title, why_not="fewer than two of the sweeps have a trial whose loss was heard")

    def plot(axes: Any) -> None:
        for i, (report, lines) in enumerate(zip(comparison.reports, heard, strict=True)):
            style = {"color": SERIES[i % len(SERIES)], "linestyle": _DASHES[i % len(_DASHES)]}
            for line in lines:
                if not line.is_best:
                    axes.plot(*zip(*line.train, strict=True), linewidth=0.7, alpha=0.55, **style)
            for line in lines:
                if line.is_best:
                    axes.plot(*zip(*line.train, strict=True), linewidth=2, zorder=3, **style)
                    axes.plot(*line.train[-1], **_look(i), zorder=4)
            axes.plot([], [], marker=_look(i)["marker"], label=_short(report.sweep_id), **style)
        _loss_axes(axes, [value for lines in heard for line in lines for _, value in line.train])
        _legend_below(axes)

    best = [
        f"{report.sweep_id}, trial {line.label}: {line.train[-1][1]:.3f}"
        for report, lines in zip(comparison.reports, heard, strict=True)
        for line in lines
        if line.is_best
    ]
    count = sum(map(len, heard))
    return Chart(
        title,
        _draw(number, plot, _SIZE[1] + 0.2 * len(heard)),
        f"Training loss by step of {count} trials. Last losses of the best: {'; '.join(best)}",
        "Training loss, each point the mean since the last report. Thick, with its sweep's shape at the end: "
        "the best trial of each sweep.",
    )


def _short(sweep_id: str) -> str:
    """The id, its middle left out where it is very long."""
    if len(sweep_id) <= _LONGEST_NAME:
        return sweep_id
    half = _LONGEST_NAME // 2
    return f"{sweep_id[: half - 1]}…{sweep_id[-half:]}"


def _legend_below(axes: Any) -> None:
    """Out of the way of the points; a line for each sweep, whose ids are long."""
    axes.figure.legend(loc="outside lower left", fontsize=8, ncols=1)
