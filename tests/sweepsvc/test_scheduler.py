"""What any scheduler must do, on Ray and on the plain one; and what Ray's must do besides."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import cloudpickle
from ray.exceptions import RaySystemError
from ray.tune import Tuner
from ray.tune.experiment import Trial

from sweeps.errors import CannotContinue, CannotStart
from sweeps.result import Progress, TrialResult
from sweeps.spec import TrialSpec
from sweeps.sweep import Resources
from sweepsvc.plain import SerialScheduler
from sweepsvc.protocols import Later, Proposal, Scheduler
from sweepsvc.scheduler import ANSWER_TRIES, CLIENT_TRIES, RayJobs, RayScheduler
from sweepsvc.worker import Kept
from tests.scripted import COMPLETES, DIES, FAILS, HANGS, RAISES, ScriptedTrials


class Notebook:
    """A conductor that gives out proposals by seed and writes down what it hears."""

    def __init__(self, folder: Path, *seeds: int) -> None:
        self._folder = folder
        self._waiting = [proposal(number, seed) for number, seed in enumerate(seeds)]
        self.heard: list[str] = []
        self.results: dict[int, TrialResult] = {}
        self.reports: dict[int, list[Progress]] = {}
        self.on_report: Callable[[], None] = lambda: None

    def next(self) -> Proposal | None:
        return self._waiting.pop(0) if self._waiting else None

    def started(self, proposal: Proposal) -> None:
        self.heard.append(f"started {proposal.key}")

    def reported(self, proposal: Proposal, progress: Progress) -> None:
        assert proposal.number is not None
        self.reports.setdefault(proposal.number, []).append(progress)
        self.on_report()

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        assert proposal.number is not None
        assert proposal.number not in self.results, "ended twice"
        self.heard.append(f"ended {proposal.key}")
        self.results[proposal.number] = result

    def waiting(self) -> None:
        """It has nothing to do meanwhile."""

    def folder(self, proposal: Proposal) -> Path:
        return self._folder / "trials" / proposal.key

    def fetch(self, proposal: Proposal) -> None:
        """The workers share its folder."""

    def outcomes(self) -> list[str]:
        return [self.results[number].outcome for number in sorted(self.results)]


def proposal(number: int, seed: int) -> Proposal:
    spec = TrialSpec.model_validate({"train": {"seed": seed}})
    return Proposal(key=str(number), spec=spec, number=number)


@pytest.fixture(scope="module")
def ray_scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayScheduler]:
    storage = tmp_path_factory.mktemp("ray")
    resources = Resources(gpus=0, cpus=1, parallel=1)
    runner = "tests.scripted:ScriptedTrials"
    with RayScheduler(resources, storage, Kept(stop=str(storage / "stop")), runner=runner) as scheduler:
        yield scheduler


@pytest.fixture(params=[pytest.param("ray", marks=pytest.mark.slow), "plain"])
def scheduler(request: pytest.FixtureRequest) -> Scheduler:
    if request.param == "plain":
        return SerialScheduler(ScriptedTrials())
    given: Scheduler = request.getfixturevalue("ray_scheduler")
    return given


@pytest.mark.slow
def test_tune_keeps_no_trial_that_has_ended_but_the_last(ray_scheduler: RayScheduler, tmp_path: Path) -> None:
    """Each holds some 40 kB, and Tune looks through all of them for every new one."""
    kinds = [COMPLETES, FAILS, COMPLETES, COMPLETES, FAILS, COMPLETES, COMPLETES, COMPLETES]
    notebook = Notebook(tmp_path, *kinds)
    alive: list[int] = []

    def count() -> None:
        gc.collect()
        alive.append(sum(type(thing) is Trial for thing in gc.get_objects()))

    notebook.on_report = count
    ray_scheduler.run(notebook)
    assert len(notebook.results) == len(kinds)
    assert max(alive) <= 4, (
        alive
    )  # one runs, one is next, one ended last; and one that failed may be stopping


# --- the contract -----------------------------------------------------------------------------------


def test_every_proposal_starts_reports_and_ends_once_in_order(scheduler: Scheduler, tmp_path: Path) -> None:
    notebook = Notebook(tmp_path, COMPLETES, COMPLETES, COMPLETES)
    scheduler.check()
    scheduler.run(notebook)
    assert notebook.heard == [f"{what} {number}" for number in range(3) for what in ("started", "ended")]
    assert [[report.step for report in notebook.reports[number]] for number in range(3)] == [[1, 2]] * 3


def test_a_failed_trial_is_told_with_its_class_and_the_next_one_runs(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    notebook = Notebook(tmp_path, FAILS, COMPLETES)
    scheduler.run(notebook)
    assert notebook.outcomes() == ["failed", "completed"]
    failure = notebook.results[0].failure
    assert failure is not None
    assert (failure.kind, failure.message) == ("diverged", "the loss must stay finite")


def test_a_runner_that_raises_without_a_result_is_a_failure_all_the_same(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    notebook = Notebook(tmp_path, RAISES, COMPLETES)
    scheduler.run(notebook)
    assert notebook.outcomes() == ["failed", "completed"]
    failure = notebook.results[0].failure
    assert failure is not None
    assert failure.kind == "bug"
    assert "no result was written" in failure.message


def test_nothing_to_run_ends_at_once(scheduler: Scheduler, tmp_path: Path) -> None:
    scheduler.run(Notebook(tmp_path))


# --- Ray's ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_actor_is_used_again_and_thrown_away_after_a_failure(
    ray_scheduler: RayScheduler, tmp_path: Path
) -> None:
    notebook = Notebook(tmp_path, COMPLETES, COMPLETES, FAILS, COMPLETES)
    ray_scheduler.run(notebook)
    ran_before = [notebook.reports[number][0].train_loss for number in range(4)]
    assert ran_before == [0, 1, 2, 0]


@pytest.mark.slow
def test_a_worker_that_dies_is_a_lost_process_and_the_next_trial_runs(
    ray_scheduler: RayScheduler, tmp_path: Path
) -> None:
    notebook = Notebook(tmp_path, DIES, COMPLETES)
    ray_scheduler.run(notebook)
    assert notebook.outcomes() == ["failed", "completed"]
    failure = notebook.results[0].failure
    assert failure is not None
    assert failure.kind == "process_lost"


def look(asked: Path, deaths: int) -> str:
    """What a machine says whose worker dies the first so many times that it is asked."""
    with asked.open("a", encoding="utf-8") as file:
        file.write("?")
    if len(asked.read_text(encoding="utf-8")) <= deaths:
        os._exit(1)
    return "well"


@pytest.mark.slow
def test_a_machine_whose_worker_dies_is_asked_again(ray_scheduler: RayScheduler, tmp_path: Path) -> None:
    answers = ray_scheduler.on_each_node(look, tmp_path / "asked", ANSWER_TRIES - 1)
    assert list(answers.values()) == ["well"]


@pytest.mark.slow
def test_a_machine_whose_worker_always_dies_is_named(ray_scheduler: RayScheduler, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    with pytest.raises(CannotStart, match="every machine of the cluster must answer, got WorkerCrashedError"):
        ray_scheduler.on_each_node(look, asked, ANSWER_TRIES)
    assert len(asked.read_text(encoding="utf-8")) == ANSWER_TRIES


@pytest.mark.slow
def test_a_look_that_raises_is_not_tried_again(ray_scheduler: RayScheduler, tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match=r"got RayTaskError.* Is a directory"):
        ray_scheduler.on_each_node(look, tmp_path, 0)


@pytest.mark.slow
def test_trials_end_as_interrupted_once_they_are_asked_to_stop(
    ray_scheduler: RayScheduler, tmp_path: Path
) -> None:
    notebook = Notebook(tmp_path, HANGS, COMPLETES)
    stop = Path(ray_scheduler._kept.stop)
    notebook.on_report = stop.touch
    ray_scheduler.run(notebook)
    stop.unlink()
    assert notebook.outcomes() == ["interrupted", "completed"]


@pytest.mark.slow
def test_a_worker_that_hears_sigterm_ends_its_trial_as_interrupted(
    ray_scheduler: RayScheduler, tmp_path: Path
) -> None:
    """As where a cluster takes back a node."""
    notebook = Notebook(tmp_path, HANGS, COMPLETES)
    notebook.on_report = terminate_workers
    ray_scheduler.run(notebook)
    assert notebook.outcomes() == ["interrupted", "completed"]


def terminate_workers() -> None:
    for child in psutil.Process().children(recursive=True):
        if "TrialActor" in " ".join(child.cmdline()):
            child.terminate()


@pytest.mark.slow
def test_an_exception_in_the_driver_ends_what_is_running_as_interrupted(
    ray_scheduler: RayScheduler, tmp_path: Path
) -> None:
    notebook = Notebook(tmp_path, HANGS, COMPLETES)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))

    def interrupt_once() -> None:
        notebook.on_report = lambda: None
        timer.start()

    notebook.on_report = interrupt_once
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            ray_scheduler.run(notebook)
    finally:
        signal.signal(signal.SIGINT, before)
    assert notebook.outcomes() == ["interrupted"]


def test_a_conductor_that_has_nothing_just_now_is_asked_again(scheduler: Scheduler, tmp_path: Path) -> None:
    notebook = Notebook(tmp_path, COMPLETES, COMPLETES)
    answers = iter([Later(), notebook.next(), Later(), Later(), notebook.next()])
    notebook.next = lambda: next(answers, None)  # type: ignore[method-assign, assignment, return-value]
    scheduler.run(notebook)
    assert notebook.outcomes() == ["completed", "completed"]


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"gpus": 64}, r"GPU 64\), got at most 0 GPUs .* lower resources.gpus \(0 trains on the CPU\)"),
        ({"gpus": 0, "cpus": 10_000}, r"CPU 10000\), got at most"),
        ({"gpus": 0, "cpus": 1, "accelerator": "A100"}, r"accelerator_type:A100 .* accelerators none"),
    ],
)
@pytest.mark.slow
def test_more_than_there_is_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    ray_scheduler: RayScheduler,
    tmp_path: Path,
    resources: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("sweepsvc.scheduler._nodes", lambda: [{"CPU": 4.0}])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    wanting = RayScheduler(Resources(**resources), tmp_path)
    with pytest.raises(CannotStart, match=message):
        wanting.check()


def test_a_trial_without_gpus_takes_the_whole_machine_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sweepsvc.scheduler._nodes", lambda: [{"CPU": 6.0}])
    whole = RayScheduler(Resources(gpus=0), tmp_path)
    assert whole._bundle() == {"CPU": 6}
    assert whole._slots() == 1
    assert RayScheduler(Resources(gpus=0, cpus=1), tmp_path)._slots() == 6


@pytest.mark.slow
def test_a_trial_without_gpus_sees_none(ray_scheduler: RayScheduler, tmp_path: Path) -> None:
    notebook = Notebook(tmp_path, COMPLETES)
    ray_scheduler.run(notebook)
    assert notebook.reports[0][0].notes == ("CUDA_VISIBLE_DEVICES=",)


@pytest.mark.slow
def test_what_is_running_when_the_conductor_fails_is_ended_as_interrupted(
    ray_scheduler: RayScheduler, tmp_path: Path
) -> None:
    notebook = Notebook(tmp_path, HANGS)

    def broken() -> None:
        raise OSError("the disk is full")

    notebook.on_report = broken
    with pytest.raises(Exception, match="the disk is full"):
        ray_scheduler.run(notebook)
    assert notebook.outcomes() == ["interrupted"]


@pytest.mark.slow
def test_what_ray_cannot_read_back_at_its_end_is_nobodys_loss(
    monkeypatch: pytest.MonkeyPatch, ray_scheduler: RayScheduler, tmp_path: Path
) -> None:
    fit = Tuner.fit

    def leave_an_empty_file(tuner: Tuner) -> object:
        monkeypatch.setattr(Trial, "get_pickled_error", lambda _: cloudpickle.loads(b""))
        return fit(tuner)

    monkeypatch.setattr(Tuner, "fit", leave_an_empty_file)
    notebook = Notebook(tmp_path, FAILS, COMPLETES)
    ray_scheduler.run(notebook)
    assert notebook.outcomes() == ["failed", "completed"]


@pytest.mark.slow
def test_a_ray_that_fails_midway_is_an_error_that_can_be_resumed_from(
    monkeypatch: pytest.MonkeyPatch, ray_scheduler: RayScheduler, tmp_path: Path
) -> None:
    def fail(_: Tuner) -> None:
        raise RaySystemError("the head is gone")

    monkeypatch.setattr(Tuner, "fit", fail)
    with pytest.raises(CannotContinue, match="Ray must be able to run trials, got RaySystemError"):
        ray_scheduler.run(Notebook(tmp_path, COMPLETES))


@pytest.mark.slow
def test_one_trial_takes_one_gpu_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, ray_scheduler: RayScheduler, tmp_path: Path
) -> None:
    node = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:A100": 1.0}
    monkeypatch.setattr("sweepsvc.scheduler._nodes", lambda: [node, {"CPU": 16.0}])
    wanting = RayScheduler(Resources(gpus=1, accelerator="A100"), tmp_path)
    assert wanting._bundle() == {"CPU": 1, "GPU": 1.0, "accelerator_type:A100": 0.001}
    assert wanting._slots() == 8
    assert RayScheduler(Resources(gpus=1, parallel=3), tmp_path)._slots() == 3


class Head:
    """A head that gives up so many times on the process that it starts for who comes by `ray://`."""

    def __init__(self, failures: int) -> None:
        self.left = failures
        self.asked = 0

    def __call__(self, address: str) -> Head:
        self.asked += 1
        if self.asked <= self.left:
            raise ConnectionAbortedError(
                "Initialization failure from server:\nTraceback (most recent call last):\n"
                "RuntimeError: Proxy failed to Connect to backend!\n"
            )
        return self


def test_a_busy_head_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(failures=CLIENT_TRIES - 1)
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", head)
    RayJobs("ray://head:10001")
    assert head.asked == CLIENT_TRIES


def test_a_head_that_fails_each_time_is_said_with_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Head(failures=CLIENT_TRIES))
    with pytest.raises(CannotStart, match="failure from server: RuntimeError: Proxy failed to Connect"):
        RayJobs("ray://head:10001")
