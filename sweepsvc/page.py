"""A report as one HTML page: no script, nothing loaded from elsewhere, everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources

from sweepsvc.page_charts import Chart, charts, joint_charts
from sweepsvc.page_html import Content, Html, breakable, data, element, escaped, joined, scrolling, table
from sweepsvc.report_compare import Comparison, Side
from sweepsvc.report_stats import Paired
from sweepsvc.report_text import (
    COSTS,
    NOISE_MARK,
    costs,
    failures_table,
    legend,
    repeats_table,
    shortened,
    summary,
)
from sweepsvc.report_views import heat_map
from sweepsvc.report_words import Cell, Row, SweepReport

NARROW = 3
"""With more columns of scores, a score's difference stands below it, and a printed page is turned."""

STRENGTHS = (0.02, 0.1)
"""Differences from which a colour is stronger."""


def as_page(comparison: Comparison) -> str:
    """The page of one sweep, or of several side by side."""
    reports = comparison.reports
    title = " beside ".join(report.sweep_id for report in reports)
    parts = [_comparison(comparison), *(_brief(report) for report in reports)]
    body = joined(parts) if len(reports) > 1 else _whole(reports[0])
    wide = len(comparison.tasks) * len(reports) > NARROW
    css = resources.files("sweepsvc").joinpath("page.css").read_text(encoding="utf-8")
    head = joined(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            # Should an escape ever be forgotten: a page of this kind runs nothing and fetches nothing.
            Html(
                '<meta http-equiv="Content-Security-Policy" '
                "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            ),
            element("title", f"{title}: report"),
            element("style", Html(css)),
        ]
    )
    page = element(
        "html",
        element("head", head),
        element("body", element("main", body), class_="wide" if wide else ""),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _whole(report: SweepReport) -> Html:
    return joined(
        [
            _header(report),
            _results(report),
            _heat(report),
            _repeats(report),
            _pictures(charts(report)),
            _failures(report),
            _made_with(report),
        ]
    )


def _brief(report: SweepReport) -> Html:
    return joined([element("h2", report.sweep_id), element("p", summary(report)), _results(report)])


def _header(report: SweepReport) -> Html:
    made = f", as of {report.evidence.made_at}" if report.evidence.made_at else ""
    running = " It is still running: what follows will change." if report.state == "running" else ""
    aim = "maximised" if report.maximize else "minimised"
    said = (
        f"Sweep {report.sweep_id}: {report.state}{made}. Sampler {report.sampler}; "
        f"{report.objective_metric} is {aim}.{running}"
    )
    return joined(
        [
            element("h1", report.name),
            element("p", said, class_="small"),
            element("p", summary(report), class_="lead"),
        ]
    )


# --- the table --------------------------------------------------------------------------------------


def _results(report: SweepReport) -> Html:
    several = len(report.tasks) > 1
    short = [path.removeprefix("lora.") for path in report.paths]
    names = [*short, *report.tasks, *(["mean"] if several else []), *COSTS]
    heads = [
        element("th", "trial", scope="col", class_="text"),
        *(element("th", breakable(name), scope="col") for name in names),
    ]
    rows = [_result_row(report, row, several) for row in report.rows]
    made = element(
        "table", element("thead", element("tr", *heads)), element("tbody", *rows), class_="results"
    )
    lines = element("ul", *(element("li", line) for line in legend(report)), class_="legend")
    return joined([element("h2", "Results"), scrolling(made), lines])


def _result_row(report: SweepReport, row: Row, several: bool) -> Html:
    cells: list[Content] = [row.settings.get(path, "") for path in report.paths]
    cells += [_score(row.cells.get(task)) for task in report.tasks]
    if several:
        cells.append(_score(row.mean_cell))
    cells += [_number(value, digits) for value, digits in costs(row)]
    kind = "baseline" if row.is_baseline else "best" if row.is_best else "" if row.completed else "ended"
    name: list[Content] = [row.key]
    if row.repeat:
        name.append(f" repeat {row.repeat}")
    if row.is_best:
        name += [" ", element("span", "best", class_="tag")]
    if not row.completed:
        name += [" ", element("span", row.failure.kind if row.failure else row.state, class_="tag")]
    return element(
        "tr", element("th", *name, scope="row"), *(element("td", cell) for cell in cells), class_=kind
    )


def _number(value: float | None, digits: int) -> Html:
    return Html("") if value is None else data(value, f"{value:,.{digits}f}")


def _score(cell: Cell | None) -> Html:
    if cell is None:
        return Html("")
    error = element("span", f" ± {cell.stderr:.3f}", class_="stderr") if cell.stderr is not None else ""
    return joined([data(cell.value, f"{cell.value:.3f}"), error, _gap(cell)])


def _gap(cell: Cell) -> Html:
    """A difference, coloured by its size and sign unless it is noise; faintly where it was not tested."""
    difference, noise = cell.difference, cell.within_noise
    if difference is None:
        return Html("")
    is_tested = cell.paired is not None
    strength = 1 + sum(is_tested and abs(difference) >= limit for limit in STRENGTHS)
    kind = "noise" if noise or not difference else f"{'good' if cell.better else 'bad'} strength-{strength}"
    shown = joined([data(difference, f"{difference:+.3f}"), f" {NOISE_MARK}" if noise else ""])
    return element("span", shown, class_=f"gap {kind}", title=_test_text(cell))


def _test_text(cell: Cell) -> str:
    if not isinstance(cell.paired, Paired):
        return f"not tested: {cell.untested}"
    paired = cell.paired
    noise = ", within noise" if paired.within_noise else ""
    return (
        f"p = {paired.p_value:.3g}{noise} ({paired.test}; {paired.differing} of {paired.documents} documents "
        "differ)"
    )


# --- r x alpha, repeats, failures -------------------------------------------------------------------


def _heat(report: SweepReport) -> Html:
    title = element("h2", f"{report.headline} over r and alpha")
    found = heat_map(report)
    if isinstance(found, str):
        return joined([title, element("p", f"Not shown: {found}.", class_="small")])
    heads = [
        element("th", "alpha \\ r", scope="col"),
        *(element("th", str(r), scope="col") for r in found.rs),
    ]
    rows = []
    for alpha in found.alphas:
        cells = []
        for r in found.rs:
            cell = found.cells.get((r, alpha))
            if cell is None:
                cells.append(element("td"))
            elif cell.value is None:
                cells.append(element("td", cell.how, class_="ended"))
            else:
                note = cell.how or f"trial {cell.keys[0]}"
                said = joined(
                    [
                        data(cell.value, f"{cell.value:.3f}"),
                        Html("<br>"),
                        element("small", note),
                    ]
                )
                share = f"--share: {found.share(cell.value):.3f}"
                cells.append(element("td", said, class_="filled", style=share))
        rows.append(element("tr", element("th", alpha, scope="row"), *cells))
    made = element("table", element("thead", element("tr", *heads)), element("tbody", *rows), class_="heat")
    note = "The stronger the colour, the higher. Empty: not tried. Only completed trials have a number."
    return joined([title, scrolling(made), element("p", note, class_="small")])


def _repeats(report: SweepReport) -> Html:
    if not report.repeats:
        return Html("")
    note = "Mean ± sample standard deviation (lowest to highest) over trials that differ in their seed alone."
    made = table(*repeats_table(report), class_="spreads")
    return joined([element("h2", "Repeats"), made, element("p", note, class_="small")])


def _failures(report: SweepReport) -> Html:
    set_back = [(row.key, why) for row in report.rows for why in row.setbacks]
    parts = [element("h2", "Failures")]
    if report.failed:
        parts.append(table(*failures_table(report)))
    else:
        parts.append(element("p", "No trial failed.", class_="small"))
    others = [f"{row.key} {row.state}" for row in report.rows if not row.completed and not row.failure]
    if others:
        parts.append(element("p", f"Not completed for another reason: {shortened(others, 20)}."))
    if set_back:
        lines = [element("li", f"{key}: {why}") for key, why in set_back]
        title = element("summary", f"{len(set_back)} attempts that came to nothing and were repeated")
        parts.append(element("details", title, element("ul", *lines)))
    return joined(parts)


def _pictures(found: Iterable[Chart]) -> Html:
    figures = []
    for chart in found:
        if chart.svg:
            picture = element("div", Html(chart.svg), role="img", aria_label=chart.alt)
            shown = joined([picture, element("figcaption", chart.caption)])
        else:
            shown = element("figcaption", f"Not shown: {chart.why_not}.")
        figures.append(element("figure", element("h3", chart.title), shown))
    return joined([element("h2", "Pictures"), element("div", *figures, class_="charts")])


# --- where it comes from ----------------------------------------------------------------------------


def _made_with(report: SweepReport) -> Html:
    facts = [[name, fact] for name, fact in report.facts.items()]
    environment = [[name, _varied(values)] for name, values in report.environment.items()]
    notes = [f"{note} (trials {shortened(keys)})" for note, keys in report.notes.items()]
    mixed = [name for name in ("device", "cpus", "platform") if len(report.environment.get(name, {})) > 1]
    parts: list[Content] = [
        element("h2", "To repeat it"),
        element("pre", report.evidence.command, class_="wrap", tabindex="0"),
        _file(report),
        element("h2", "Made with"),
    ]
    if mixed:
        differ = ", ".join(mixed)
        said = f"The trials ran on machines that differ ({differ}): do not compare their seconds and memory."
        parts.append(element("p", said))
    parts.append(table(["of the driver", ""], facts, class_="facts"))
    if environment:
        parts.append(table(["of the trials", ""], environment, class_="facts"))
    if notes:
        lines = element("ul", *(element("li", note) for note in notes))
        parts.append(element("details", element("summary", "Choices made for these trials"), lines))
    return joined(parts)


def _file(report: SweepReport) -> Html:
    said = f"The file as it was launched, {report.source}, digest {report.file_digest}"
    text = element("pre", report.text, tabindex="0")
    return element("details", element("summary", said), text)


def _varied(values: Mapping[str, tuple[str, ...]]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} (trials {shortened(keys)})" for value, keys in values.items())


# --- several sweeps ---------------------------------------------------------------------------------


def _comparison(comparison: Comparison) -> Html:
    names = [report.sweep_id for report in comparison.reports]
    columns = [(i, column) for column in comparison.columns for i in range(len(names))]
    heads = [
        "",
        *comparison.paths,
        *(joined([breakable(task), Html("<br>"), names[i]]) for i, task in columns),
    ]
    rows = [
        [
            one.name,
            *(one.settings.get(path, "") for path in comparison.paths),
            *(_side(one.sides[i].get(task)) for i, task in columns),
        ]
        for one in comparison.matched
    ]
    note = (
        f"Rows: settings by their values. With a sign: the difference to {names[0]} at the same settings; "
        f"{NOISE_MARK}: within noise by a paired test over the same documents. Empty: no completed trial."
    )
    differing = [[name, *values] for name, values in comparison.differing.items()]
    environment = [[name, *values] for name, values in comparison.environment.items()]
    parts: list[Content] = [
        element("h1", " beside ".join(names)),
        element("h2", "Side by side"),
        table(heads, rows, class_="results") if rows else element("p", "No trial of these sweeps completed."),
        element("p", note, class_="small"),
        _pictures(joint_charts(comparison)),
        element("h2", "Settings that differ"),
        table(["field", *names], differing, class_="facts")
        if differing
        else element("p", "None but those that were searched.", class_="small"),
    ]
    if environment:
        parts += [element("h2", "Environments that differ"), table(["", *names], environment, class_="facts")]
    return joined(parts)


def _side(side: Side | None) -> Content:
    if side is None:
        return ""
    if side.cell is not None:
        return _score(side.cell)
    return joined([data(side.mean, f"{side.mean:.3f}"), escaped(f" mean of {len(side.keys)}")])
