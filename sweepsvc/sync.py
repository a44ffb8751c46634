"""Makes the tracker whole again, from the study, the trials' folders and the logs beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sweepsvc.home import SweepFolder
from sweepsvc.protocols import History, Rebuilding, Report, SweepRecord, TrialRecord
from sweepsvc.tracklog import Ended, Entry, Mark, Replay, Started, TrackLog


@dataclass(frozen=True)
class Synced:
    """How many runs were made, completed, right already, and taken away since their trial had two.

    `runs` is the run of each trial by its key.
    """

    made: int
    completed: int
    right: int
    removed: int
    runs: Mapping[str, str]

    def __str__(self) -> str:
        return (
            f"{len(self.runs)} runs of trials in the tracker: {self.made} made, {self.completed} completed, "
            f"{self.right} right already; {self.removed} removed that were a trial's second"
        )


def synchronise(
    record: SweepRecord,
    folder: SweepFolder,
    recorder: Rebuilding,
    known_runs: Mapping[str, str] | None = None,
) -> Synced:
    """Give every trial of `record` that was begun exactly one run, with all that is known of it.

    `known_runs`, by key, go before what the study has. Only the sweep's owner may do it, and nobody else may
    drive the sweep meanwhile: what runs in the study is taken as cut. Raises what the recorder raises;
    what was done until then stays, and a second call does the rest.
    """
    recorder.attach()
    work = _Work(folder, recorder, known_runs or {}, recorder.runs())
    for trial in (*record.baselines, *record.trials):
        work.synchronise(trial)
    recorder.close("interrupted" if record.state == "running" else record.state)
    return Synced(work.made, work.completed, work.right, work.removed, work.runs)


class _Work:
    def __init__(
        self,
        folder: SweepFolder,
        recorder: Rebuilding,
        known_runs: Mapping[str, str],
        found: Mapping[str, Iterable[str]],
    ) -> None:
        self._folder = folder
        self._recorder = recorder
        self._known = known_runs
        self._found = found
        self.made = self.completed = self.right = self.removed = 0
        self.runs: dict[str, str] = {}

    def synchronise(self, trial: TrialRecord) -> None:
        key = trial.proposal.key
        log = TrackLog(self._folder.trial(trial.proposal))
        known = self._known.get(key) or trial.mlflow_run_id or log.mark.run_id
        run_id = self._the_one_run(key, known)
        if run_id is None and trial.attempts == 0 and trial.result is None:
            return  # it never began
        history = _history(log.history())
        is_new = run_id is None
        if run_id is None:
            run_id = self._recorder.start(
                trial.proposal, attempt=trial.attempts, first=True, at_ms=history.started_ms
            )
        was_written = self._recorder.complete(run_id, trial, history, log.trial)
        self.made += is_new
        self.completed += was_written and not is_new
        self.right += not was_written and not is_new
        self.runs[key] = run_id
        # A later driver of the sweep has nothing of this to deliver, and goes on in this run.
        if log.size and log.mark != Mark(log.size, run_id):
            log.delivered(Mark(log.size, run_id))

    def _the_one_run(self, key: str, known: str | None) -> str | None:
        """The run that the trial is to have, if it has any; others are taken away."""
        found = list(self._found.get(key, ()))
        if not found:
            return None
        kept = known if known in found else found[0]
        for run_id in found:
            if run_id != kept:
                self._recorder.delete(run_id)
                self.removed += 1
        return kept


def _history(entries: Iterable[Entry]) -> History:
    """What was heard of a trial, without the steps that an attempt repeated."""
    replay = Replay()
    started_ms, ended_ms = None, None
    reports: list[Report] = []
    for entry in entries:
        part = replay.take(entry)
        if isinstance(part, Report):
            reports.append(part)
        elif isinstance(part, Ended):
            ended_ms = part.at_ms
        else:
            assert isinstance(part, Started)
            started_ms = started_ms or part.at_ms
    return History(started_ms, ended_ms, reports)
