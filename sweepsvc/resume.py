"""Going on with a sweep: what its study, its files and its tracker say, brought into agreement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sweeps.errors import CannotStart, FailureClass
from sweeps.result import TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial.paths import TrialFolder
from sweepsvc.protocols import Proposal, Study, SweepRecord, Tracking, TrialRecord
from sweepsvc.stored import TrialFiles

FOR_GOOD: tuple[FailureClass, ...] = ("diverged", "out_of_memory")
"""Failures that belong to the trial's own settings: it would fail again, so only a person can have it run."""


@dataclass(frozen=True)
class Selection:
    """Which trials are to run: everything that is not done, or the failed ones, or some by their key."""

    failed: bool = False
    trials: tuple[str, ...] = ()
    from_scratch: bool = False

    @property
    def is_everything(self) -> bool:
        return not self.failed and not self.trials

    def has(self, trial: TrialRecord) -> bool:
        """Whether the trial, which is not done, is to run."""
        if trial.proposal.key in self.trials:
            return True
        if self.failed:
            return trial.state == "failed"
        return self.is_everything and not _is_for_good(trial)

    def check(self, record: SweepRecord) -> None:
        """Raise `CannotStart` where a trial is named that there is not, or that is done."""
        states = {trial.proposal.key: trial.state for trial in (*record.baselines, *record.trials)}
        for key in self.trials:
            if key not in states:
                raise CannotStart(
                    f"--trial must name a trial of the sweep, got {key}; it has {_listed(list(states))}"
                )
            if states[key] in ("completed", "pruned"):
                raise CannotStart(
                    f"a finished trial is never run again, got --trial {key}, which {_VERB[states[key]]}; "
                    "launch a sweep of its own for it"
                )


_VERB = {"completed": "has completed", "pruned": "was pruned"}


def _is_for_good(trial: TrialRecord) -> bool:
    failure = trial.result.failure if trial.result else None
    return trial.state == "failed" and failure is not None and failure.kind in FOR_GOOD


@dataclass
class Findings:
    """What there was of a sweep, and what is to run of it.

    `told` are keys of trials whose result lay in their folder, and the study had not heard of it. `steps`
    maps the keys of `queue` to the step of the last checkpoint, 0 without one. `lost` were running and left
    no checkpoint; `left` ended in a way that is not mended by trying again, or were not asked for.
    """

    finished: int = 0
    told: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    queue: list[Proposal] = field(default_factory=list)
    to_reopen: set[str] = field(default_factory=set)
    steps: dict[str, int] = field(default_factory=dict)
    to_start: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def lines(self, asks: bool) -> Iterator[str]:
        """What a person should know before it goes on."""
        resumed = [
            f"{_name(key)} from step {step}" if step else f"{_name(key)} from its beginning"
            for key, step in self.steps.items()
            if key not in self.to_start
        ]
        rest = ["what the search has not proposed yet"] if asks else []
        yield f"finished: {self.finished}"
        yield f"to resume: {_listed(resumed)}"
        yield f"to start: {_listed([*map(_name, self.to_start), *rest])}"
        yield f"lost, cut before a first checkpoint: {_listed(list(map(_name, self.lost)))}"
        if self.left:
            ends = [f"{_name(key)} {why}" for key, why in self.left.items()]
            yield f"left as it is: {_listed(ends)} (--failed or --trial has it run again)"
        if self.told:
            yield f"told now, finished while nobody listened: {_listed(list(map(_name, self.told)))}"
        yield from self.repairs


def _name(key: str) -> str:
    return f"trial {key}" if key.isdecimal() else key


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def reconcile(
    study: Study,
    files: TrialFiles,
    tracking: Tracking,
    selection: Selection,
    open_runs: Mapping[str, str],
) -> Findings:
    """Bring the study, the result files and the tracker into agreement; what is to run then.

    The driver before must be gone. `open_runs` are the tracker's runs without an end, by the trial's key.
    What is finished stays as it is. A result file of which the study has not heard is told; what was running,
    has left none and is not selected is told interrupted; so no trial is running that no process runs.
    """
    found = Findings()
    study.baselines()
    for trial in _everything(study.read()):
        _settle(trial, study, files, tracking, selection, found)
    unclosed = {*open_runs, *tracking.unended()}
    for trial in _everything(study.read()) if unclosed else ():
        key = trial.proposal.key
        if key in open_runs:
            study.tracked(key, open_runs[key])
        if key in unclosed and trial.result is not None and key not in {*found.steps, *found.told}:
            tracking.end(trial.proposal, trial.result)
            found.repairs.append(f"{_name(key)}: its run was left open, and is closed")
    return found


def _everything(record: SweepRecord) -> list[TrialRecord]:
    return [*record.baselines, *record.trials]


def _settle(
    trial: TrialRecord,
    study: Study,
    files: TrialFiles,
    tracking: Tracking,
    selection: Selection,
    found: Findings,
) -> None:
    proposal = trial.proposal
    was_running = trial.state == "running"
    if was_running:
        result = _last_word(files.fetch(proposal), proposal.spec, found)
        if result is not None:
            study.tell(proposal, result)
            tracking.end(proposal, result)
            found.told.append(proposal.key)
            trial = TrialRecord(proposal, result.outcome, trial.attempts, result)
    if trial.state in ("completed", "pruned"):
        found.finished += 1
    elif selection.has(trial):
        found.queue.append(proposal)
        if trial.state in ("failed", "interrupted"):
            found.to_reopen.add(proposal.key)
        if trial.state == "waiting":
            found.to_start.append(proposal.key)
        step = 0 if selection.from_scratch else files.last_step(proposal)
        found.steps[proposal.key] = step
        if was_running and not step and trial.state == "running":
            found.lost.append(proposal.key)
    elif trial.state == "running":
        result = TrialResult(outcome="interrupted")
        study.tell(proposal, result)
        tracking.end(proposal, result)
        found.left[proposal.key] = "interrupted"
    elif trial.state != "waiting":
        failure = trial.result.failure if trial.result else None
        found.left[proposal.key] = f"{trial.state}: {failure.kind}" if failure else trial.state


def _last_word(files: TrialFolder, spec: TrialSpec, found: Findings) -> TrialResult | None:
    """The end that the worker wrote and nobody heard of; None where it wrote none, or was cut."""
    try:
        result = files.read_result()
        if result is None or result.outcome == "interrupted":
            return None
        kept = TrialSpec.model_validate_json(files.spec.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        found.repairs.append(f"the result in {files.path} cannot be read, the trial runs again: {reason}")
        return None
    return result if kept.digest == spec.digest else None
