"""A plain study, recorder and scheduler, without any library: for tests, and to read what each must do."""

from __future__ import annotations

import math
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sweeps.errors import failure_class
from sweeps.result import Failure, Progress, TrialResult
from sweeps.space import Domain, Label, Picks, Range
from sweeps.spec import TrialSpec
from sweeps.sweep import Sweep
from sweeps.trial.paths import TrialFolder
from sweepsvc.proposing import Proposer, baseline_proposals
from sweepsvc.protocols import Conductor, Later, Node, Proposal, Report, SweepRecord, SweepState
from sweepsvc.records import (
    another_attempt,
    proposal_entry,
    reopened,
    result_entry,
    trial_record,
    with_run,
    with_setback,
)

T = TypeVar("T")

# --- study ------------------------------------------------------------------------------------------


class PlainStudy:
    """The ledger in memory. Every sampler but the grid draws at random."""

    def __init__(self, sweep: Sweep, sweep_id: str, facts: Mapping[str, str]) -> None:
        self._sweep = sweep
        self._sweep_id = sweep_id
        self._facts = dict(facts)
        self._proposer = Proposer(sweep, _Chance(sweep))
        self._entries: dict[str, dict[str, Any]] = {}
        self._state: SweepState = "running"

    @property
    def ended_because(self) -> str:
        return self._proposer.ended_because

    @property
    def notes(self) -> tuple[str, ...]:
        return self._proposer.notes

    def baselines(self) -> Sequence[Proposal]:
        proposals = baseline_proposals(self._sweep)
        for proposal in proposals:
            self._entries.setdefault(proposal.key, {"proposal": proposal_entry(proposal)})
        return proposals

    def ask(self) -> Proposal | None:
        asked = self._proposer.next()
        if asked is None:
            return None
        self._entries[asked.proposal.key] = {"proposal": proposal_entry(asked.proposal)}
        return asked.proposal

    def started(self, proposal: Proposal) -> int:
        begun = another_attempt(self._entry(proposal.key))
        self._entry(proposal.key)["started"] = begun
        return int(begun["attempts"])

    def tracked(self, key: str, mlflow_run_id: str) -> None:
        self._entry(key)["started"] = with_run(self._entry(key), mlflow_run_id)

    def setback(self, proposal: Proposal, why: str) -> None:
        self._entry(proposal.key)["started"] = with_setback(self._entry(proposal.key), why)

    def tell(self, proposal: Proposal, result: TrialResult) -> None:
        entry = self._entry(proposal.key)
        if "result" in entry:
            raise ValueError(
                f"a trial is told once, got a second result for {proposal.key} ({result.outcome}); drop it"
            )
        entry["result"] = result_entry(result)

    def reopen(self, proposal: Proposal) -> None:
        self._entries[proposal.key] = reopened(self._entry(proposal.key))

    def _entry(self, key: str) -> dict[str, Any]:
        if key not in self._entries:
            raise ValueError(f"only what this study proposed can be started or told, got {key}; ask first")
        return self._entries[key]

    def heartbeat(self) -> bool:
        return False  # in one process, nobody else can see or ask

    def close(self, state: SweepState) -> None:
        self._state = state

    def read(self) -> SweepRecord:
        metric = self._sweep.objective.metric
        records = [trial_record(entry, metric) for entry in self._entries.values()]
        return SweepRecord(
            sweep_id=self._sweep_id,
            state=self._state,
            objective_metric=metric,
            maximize=self._sweep.objective.maximize,
            baselines=[record for record in records if record.proposal.is_baseline],
            trials=[record for record in records if not record.proposal.is_baseline],
            facts=self._facts,
            ended=bool(self._proposer.ended_because),
        )


class _Chance:
    """Draws every field independently and evenly."""

    def __init__(self, sweep: Sweep) -> None:
        self._space = sweep.search.space
        self._random = random.Random(sweep.search.seed)

    def draw(self) -> Picks:
        return {path: self._one_of(domain) for path, domain in self._space.items()}

    def _one_of(self, domain: Domain) -> Label:
        if isinstance(domain, Range) and domain.log:
            number = math.exp(self._random.uniform(math.log(domain.low), math.log(domain.high)))
            number = min(max(number, domain.low), domain.high)
            return round(number) if domain.integer else number
        if domain.size is not None:
            return self._random.choice(list(domain.labels()))
        assert isinstance(domain, Range)
        return self._random.uniform(domain.low, domain.high)

    def reject(self, why: Mapping[str, int | str]) -> None:
        """Nothing to take back."""


# --- recorder ---------------------------------------------------------------------------------------


@dataclass
class PlainRun:
    """What was recorded of one trial: its reports, how it ended and the files of its folder by then."""

    proposal: Proposal
    attempts: int = 0
    reports: list[Report] = field(default_factory=list)
    result: TrialResult | None = None
    files: tuple[str, ...] = ()


class PlainRecorder:
    """The tracker in memory: one `PlainRun` a trial by its run's id, and the sweep's state."""

    def __init__(self, sweep_id: str) -> None:
        self.sweep_id = sweep_id
        self.state: SweepState | None = None
        self.runs: dict[str, PlainRun] = {}

    def open(self) -> None:
        self.state = "running"

    def start(
        self,
        proposal: Proposal,
        run_id: str | None = None,
        *,
        attempt: int = 1,
        first: bool = False,
        at_ms: int | None = None,
    ) -> str:
        if run_id not in self.runs:
            run_id = f"{self.sweep_id}/{proposal.key}"
        run = self.runs.setdefault(run_id, PlainRun(proposal))
        run.attempts, run.result = attempt, None
        return run_id

    def report(self, run_id: str, reports: Sequence[Report]) -> None:
        run = self.runs[run_id]
        run.reports += [report for report in reports if report not in run.reports]

    def end(
        self,
        run_id: str,
        proposal: Proposal,
        result: TrialResult,
        folder: Path,
        *,
        at_ms: int | None = None,
    ) -> None:
        run = self.runs[run_id]
        run.result = result
        run.files = tuple(
            sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        )

    def close(self, state: SweepState) -> None:
        self.state = state


# --- scheduler --------------------------------------------------------------------------------------


class SerialScheduler:
    """Runs one proposal after another in this process.

    `runner(spec, folder)` yields reports and leaves `result.json` in the folder, as `run_trial` does.
    """

    def __init__(self, runner: Callable[[TrialSpec, Path], Iterator[Progress]]) -> None:
        self._runner = runner

    def check(self) -> None:
        """This process is always there."""

    def nodes(self) -> Sequence[Node]:
        return [Node("this", socket.gethostname(), is_here=True)]

    def on_each_node(self, work: Callable[..., T], *arguments: object) -> Mapping[Node, T]:
        return {node: work(*arguments) for node in self.nodes()}

    def run(self, conductor: Conductor) -> None:
        while (proposal := conductor.next()) is not None:
            if isinstance(proposal, Later):
                time.sleep(0.01)
            else:
                self._run_one(conductor, proposal)

    def _run_one(self, conductor: Conductor, proposal: Proposal) -> None:
        folder = conductor.folder(proposal)
        otherwise = TrialResult(outcome="interrupted")
        conductor.started(proposal)
        try:
            for progress in self._runner(proposal.spec, folder):
                conductor.reported(proposal, progress)
        except Exception as error:  # a runner writes its failures itself, unless it is broken
            failure = Failure(kind=failure_class(error), message=str(error))
            otherwise = TrialResult(outcome="failed", failure=failure)
        finally:  # also where the person stops it
            conductor.fetch(proposal)
            conductor.ended(proposal, TrialFolder(folder).read_result() or otherwise)
