"""`report` from a study, its files and a tracker to what lies on the disk."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

from sweeps.errors import CannotStart, UnknownSweep
from sweeps.result import Progress, Score
from sweeps.sweep import Sweep
from sweeps.trial.paths import TrialFolder
from sweepsvc import cli
from sweepsvc.home import Home
from sweepsvc.protocols import Report
from sweepsvc.recorder import MlflowRecorder
from sweepsvc.report_files import command, read_report, write_report
from sweepsvc.study import load_record, open_study
from sweepsvc.tracklog import TrackLog
from tests.sweepsvc.samples import TASK, result_of, sweep_of

ANSWERS = {"baseline": [1.0, 0.0, 0.0, 0.0], "0": [1.0, 1.0, 0.0, 0.0], "1": [1.0, 1.0, 1.0, 0.0]}


@pytest.fixture(scope="module")
def two_sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two sweeps that have ended; a database's schema takes half a second. Read only."""
    path = tmp_path_factory.mktemp("home")
    for sweep_id in ("demo-1", "other-1"):
        run_a_sweep(Home(path), sweep_id)
    return path


@pytest.fixture
def home(two_sweeps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A copy of it for one test."""
    for name in ("SWEEPSVC_HOME", "SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(two_sweeps, tmp_path / "runs")
    return Home(tmp_path / "runs")


def sweep_named() -> Sweep:
    return sweep_of("sampler: grid, space: {lora.r: [8, 32, 64]}")


def run_a_sweep(home: Home, sweep_id: str) -> None:
    """A baseline, two trials that completed and one that failed, with their files."""
    study = open_study(sweep_named(), sweep_id, home.study_url, {"owner": "host:1:2", "python": "3.11"})
    for proposal in (*study.baselines(), *iter(study.ask, None)):
        study.started(proposal)
        folder = home.sweep(sweep_id).trial(proposal)
        log = TrackLog(folder)
        log.append(Report(Progress(phase="training", step=1, steps=4, train_loss=2.5), 1))
        if proposal.key not in ANSWERS:
            study.tell(proposal, result_of("failed", 0.99))
            continue
        answers = ANSWERS[proposal.key]
        score = Score(value=sum(answers) / 4, stderr=0.2, documents=4)
        result = result_of("completed").model_copy(update={"scores": {TASK: score}})
        write_evaluation(folder, answers)
        study.tell(proposal, result)
    study.close("failed")


def write_evaluation(folder: Path, answers: list[float]) -> None:
    column = {"doc_hash": list("abcd"), "acc,none": answers}
    task = {"metrics": {"acc,none": {"value": 0.5, "stderr": 0.2}}, "per_document": column}
    folder.mkdir(parents=True, exist_ok=True)
    TrialFolder(folder).evaluation.write_text(json.dumps({"tasks": {TASK: task}, "groups": {}}))


def rows_of(file: Path) -> dict[str, dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as text:
        return {f"{line['sweep']} {line['trial']}": line for line in csv.DictReader(text)}


def test_a_report_is_written_whole_and_reads_the_files_beside_the_study(home: Home) -> None:
    said = write_report(["demo-1"], home, None)
    folder = home.sweep("demo-1").path / "report"
    assert said[:3] == [str(folder / name) for name in ("report.html", "report.md", "report.csv")]
    assert sorted(path.name for path in folder.iterdir()) == ["report.csv", "report.html", "report.md"]
    rows = rows_of(folder / "report.csv")
    record = load_record("demo-1", home.study_url)
    known = {f"demo-1 {trial.proposal.key}": trial for trial in (*record.baselines, *record.trials)}
    assert list(rows) == list(known)
    for key, line in rows.items():
        value = known[key].value
        assert line["objective"] == ("" if value is None else repr(value))
    assert rows["demo-1 1"]["p_value.blimp_causative"] == "0.5"  # two of four documents, both won
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "completed trials are needed at least, there are 2" in page
    assert "Training loss by step of 4 trials" not in page  # a baseline has none of its own to show
    assert "Training loss by step of 3 trials" in page


def test_a_tracker_that_has_no_run_is_said_and_the_report_stays(home: Home) -> None:
    said = write_report(["demo-1"], home, None)
    assert said[3].startswith("not in the tracker: the sweep must have a run in sqlite:///")
    assert not (home.path / "mlflow.db").exists()
    assert Path(said[0]).exists()


def test_a_tracker_that_does_not_answer_is_said_and_the_report_stays(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = write_report(["demo-1"], home, None)
    assert "not in the tracker: the MLflow store must be reachable, got http://me:***@127.0.0.1:9" in said[3]
    assert Path(said[0]).exists()


def test_the_three_files_and_no_others_go_to_the_sweeps_run(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[list[str], str]] = []
    monkeypatch.setattr(
        MlflowRecorder, "keep", lambda _, files, name: kept.append(([file.name for file in files], name))
    )
    (tmp_path / "private.txt").write_text("not for the tracker")
    said = write_report(["demo-1"], home, tmp_path)
    assert kept == [(["report.html", "report.md", "report.csv"], "report")]
    assert said[3] == "in the tracker: artifacts report/ of the run demo-1"


def test_several_sweeps_have_a_report_of_their_own_beside_that_of_the_first(home: Home) -> None:
    said = write_report(["demo", "other", "demo-1"], home, None)
    folder = home.sweep("demo-1").path / "report-with-other-1"
    assert said[0] == str(folder / "report.html")
    assert len(rows_of(folder / "report.csv")) == 8
    assert "Side by side" in (folder / "report.html").read_text(encoding="utf-8")
    assert not (home.sweep("demo-1").path / "report").exists()


def test_what_is_no_sweep_and_a_folder_that_is_a_file_are_bad_input(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownSweep, match="'nothing'"):
        write_report(["nothing"], home, None)
    (tmp_path / "taken").write_text("")
    with pytest.raises(CannotStart, match="give another with -o"):
        write_report(["demo-1"], home, tmp_path / "taken")
    monkeypatch.setattr(sys, "argv", ["sweepsvc", "report", "nothing", "--home", str(home.path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2


def test_the_command_writes_where_it_is_told(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["sweepsvc", "report", "demo-1", "-o", str(out), "--home", str(home.path)]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert str(out / "report.html") in capsys.readouterr().out
    assert (out / "report.md").exists()


def test_a_running_sweep_keeps_its_log_as_it_is(home: Home) -> None:
    trial = load_record("demo-1", home.study_url).trials[0].proposal
    log = home.sweep("demo-1").trial(trial) / "tracking" / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"at_ms": 2, "what": "rep')  # the driver is in the middle of a line
    before = log.read_bytes()
    report = read_report(load_record("demo-1", home.study_url), home)
    assert [one.progress.train_loss for one in report.evidence.reports["0"]] == [2.5]
    assert log.read_bytes() == before


def test_the_command_to_repeat_it_is_safe_to_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = command(str(tmp_path / "my sweeps" / "a.yaml"), ("search.trials=3", "lora.alpha=[1, $(rm x)]"))
    assert made == (
        "python -m sweepsvc launch 'my sweeps/a.yaml' --set search.trials=3 --set 'lora.alpha=[1, $(rm x)]'"
    )
    assert command("/elsewhere/a.yaml", ()) == "python -m sweepsvc launch /elsewhere/a.yaml"
