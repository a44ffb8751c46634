"""The service's own words, and what it asks of each third party it stands on.

One file implements each protocol over its library (`study.py` over Optuna, `recorder.py` over MLflow,
`scheduler.py` over Ray); `plain.py` holds a plain one of each without any library.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sweeps.result import Progress, TrialResult
from sweeps.spec import TrialSpec

TrialState = Literal["waiting", "running", "completed", "pruned", "failed", "interrupted"]
SweepState = Literal["running", "completed", "failed", "interrupted"]


@dataclass(frozen=True)
class Proposal:
    """Parameters asked of the study, and the `TrialSpec` that they resolve to.

    `params` maps the field paths that the space varies to their resolved values (`lora.alpha`: 16.0);
    `rules` maps those among them that were chosen as a rule or a named constant to how they were
    written (`lora.alpha`: "2*r"). A baseline has no number.
    """

    key: str
    spec: TrialSpec
    number: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)
    repeat: int = 0

    @property
    def is_baseline(self) -> bool:
        return self.number is None


@dataclass(frozen=True)
class TrialRecord:
    """What the study knows of one proposal. `setbacks` are attempts that were cut or failed and repeated."""

    proposal: Proposal
    state: TrialState
    attempts: int = 0
    result: TrialResult | None = None
    value: float | None = None
    mlflow_run_id: str | None = None
    setbacks: Sequence[str] = ()


@dataclass(frozen=True)
class SweepRecord:
    """What the study knows of one sweep.

    `ended`: there is nothing left to propose. `owner` is the process that drives it, or drove it last;
    `heartbeat` is when it last said that it lives, UTC, ISO 8601, "" if it never did.
    """

    sweep_id: str
    state: SweepState
    objective_metric: str
    maximize: bool
    baselines: Sequence[TrialRecord]
    trials: Sequence[TrialRecord]
    facts: Mapping[str, str]
    ended: bool = False
    owner: str = ""
    heartbeat: str = ""


@dataclass(frozen=True)
class Importance:
    """What share of the objective's variance each searched field explains, the greatest first.

    Empty where that cannot be said, and then `why_not` says why. `trials` is how many it was learnt from.
    """

    shares: Mapping[str, float]
    trials: int = 0
    why_not: str = ""


@dataclass(frozen=True)
class SweepSummary:
    """One sweep in a list: how many of its trials are in each state; `launched` is UTC, ISO 8601."""

    sweep_id: str
    name: str
    state: SweepState
    launched: str
    counts: Mapping[TrialState, int]


@dataclass(frozen=True)
class Report:
    """One `Progress` of a trial, and when it was heard: milliseconds since 1970, UTC."""

    progress: Progress
    at_ms: int


class Study(Protocol):
    """The ledger of one sweep. Only the driver writes it."""

    def baselines(self) -> Sequence[Proposal]:
        """The untouched bases to score, empty if the sweep wants none. Idempotent."""

    def ask(self) -> Proposal | None:
        """The next proposal, never equal to an earlier one (law L8); None when there is none left."""

    @property
    def ended_because(self) -> str:
        """Why `ask` returned None: the budget is spent, or the space is exhausted."""

    @property
    def notes(self) -> Sequence[str]:
        """Choices made for the user so far, each with its reason."""

    def started(self, proposal: Proposal) -> int:
        """One more attempt at `proposal` began; the number of it, from 1."""

    def tracked(self, key: str, mlflow_run_id: str) -> None:
        """The proposal of that key has this run in the tracker; it may have ended since."""

    def setback(self, proposal: Proposal, why: str) -> None:
        """The attempt at `proposal` came to nothing, and another one will follow."""

    def tell(self, proposal: Proposal, result: TrialResult) -> None:
        """The one final state of `proposal`. A second call for the same proposal is an error."""

    def reopen(self, proposal: Proposal) -> None:
        """`proposal`, which was told failed or interrupted, runs again: its result so far is none."""

    def heartbeat(self) -> bool:
        """Say that the driver lives; whether somebody has asked it to stop.

        Where another driver has taken the sweep over, this and every later write raises `TakenOver`.
        """

    def close(self, state: SweepState) -> None:
        """The driver is done with the sweep."""

    def read(self) -> SweepRecord:
        """Everything known, baselines and trials in the order of their proposal."""


class Recorder(Protocol):
    """The tracker: a copy of what the study knows, for people to compare in.

    Whatever it cannot reach or write, it raises. Every call may be repeated after one that failed, also by
    another process: it then finishes what was begun, and makes nothing twice. `at_ms` is when it happened,
    milliseconds since 1970, UTC; now, if it is not given.
    """

    def open(self) -> None:
        """Open the sweep's parent run, or the one that the sweep has again."""

    def start(
        self,
        proposal: Proposal,
        run_id: str | None = None,
        *,
        attempt: int = 1,
        first: bool = False,
        at_ms: int | None = None,
    ) -> str:
        """Open the trial's run, or the one that it has again; its id. `run_id` is what it had, if known.

        `first` says that nobody can have opened one before, which saves looking for it.
        """

    def report(self, run_id: str, reports: Sequence[Report]) -> None:
        """Record some reports, in as few requests as there can be."""

    def end(
        self,
        run_id: str,
        proposal: Proposal,
        result: TrialResult,
        folder: Path,
        *,
        at_ms: int | None = None,
    ) -> None:
        """Record the final numbers and artifacts, and close the trial's run. The last result stands."""

    def close(self, state: SweepState) -> None:
        """Close the parent run."""


@dataclass(frozen=True)
class History:
    """What was heard of a trial while it ran. `ended_ms` is None where its end was not heard."""

    started_ms: int | None = None
    ended_ms: int | None = None
    reports: Sequence[Report] = ()


class Rebuilding(Recorder, Protocol):
    """A tracker that can be looked into, and made whole from the study and the files."""

    def attach(self) -> None:
        """As `open`, but the parent run keeps its status."""

    def runs(self) -> Mapping[str, Sequence[str]]:
        """The runs of the sweep's trials by their keys, the oldest of each first."""

    def complete(self, run_id: str, trial: TrialRecord, history: History, folder: Path) -> bool:
        """Write what the run lacks of what is known of the trial; whether it lacked anything."""

    def delete(self, run_id: str) -> None:
        """Take a run away that no trial has."""


@dataclass(frozen=True)
class Point:
    """One number of a run: of which step, and when it was recorded (milliseconds since 1970, UTC).

    Two of the same step and time are the same, NaN too.
    """

    step: int
    at_ms: int
    value: float = field(compare=False)


@dataclass(frozen=True)
class RunHistory:
    """When a run began, and each of its numbers by name, in the order of recording."""

    started_ms: int
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)


class Reader(Protocol):
    """A tracker that is looked into and never changed: it makes neither a store nor a run.

    `CannotStart` if it does not answer.
    """

    def newest(self, run_id: str) -> Mapping[str, Point] | None:
        """The newest of each number by step (`train.loss`, `lr`, ...); None where there is no such run.

        `wall_seconds` is among them once the run has ended: whatever came with it are final numbers.
        """

    def history(self, run_id: str) -> RunHistory | None:
        """All of them; None where there is no such run."""


class Tracking(Protocol):
    """What a driver says to the tracker. It never waits for it, and trouble with it raises nothing here."""

    def start(self, proposal: Proposal, attempt: int) -> None:
        """Attempt number `attempt`, from 1, began."""

    def report(self, proposal: Proposal, progress: Progress) -> None: ...

    def end(self, proposal: Proposal, result: TrialResult) -> None: ...

    def opened(self) -> Sequence[tuple[str, str]]:
        """The key and the run of each trial whose run was opened since the last call."""

    def unended(self) -> Collection[str]:
        """The keys of the trials of which an earlier driver told the start and not the end."""

    def notes(self) -> Sequence[str]:
        """What a person should know, since the last call: that the tracker fails, that it answers again."""

    def close(self, state: SweepState) -> None:
        """Close the parent run once everything is delivered, or leave the rest in the outbox and say so."""


@dataclass(frozen=True)
class Node:
    """A machine that can hold a trial: its id among the scheduler's, its host name, whether it is ours."""

    id: str
    name: str
    is_here: bool


class Later:
    """Nothing to place just now; ask again in a moment."""


class Conductor(Protocol):
    """The sweep's side of a scheduler: it hands out proposals and hears how they go."""

    def next(self) -> Proposal | Later | None:
        """The next proposal to place, None when there is none left; asked again and again."""

    def waiting(self) -> None:
        """Every worker is busy; said again and again."""

    def started(self, proposal: Proposal) -> None:
        """The proposal is on a worker."""

    def reported(self, proposal: Proposal, progress: Progress) -> None:
        """The worker reported."""

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        """The worker's last word; exactly once each time that `next` gave the proposal out."""

    def folder(self, proposal: Proposal) -> Path:
        """Where the worker leaves its files."""

    def fetch(self, proposal: Proposal) -> None:
        """Bring what the worker has left into that folder, should it have worked in another one."""


class Scheduler(Protocol):
    """Places each proposal on a worker of its own."""

    def check(self) -> None:
        """Raise `CannotStart` if the machine or cluster can never place a trial."""

    def run(self, conductor: Conductor) -> None:
        """Run until `conductor.next()` gives None and every placed proposal has ended."""
