"""The service's own words, and what it asks of each third party it stands on.

One file implements each protocol over its library (`study.py` over Optuna, `recorder.py` over MLflow,
`scheduler.py` over Ray); `plain.py` holds a plain one of each without any library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """What the study knows of one proposal."""

    proposal: Proposal
    state: TrialState
    attempts: int = 0
    result: TrialResult | None = None
    value: float | None = None
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class SweepRecord:
    """What the study knows of one sweep."""

    sweep_id: str
    state: SweepState
    objective_metric: str
    maximize: bool
    baselines: Sequence[TrialRecord]
    trials: Sequence[TrialRecord]
    facts: Mapping[str, str]


@dataclass(frozen=True)
class SweepSummary:
    """One sweep in a list: how many of its trials are in each state; `launched` is UTC, ISO 8601."""

    sweep_id: str
    name: str
    state: SweepState
    launched: str
    counts: Mapping[TrialState, int]


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

    def started(self, proposal: Proposal, mlflow_run_id: str | None) -> None:
        """One more attempt at `proposal` began."""

    def tell(self, proposal: Proposal, result: TrialResult) -> None:
        """The one final state of `proposal`. A second call for the same proposal is an error."""

    def close(self, state: SweepState) -> None:
        """The driver is done with the sweep."""

    def read(self) -> SweepRecord:
        """Everything known, baselines and trials in the order of their proposal."""


class Recorder(Protocol):
    """The tracker: a copy of what the study knows, for people to compare in. Calls come in order."""

    def open(self) -> None:
        """Open the sweep's parent run."""

    def start(self, proposal: Proposal) -> str | None:
        """Open the trial's run; its id, or None where there is no tracker."""

    def report(self, proposal: Proposal, progress: Progress) -> None:
        """Record one report, in one request."""

    def end(self, proposal: Proposal, result: TrialResult, folder: Path) -> None:
        """Record the final numbers and artifacts, and close the trial's run."""

    def close(self, state: SweepState) -> None:
        """Close the parent run."""


class Conductor(Protocol):
    """The sweep's side of a scheduler: it hands out proposals and hears how they go."""

    def next(self) -> Proposal | None:
        """The next proposal to place, None when there is none left."""

    def started(self, proposal: Proposal) -> None:
        """The proposal is on a worker."""

    def reported(self, proposal: Proposal, progress: Progress) -> None:
        """The worker reported."""

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        """The worker's last word; exactly once for each proposal that `next` gave out."""

    def folder(self, proposal: Proposal) -> Path:
        """Where the worker leaves its files."""


class Scheduler(Protocol):
    """Places each proposal on a worker of its own."""

    def check(self) -> None:
        """Raise `CannotStart` if the machine or cluster can never place a trial."""

    def run(self, conductor: Conductor) -> None:
        """Run until `conductor.next()` gives None and every placed proposal has ended."""
