"""Reads what a report needs, writes its files, hands them to the tracker. The sweep may be running."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sweeps.errors import CannotStart
from sweeps.trial.paths import TrialFolder, write_whole
from sweepsvc.home import Home
from sweepsvc.owner import as_it_stands
from sweepsvc.protocols import SweepRecord
from sweepsvc.report import build
from sweepsvc.report_compare import compared
from sweepsvc.report_documents import read_documents
from sweepsvc.report_text import as_csv, as_markdown
from sweepsvc.report_words import Evidence, SweepReport
from sweepsvc.study import load_importance, load_launched, load_record
from sweepsvc.tracklog import read_reports
from sweepsvc.urls import masked

PAGE, MARKDOWN, CSV = "report.html", "report.md", "report.csv"
LONGEST_FOLDER_NAME = 120


def write_report(sweeps: Sequence[str], home: Home, out: Path | None) -> list[str]:
    """Write the report of one sweep, or of several side by side; what a person should know of it.

    Raises `UnknownSweep`, and `CannotStart` where a sweep cannot be read or the folder not be written. A
    tracker that cannot be used is said.
    """
    from sweepsvc.page import as_page

    records = {record.sweep_id: record for record in (load_record(one, home.study_url) for one in sweeps)}
    reports = [read_report(as_it_stands(record), home) for record in records.values()]
    name = "report" if len(reports) == 1 else f"report-with-{_joined(reports[1:])}"
    folder = (out or home.sweep(reports[0].sweep_id).path / name).absolute()
    comparison = compared(reports)
    texts = {PAGE: as_page(comparison), MARKDOWN: as_markdown(comparison), CSV: as_csv(comparison)}
    try:
        for file, text in texts.items():
            write_whole(folder / file, text)
    except OSError as error:
        raise CannotStart(
            f"the report's folder must be writable, got {folder}: {error.strerror}; give another with -o"
        ) from error
    files = [folder / file for file in texts]
    return [*map(str, files), *(_kept(report, home, files, name) for report in reports)]


def _joined(reports: Sequence[SweepReport]) -> str:
    return "+".join(report.sweep_id for report in reports)[:LONGEST_FOLDER_NAME]


def read_report(record: SweepRecord, home: Home) -> SweepReport:
    """The report of one sweep, with its importance by Optuna, its documents and its losses."""
    launched = load_launched(record.sweep_id, home.study_url)
    folder = home.sweep(record.sweep_id)
    documents, reports = {}, {}
    for trial in (*record.baselines, *record.trials):
        files = TrialFolder(folder.trial(trial.proposal))
        reports[trial.proposal.key] = read_reports(files.path)
        if trial.state == "completed" and trial.result:
            documents[trial.proposal.key] = read_documents(files.evaluation, trial.result.scores)
    evidence = Evidence(
        documents=documents,
        reports=reports,
        importance=load_importance(record.sweep_id, home.study_url),
        made_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command(launched.sweep.source, launched.sweep.overrides),
    )
    masked_facts = {name: masked(fact) for name, fact in record.facts.items()}
    return build(replace(record, facts=masked_facts), launched.sweep, evidence)


def command(source: str, overrides: Sequence[str]) -> str:
    """What launches the sweep again, the file's path as short as it can be from here."""
    path = Path(source)
    file = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else source
    options = [word for one in overrides for word in ("--set", one)]
    return shlex.join(["python", "-m", "sweepsvc", "launch", file, *options])


def _kept(report: SweepReport, home: Home, files: Sequence[Path], name: str) -> str:
    """Hand the files to the sweep's run in the tracker; how that went."""
    from sweepsvc.recorder import MlflowRecorder

    sweep = load_launched(report.sweep_id, home.study_url).sweep
    recorder = MlflowRecorder(sweep, report.sweep_id, home.tracking_uri, home.artifacts, {})
    try:
        recorder.keep(files, name)
    except CannotStart as error:
        return f"not in the tracker: {error}"
    return f"in the tracker: artifacts {name}/ of the run {report.sweep_id}"
