"""The plain scheduler; the plain study and recorder are tested by the contracts of their protocols."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.errors import Diverged
from sweeps.result import Progress, TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial.paths import TrialFolder
from sweepsvc.plain import PlainStudy, SerialScheduler
from sweepsvc.protocols import Proposal
from tests.sweepsvc.samples import result_of, sweep_of


class Listener:
    """A conductor that hands out a grid and writes down what it hears."""

    def __init__(self, home: Path) -> None:
        self._study = PlainStudy(sweep_of("sampler: grid, space: {lora.r: [4, 8]}"), "sweep-1", {})
        self._home = home
        self.heard: list[str] = []
        self.results: list[TrialResult] = []

    def next(self) -> Proposal | None:
        return self._study.ask()

    def started(self, proposal: Proposal) -> None:
        self.heard.append(f"started {proposal.key}")

    def reported(self, proposal: Proposal, progress: Progress) -> None:
        self.heard.append(f"reported {proposal.key} {progress.step}")

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        self.heard.append(f"ended {proposal.key} {result.outcome}")
        self.results.append(result)

    def waiting(self) -> None:
        """Nobody is busy when it is asked."""

    def folder(self, proposal: Proposal) -> Path:
        return self._home / proposal.key

    def fetch(self, proposal: Proposal) -> None:
        """Nothing is elsewhere."""


def test_each_proposal_runs_to_its_last_word_before_the_next(tmp_path: Path) -> None:
    def runner(spec: TrialSpec, folder: Path) -> Iterator[Progress]:
        yield Progress(phase="training", step=spec.lora.r)
        TrialFolder(folder).write_result(result_of("completed", 0.5))

    listener = Listener(tmp_path)
    SerialScheduler(runner).run(listener)
    first = ["started 0", "reported 0 4", "ended 0 completed"]
    assert listener.heard == [*first, "started 1", "reported 1 8", "ended 1 completed"]
    assert listener.results == [result_of("completed", 0.5)] * 2


def test_a_runner_that_raises_is_a_failed_trial_and_the_next_one_runs(tmp_path: Path) -> None:
    def runner(spec: TrialSpec, folder: Path) -> Iterator[Progress]:
        yield Progress(phase="training")
        raise Diverged("the loss is nan")

    listener = Listener(tmp_path)
    SerialScheduler(runner).run(listener)
    assert [result.outcome for result in listener.results] == ["failed", "failed"]
    failure = listener.results[0].failure
    assert failure is not None
    assert (failure.kind, failure.message) == ("diverged", "the loss is nan")


def test_a_person_who_stops_it_leaves_an_interrupted_trial(tmp_path: Path) -> None:
    def runner(spec: TrialSpec, folder: Path) -> Iterator[Progress]:
        yield Progress(phase="training")
        raise KeyboardInterrupt

    listener = Listener(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        SerialScheduler(runner).run(listener)
    assert listener.heard[-1] == "ended 0 interrupted"
