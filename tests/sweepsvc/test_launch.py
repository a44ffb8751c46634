"""The life of a sweep over plain parts: who is told what, in which order."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from sweeps.errors import CannotStart
from sweeps.result import Progress, Score, TrialResult
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep_text
from sweepsvc import launch
from sweepsvc.home import Home
from sweepsvc.plain import PlainStudy
from sweepsvc.protocols import Conductor, Proposal, SweepState

TEXT = """
name: demo
trial: {evaluate: {tasks: [blimp_causative]}}
search:
  sampler: grid
  space: {lora.r: [4, 8]}
resources: {gpus: 0}
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return load_sweep_text(TEXT, str(tmp_path / "demo.yaml"), (), tmp_path)


class Log:
    """A tracker and a view that write down what they hear."""

    def __init__(self, fails: bool = False) -> None:
        self.heard: list[str] = []
        self._fails = fails

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        if self._fails:
            raise ConnectionError("no route to the tracker http://me:secret@host")

    def open(self) -> None:
        self._hear("open")

    def start(self, proposal: Proposal) -> str | None:
        self._hear(f"start {proposal.key}")
        return f"run-{proposal.key}"

    def report(self, proposal: Proposal, progress: Progress) -> None:
        self._hear(f"report {proposal.key}")

    def end(self, proposal: Proposal, result: TrialResult, folder: Path) -> None:
        self._hear(f"end {proposal.key} {result.outcome} {folder.name}")

    def close(self, state: SweepState) -> None:
        self._hear(f"close {state}")


class Quiet:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def started(self, proposal: Proposal) -> None: ...

    def reported(self, proposal: Proposal, progress: Progress) -> None: ...

    def ended(self, proposal: Proposal, result: TrialResult) -> None: ...


DONE = TrialResult(outcome="completed", scores={"blimp_causative": Score(value=0.5)})


class Script:
    """A scheduler that plays one outcome a proposal, and may be stopped midway."""

    def __init__(self, *results: TrialResult | None) -> None:
        self._results = list(results)

    def check(self) -> None: ...

    def run(self, conductor: Conductor) -> None:
        while (proposal := conductor.next()) is not None:
            conductor.started(proposal)
            conductor.reported(proposal, Progress(phase="training", step=1, steps=2))
            result = self._results.pop(0)
            if result is None:
                conductor.ended(proposal, TrialResult(outcome="interrupted"))
                raise KeyboardInterrupt
            conductor.ended(proposal, result)


def drive(sweep: Sweep, home: Home, script: Script, log: Log) -> tuple[SweepState, Any, Quiet]:
    study, view = PlainStudy(sweep, "demo-1", {}), Quiet()
    folder = launch.prepare(sweep, home, "demo-1")
    state = launch.drive(launch.SweepRun(study, log, folder, view), script)
    return state, study.read(), view


def test_the_baseline_goes_first_then_every_trial_and_the_reason_for_the_end_is_said(
    sweep: Sweep, tmp_path: Path
) -> None:
    log = Log()
    state, record, view = drive(sweep, Home(tmp_path), Script(DONE, DONE, DONE), log)
    assert state == record.state == "completed"
    assert log.heard[:3] == ["start baseline", "report baseline", "end baseline completed baseline"]
    assert log.heard[-1] == "close completed"
    assert [trial.state for trial in record.trials] == ["completed", "completed"]
    assert [trial.mlflow_run_id for trial in record.trials] == ["run-0", "run-1"]
    assert [trial.attempts for trial in record.trials] == [1, 1]
    assert view.notes


def test_a_failed_trial_makes_a_failed_sweep_and_the_others_go_on(sweep: Sweep, tmp_path: Path) -> None:
    failed = TrialResult(outcome="failed")
    state, record, _ = drive(sweep, Home(tmp_path), Script(DONE, failed, DONE), Log())
    assert state == "failed"
    assert [trial.state for trial in record.trials] == ["failed", "completed"]


def test_a_stopped_sweep_is_interrupted(sweep: Sweep, tmp_path: Path) -> None:
    log = Log()
    state, record, _ = drive(sweep, Home(tmp_path), Script(DONE, DONE, None), log)
    assert state == record.state == "interrupted"
    assert [trial.state for trial in record.trials] == ["completed", "interrupted"]
    assert log.heard[-1] == "close interrupted"


def test_a_tracker_that_fails_stops_nothing_and_is_shown(sweep: Sweep, tmp_path: Path) -> None:
    state, record, view = drive(sweep, Home(tmp_path), Script(DONE, DONE, DONE), Log(fails=True))
    assert state == "completed"
    assert [trial.value for trial in record.trials] == [0.5, 0.5]
    assert any("no route to the tracker http://me:***@host" in note for note in view.notes)
    assert not any("secret" in note for note in view.notes)


def test_an_id_that_is_taken_is_refused_and_nothing_is_overwritten(sweep: Sweep, tmp_path: Path) -> None:
    folder = launch.prepare(sweep, Home(tmp_path), "demo-1")
    assert folder.sweep_file.read_text() == TEXT
    with pytest.raises(CannotStart, match=r"an id of its own, got demo-1.*give another --id"):
        launch.prepare(sweep, Home(tmp_path), "demo-1")


@pytest.mark.parametrize("sweep_id", ["../x", "a/b", "", ".hidden", "study.db", "mlartifacts"])
def test_an_id_that_is_no_folder_name_of_its_own_is_refused(
    sweep: Sweep, tmp_path: Path, sweep_id: str
) -> None:
    with pytest.raises(CannotStart, match="an id must be letters, digits"):
        launch.prepare(sweep, Home(tmp_path / "home"), sweep_id)
    assert not (tmp_path / "home").exists()


def test_a_start_that_fails_takes_back_what_was_made(sweep: Sweep, tmp_path: Path) -> None:
    folder = launch.prepare(sweep, Home(tmp_path), "demo-1")
    undone: list[str] = []
    with contextlib.suppress(CannotStart), launch.all_or_nothing(folder) as undo:
        undo.callback(undone.append, "study")
        raise CannotStart("no tracker")
    assert undone == ["study"]
    assert not folder.path.exists()
    kept = launch.prepare(sweep, Home(tmp_path), "demo-1")
    with launch.all_or_nothing(kept) as undo:
        undo.callback(undone.append, "again")
    assert undone == ["study"]
    assert kept.path.exists()


def test_a_home_that_cannot_be_written_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotStart, match="the home must be writable"):
        launch.prepare(sweep, Home(tmp_path / "file"), "demo-1")


def test_new_ids_begin_with_the_name_and_sort_by_time() -> None:
    assert launch.new_sweep_id("demo").startswith("demo-20")
