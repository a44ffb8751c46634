"""The outbox before a recorder that fails, is slow, or loses its process in the middle of a call."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sweeps.result import Failure, Outcome, Progress, TrialResult
from sweeps.spec import TrialSpec
from sweepsvc import outbox
from sweepsvc.home import SweepFolder
from sweepsvc.outbox import Outbox
from sweepsvc.plain import PlainRecorder, PlainRun, PlainStudy
from sweepsvc.protocols import Proposal, Report, SweepState
from sweepsvc.tracklog import CHUNK_BYTES, Ended, Started, TrackLog
from tests.sweepsvc.samples import result_of, sweep_of
from tests.waiting import until


class Tracker(PlainRecorder):
    """A plain recorder that writes down its calls; `before` and `after` see each, and may raise or block."""

    def __init__(self) -> None:
        super().__init__("sweep-1")
        self.calls: list[str] = []
        self.outcomes: list[Outcome] = []
        self._numbers = itertools.count()
        self.before: Callable[[str], None] = lambda call: None
        self.after: Callable[[str], None] = lambda call: None

    def _called(self, *words: object) -> str:
        self.calls.append(" ".join(str(word) for word in words))
        self.before(self.calls[-1])
        return self.calls[-1]

    def open(self) -> None:
        self._called("open")
        super().open()

    def start(
        self,
        proposal: Proposal,
        run_id: str | None = None,
        *,
        attempt: int = 1,
        first: bool = False,
        at_ms: int | None = None,
    ) -> str:
        call = self._called("start", proposal.key, attempt)
        if run_id not in self.runs:
            held = [held for held, run in self.runs.items() if run.proposal.key == proposal.key]
            run_id = f"run-{next(self._numbers)}" if first or not held else held[0]
        run = self.runs.setdefault(run_id, PlainRun(proposal))
        run.attempts, run.result = attempt, None
        self.after(call)
        return run_id

    def report(self, run_id: str, reports: Sequence[Report]) -> None:
        call = self._called("report", self.runs[run_id].proposal.key, f"x{len(reports)}")
        super().report(run_id, reports)
        self.after(call)

    def end(
        self,
        run_id: str,
        proposal: Proposal,
        result: TrialResult,
        folder: Path,
        *,
        at_ms: int | None = None,
    ) -> None:
        call = self._called("end", proposal.key)
        super().end(run_id, proposal, result, folder, at_ms=at_ms)
        self.outcomes.append(result.outcome)
        self.after(call)

    def close(self, state: SweepState) -> None:
        self._called("close", state)
        super().close(state)

    def run(self, key: str) -> PlainRun:
        """The one run of the trial."""
        (run,) = [run for run in self.runs.values() if run.proposal.key == key]
        return run

    def losses(self, key: str) -> list[tuple[int, float | None]]:
        progresses = [report.progress for report in self.run(key).reports]
        return [(one.step, one.train_loss) for one in progresses if one.train_loss is not None]


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(outbox, "LONGEST_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(outbox, "CLOSING_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(outbox, "PATIENCE_SECONDS", 0.3)


@pytest.fixture
def tracker() -> Tracker:
    return Tracker()


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path / "demo-1")


@pytest.fixture
def trials() -> list[Proposal]:
    study = PlainStudy(sweep_of("sampler: grid, space: {lora.r: [4, 8, 16]}"), "sweep-1", {})
    return list(iter(study.ask, None))


def step(number: int, **more: Any) -> Progress:
    return Progress(phase="training", step=number, steps=9, train_loss=float(-number), **more)


def refuse(call: str) -> None:
    raise ConnectionError(f"no route to http://me:secret@host for {call}\nand more")


def hang(call: str) -> None:
    threading.Event().wait()


def log_file(folder: SweepFolder, trial: Proposal) -> Path:
    return folder.trial(trial) / "tracking" / "log.jsonl"


def whole_trial(box: Outbox, trial: Proposal, attempt: int = 1) -> None:
    box.start(trial, attempt)
    box.report(trial, step(1))
    box.report(trial, step(2))
    box.end(trial, result_of("completed", 0.5))


# --- a recorder that answers ------------------------------------------------------------------------


def test_all_that_is_said_is_delivered_in_order_and_waiting_reports_at_once(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    gate = threading.Event()
    tracker.before = lambda call: assert_waited(gate)
    box = Outbox(tracker, folder)
    whole_trial(box, trials[0])
    gate.set()
    box.close("completed")
    assert tracker.calls == ["open", "start 0 1", "report 0 x2", "end 0", "close completed"]
    assert tracker.losses("0") == [(1, -1.0), (2, -2.0)]
    assert tracker.run("0").result == result_of("completed", 0.5)
    assert tracker.state == "completed"
    assert box.notes() == []


def assert_waited(gate: threading.Event) -> None:
    assert gate.wait(10)


def test_every_number_comes_out_as_it_went_in(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    said = step(3, eval_loss=float("inf"), lr=1e-300, notes=("dtype: ü",))
    before = time.time()
    box = Outbox(tracker, folder)
    box.start(trials[0], 1)
    box.report(trials[0], said)
    box.close("completed")
    (report,) = tracker.run("0").reports
    assert report.progress == said
    assert before - 0.01 < report.at_ms / 1000 < time.time() + 0.01
    assert tracker.run("0").proposal == trials[0]


def test_the_driver_never_waits_for_a_recorder_that_hangs(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    tracker.before = hang
    box = Outbox(tracker, folder)
    began = time.monotonic()
    for trial in trials:
        whole_trial(box, trial)
    assert (box.opened(), box.notes()) == ([], [])
    assert time.monotonic() - began < 1


def test_the_study_hears_of_each_run_that_it_does_not_know(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    tracker.runs["run-old"] = PlainRun(trials[1])
    box = Outbox(tracker, folder, {"1": "run-old", "2": None})
    for trial in trials:
        whole_trial(box, trial)
    box.close("completed")
    assert sorted(box.opened()) == [("0", "run-0"), ("2", "run-1")]
    assert box.opened() == []
    assert tracker.losses("1") == [(1, -1.0), (2, -2.0)]  # in the run that it had


def test_a_run_that_the_study_did_not_hear_of_before_its_driver_was_killed_is_said_again(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    first = Outbox(tracker, folder)
    whole_trial(first, trials[0])
    first.close("completed")
    assert Outbox(tracker, folder, {}).opened() == [("0", "run-0")]
    assert Outbox(tracker, folder, {"0": "run-0"}).opened() == []


def test_a_trial_that_ends_without_a_start_is_recorded_all_the_same(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    box = Outbox(tracker, folder)
    box.end(trials[0], result_of("failed"))
    box.close("failed")
    assert tracker.calls == ["open", "start 0 1", "end 0", "close failed"]


# --- attempts ---------------------------------------------------------------------------------------


def test_another_attempt_goes_into_the_same_run_without_the_steps_that_it_repeats(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    first = Outbox(tracker, folder)
    first.start(trials[0], 1)
    for number in (1, 2, 3):
        first.report(trials[0], step(number))
    first.close("interrupted")
    second = Outbox(tracker, folder)
    second.start(trials[0], 2)
    second.report(trials[0], step(3, eval_loss=0.25))  # measured now, and not before the kill
    second.report(trials[0], step(4))
    second.report(trials[0], Progress(phase="training", step=4, eval_loss=0.5))
    second.end(trials[0], result_of("completed", 0.5))
    second.close("completed")
    assert tracker.losses("0") == [(1, -1.0), (2, -2.0), (3, -3.0), (4, -4.0)]
    evals = [report.progress for report in tracker.run("0").reports if report.progress.eval_loss is not None]
    assert [(progress.step, progress.eval_loss) for progress in evals] == [(3, 0.25), (4, 0.5)]
    assert tracker.run("0").attempts == 2


def test_each_end_is_delivered_and_the_last_one_stands(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    box = Outbox(tracker, folder)
    box.start(trials[0], 1)
    box.end(trials[0], result_of("failed"))
    whole_trial(box, trials[0], attempt=2)
    box.close("completed")
    assert tracker.outcomes == ["failed", "completed"]
    assert tracker.run("0").result == result_of("completed", 0.5)


# --- a recorder that fails --------------------------------------------------------------------------


def test_a_recorder_that_fails_for_a_while_is_said_once_and_then_gets_everything_once(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    box = Outbox(tracker, folder)
    box.start(trials[0], 1)
    until(lambda: tracker.runs, 10)
    tracker.before = refuse
    whole_trial(box, trials[1])
    box.report(trials[0], step(1))
    box.end(trials[0], result_of("completed", 0.5))
    tried = len(tracker.calls)
    until(lambda: len(tracker.calls) > tried + 4, 10)
    tracker.before = lambda call: None
    until(lambda: len(tracker.outcomes) == 2, 10)
    box.close("completed")
    failed, answers = box.notes()
    assert failed.startswith("the tracker fails: ConnectionError: no route to http://me:***@host for ")
    assert failed.endswith("; records wait in the outbox")
    assert "\n" not in failed
    assert answers.startswith("the tracker answers again")
    assert tracker.losses("0") == [(1, -1.0)]
    assert tracker.losses("1") == [(1, -1.0), (2, -2.0)]
    assert len(tracker.runs) == 2


def test_the_waits_between_tries_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FIRST_WAIT_SECONDS", 1.0)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    turn = outbox._Turn()
    waits = []
    for _ in range(8):
        turn.put_off(60.0)
        waits.append(turn.due - 100)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_what_cannot_be_delivered_at_the_end_is_left_counted_and_delivered_by_the_next_driver(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    tracker.before = refuse
    first = Outbox(tracker, folder)
    for trial in trials:
        whole_trial(first, trial)
    began = time.monotonic()
    first.close("completed")
    assert 0.2 < time.monotonic() - began < 5
    left = "13 records wait in the outbox for the tracker; deliver with: python -m sweepsvc sync demo-1"
    assert first.notes()[-1] == left
    tracker.before = lambda call: None
    second = Outbox(tracker, folder)
    second.close("completed")
    assert [tracker.losses(trial.key) for trial in trials] == [[(1, -1.0), (2, -2.0)]] * 3
    assert tracker.outcomes == ["completed"] * 3
    assert sorted(second.opened()) == [("0", "run-0"), ("1", "run-1"), ("2", "run-2")]
    assert second.notes() == []


def test_a_slow_recorder_is_waited_for_at_the_end(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    tracker.before = lambda call: time.sleep(0.05)
    box = Outbox(tracker, folder)
    for trial in trials:
        whole_trial(box, trial)
    box.close("completed")  # 11 calls: far longer than the patience with one that fails
    assert tracker.outcomes == ["completed"] * 3
    assert tracker.calls[-1] == "close completed"


def test_a_recorder_that_hangs_at_the_end_is_left_to_sync(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "STANDSTILL_SECONDS", 0.3)
    tracker.before = hang
    box = Outbox(tracker, folder)
    whole_trial(box, trials[0])
    began = time.monotonic()
    box.close("completed")
    assert 0.2 < time.monotonic() - began < 5
    assert box.notes() == [
        "5 records wait in the outbox for the tracker; deliver with: python -m sweepsvc sync demo-1"
    ]


def test_a_recorder_that_is_slow_without_end_is_left_to_sync(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "END_SECONDS", 0.5)
    tracker.before = lambda call: time.sleep(0.15)
    box = Outbox(tracker, folder)
    for trial in trials:
        whole_trial(box, trial)
    began = time.monotonic()
    box.close("completed")
    assert 0.4 < time.monotonic() - began < 1.4  # all 11 calls take longer
    assert "wait in the outbox for the tracker" in box.notes()[-1]


def test_a_person_who_does_not_want_to_wait_leaves_the_rest(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    tracker.before = hang
    box = Outbox(tracker, folder)
    box.start(trials[0], 1)
    monkeypatch.setattr(Outbox, "_wait_for_the_end", interrupted)
    box.close("interrupted")
    assert box.notes() == [
        "2 records wait in the outbox for the tracker; deliver with: python -m sweepsvc sync demo-1"
    ]


def test_a_trial_that_the_recorder_always_refuses_holds_up_no_other(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    def refuse_the_first(call: str) -> None:
        if call == "end 0":
            refuse(call)

    tracker.before = refuse_the_first
    box = Outbox(tracker, folder)
    for trial in trials:
        whole_trial(box, trial)
    box.close("completed")
    assert tracker.outcomes == ["completed"] * 2
    assert tracker.state == "completed"
    notes = box.notes()
    assert len(notes) == 2
    assert notes[-1].startswith("1 record waits in the outbox")


def test_a_run_that_was_taken_away_is_replaced_by_one_with_the_whole_history(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    box = Outbox(tracker, folder)
    box.start(trials[0], 1)
    box.report(trials[0], step(1))
    until(lambda: tracker.runs and tracker.losses("0"), 10)
    del tracker.runs["run-0"]
    box.report(trials[0], step(2))
    until(lambda: tracker.runs and len(tracker.losses("0")) == 2, 10)
    box.end(trials[0], result_of("completed", 0.5))
    box.close("completed")
    assert tracker.losses("0") == [(1, -1.0), (2, -2.0)]
    assert tracker.run("0").result is not None


# --- a driver that is killed ------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["start 0 1", "report 0 x1", "end 0"])
def test_a_driver_that_is_killed_between_a_record_and_its_mark_makes_nothing_twice(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal], call: str
) -> None:
    reached = threading.Event()

    def die_after_it(done: str) -> None:
        if done == call:
            reached.set()
            hang(done)

    tracker.after = die_after_it
    killed = Outbox(tracker, folder)
    killed.start(trials[0], 1)
    killed.report(trials[0], step(1))
    killed.end(trials[0], result_of("completed", 0.5))
    assert reached.wait(10)
    tracker.after = lambda done: None
    next_one = Outbox(tracker, folder)
    next_one.close("completed")
    assert tracker.losses("0") == [(1, -1.0)]
    assert tracker.run("0").result == result_of("completed", 0.5)
    assert next_one.opened() == [("0", "run-0")]


def test_a_torn_last_line_is_cut_off_and_the_rest_goes_on(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    tracker.before = hang
    killed = Outbox(tracker, folder)
    killed.start(trials[0], 1)
    killed.report(trials[0], step(1))
    until(lambda: tracker.calls, 10)  # from here on its thread does nothing more
    with log_file(folder, trials[0]).open("ab") as log:
        log.write(b'{"at_ms": 17, "what": "rep')
    tracker.before = lambda call: None
    next_one = Outbox(tracker, folder)
    next_one.start(trials[0], 2)
    next_one.report(trials[0], step(2))
    next_one.close("interrupted")
    assert tracker.losses("0") == [(1, -1.0), (2, -2.0)]
    lines = log_file(folder, trials[0]).read_text().splitlines()
    assert [json.loads(line)["what"] for line in lines] == ["start", "report", "start", "report"]


def test_a_mark_that_a_power_cut_broke_means_that_all_is_said_again(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    first = Outbox(tracker, folder)
    whole_trial(first, trials[0])
    first.close("completed")
    (folder.trial(trials[0]) / "tracking" / "delivered.json").write_text("")
    Outbox(tracker, folder).close("completed")
    assert tracker.losses("0") == [(1, -1.0), (2, -2.0)]
    assert tracker.outcomes == ["completed", "completed"]


def test_a_line_that_cannot_be_read_is_left_out_and_said(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    tracker.before = refuse
    first = Outbox(tracker, folder)
    whole_trial(first, trials[0])
    first.close("completed")
    file = log_file(folder, trials[0])
    file.write_text(file.read_text().replace('"step": 1', '"stop": 1'))
    tracker.before = lambda call: None
    second = Outbox(tracker, folder)
    second.close("completed")
    assert tracker.losses("0") == [(2, -2.0)]
    (note,) = second.notes()
    assert "one of trial 0 is not: it is left out" in note


# --- a disk that fails ------------------------------------------------------------------------------


def test_a_disk_that_takes_nothing_is_said_once_and_stops_nothing(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    folder.path.mkdir()
    (folder.path / "trials").write_text("not a folder")
    box = Outbox(tracker, folder)
    whole_trial(box, trials[0])
    whole_trial(box, trials[1])
    box.close("completed")
    (note,) = box.notes()
    assert note.startswith("records for the tracker cannot be kept: ")
    assert "python -m sweepsvc sync demo-1" in note
    assert tracker.state == "completed"


def test_a_disk_that_takes_half_a_record_keeps_none_of_it(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal], monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Outbox(tracker, folder)
    box.start(trials[0], 1)
    before = log_file(folder, trials[0]).read_bytes()
    with monkeypatch.context() as full:
        write = os.write
        full.setattr("sweepsvc.tracklog.os.write", lambda file, data: write(file, data[:20]))
        box.report(trials[0], step(1))
    assert log_file(folder, trials[0]).read_bytes() == before
    box.report(trials[0], step(2))
    box.close("completed")
    assert tracker.losses("0") == [(2, -2.0)]
    (note,) = box.notes()
    assert "a record needs" in note


def test_a_mark_that_cannot_be_written_is_no_fault_of_the_tracker(
    tracker: Tracker, folder: SweepFolder, trials: list[Proposal]
) -> None:
    (folder.trial(trials[0]) / "tracking" / "delivered.json").mkdir(parents=True)
    box = Outbox(tracker, folder)
    whole_trial(box, trials[0])
    box.close("completed")
    assert tracker.losses("0") == [(1, -1.0), (2, -2.0)]
    assert tracker.state == "completed"
    (note,) = box.notes()
    assert note.startswith("records for the tracker cannot be kept: IsADirectoryError")


# --- many trials ------------------------------------------------------------------------------------


def test_two_thousand_delivered_trials_are_passed_over_in_far_less_than_a_second(
    tracker: Tracker, folder: SweepFolder
) -> None:
    for number in range(2000):
        tracking = folder.path / "trials" / str(number) / "tracking"
        tracking.mkdir(parents=True)
        (tracking / "log.jsonl").write_text("x" * 9 + "\n")
        (tracking / "delivered.json").write_text('{"bytes": 10, "run_id": "run", "maybe": false}')
    began = time.monotonic()
    box = Outbox(tracker, folder, {str(number): "run" for number in range(2000)})
    assert time.monotonic() - began < 1
    box.close("completed")
    assert tracker.calls == ["open", "close completed"]


def test_a_driver_that_died_before_it_told_an_end_is_known_for_that(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    [first, second] = [TrackLog(folder.path / "trials" / key) for key in ("0", "1")]
    long = TrialResult(
        outcome="failed", failure=Failure(kind="bug", message="why", traceback="x" * 2 * CHUNK_BYTES)
    )
    for log, key in ((first, "0"), (second, "1")):
        log.append(Started(Proposal(key, TrialSpec(), int(key)), 1, 1))
        log.append(Report(Progress(phase="training", step=1, train_loss=1.0), 2))
    assert first.lacks_an_end
    first.append(Ended(long, 3))
    assert not first.lacks_an_end
    outbox = Outbox(PlainRecorder("demo-1"), folder)
    assert set(outbox.unended()) == {"1"}
    outbox.close("interrupted")
