"""Launching, stopping and going on with a sweep, over the real study and tracker, with scripted trials."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from sweeps.errors import CannotContinue, CannotStart, UnknownSweep
from sweeps.result import Failure, Progress, Score, TrialResult
from sweeps.spec import TrialSpec
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep
from sweeps.trial.paths import TrialFolder
from sweepsvc import owner, session
from sweepsvc.home import Home, SweepFolder
from sweepsvc.nextsteps import next_steps
from sweepsvc.plain import SerialScheduler
from sweepsvc.protocols import SweepRecord
from sweepsvc.resume import Selection
from sweepsvc.session import Asked
from sweepsvc.study import load_record

TEXT = """\
name: demo
trial: {evaluate: {tasks: [blimp_causative]}}
search:
  sampler: random
  trials: 3
  space: {lora.r: [1, 2, 3, 4, 5, 6, 7, 8]}
baseline: false
resources: {gpus: 0}
"""

Plays = Callable[[TrialSpec, Path], TrialResult | None]


class Trials:
    """A runner whose trials end as `plays` says; None is a process that dies with its driver."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.plays: Plays = lambda spec, folder: scored(1 / spec.lora.r)

    def __call__(self, spec: TrialSpec, folder: Path) -> Iterator[Progress]:
        self.ran.append(spec.lora.r)
        files = TrialFolder(folder)
        files.write_spec(spec)
        yield Progress(phase="training", step=1, steps=2, train_loss=1.0)
        result = self.plays(spec, folder)
        if result is None:
            raise Killed
        files.write_result(result)


class Killed(BaseException):
    """The driver's process is gone."""


class Alone(SerialScheduler):
    """Tells nobody of a trial whose process died with the driver."""

    def _run_one(self, conductor: Any, proposal: Any) -> None:
        conductor.started(proposal)
        for progress in self._runner(proposal.spec, conductor.folder(proposal)):
            conductor.reported(proposal, progress)
        result = TrialFolder(conductor.folder(proposal)).read_result()
        assert result is not None
        conductor.ended(proposal, result)


def scored(value: float) -> TrialResult:
    return TrialResult(outcome="completed", scores={"blimp_causative": Score(value=value)})


def failed(kind: Any) -> TrialResult:
    return TrialResult(outcome="failed", failure=Failure(kind=kind, message=f"a {kind}"))


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    made = Trials()

    @contextlib.contextmanager
    def scheduler(sweep: Sweep, folder: SweepFolder, joined: session.Joined) -> Iterator[SerialScheduler]:
        yield Alone(made)

    monkeypatch.setattr(session, "_scheduler", scheduler)
    return made


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name in ("SWEEPSVC_HOME", "SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return Home(tmp_path / "home")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(TEXT)
    return path


def launch(file: Path, home: Home, sweep_id: str = "demo-1") -> SweepRecord:
    return session.launch(load_sweep(file), home, sweep_id)


def killed_in_trial(number: int, file: Path, home: Home, trials: Trials) -> None:
    """A sweep whose driver dies in its trial of that number."""
    plays = trials.plays
    trials.plays = lambda spec, folder: None if len(trials.ran) == number + 1 else scored(1 / spec.lora.r)
    with pytest.raises(Killed):
        launch(file, home)
    trials.plays = plays


def states(record: SweepRecord) -> list[str]:
    return [trial.state for trial in record.trials]


def runs(home: Home) -> list[Any]:
    client = MlflowClient(tracking_uri=home.tracking_uri)
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return [run for run in found if "mlflow.parentRunId" in run.data.tags]


# --- going on ---------------------------------------------------------------------------------------


def test_a_sweep_whose_driver_died_goes_on_with_the_trial_that_was_cut(
    file: Path, home: Home, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_in_trial(1, file, home, trials)
    before = load_record("demo-1", home.study_url).trials[0]
    record = session.resume("demo", home, Asked())
    assert (record.state, states(record)) == ("completed", ["completed"] * 3)
    assert [trial.attempts for trial in record.trials] == [1, 2, 1]
    assert record.trials[0] == before
    assert trials.ran == [trials.ran[0], trials.ran[1], trials.ran[1], trials.ran[3]]
    assert [run.info.status for run in runs(home)] == ["FINISHED"] * 3
    assert [run.info.run_id for run in runs(home)] == [trial.mlflow_run_id for trial in record.trials]
    said = capsys.readouterr().out
    assert "finished: 1\n" in said
    assert "to resume: trial 1 from its beginning\n" in said
    assert "to start: what the search has not proposed yet\n" in said
    assert "lost, cut before a first checkpoint: trial 1\n" in said


def test_a_result_that_the_worker_wrote_when_the_driver_was_gone_is_told_and_not_computed_again(
    file: Path, home: Home, trials: Trials
) -> None:
    killed_in_trial(1, file, home, trials)
    TrialFolder(home.sweep("demo-1").path / "trials" / "1").write_result(scored(0.875))
    record = session.resume("demo-1", home, Asked())
    assert record.trials[1].value == 0.875
    assert len(trials.ran) == 3
    assert [run.data.metrics["score.mean"] for run in runs(home)] == [trial.value for trial in record.trials]


def test_a_finished_sweep_has_nothing_to_resume(
    file: Path, home: Home, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = launch(file, home)
    monkeypatch.setattr(session, "_scheduler", lambda *_: pytest.fail("started a scheduler"))
    again = session.resume("demo-1", home, Asked())
    assert (again.state, again.trials) == ("completed", first.trials)


def test_more_trials_can_be_added_and_are_other_ones(file: Path, home: Home, trials: Trials) -> None:
    launch(file, home)
    assert len(session.resume("demo-1", home, Asked(add_trials=2)).trials) == 5
    record = session.resume("demo-1", home, Asked(add_trials=1))
    assert (record.state, len(record.trials)) == ("completed", 6)
    assert len(set(trials.ran)) == len(trials.ran) == 6


def test_what_failed_is_run_again_but_for_what_would_fail_again(
    file: Path, home: Home, trials: Trials
) -> None:
    ends = iter([failed("bug"), failed("diverged"), scored(0.5)])
    trials.plays = lambda spec, folder: next(ends)
    assert launch(file, home).state == "failed"
    trials.plays = lambda spec, folder: scored(0.25)
    record = session.resume("demo-1", home, Asked())
    assert (record.state, states(record)) == ("failed", ["completed", "failed", "completed"])
    record = session.resume("demo-1", home, Asked(Selection(failed=True)))
    assert (record.state, [trial.attempts for trial in record.trials]) == ("completed", [2, 2, 1])
    [_, once_failed, _] = runs(home)
    assert once_failed.info.status == "FINISHED"
    assert "failure" not in once_failed.data.tags


def test_only_the_named_trials_run_and_a_finished_one_cannot_be_named(
    file: Path, home: Home, trials: Trials
) -> None:
    killed_in_trial(1, file, home, trials)
    record = session.resume("demo-1", home, Asked(Selection(trials=("1",))))
    assert (record.state, states(record)) == ("interrupted", ["completed", "completed"])
    with pytest.raises(CannotStart, match="a finished trial is never run again, got --trial 0"):
        session.resume("demo-1", home, Asked(Selection(trials=("0",))))


# --- what is refused --------------------------------------------------------------------------------


def test_a_file_that_changed_its_meaning_is_refused_with_the_differences(
    file: Path, home: Home, trials: Trials
) -> None:
    killed_in_trial(1, file, home, trials)
    file.write_text(TEXT.replace("7, 8]", "7, 16]").replace("trials: 3", "trials: 2"))
    with pytest.raises(CannotStart) as refused:
        session.resume("demo-1", home, Asked())
    assert "search.space.lora.r: [1, 2, 3, 4, 5, 6, 7, 8] -> [1, 2, 3, 4, 5, 6, 7, 16]" in str(refused.value)
    assert "search.trials: 3 -> 2" in str(refused.value)
    assert len(trials.ran) == 2
    file.write_text("name: [")
    with pytest.raises(CannotStart, match="--as-launched"):
        session.resume("demo-1", home, Asked())
    assert session.resume("demo-1", home, Asked(as_launched=True)).state == "completed"


def test_a_larger_budget_in_the_file_is_taken_and_kept(file: Path, home: Home, trials: Trials) -> None:
    launch(file, home)
    file.write_text("# more\n" + TEXT.replace("trials: 3", "trials: 5"))
    assert len(session.resume("demo-1", home, Asked()).trials) == 5
    assert home.sweep("demo-1").sweep_file.read_text() == file.read_text()
    file.unlink()
    assert len(session.resume("demo-1", home, Asked()).trials) == 5


def test_a_sweep_without_a_budget_has_none_to_add_to(file: Path, home: Home, trials: Trials) -> None:
    file.write_text(TEXT.replace("random", "grid").replace("  trials: 3\n", ""))
    launch(file, home)
    with pytest.raises(CannotStart, match=r"--add-trials adds to search\.trials, got 2"):
        session.resume("demo-1", home, Asked(add_trials=2))


def test_a_second_driver_is_refused_and_told_of_the_first(file: Path, home: Home, trials: Trials) -> None:
    refusals: list[str] = []

    def try_the_same(spec: TrialSpec, folder: Path) -> TrialResult:
        for second in (lambda: session.resume("demo-1", home, Asked()), lambda: launch(file, home)):
            with pytest.raises(CannotStart) as refused:
                second()
            refusals.append(str(refused.value))
        with pytest.raises(CannotStart):
            session.sync("demo-1", home)
        return scored(0.5)

    trials.plays = try_the_same
    assert launch(file, home).state == "completed"
    assert len(trials.ran) == 3
    named = owner.named(owner.this_process())
    assert all(f"demo-1 is driven by {named}" in refusal for refusal in refusals)


def test_a_driver_on_another_host_is_believed_until_a_person_knows_better(
    file: Path, home: Home, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in_trial(0, file, home, trials)
    with monkeypatch.context() as patched:
        patched.setattr("socket.gethostname", lambda: "another-host")
        with pytest.raises(CannotStart, match="--take-over"):
            session.resume("demo-1", home, Asked())
        assert session.resume("demo-1", home, Asked(take_over=True)).state == "completed"


def test_an_unknown_sweep_and_a_home_of_a_later_version_are_refused(
    file: Path, home: Home, trials: Trials
) -> None:
    with pytest.raises(UnknownSweep):
        session.resume("demo-1", home, Asked())
    assert not home.path.exists()
    launch(file, home)
    (home.path / "format").write_text("2\n")
    for refused in (
        lambda: session.resume("demo-1", home, Asked()),
        lambda: session.stop("demo-1", home),
        lambda: session.sync("demo-1", home),
    ):
        with pytest.raises(CannotStart, match="a home must be of format 1 or lower, got '2'"):
            refused()


def test_a_launch_that_was_killed_before_its_sweep_began_can_be_repeated(
    file: Path, home: Home, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id would otherwise be taken for good, by a sweep that there is not."""

    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("sweepsvc.study._attributes", dies)
        patched.setattr("sweepsvc.launch.shutil.rmtree", lambda *_, **__: None)  # killed: nothing is undone
        with pytest.raises(Killed):
            launch(file, home)
    with pytest.raises(UnknownSweep):
        session.resume("demo-1", home, Asked())
    assert launch(file, home).state == "completed"
    with pytest.raises(CannotStart, match="an id of its own"):
        launch(file, home)


# --- stopping ---------------------------------------------------------------------------------------


def test_stop_has_the_driver_end_and_says_how_to_go_on(
    file: Path, home: Home, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    stoppers: list[threading.Thread] = []

    def stop_in_the_second(spec: TrialSpec, folder: Path) -> TrialResult:
        if len(trials.ran) == 2:
            stopper = threading.Thread(target=session.stop, args=("demo-1", home))
            stopper.start()
            stoppers.append(stopper)
            while not home.sweep("demo-1").stop.exists():
                time.sleep(0.01)
            return TrialResult(outcome="interrupted")
        return scored(0.5)

    trials.plays = stop_in_the_second
    record = launch(file, home)
    stoppers[0].join(10)
    assert not stoppers[0].is_alive()
    assert (record.state, states(record)) == ("interrupted", ["completed", "interrupted"])
    said = capsys.readouterr().out
    assert said.count("-m sweepsvc resume demo-1") == 2
    with pytest.raises(CannotStart, match="only a sweep that runs can be stopped, and demo-1 is interrupted"):
        session.stop("demo-1", home)
    trials.plays = lambda spec, folder: scored(0.5)
    assert session.resume("demo-1", home, Asked()).state == "completed"


def test_sigterm_before_the_first_trial_leaves_nothing(
    file: Path, home: Home, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "gather", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        launch(file, home)
    assert not home.path.exists()


# --- the tracker ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_python_lost_before_the_first_trial_is_heard_all_the_same(
    file: Path, home: Home, trials: Trials, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = session.gather

    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(number)  # what it raises here goes nowhere

    def gather(source: Path) -> dict[str, str]:
        Freed()
        return real(source)

    monkeypatch.setattr(session, "gather", gather)
    record = session.launch(load_sweep(file), home, "demo-1")
    assert (trials.ran, record.state) == ([], "interrupted")
    monkeypatch.setattr(session, "gather", real)
    assert session.resume("demo-1", home, Asked()).state == "completed"
    assert len(trials.ran) == 3


def test_a_tracker_that_is_away_when_a_sweep_is_resumed_is_made_whole_later(
    file: Path,
    home: Home,
    trials: Trials,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed_in_trial(1, file, home, trials)
    with monkeypatch.context() as patched:
        patched.setattr("sweepsvc.outbox.PATIENCE_SECONDS", 0.1)
        patched.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        record = session.resume("demo-1", home, Asked())
    assert (record.state, states(record)) == ("completed", ["completed"] * 3)
    said = capsys.readouterr().out
    assert "the tracker does not answer" in said
    assert "python -m sweepsvc sync demo-1" in said
    session.sync("demo-1", home)
    assert [run.info.status for run in runs(home)] == ["FINISHED"] * 3
    known = [trial.mlflow_run_id for trial in load_record("demo-1", home.study_url).trials]
    assert known == [run.info.run_id for run in runs(home)]


def test_a_tracker_whose_store_is_gone_is_rebuilt_whole(file: Path, home: Home, trials: Trials) -> None:
    record = launch(file, home)
    before = [(run.data.params, run.data.metrics) for run in runs(home)]
    for left in home.path.glob("mlflow.db*"):
        left.unlink()
    session.sync(None, home)
    assert [(run.data.params, run.data.metrics) for run in runs(home)] == before
    assert load_record("demo-1", home.study_url).state == record.state == "completed"


# --- what is said -----------------------------------------------------------------------------------


def test_what_to_do_next_can_be_typed_as_it_is_printed(
    file: Path, tmp_path: Path, trials: Trials, home: Home
) -> None:
    record = launch(file, home)
    printed = next_steps(Home(tmp_path / "a home"), record)
    assert f"-m sweepsvc ui --home '{tmp_path}/a home'" in printed
    assert next_steps(Home(), record).endswith("status demo-1")


def test_a_ledger_that_fails_is_said_with_the_way_to_go_on(
    file: Path, home: Home, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise CannotContinue("the study must be writable, got disk full")

    with monkeypatch.context() as patched:
        patched.setattr("sweepsvc.study.OptunaStudy.tell", full)
        with pytest.raises(CannotContinue, match=r"disk full\n.*-m sweepsvc resume demo-1"):
            launch(file, home)
    assert len(trials.ran) == 1
    record = session.resume("demo-1", home, Asked())
    assert (record.state, len(trials.ran)) == ("completed", 3)
    assert (
        json.loads((home.sweep("demo-1").path / "trials/0/result.json").read_text())["outcome"] == "completed"
    )
