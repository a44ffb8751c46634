"""The life of a sweep over plain parts: who is told what, in which order, and what is tried again."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweeps.errors import CannotContinue, CannotStart, FailureClass, TakenOver
from sweeps.result import Failure, Progress, Score, TrialResult
from sweeps.sweep import Faults, Sweep
from sweeps.sweepfile import load_sweep_text
from sweeps.trial.paths import TrialFolder
from sweepsvc import launch
from sweepsvc.home import Home
from sweepsvc.plain import PlainStudy
from sweepsvc.protocols import Conductor, Later, Proposal, SweepRecord, SweepState

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
    """A tracker that writes down what it hears, and opens a run for each trial a little late."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self._runs: list[tuple[str, str]] = []
        self.to_say: list[str] = []

    def start(self, proposal: Proposal, attempt: int) -> None:
        self.heard.append(f"start {proposal.key}" + (f" again, {attempt}" if attempt > 1 else ""))
        self._runs.append((proposal.key, f"run-{proposal.key}"))

    def report(self, proposal: Proposal, progress: Progress) -> None:
        self.heard.append(f"report {proposal.key}")

    def end(self, proposal: Proposal, result: TrialResult) -> None:
        self.heard.append(f"end {proposal.key} {result.outcome}")

    def opened(self) -> list[tuple[str, str]]:
        runs, self._runs = self._runs, []
        return runs

    def notes(self) -> list[str]:
        notes, self.to_say = self.to_say, []
        return notes

    def close(self, state: SweepState) -> None:
        self.heard.append(f"close {state}")


class Quiet:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def started(self, proposal: Proposal) -> None: ...

    def reported(self, proposal: Proposal, progress: Progress) -> None: ...

    def again(self, proposal: Proposal, why: str) -> None:
        self.notes.append(f"{proposal.key} {why}")

    def ended(self, proposal: Proposal, result: TrialResult) -> None: ...


DONE = TrialResult(outcome="completed", scores={"blimp_causative": Score(value=0.5)})
CUT = TrialResult(outcome="interrupted")


def failed(kind: FailureClass, steps: int = 0) -> TrialResult:
    return TrialResult(outcome="failed", failure=Failure(kind=kind, message=f"a {kind}"), steps=steps)


TRAINED = 390  # steps of the article's trial, which the sweep's trials are


class Script:
    """A scheduler that plays one outcome each time it is given a proposal; an exception is raised."""

    def __init__(self, *results: TrialResult | BaseException) -> None:
        self._results = list(results)
        self.ran: list[str] = []

    def check(self) -> None: ...

    def run(self, conductor: Conductor) -> None:
        while (proposal := conductor.next()) is not None:
            if isinstance(proposal, Later):
                time.sleep(0.001)
                continue
            self.ran.append(proposal.key)
            conductor.started(proposal)
            conductor.reported(proposal, Progress(phase="training", step=1, steps=2))
            result = self._results.pop(0)
            if isinstance(result, BaseException):
                conductor.ended(proposal, CUT)
                raise result
            conductor.ended(proposal, result)


class Driven:
    """One sweep over plain parts, driven once with what `script` plays."""

    def __init__(self, sweep: Sweep, home: Home, *script: TrialResult | BaseException) -> None:
        self.study: Any = PlainStudy(sweep, "demo-1", {})
        self.view, self.log, self.script = Quiet(), Log(), Script(*script)
        self.folder = launch.prepare(sweep, home, "demo-1")
        self._faults = sweep.faults

    def drive(self, **more: Any) -> SweepRecord:
        queue = more.pop("queue", self.study.baselines())
        self.run = launch.SweepRun(self.study, self.log, self.folder, self.view, self._faults, queue, **more)
        return launch.drive(self.run, self.script)


def test_the_baseline_goes_first_then_every_trial_and_the_reason_for_the_end_is_said_once(
    sweep: Sweep, tmp_path: Path
) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE, DONE, DONE)
    record = driven.drive()
    assert record.state == "completed"
    assert driven.log.heard[:3] == ["start baseline", "report baseline", "end baseline completed"]
    assert driven.log.heard[-1] == "close completed"
    assert [trial.state for trial in record.trials] == ["completed", "completed"]
    assert [trial.mlflow_run_id for trial in record.trials] == ["run-0", "run-1"]
    assert [trial.attempts for trial in record.trials] == [1, 1]
    assert driven.view.notes == ["the space has 2 distinct trials, all proposed"]


def test_a_failed_trial_makes_a_failed_sweep_and_the_others_go_on(sweep: Sweep, tmp_path: Path) -> None:
    record = Driven(sweep, Home(tmp_path), DONE, failed("diverged"), DONE).drive()
    assert record.state == "failed"
    assert [trial.state for trial in record.trials] == ["failed", "completed"]


def test_what_the_tracker_has_to_say_is_shown(sweep: Sweep, tmp_path: Path) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE, DONE, DONE)
    driven.log.to_say = ["the tracker fails: no route"]
    driven.drive()
    assert "the tracker fails: no route" in driven.view.notes


# --- trying again -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "attempts"),
    [
        (failed("process_lost"), 4),
        (CUT, 4),  # while the sweep goes on: the node was taken from us
        (failed("evaluation_failed", steps=TRAINED), 2),
        (failed("evaluation_failed"), 1),  # before the training: it would be found again
        (failed("download_failed"), 6),
        (failed("diverged"), 1),
        (failed("out_of_memory"), 1),
        (failed("bad_data"), 1),
        (failed("bad_model"), 1),
        (failed("bug"), 1),
    ],
    ids=lambda value: value.failure.kind if isinstance(value, TrialResult) and value.failure else None,
)
def test_each_class_of_failure_is_tried_again_as_often_as_its_policy_says(
    sweep: Sweep, tmp_path: Path, result: TrialResult, attempts: int
) -> None:
    sweep = replace(sweep, faults=Faults(backoff_seconds=0.0))
    driven = Driven(sweep, Home(tmp_path), DONE, *[result] * attempts, DONE)
    record = driven.drive()
    assert [trial.attempts for trial in record.trials] == [attempts, 1]
    assert [trial.state for trial in record.trials] == [result.outcome, "completed"]
    assert len(record.trials[0].setbacks) == attempts - 1
    ends = [line for line in driven.log.heard if line.startswith("end 0")]
    assert ends == [f"end 0 {result.outcome}"]


def test_a_trial_that_succeeds_in_the_end_has_only_that_result(sweep: Sweep, tmp_path: Path) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE, failed("process_lost"), DONE, DONE)
    record = driven.drive()
    assert record.state == "completed"
    assert [trial.attempts for trial in record.trials] == [2, 1]
    assert record.trials[0].setbacks == ("process_lost: a process_lost",)
    assert "start 0 again, 2" in driven.log.heard
    assert driven.view.notes[0] == "0 process_lost: a process_lost; tried again (1 of 3)"


def test_a_download_is_tried_again_after_a_pause_that_doubles_while_others_run(
    sweep: Sweep, tmp_path: Path
) -> None:
    sweep = replace(sweep, faults=Faults(backoff_seconds=0.1))
    driven = Driven(
        sweep, Home(tmp_path), DONE, failed("download_failed"), DONE, failed("download_failed"), DONE
    )
    start = time.monotonic()
    record = driven.drive()
    assert time.monotonic() - start > 0.3
    assert driven.script.ran == ["baseline", "0", "1", "0", "0"]
    assert record.state == "completed"


# --- stopping ---------------------------------------------------------------------------------------


def wide(tmp_path: Path, **faults: Any) -> Sweep:
    text = TEXT.replace("[4, 8]", "[1, 2, 3, 4, 5, 6, 7, 8, 9]")
    sweep = load_sweep_text(text, str(tmp_path / "demo.yaml"), (), tmp_path)
    return replace(sweep, faults=Faults(**faults))


def test_trials_that_fail_in_a_row_for_one_reason_stop_the_sweep(tmp_path: Path) -> None:
    bad = failed("bad_model")
    driven = Driven(wide(tmp_path), Home(tmp_path), DONE, bad, bad, DONE, bad, bad, bad, bad, bad, DONE)
    record = driven.drive()
    assert record.state == "interrupted"
    assert len(record.trials) == 8
    assert driven.view.notes[-1].startswith("the sweep stops: 5 trials in a row failed as bad_model")


def test_another_reason_begins_the_count_anew_and_zero_never_stops(tmp_path: Path) -> None:
    bad, worse = failed("bad_model"), failed("bug")
    mixed = [bad, worse, bad, worse, bad, worse, bad, worse, bad]
    record = Driven(wide(tmp_path, stop_after=2), Home(tmp_path / "a"), DONE, *mixed).drive()
    assert record.state == "failed"
    record = Driven(wide(tmp_path, stop_after=0), Home(tmp_path / "b"), DONE, *[bad] * 9).drive()
    assert record.state == "failed"


def test_a_full_disk_stops_the_sweep_at_once(tmp_path: Path) -> None:
    driven = Driven(wide(tmp_path), Home(tmp_path), DONE, failed("disk_full"))
    assert driven.drive().state == "interrupted"
    assert "trial 0 found no space" in driven.view.notes[-1]


def test_a_sweep_that_is_asked_to_stop_hands_out_no_more(sweep: Sweep, tmp_path: Path) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE, CUT)

    def stop_in_the_second(number: list[int]) -> TrialResult:
        number.append(0)
        if len(number) == 2:
            driven.folder.stop.touch()
        return results[len(number) - 1]

    results, calls = [DONE, CUT], list[int]()
    driven.script._results = _Lazy(lambda: stop_in_the_second(calls))  # type: ignore[assignment]
    record = driven.drive()
    assert record.state == "interrupted"
    assert driven.script.ran == ["baseline", "0"]
    assert [(trial.state, trial.attempts) for trial in record.trials] == [("interrupted", 1)]


class _Lazy:
    """Outcomes that are made when they are played."""

    def __init__(self, make: Callable[[], TrialResult]) -> None:
        self._make = make

    def pop(self, _: int) -> TrialResult:
        return self._make()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_gently_and_a_second_at_once(sweep: Sweep, tmp_path: Path, number: int) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE, CUT)

    def signalled_once() -> TrialResult:
        signal.raise_signal(number)
        assert driven.folder.stop.exists()
        return CUT

    driven.script._results = _Lazy(signalled_once)  # type: ignore[assignment]
    before = signal.getsignal(number)
    assert driven.drive().state == "interrupted"
    assert driven.script.ran == ["baseline"]
    assert signal.getsignal(number) is before

    driven = Driven(sweep, Home(tmp_path / "again"))

    def signalled_twice() -> TrialResult:
        signal.raise_signal(number)
        signal.raise_signal(number)
        raise AssertionError("went on")

    driven.script._results = _Lazy(signalled_twice)  # type: ignore[assignment]
    assert driven.drive().state == "interrupted"


def test_what_waits_to_be_tried_again_when_the_sweep_stops_is_interrupted(tmp_path: Path) -> None:
    sweep = wide(tmp_path, backoff_seconds=60.0)
    driven = Driven(sweep, Home(tmp_path), failed("download_failed"), failed("disk_full"))
    record = driven.drive()
    assert [trial.state for trial in (*record.baselines, *record.trials)] == ["interrupted", "failed"]
    assert "end baseline interrupted" in driven.log.heard


def test_a_stopped_sweep_is_interrupted(sweep: Sweep, tmp_path: Path) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE, DONE, KeyboardInterrupt())
    record = driven.drive()
    assert record.state == "interrupted"
    assert driven.log.heard[-1] == "close interrupted"


class Broken(PlainStudy):
    """A study whose disk is full from the second result on."""

    told = 0

    def tell(self, proposal: Proposal, result: TrialResult) -> None:
        self.told += 1
        if self.told > 1:
            raise CannotContinue("the study must be writable, got disk full")
        super().tell(proposal, result)


def test_a_ledger_that_cannot_be_written_stops_the_sweep_and_says_so(sweep: Sweep, tmp_path: Path) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE, DONE, DONE)
    driven.study = Broken(sweep, "demo-1", {})
    with pytest.raises(CannotContinue, match="disk full"):
        driven.drive()
    assert driven.script.ran == ["baseline", "0"]
    assert driven.folder.stop.exists()


# --- going on ---------------------------------------------------------------------------------------


def test_what_was_told_is_opened_again_at_its_turn_and_its_old_word_is_gone(
    sweep: Sweep, tmp_path: Path
) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE, failed("bug"), CUT, CUT, CUT, CUT)
    first = driven.drive()
    assert [trial.state for trial in first.trials] == ["failed", "interrupted"]
    files = [TrialFolder(driven.folder.trial(trial.proposal)) for trial in first.trials]
    files[0].write_result(failed("bug"))
    queue = [trial.proposal for trial in first.trials]

    driven.script = Script(DONE, KeyboardInterrupt())
    second = driven.drive(queue=queue, told={"0", "1"})
    assert not files[0].result.exists()
    assert [trial.state for trial in second.trials] == ["completed", "interrupted"]
    assert [trial.attempts for trial in second.trials] == [2, 5]


def test_only_what_is_queued_runs_when_nothing_is_asked(sweep: Sweep, tmp_path: Path) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE)
    record = driven.drive(asks=False)
    assert driven.script.ran == ["baseline"]
    assert record.state == "interrupted"  # there is more to propose


def test_what_is_forgotten_begins_without_its_checkpoints(sweep: Sweep, tmp_path: Path) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE)
    [baseline] = driven.study.baselines()
    checkpoint = TrialFolder(driven.folder.trial(baseline)).checkpoints / "step-00000004"
    checkpoint.mkdir(parents=True)
    driven.drive(asks=False, forgotten={"baseline"})
    assert not checkpoint.exists()


def test_a_result_that_completed_meanwhile_is_not_removed(sweep: Sweep, tmp_path: Path) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE)
    [baseline] = driven.study.baselines()
    files = TrialFolder(driven.folder.trial(baseline))
    files.write_spec(baseline.spec)
    files.write_result(DONE)
    driven.drive(asks=False)
    assert files.read_result() == DONE


# --- starting ---------------------------------------------------------------------------------------


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


# --- from elsewhere ---------------------------------------------------------------------------------


def test_a_word_left_in_the_study_stops_the_sweep(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweepsvc.owner.HEARTBEAT_SECONDS", 0.0)
    driven = Driven(sweep, Home(tmp_path), DONE, DONE)
    words = iter([False, False, True])
    driven.study.heartbeat = lambda: next(words, True)
    assert driven.drive().state == "interrupted"
    assert driven.folder.stop.exists(), "running trials are to write a checkpoint and end"
    assert any("it was asked to stop" in note for note in driven.view.notes)


def test_a_driver_that_lost_its_sweep_ends_and_leaves_the_other_alone(sweep: Sweep, tmp_path: Path) -> None:
    driven = Driven(sweep, Home(tmp_path), DONE, DONE)

    def lost() -> bool:
        raise TakenOver("a sweep has one driver, and process 2 on other has taken this one over")

    driven.study.heartbeat = lost
    with pytest.raises(TakenOver, match="process 2 on other"):
        driven.drive()
    assert driven.script.ran == []
    assert not driven.folder.stop.exists(), "the file is the other driver's by now"
    assert driven.log.heard == [], "nor is its run closed in the tracker"
