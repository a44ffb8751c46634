"""A sweep followed from its study and its tracker: what is said, once, and when it ends."""

from __future__ import annotations

import io
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.errors import CannotStart, UnknownSweep
from sweeps.result import Progress, TrialResult
from sweepsvc import cli, watch
from sweepsvc.home import Home
from sweepsvc.owner import this_process
from sweepsvc.plain import PlainStudy
from sweepsvc.protocols import Point, Proposal, RunHistory, SweepRecord, SweepState
from sweepsvc.study import OptunaStudy, StudyReader, open_study
from sweepsvc.view import outcome_text, progress_text
from sweepsvc.watch import Changes, Newest, newer
from tests.sweepsvc.samples import result_of, sweep_of
from tests.waiting import until

SPACE = 'space: {lora.r: [8, 32], lora.alpha: ["2*r", 1]}'


class Heard:
    """A view that keeps what it hears."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def started(self, proposal: Proposal) -> None:
        self.said.append(f"{proposal.key} started")

    def reported(self, proposal: Proposal, progress: Progress) -> None:
        self.said.append(f"{proposal.key} {progress_text(progress)}")

    def again(self, proposal: Proposal, why: str) -> None:
        self.said.append(f"{proposal.key} {why}")

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        self.said.append(f"{proposal.key} {outcome_text(result)}")

    def news(self) -> list[str]:
        """What was said since the last call."""
        said, self.said = self.said, []
        return said


class Silent:
    """A tracker without a number."""

    def newest(self, run_id: str) -> Mapping[str, Point] | None:
        return None

    def history(self, run_id: str) -> RunHistory | None:
        return None


class Tracker(Silent):
    """A tracker with the numbers that a test puts in, or none that answers."""

    def __init__(self) -> None:
        self.numbers: dict[str, dict[str, Point]] = {}
        self.trouble = ""
        self.asked = threading.Event()

    def newest(self, run_id: str) -> Mapping[str, Point] | None:
        self.asked.set()
        if self.trouble:
            raise CannotStart(self.trouble)
        return self.numbers.get(run_id)


@pytest.fixture
def study() -> PlainStudy:
    return PlainStudy(sweep_of(f"sampler: grid, {SPACE}", "baseline: false"), "demo-1", {})


def now(study: PlainStudy) -> SweepRecord:
    """As the study stands, with a driver that lives."""
    return replace(study.read(), owner=this_process())


def next_of(study: PlainStudy | OptunaStudy) -> Proposal:
    proposal = study.ask()
    assert proposal is not None
    return proposal


def looked_at(study: PlainStudy) -> tuple[Heard, Proposal, Changes]:
    """A trial that has started and has a run, and somebody who looks on from here."""
    view, proposal = Heard(), next_of(study)
    study.started(proposal)
    study.tracked(proposal.key, f"run-{proposal.key}")
    return view, proposal, Changes(view, now(study))


def numbers(step: int, loss: float, at_ms: int | None = None) -> dict[str, Point]:
    when = 1_000 * step if at_ms is None else at_ms
    return {"train.loss": Point(step, when, loss), "tokens_per_second": Point(step, when, 800.0)}


# --- events -----------------------------------------------------------------------------------------


def test_each_event_is_told_once_in_its_order(study: PlainStudy) -> None:
    view = Heard()
    changes = Changes(view, now(study))
    first, second = next_of(study), next_of(study)
    changes.tell(now(study))
    assert view.news() == []  # both wait
    study.started(first)
    study.started(second)
    changes.tell(now(study))
    changes.tell(now(study))
    assert view.news() == ["0 started", "1 started"]
    study.tell(first, result_of("completed", 0.5))
    changes.tell(now(study))
    study.tell(second, result_of("failed"))
    changes.tell(now(study))
    changes.tell(now(study))
    assert view.news() == [
        "0 completed: blimp_causative 0.500 ± 0.010, 3 s",
        "1 failed: diverged: the loss is nan",
    ]


def test_what_was_before_is_not_told_but_for_what_runs(study: PlainStudy) -> None:
    done, retried, _ = next_of(study), next_of(study), next_of(study)
    study.started(done)
    study.tell(done, result_of("completed", 0.5))
    study.started(retried)
    study.setback(retried, "process_lost: gone")
    study.started(retried)
    view = Heard()
    Changes(view, now(study)).tell(now(study))
    assert view.news() == ["1 started"]


def test_attempts_between_two_readings_are_told_one_by_one(study: PlainStudy) -> None:
    view = Heard()
    changes = Changes(view, now(study))
    proposal = next_of(study)
    for why in ("process_lost: first", "download_failed: second"):
        study.started(proposal)
        study.setback(proposal, why)
    changes.tell(now(study))
    assert view.news() == [
        "0 started",
        "0 process_lost: first; it is tried again",
        "0 started",
        "0 download_failed: second; it is tried again",
    ]
    study.started(proposal)
    study.tell(proposal, result_of("completed", 0.5))
    changes.tell(now(study))
    assert [text.partition(":")[0] for text in view.news()] == ["0 started", "0 completed"]


def test_a_trial_that_was_cut_or_is_opened_again_goes_on(study: PlainStudy) -> None:
    view = Heard()
    changes = Changes(view, now(study))
    proposal = next_of(study)
    study.started(proposal)
    changes.tell(now(study))
    study.started(proposal)  # by another driver: the first one was killed
    changes.tell(now(study))
    assert view.news() == ["0 started", "0 was cut off, and goes on", "0 started"]
    study.tell(proposal, result_of("interrupted"))
    changes.tell(now(study))
    study.reopen(proposal)
    changes.tell(now(study))
    study.started(proposal)
    study.tell(proposal, result_of("completed", 0.5))
    changes.tell(now(study))
    assert [text.partition(":")[0] for text in view.news()] == ["0 interrupted", "0 started", "0 completed"]


def test_a_new_driver_and_the_last_proposal_are_said(study: PlainStudy) -> None:
    view = Heard()
    changes = Changes(view, now(study))
    while study.ask() is not None:
        pass
    changes.tell(replace(now(study), owner="gpu-3:4711:1"))
    changes.tell(replace(now(study), owner="gpu-3:4711:1"))
    assert view.news() == ["driven by process 4711 on gpu-3 now", "every trial of the sweep is proposed: 4"]


# --- numbers of running trials ----------------------------------------------------------------------


def test_numbers_are_reported_of_running_trials_alone_and_never_twice(study: PlainStudy) -> None:
    view = Heard()
    proposal = next_of(study)
    study.started(proposal)
    changes = Changes(view, now(study))
    assert changes.running() == {}  # it has no run yet
    study.tracked("0", "run-0")
    changes.tell(now(study))
    assert changes.running() == {"0": "run-0"}
    view.news()
    for loss in (2.5, 2.5):
        changes.report({"0": numbers(20, loss), "9": numbers(1, 1.0)})
    assert view.news() == ["0 training step 20/390  loss 2.5000  800 tokens/s"]
    for _ in range(2):
        changes.report({"0": numbers(21, math.nan)})
    assert view.news() == ["0 training step 21/390  loss nan  800 tokens/s  369 s left"]
    study.tell(proposal, result_of("completed", 0.5))
    changes.tell(now(study))
    view.news()
    changes.report({"0": numbers(22, 1.0)})
    assert (view.news(), changes.running()) == ([], {})


def test_a_held_out_loss_is_reported_once_at_its_own_step() -> None:
    held_out = {"eval.loss": Point(20, 20_500, 1.75)}
    at_once = newer({}, numbers(20, 2.5) | held_out, 390)
    assert [(one.step, one.train_loss, one.eval_loss) for one in at_once] == [(20, 2.5, 1.75)]
    later = newer(numbers(20, 2.5), numbers(23, 2.0) | held_out, 390)
    assert [(one.step, one.train_loss, one.eval_loss) for one in later] == [(20, None, 1.75), (23, 2.0, None)]
    assert newer(numbers(23, 2.0) | held_out, numbers(23, 2.0) | held_out, 390) == []


def test_after_its_last_step_a_trial_is_scored(study: PlainStudy) -> None:
    view, proposal, changes = looked_at(study)
    for step, at_ms in ((380, 380_000), (390, 390_000), (390, 390_001)):
        changes.report({"0": numbers(step, 1.5, at_ms)})
    assert [line.split("  ")[0] for line in view.news()] == [
        "0 started",
        "0 training step 380/390",
        "0 training step 390/390",
        "0 evaluating",
        "0 training step 390/390",
    ]
    study.setback(proposal, "process_lost: gone")
    study.started(proposal)  # from a checkpoint before its last step
    changes.tell(now(study))
    view.news()
    changes.report({"0": numbers(390, 1.5, 390_001)})  # those of the first attempt
    assert view.news() == []
    changes.report({"0": numbers(390, 1.5, 395_000)})
    assert view.news() == ["0 training step 390/390  loss 1.5000  800 tokens/s", "0 evaluating"]


def test_the_last_step_of_an_attempt_that_nobody_saw_says_nothing_of_this_one(study: PlainStudy) -> None:
    proposal = next_of(study)
    study.started(proposal)
    study.setback(proposal, "evaluation_failed: no such task")
    study.started(proposal)
    study.tracked("0", "run-0")
    view = Heard()
    changes = Changes(view, now(study))
    changes.report({"0": numbers(390, 1.5)})
    assert "0 evaluating" not in view.news()


def test_no_pace_is_told_from_one_attempt_to_the_next(study: PlainStudy) -> None:
    view, proposal, changes = looked_at(study)
    changes.report({"0": numbers(200, 1.5)})
    study.setback(proposal, "process_lost: gone")
    study.started(proposal)
    changes.tell(now(study))
    view.news()
    changes.report({"0": numbers(203, 1.5, at_ms=313_000)})
    assert view.news() == ["0 training step 203/390  loss 1.5000  800 tokens/s"]
    changes.report({"0": numbers(213, 1.5, at_ms=323_000)})
    assert view.news() == ["0 training step 213/390  loss 1.5000  800 tokens/s  177 s left"]


def test_the_seconds_that_are_left_are_told_by_the_pace_between_two_looks() -> None:
    [first] = newer({}, numbers(20, 2.5), 390)
    [second] = newer(numbers(20, 2.5), numbers(30, 2.0, at_ms=25_000), 390)
    assert (first.seconds_left, second.seconds_left) == (None, 0.5 * 360)
    [resumed] = newer(numbers(20, 2.5), numbers(15, 2.6, at_ms=90_000), 390)  # it goes on from before
    assert resumed.seconds_left is None


def test_final_numbers_are_no_report() -> None:
    before = numbers(390, 1.5)
    final = numbers(390, 1.5, at_ms=999_000) | {"wall_seconds": Point(390, 999_000, 60.0)}
    assert newer(before, final, 390) == []


def test_a_tracker_that_is_away_is_said_once_and_once_that_it_is_back() -> None:
    tracker = Tracker()
    tracker.trouble = "refused: http://me:secret@host"
    notes: list[str] = []
    found: dict[str, Mapping[str, Point]] = {}
    with Newest(tracker, poll_seconds=0.001) as newest:

        def heard() -> tuple[int, int]:
            notes.extend(newest.notes())
            found.update(newest.take())
            return len(notes), len(found)

        newest.want({"0": "run-0"})
        for _ in range(3):
            tracker.asked.clear()
            assert tracker.asked.wait(10)
        tracker.numbers["run-0"] = numbers(1, 2.0)
        tracker.trouble = ""
        until(lambda: heard() == (2, 1), 10)
    assert found["0"]["train.loss"].value == 2.0
    assert notes == [
        "the tracker does not answer, what the study says goes on: refused: http://me:***@host",
        "the tracker answers again",
    ]


# --- following --------------------------------------------------------------------------------------


class Scripted:
    """A study that goes one step on before each reading; a step may raise."""

    def __init__(self, study: PlainStudy, steps: Iterator[None], owner: str = "") -> None:
        self._study = study
        self._steps = steps
        self._owner = owner or this_process()
        self.readings = 0

    def read(self) -> SweepRecord:
        self.readings += 1
        next(self._steps, None)
        return replace(self._study.read(), owner=self._owner)


def followed(study: Scripted, record: SweepRecord) -> tuple[SweepRecord, list[str]]:
    view = Heard()
    with Newest(Silent(), poll_seconds=0.001) as newest:
        return watch.follow(study, newest, view, record, poll_seconds=0.001), view.said


def test_a_sweep_is_followed_to_its_end_through_a_study_that_is_away_for_a_while(study: PlainStudy) -> None:
    class Steps:
        """What happens before each reading."""

        def __init__(self) -> None:
            self.number = 0

        def __iter__(self) -> Steps:
            return self

        def __next__(self) -> None:
            self.number += 1
            if self.number == 1:
                study.started(next_of(study))
            elif self.number in (2, 3):
                raise CannotStart("the study database must be reachable")
            elif self.number == 5:
                study.tell(study.read().trials[0].proposal, result_of("completed", 0.5))
                study.close("completed")

    record, said = followed(Scripted(study, Steps()), now(study))
    assert record.state == "completed"
    assert said == [
        "0 started",
        "the study does not answer, it is asked again until it does: the study database must be reachable",
        "the study answers again",
        "0 completed: blimp_causative 0.500 ± 0.010, 3 s",
    ]


def test_the_last_words_of_a_driver_that_has_just_ended_are_read(
    study: PlainStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps() -> Iterator[None]:
        study.started(next_of(study))
        yield
        monkeypatch.setattr("sweepsvc.owner.lives", lambda owner, heartbeat: False)
        yield  # read as running, and the driver is gone
        study.tell(study.read().trials[0].proposal, result_of("completed", 0.5))
        study.close("completed")
        yield

    record, said = followed(Scripted(study, steps()), now(study))
    assert record.state == "completed"
    assert said[-1].startswith("0 completed")


def test_a_sweep_whose_driver_was_killed_ends_as_interrupted(
    study: PlainStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps() -> Iterator[None]:
        study.started(next_of(study))
        yield
        monkeypatch.setattr("sweepsvc.owner.lives", lambda owner, heartbeat: False)
        yield

    record, said = followed(Scripted(study, steps()), now(study))
    assert (record.state, record.trials[0].state) == ("interrupted", "interrupted")
    assert said == ["0 started"]


def test_a_reading_that_takes_long_is_repeated_less_often(study: PlainStudy) -> None:
    def steps() -> Iterator[None]:
        for _ in range(3):
            time.sleep(0.02)
            yield
        study.close("completed")
        yield

    began = time.monotonic()
    followed(Scripted(study, steps()), now(study))
    assert time.monotonic() - began > 3 * 0.02 / watch.SHARE


# --- the study, read again and again ----------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.chdir(tmp_path)
    for name in ("SWEEPSVC_HOME", "SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return Home()


def opened(home: Home, sweep_id: str = "demo-1", owner: str = "") -> OptunaStudy:
    sweep = sweep_of(f"sampler: grid, {SPACE}", "baseline: true")
    return open_study(sweep, sweep_id, home.study_url, {"owner": owner or this_process()})


def test_a_reader_sees_what_the_driver_writes_and_makes_anew_only_what_changed(home: Home) -> None:
    driver = opened(home)
    baseline = driver.baselines()[0]
    first, second = next_of(driver), next_of(driver)
    driver.started(first)
    driver.tell(first, result_of("completed", 0.5))
    driver.started(second)
    reader = StudyReader("demo", home.study_url)
    before = reader.read()
    assert before == driver.read()
    driver.tell(second, result_of("failed"))
    driver.started(baseline)
    third = next_of(driver)
    driver.tracked(first.key, "run-0")  # of one that has ended: kept beside it
    after = reader.read()
    assert after == driver.read()
    assert [trial.state for trial in after.trials] == ["completed", "failed", "waiting"]
    assert after.trials[0].proposal is before.trials[0].proposal
    assert after.trials[0].mlflow_run_id == "run-0"
    driver.reopen(second)
    driver.started(second)
    driver.started(third)
    last = reader.read()
    assert [trial.state for trial in last.trials] == ["completed", "running", "running"]
    assert last.trials[1].attempts == 2
    assert last == driver.read()


def test_a_reader_reads_no_trial_that_has_ended_a_second_time(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = opened(home)
    for _ in range(3):
        proposal = next_of(driver)
        driver.started(proposal)
        driver.tell(proposal, result_of("completed", 0.5))
    driver.started(next_of(driver))
    reader = StudyReader(None, home.study_url)
    rows: list[int] = []
    read = reader._storage._get_trials

    def counted(*arguments: object, **options: object) -> object:
        found = read(*arguments, **options)
        rows.append(len(found))
        return found

    monkeypatch.setattr(reader._storage, "_get_trials", counted)
    for _ in range(3):
        assert len(reader.read().trials) == 4
    assert rows == [4, 1, 1]


def test_a_study_that_is_away_is_not_made_and_read_again_when_it_is_back(home: Home) -> None:
    driver = opened(home)
    driver.close("completed")
    reader = StudyReader(None, home.study_url)
    file = home.path / "study.db"
    away = file.rename(file.with_name("away.db"))
    with pytest.raises(CannotStart, match="the study database must be reachable"):
        reader.read()
    assert not file.exists()
    away.rename(file)
    assert reader.read().state == "completed"
    file.write_bytes(b"no database" * 100)
    with pytest.raises(CannotStart, match="the study database must be reachable"):
        reader.read()


def test_a_sweep_that_is_deleted_is_unknown(home: Home) -> None:
    driver = opened(home)
    reader = StudyReader(None, home.study_url)
    driver.discard()
    with pytest.raises(UnknownSweep, match="demo-1 was deleted"):
        reader.read()


# --- the command ------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sweepsvc", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("failed", 3), ("interrupted", 4)])
def test_a_sweep_that_has_ended_is_shown_with_the_exit_code_of_launch(
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    state: SweepState,
    code: int,
) -> None:
    driver = opened(home)
    proposal = next_of(driver)
    driver.started(proposal)
    driver.tell(proposal, result_of("completed", 0.5))
    driver.close(state)
    assert run(monkeypatch, "watch", "demo") == code
    shown = capsys.readouterr().out
    assert f"demo-1: {state}" in shown
    assert "0.500 ± 0.010" in shown
    assert "-m sweepsvc status demo-1" in shown
    assert ("-m sweepsvc resume demo-1" in shown) == (state != "completed")
    assert [path.name for path in home.path.iterdir()] == ["study.db"]


def test_ctrl_c_ends_the_watching_and_not_the_sweep(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = opened(home)
    proposal = next_of(driver)
    driver.started(proposal)
    driver.tell(proposal, result_of("completed", 0.5))
    driver.started(next_of(driver))

    def press_ctrl_c(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sweepsvc.watch.time.sleep", press_ctrl_c)
    assert run(monkeypatch, "watch") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"sweep demo-1, driven by process {this_process().rsplit(':', 2)[1]} on")
    assert any("0.500 ± 0.010" in line for line in lines)
    assert lines[-2].endswith("trial 1 (lora.r=8, lora.alpha=1) started")
    assert lines[-1] == "the watching has ended, the sweep demo-1 has not: it goes on where it runs"
    assert driver.read().trials[1].state == "running"


def test_many_that_ended_before_are_counted_in_a_line(study: PlainStudy) -> None:
    for score in (0.5, 0.75):
        proposal = next_of(study)
        study.tell(proposal, result_of("completed", score))
    record = now(study)
    console = Console(file=io.StringIO(), width=200)
    line = watch._before(record, [*record.trials] * 600, console)
    assert line == (
        "1,200 ended before: 1,200 completed; best so far score.mean 0.75 (trial 1 (lora.r=8, lora.alpha=1))"
    )


def test_an_unknown_sweep_is_bad_input_and_watching_makes_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "watch", "nope") == 2
    assert run(monkeypatch, "logs", "nope", "--trial", "0") == 2
    assert "a sweep must have been launched" in capsys.readouterr().err
    assert not home.path.exists()
