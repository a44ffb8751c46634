"""What a later driver finds of a sweep, and what it does about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sweeps.errors import CannotStart
from sweeps.result import Failure, TrialResult
from sweeps.trial.paths import TrialFolder
from sweepsvc.home import SweepFolder
from sweepsvc.plain import PlainStudy
from sweepsvc.protocols import Proposal, TrialRecord
from sweepsvc.resume import Findings, Selection, reconcile
from sweepsvc.stored import TrialFiles
from tests.sweepsvc.samples import result_of, sweep_of

SWEEP = sweep_of("sampler: grid, space: {lora.r: [1, 2, 3, 4, 5, 6, 7, 8]}", rest="baseline: false")
CUT = TrialResult(outcome="interrupted")


def failed(kind: Any) -> TrialResult:
    return TrialResult(outcome="failed", failure=Failure(kind=kind, message="why"))


class Ends:
    """A tracker that hears only of ends."""

    def __init__(self) -> None:
        self.heard: dict[str, str] = {}
        self.started: set[str] = set()

    def unended(self) -> set[str]:
        return self.started

    def end(self, proposal: Proposal, result: TrialResult) -> None:
        self.heard[proposal.key] = result.outcome


class Left:
    """A sweep that a driver left: which of its trials were in which state, and what lies in their folders."""

    def __init__(self, folder: Path) -> None:
        self.study = PlainStudy(SWEEP, "demo-1", {})
        self.folder = SweepFolder(folder)
        self.tracker = Ends()
        self.proposals: list[Proposal] = []

    def waiting(self) -> str:
        proposal = self.study.ask()
        assert proposal is not None
        self.proposals.append(proposal)
        return proposal.key

    def running(self, *, step: int = 0, result: TrialResult | None = None) -> str:
        key = self.waiting()
        self.study.started(self.proposals[-1])
        files = TrialFolder(self.folder.trial(self.proposals[-1]))
        files.write_spec(self.proposals[-1].spec)
        if step:
            (files.checkpoints / f"step-{step:08}").mkdir(parents=True)
        if result is not None:
            files.write_result(result)
        return key

    def told(self, result: TrialResult, *, step: int = 0) -> str:
        key = self.running(step=step)
        self.study.tell(self.proposals[-1], result)
        return key

    def found(self, open_runs: dict[str, str] | None = None, **selection: Any) -> Findings:
        tracker: Any = self.tracker
        return reconcile(
            self.study, TrialFiles(self.folder), tracker, Selection(**selection), open_runs or {}
        )

    def trials(self) -> dict[str, TrialRecord]:
        return {trial.proposal.key: trial for trial in self.study.read().trials}


@pytest.fixture
def left(tmp_path: Path) -> Left:
    return Left(tmp_path)


def queued(found: Findings) -> list[str]:
    return [proposal.key for proposal in found.queue]


def test_everything_that_is_not_done_is_queued_but_what_failed_for_good(left: Left) -> None:
    left.told(result_of("completed", 0.5))
    cut = left.told(CUT, step=120)
    bug = left.told(failed("bug"))
    for_good = [left.told(failed("diverged")), left.told(failed("out_of_memory"))]
    running = left.running(step=40)
    lost = left.running()
    waits = left.waiting()
    found = left.found()
    assert queued(found) == [cut, bug, running, lost, waits]
    assert found.to_reopen == {cut, bug}
    assert found.finished == 1
    assert found.lost == [lost]
    assert found.to_start == [waits]
    assert list(found.left) == for_good
    lines = list(found.lines(asks=True))
    assert lines == [
        "finished: 1",
        "to resume: trial 1 from step 120, trial 2 from its beginning, trial 5 from step 40, "
        "trial 6 from its beginning",
        "to start: trial 7, what the search has not proposed yet",
        "lost, cut before a first checkpoint: trial 6",
        "left as it is: trial 3 failed: diverged, trial 4 failed: out_of_memory "
        "(--failed or --trial has it run again)",
    ]


def test_a_result_that_nobody_heard_of_is_told_to_study_and_tracker(left: Left) -> None:
    finished = left.running(result=result_of("completed", 0.5))
    broken = left.running(result=failed("bad_data"))
    found = left.found()
    assert found.told == [finished, broken]
    assert left.trials()[finished].value == 0.5
    assert left.trials()[broken].state == "failed"
    assert left.tracker.heard == {finished: "completed", broken: "failed"}
    assert queued(found) == [broken]
    assert "told now, finished while nobody listened: trial 0, trial 1" in list(found.lines(asks=False))


@pytest.mark.parametrize("spoil", ["another trial's", "not JSON", "no spec"])
def test_a_result_that_is_not_the_trials_own_is_not_told(left: Left, spoil: str) -> None:
    key = left.running(result=result_of("completed", 0.5))
    files = TrialFolder(left.folder.trial(left.proposals[-1]))
    if spoil == "another trial's":
        files.write_spec(left.proposals[-1].spec.untrained())
    elif spoil == "not JSON":
        files.result.write_text('{"outcome": "compl')
    else:
        files.spec.unlink()
    found = left.found()
    assert (found.told, queued(found)) == ([], [key])
    assert left.trials()[key].state == "running"
    assert bool(found.repairs) == (spoil != "another trial's")


def test_only_the_failed_or_only_the_named_run_and_no_zombie_is_left(left: Left) -> None:
    cut = left.told(CUT)
    diverged = left.told(failed("diverged"))
    running = left.running(step=3)
    assert queued(left.found(failed=True)) == [diverged]
    assert left.trials()[running].state == "interrupted"
    assert left.tracker.heard == {running: "interrupted"}
    found = left.found(trials=(running, cut))
    assert queued(found) == [cut, running]
    assert found.steps == {cut: 0, running: 3}


def test_from_scratch_counts_on_no_checkpoint(left: Left) -> None:
    key = left.told(CUT, step=12)
    assert left.found(from_scratch=True).steps == {key: 0}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            result_of("completed", 0.5),
            "a finished trial is never run again, got --trial 0, which has completed",
        ),
        (result_of("pruned", 0.5), "got --trial 0, which was pruned"),
    ],
)
def test_a_finished_trial_cannot_be_named(left: Left, result: TrialResult, message: str) -> None:
    left.told(result)
    with pytest.raises(CannotStart, match=message):
        Selection(trials=("0",)).check(left.study.read())


def test_a_trial_that_there_is_not_cannot_be_named(left: Left) -> None:
    left.told(CUT)
    with pytest.raises(CannotStart, match="--trial must name a trial of the sweep, got 9; it has 0"):
        Selection(trials=("9",)).check(left.study.read())


def test_a_run_left_open_is_closed_or_goes_on(left: Left) -> None:
    done = left.told(result_of("completed", 0.5))
    cut = left.told(CUT)
    found = left.found(open_runs={done: "run-a", cut: "run-b"})
    assert left.tracker.heard == {done: "completed"}
    assert left.trials()[cut].mlflow_run_id == "run-b"
    assert found.repairs == ["trial 0: its run was left open, and is closed"]


def test_an_end_that_the_tracker_was_never_told_is_told_also_where_it_cannot_be_asked(left: Left) -> None:
    done, cut = left.told(result_of("completed", 0.5)), left.told(CUT)
    left.tracker.started = {done, cut}
    left.found(trials=(cut,))
    assert left.tracker.heard == {done: "completed"}


def test_a_baseline_is_found_like_any_trial(tmp_path: Path) -> None:
    study = PlainStudy(sweep_of("sampler: grid, space: {lora.r: [4]}"), "demo-1", {})
    tracker: Any = Ends()
    found = reconcile(study, TrialFiles(SweepFolder(tmp_path)), tracker, Selection(), {})
    assert queued(found) == ["baseline"]
    assert "to start: baseline" in list(found.lines(asks=False))
