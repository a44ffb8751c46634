"""The page, the Markdown and the CSV: the study's numbers, nothing that runs, nothing from elsewhere."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from sweeps.result import Failure
from sweepsvc import page_charts
from sweepsvc.page import as_page
from sweepsvc.page_charts import MARKERS, SERIES, charts, joint_charts
from sweepsvc.page_html import Html, element
from sweepsvc.protocols import Importance, TrialRecord
from sweepsvc.report import build
from sweepsvc.report_compare import Comparison, compared
from sweepsvc.report_text import as_csv, as_markdown
from sweepsvc.report_words import Cell, SweepReport
from tests.sweepsvc.reported import demo_trials, ended, evidence_of, losses, proposal, record_of, report_of
from tests.sweepsvc.samples import sweep_of

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What stands in a page: every tag, every number by the row of the result table, the ids, the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.rows: dict[str, list[float]] = {}
        self.text = ""
        self._row = ""
        self._is_results = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "br", "wbr", "path", "use", "image"):
            self.open.append(tag)
        self.ids += [given["id"] or ""] if "id" in given else []
        names = ("href", "xlink:href", "src", "action")
        self.references += [given[name] or "" for name in names if name in given]
        assert not [name for name in given if name.startswith("on")]
        if tag == "table":
            self._is_results = given.get("class") == "results"
        if tag == "tr":
            self._row = ""
        if tag == "data" and self._is_results:
            self.rows.setdefault(self._row, []).append(float(given["value"] or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "use", "image"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "th" and not self._row:
            self._row = data.strip()


@functools.cache
def demo_page() -> str:
    return as_page(compared([report_of()]))


def page_of(*reports: SweepReport) -> Page:
    page = Page(as_page(compared(reports)))
    assert page.open == []
    return page


def numbers_of(trial: TrialRecord, base: float) -> list[float]:
    """What the study says of a completed trial, in the order of the page's row."""
    assert trial.result is not None
    result, score = trial.result, trial.result.scores["facts"].value
    gap = [] if trial.proposal.is_baseline else [score - base]
    measured = result.measured
    costs = [result.trainable_params, measured.peak_memory_gb, measured.train_seconds, measured.wall_seconds]
    return [score, *gap, *(float(cost or 0) for cost in costs)]


def test_the_numbers_of_the_page_are_the_studys() -> None:
    record = record_of(demo_trials())
    wanted = {
        trial.proposal.key: numbers_of(trial, 0.1)
        for trial in (*record.baselines, *record.trials)
        if trial.state == "completed"
    }
    assert len(wanted) == 3
    assert Page(demo_page()).rows == wanted


def test_the_numbers_of_the_csv_are_the_studys() -> None:
    record = record_of(demo_trials())
    lines = {line["trial"]: line for line in csv.DictReader(io.StringIO(as_csv(compared([report_of()]))))}
    assert list(lines) == ["baseline", "0", "1", "2", "3", "4", "5"]
    for trial in (*record.baselines, *record.trials):
        line = lines[trial.proposal.key]
        assert line["state"] == trial.state
        metrics = trial.result.metrics() if trial.result and trial.state == "completed" else {}
        for name in ("score.facts", "score_stderr.facts", "score.mean", "peak_memory_gb", "train_seconds"):
            assert line[name] == (repr(metrics[name]) if name in metrics else "")
    assert (lines["1"]["lora.r"], lines["1"]["lora.alpha"], lines["1"]["lora.alpha_over_r"]) == (
        "32",
        "64",
        "2.0",
    )
    assert lines["1"]["difference.facts"] == repr(0.9 - 0.1)
    assert lines["1"]["p_value.facts"] == repr(2 / 2**8)
    assert (lines["2"]["failure"], lines["2"]["score.facts"]) == ("diverged", "")


def test_the_numbers_of_the_markdown_are_the_studys() -> None:
    text = as_markdown(compared([report_of()]))
    assert "| baseline |  |  | 0.100 ± 0.050 | 0 | 1.00 | 0.0 | 31.0 |" in text
    assert "| 0 | 8 | 1 | 0.200 ± 0.050 (+0.100 ≈) | 1,000 | 1.00 | 20.0 | 31.0 |" in text
    assert "| 1 best | 32 | 64 (2\\*r) | 0.900 ± 0.050 (+0.800) | 1,000 | 2.00 | 21.0 | 31.0 |" in text
    assert "| 2 failed: diverged | 32 | 1 |  |  |  |  |  |" in text
    assert "| diverged | 1 | 2 | the loss must stay finite, got nan |" in text
    assert "python -m sweepsvc launch demo.yaml" in text


def test_no_number_of_a_trial_that_did_not_complete_is_anywhere() -> None:
    comparison = compared([report_of()])
    for text in (as_csv(comparison), as_markdown(comparison), Page(demo_page()).text):
        assert not [number for number in ("0.99", "0.98", "0.97") if number in text]


def test_a_page_runs_nothing_and_loads_nothing() -> None:
    page = Page(demo_page())
    assert page.open == []
    assert not {"script", "iframe", "img", "link", "object", "form"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert set(page.references) <= {f"#{one}" for one in page.ids}
    assert len(page.ids) == len(set(page.ids)) > 10
    text = demo_page()
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "url(http" not in text


def evil_report() -> SweepReport:
    """Markup wherever a person or a machine may have written something."""
    failed = ended(proposal(1, 32, 64.0, EVIL), "failed")
    assert failed.result is not None
    failure = Failure(kind="bug", message=f"a|b {EVIL}\n=1+1")
    failed = dataclasses.replace(failed, result=failed.result.model_copy(update={"failure": failure}))
    good = ended(proposal(0, 8, 16.0, EVIL), "completed", **{EVIL: 0.5, "$x_1$": 0.25})
    assert good.result is not None
    marked = {"notes": (EVIL,), "environment": {EVIL: EVIL}}
    good = dataclasses.replace(good, result=good.result.model_copy(update=marked), setbacks=(EVIL,))
    more = ended(proposal(2, 16, 16.0, "$\\frac$"), "completed", **{EVIL: 0.75, "$x_1$": 0.5})
    record = record_of([good, failed, more], sweep_id=EVIL, facts={"git_commit": EVIL}, baselines=[])
    evidence = evidence_of(
        importance=Importance({EVIL: 0.5, "$\\frac$": 0.5}, 9),
        command=f"launch '{EVIL}\n{EVIL}'",
        made_at=EVIL,
        reports={"0": losses(2.0, 1.0), "1": losses(2.0, 9.0)},
    )
    made = build(record, sweep_of("sampler: grid"), evidence)
    return dataclasses.replace(made, name=EVIL, source=EVIL, text=f"{EVIL}</pre>", sampler=EVIL)


def test_a_sweep_named_script_is_harmless() -> None:
    report = evil_report()
    for page in (page_of(report), page_of(report, evil_report())):
        assert "script" not in page.tags
        assert page.text.count(EVIL) > 10  # it is there, as text
    markdown = as_markdown(compared([report]))
    outside = [line for line in markdown.splitlines() if not line.startswith("    ")]  # of the block of code
    assert "<script" not in "".join(outside)
    assert "a\\|b &lt;script&gt;" in markdown
    assert (
        len([line for line in markdown.splitlines() if "<script" in line]) == 2
    )  # the command, on two lines


def test_a_spreadsheet_takes_no_text_for_a_formula() -> None:
    failed = ended(proposal(0), "failed")
    assert failed.result is not None
    failure = Failure(kind="bug", message="=HYPERLINK(1)")
    failed = dataclasses.replace(failed, result=failed.result.model_copy(update={"failure": failure}))
    (line,) = [
        line
        for line in csv.DictReader(io.StringIO(as_csv(compared([report_of([failed])]))))
        if line["trial"] == "0"
    ]
    assert line["message"] == "'=HYPERLINK(1)"


def test_an_element_escapes_whatever_is_not_html() -> None:
    assert element("p", "<", Html("<br>"), title='"') == '<p title="&quot;">&lt;<br></p>'
    assert element("p", Html("<b>") + "<") == "<p>&lt;b&gt;&lt;</p>"  # a sum of both is text again


def test_a_colour_is_faint_where_nothing_was_tested_and_absent_where_it_is_noise() -> None:
    text = demo_page()
    assert 'class="gap noise" title="p = 1, within noise' in text
    assert (
        'class="gap good strength-3" title="p = 0.00781 (McNemar, exact; 8 of 10 documents differ)"' in text
    )
    evidence = evidence_of(documents={})
    untested = as_page(compared([build(record_of(demo_trials()), sweep_of("sampler: grid"), evidence)]))
    assert 'class="gap good strength-1" title="not tested: of what it is compared with' in untested
    assert "gap good strength-3" not in untested


def test_less_of_a_perplexity_is_better() -> None:
    worse = Cell(9.0, None, "word_perplexity", 10, difference=2.0)
    assert (worse.better, dataclasses.replace(worse, metric="acc").better) == (False, True)


# --- what is shown ----------------------------------------------------------------------------------


def test_every_picture_has_words_and_the_pages_own_colours() -> None:
    drawn = charts(report_of())
    assert [chart.title for chart in drawn if chart.svg] == [chart.title for chart in drawn]
    assert len(drawn) == 5
    for chart in drawn:
        assert chart.alt
        assert "var(--ink)" in chart.svg
        assert not re.findall(r"#0[1-9]0[0-9]0[0-9]", chart.svg)
    assert "trial 1: 2, 0.900" in drawn[0].alt
    assert "trial 2 failed: 90.000" in drawn[3].alt


def test_two_pages_of_the_same_sweep_are_equal() -> None:
    assert as_page(compared([report_of()])) == demo_page()


def test_a_picture_that_cannot_be_drawn_says_why() -> None:
    report = report_of([ended(proposal(0), "failed", facts=0.9)])
    evidence = evidence_of(importance=Importance({}, why_not="4 completed trials are needed"), reports={})
    text = page_of(dataclasses.replace(report, evidence=evidence)).text
    assert "No trial of 1 completed: there is nothing to compare." in text
    assert "Not shown: 4 completed trials are needed." in text
    assert "Not shown: no loss was heard of any trial." in text
    assert "Not shown: fewer than two values of alpha / r completed." in text
    assert "Not shown: r and alpha have one value each." in text


def test_a_sweep_that_was_only_proposed_has_a_page_too() -> None:
    nothing = report_of([TrialRecord(proposal(0), "waiting")], baselines=[])
    assert "No trial of 1 completed" in page_of(nothing).text
    assert "No trial of 0 completed" in page_of(report_of([], baselines=[])).text


def test_many_trials_are_drawn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [ended(proposal(i, 2 ** (i % 5), 4.0 + i), "completed", facts=i / 30) for i in range(30)]
    reports: dict[str, Any] = {str(i): losses(3.0, 2.0 - i / 100) for i in range(30)}
    made = build(record_of(trials), sweep_of("sampler: grid"), evidence_of(reports=reports, documents={}))
    text = as_page(compared([made]))
    assert len(text) < 600_000
    assert "29 (best)" in text
    monkeypatch.setattr(page_charts, "DRAWN", 3)
    few = charts(made)[3]
    assert few.caption.endswith("Drawn: the first 3 trials and the best.")
    assert few.alt.startswith("Training loss by step of 4 trials.")


def test_machines_that_differ_are_pointed_out() -> None:
    assert "machines that differ (device)" in Page(demo_page()).text


def test_sweeps_side_by_side_name_both() -> None:
    page = page_of(report_of(), report_of([], sweep_id="other-1"))
    assert "demo-1 beside other-1" in page.text
    assert "Settings that differ" in page.text


def lora_beside_qlora() -> Comparison:
    """Two sweeps of four trials: ranks 8 and 32, alpha 1 and 2*r."""
    made = []
    for sweep_id, lift in (("lora-1", 0.3), ("qlora-1", 0.2)):
        trials = [
            ended(proposal(i, r, alpha), "completed", facts=lift + i / 10)
            for i, (r, alpha) in enumerate([(8, 1.0), (8, 16.0), (32, 1.0), (32, 64.0)])
        ]
        trials.append(ended(proposal(4, 64), "failed", facts=0.99))
        made.append(build(record_of(trials, sweep_id=sweep_id), sweep_of("sampler: grid"), evidence_of()))
    return compared(made)


def test_sweeps_are_drawn_together_and_told_apart_by_colour_and_shape() -> None:
    memory, ratio, losses_of_both = joint_charts(lora_beside_qlora())
    for chart in (memory, ratio, losses_of_both):
        assert ">lora-1<" in chart.svg
        assert ">qlora-1<" in chart.svg
        assert "var(--series-1)" in chart.svg
        assert "var(--series-2)" in chart.svg
        assert "var(--series-3)" not in chart.svg
        assert not re.search("#0[1-4]0", chart.svg)  # no stand-in colour is left
    assert len(MARKERS) == len(set(MARKERS)) == len(SERIES)
    assert "lora-1: score.mean of 4 trials. trial 0: 1, 0.300" in memory.alt
    assert "0.990" not in memory.alt  # the failed trial is in no picture of scores
    assert ratio.svg.count(">r=8<") == ratio.svg.count(">r=32<") == 1  # both sweeps' lines begin there
    assert "qlora-1, trial 1" not in losses_of_both.alt
    assert "lora-1, trial 3" not in losses_of_both.alt  # the best has no loss that was heard


def test_the_page_of_several_sweeps_has_their_pictures_and_each_id_once() -> None:
    page = page_of(*lora_beside_qlora().reports)
    assert page.tags.count("figure") == page.tags.count("svg") == 3
    assert len(page.ids) == len(set(page.ids))


def test_scores_that_are_not_the_same_number_are_not_drawn_on_one_axis() -> None:
    several = ended(proposal(0), "completed", facts=0.5, rivers=0.6)
    other = report_of([several], sweep_id="other-1")
    memory, ratio, _ = joint_charts(compared([report_of(), other]))
    assert memory.why_not == ratio.why_not == "the mean scores are over different benchmarks"
    by_loss = report_of(sweep_id="other-1", objective_metric="train.loss", maximize=False)
    memory, _, _ = joint_charts(compared([report_of(), by_loss]))
    assert memory.why_not == "the sweeps are told by different numbers: score.mean, train.loss"
    memory, _, heard = joint_charts(compared([report_of(), report_of([], sweep_id="other-1")]))
    assert memory.why_not == "fewer than two of the sweeps have a completed trial to draw"
    assert heard.why_not == "fewer than two of the sweeps have a trial whose loss was heard"


def test_ranks_that_begin_at_one_place_stand_below_each_other() -> None:
    trials = [
        ended(proposal(i, r, 2.0 * r * (1 + i % 2)), "completed", facts=0.5)
        for i, r in enumerate([8, 8, 32, 32, 64, 64])
    ]
    reports = [report_of(trials, sweep_id=name) for name in ("one-1", "two-1")]
    svg = joint_charts(compared(reports))[1].svg
    heights = re.findall(r'y="([\d.-]+)"[^>]*>r=\d+<', svg)
    tops = sorted(map(float, heights))
    assert len(tops) == 3
    assert all(low - high > 7 for high, low in itertools.pairwise(tops))
