"""The outbox: what the tracker is to hear waits on the disk until it has heard it.

The driver only appends to a log beside the trial (`tracklog.py`). One thread reads the logs back and tells
the recorder, trial by trial and in order within a trial. Where the recorder fails, that thread tries again
later; where this process ends before it has succeeded, the next driver's outbox goes on, or `sync` does.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from sweeps.result import Progress, TrialResult
from sweepsvc.home import SweepFolder
from sweepsvc.protocols import Proposal, Recorder, Report, SweepState
from sweepsvc.tracklog import Ended, Entry, Line, Mark, Replay, Started, TrackLog
from sweepsvc.urls import masked

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
"""Between two tries at a recorder that fails: doubled from the first to the longest."""

CLOSING_WAIT_SECONDS = 0.5
"""The longest such wait while the driver waits for the end."""

PATIENCE_SECONDS = 5.0
"""How long the driver waits at its end for a recorder that only fails."""

STANDSTILL_SECONDS, END_SECONDS = 30.0, 300.0
"""The same for one that neither succeeds nor fails, and for all of what waits, however well it goes."""


@dataclass(eq=False)
class _Turn:
    """Something to deliver, and when to try it next (monotonic seconds)."""

    failures: int = 0
    due: float = 0.0

    def put_off(self, longest_seconds: float) -> None:
        self.failures += 1
        self.due = time.monotonic() + min(FIRST_WAIT_SECONDS * 2.0 ** (self.failures - 1), longest_seconds)

    def succeeded(self) -> None:
        self.failures = 0
        self.due = time.monotonic()  # behind the others, so that each has its turn


@dataclass(eq=False)
class _Trial(_Turn):
    """A trial that this outbox has to do with. `run_id` is set while its run is known to be open."""

    log: TrackLog = field(kw_only=True)
    run_id: str | None = None
    replay: Replay | None = None
    ended: bool = False
    damaged: bool = False


class Outbox:
    """`Tracking` over a `Recorder` that may fail, be slow, or be away for a while.

    `runs` is the run of each trial by its key, as far as the study knows. What earlier drivers of the sweep
    left undelivered is delivered too. Only the sweep's owner may make one.
    """

    def __init__(
        self, recorder: Recorder, folder: SweepFolder, runs: Mapping[str, str | None] | None = None
    ) -> None:
        self._recorder = recorder
        self._folder = folder
        self._runs = dict(runs or {})
        self._changed = threading.Condition()
        self._trials: dict[str, _Trial] = {}
        self._parent = _Turn()
        self._tracker = _Turn()
        self._failing: set[_Turn] = set()
        self._is_open = False
        self._closing: SweepState | None = None
        self._closed = self._stopped = self._disk_failed = False
        self._last_success = 0.0
        self._last_ms = 0
        self._unended: set[str] = set()
        self._notes: list[str] = []
        self._opened: list[tuple[str, str]] = []
        self._pick_up()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    # --- the driver's side: append, and go on -------------------------------------------------------

    def start(self, proposal: Proposal, attempt: int) -> None:
        """Attempt number `attempt`, from 1, began."""
        self._append(proposal, Started(proposal, attempt, self._now_ms()))

    def report(self, proposal: Proposal, progress: Progress) -> None:
        self._append(proposal, Report(progress, self._now_ms()))

    def end(self, proposal: Proposal, result: TrialResult) -> None:
        self._append(proposal, Ended(result, self._now_ms()))

    def _now_ms(self) -> int:
        """No two of a driver are equal: of two numbers of one step and time a tracker may show either."""
        with self._changed:
            self._last_ms = max(self._last_ms + 1, time.time_ns() // 1_000_000)
            return self._last_ms

    def _append(self, proposal: Proposal, entry: Entry) -> None:
        # Whatever goes wrong here, the trial goes on: the study is the ledger.
        try:
            with self._changed:
                trial = self._trial(proposal)
                if trial.log.size == 0 and not isinstance(entry, Started):
                    trial.log.append(Started(proposal, 1, entry.at_ms))
                trial.log.append(entry)
                trial.ended = isinstance(entry, Ended)
                self._changed.notify_all()
        except Exception as error:
            self._note_disk(error)

    def _trial(self, proposal: Proposal) -> _Trial:
        if proposal.key not in self._trials:
            self._trials[proposal.key] = _Trial(log=TrackLog(self._folder.trial(proposal)))
        return self._trials[proposal.key]

    def _note_disk(self, error: Exception) -> None:
        with self._changed:
            if not self._disk_failed:
                self._notes.append(
                    f"records for the tracker cannot be kept: {_reason(error)}; the study has every result, "
                    f"{self._sync_command} makes the tracker whole once the disk is"
                )
            self._disk_failed = True

    def opened(self) -> Sequence[tuple[str, str]]:
        """The key and the run of each trial whose run was opened since the last call."""
        with self._changed:
            said, self._opened = self._opened, []
        return said

    def unended(self) -> Collection[str]:
        """The keys of the trials of which an earlier driver told the start and not the end."""
        return self._unended

    def notes(self) -> Sequence[str]:
        """What a person should know, since the last call."""
        with self._changed:
            said, self._notes = self._notes, []
        return said

    def close(self, state: SweepState) -> None:
        """Close the parent run once everything is delivered; see `protocols.Tracking`.

        Waits as long as anything gets through, `END_SECONDS` at most. A recorder that only fails has
        `PATIENCE_SECONDS`, one that hangs `STANDSTILL_SECONDS`; Ctrl-C leaves the rest at once.
        """
        with self._changed:
            self._closing = state
            for turn in (self._tracker, self._parent, *self._trials.values()):
                turn.due = 0.0
            self._changed.notify_all()
            with contextlib.suppress(KeyboardInterrupt):
                self._wait_for_the_end(time.monotonic())
            self._stopped = True
            self._changed.notify_all()
            self._note_the_rest()

    def _wait_for_the_end(self, began: float) -> None:
        while not self._done and self._thread.is_alive():
            now = time.monotonic()
            idle_seconds = now - max(began, self._last_success)
            patience_seconds = PATIENCE_SECONDS if self._tracker.failures else STANDSTILL_SECONDS
            if idle_seconds > patience_seconds or now - began > END_SECONDS:
                return
            self._changed.wait(0.1)

    @property
    def _done(self) -> bool:
        return self._closed and not any(trial.log.waits for trial in self._trials.values())

    def _note_the_rest(self) -> None:
        if self._done:
            return
        rest = sum(_lines_waiting(trial.log) for trial in self._trials.values()) + (not self._closed)
        records = "1 record waits" if rest == 1 else f"{rest} records wait"
        self._notes.append(f"{records} in the outbox for the tracker; deliver with: {self._sync_command}")

    @property
    def _sync_command(self) -> str:
        return f"python -m sweepsvc sync {self._folder.path.name}"

    # --- what earlier drivers left ------------------------------------------------------------------

    def _pick_up(self) -> None:
        for folder in _tracked_folders(self._folder.path / "trials"):
            try:
                log = TrackLog(folder)
            except OSError as error:
                self._note_disk(error)
                continue
            if log.lacks_an_end:
                self._unended.add(folder.name)
            if log.waits:
                self._trials[folder.name] = _Trial(log=log, ended=True)
            if log.mark.run_id is not None:
                self._is_run(folder.name, log.mark.run_id)

    def _is_run(self, key: str, run_id: str) -> None:
        with self._changed:
            if self._runs.get(key) != run_id:
                self._runs[key] = run_id
                self._opened.append((key, run_id))

    # --- the thread's side: tell the recorder -------------------------------------------------------

    def _work(self) -> None:
        while (turn := self._next()) is not None:
            try:
                self._deliver(turn)
            except (
                Exception
            ) as error:  # mlflow's, a client's, a server's: it is tried again, the trial goes on
                self._failed(turn, error)
            else:
                self._succeeded(turn)

    def _next(self) -> _Turn | None:
        """What to deliver next, waited for; None when there will be nothing more."""
        with self._changed:
            while not self._stopped and not (self._closing and self._done):
                turn = self._ready(time.monotonic())
                if turn is not None:
                    return turn
                self._changed.wait(self._seconds_to_wait())
        return None

    def _ready(self, now: float) -> _Turn | None:
        turns = [turn for turn in self._turns() if max(turn.due, self._tracker.due) <= now]
        return min(turns, key=lambda turn: turn.due, default=None)

    def _seconds_to_wait(self) -> float | None:
        due = min((turn.due for turn in self._turns()), default=None)
        return None if due is None else max(due, self._tracker.due, 0.0) - time.monotonic()

    def _turns(self) -> Sequence[_Turn]:
        waiting: list[_Turn] = [trial for trial in self._trials.values() if trial.log.waits]
        # The sweep's own run is closed after what can be delivered, not kept open by one record that cannot.
        if self._closing and not self._closed and all(turn.failures for turn in waiting):
            waiting.append(self._parent)
        return waiting

    def _deliver(self, turn: _Turn) -> None:
        if not self._is_open:
            self._recorder.open()
            self._is_open = True
        if isinstance(turn, _Trial):
            self._deliver_some(turn)
        elif self._closing is not None:
            self._recorder.close(self._closing)

    def _deliver_some(self, trial: _Trial) -> None:
        """The next entry of the trial's log, or the next reports at once."""
        if trial.replay is None:
            trial.replay = _replayed(trial.log.heard())
        lines = trial.log.waiting()
        entry, end = lines[0].entry, lines[0].end
        if isinstance(entry, Started):
            trial.replay.take(entry)
        elif trial.replay.started is None:
            entry = None
        if entry is None:  # not to be read, or of a trial that nobody knows: the others go on
            self._note_damage(trial)
            self._mark(trial, Mark(end, trial.log.mark.run_id, trial.log.mark.maybe))
            return
        if (isinstance(entry, Started) or trial.run_id is None) and not self._start(trial):
            return
        assert trial.run_id is not None
        if isinstance(entry, Report):
            end = self._report(trial.run_id, trial.replay, lines)
        elif isinstance(entry, Ended):
            self._end(trial, trial.run_id, trial.replay, entry)
        self._mark(trial, Mark(end, trial.run_id))

    def _start(self, trial: _Trial) -> bool:
        """Open the trial's run; False if it is not the one it had: it is to hear all from the start."""
        assert trial.replay is not None
        started, mark = trial.replay.started, trial.log.mark
        assert started is not None
        known = mark.run_id or self._runs.get(started.proposal.key)
        first = known is None and not mark.maybe
        if first:  # should we be killed before the id is written down, the next one has to look for the run
            self._mark(trial, Mark(mark.bytes, None, maybe=True))
        run_id = self._recorder.start(
            started.proposal, known, attempt=started.attempt, first=first, at_ms=started.at_ms
        )
        trial.run_id = run_id
        replaced = mark.bytes > 0 and mark.run_id != run_id
        if replaced:
            trial.replay = None
        self._mark(trial, Mark(0 if replaced else mark.bytes, run_id))
        self._is_run(started.proposal.key, run_id)
        return not replaced

    def _report(self, run_id: str, replay: Replay, lines: Sequence[Line]) -> int:
        """Record the reports at the beginning of `lines`; the byte where they end."""
        group = list(takewhile(lambda line: isinstance(line.entry, Report), lines))
        entries = [replay.take(line.entry) for line in group if line.entry is not None]
        self._recorder.report(run_id, [entry for entry in entries if isinstance(entry, Report)])
        return group[-1].end

    def _mark(self, trial: _Trial, mark: Mark) -> None:
        try:
            trial.log.delivered(mark)
        except OSError as error:  # not the tracker's fault; it may hear something twice, which does no harm
            self._note_disk(error)

    def _end(self, trial: _Trial, run_id: str, replay: Replay, entry: Ended) -> None:
        assert replay.started is not None
        self._recorder.end(run_id, replay.started.proposal, entry.result, trial.log.trial, at_ms=entry.at_ms)

    def _succeeded(self, turn: _Turn) -> None:
        with self._changed:
            self._last_success = time.monotonic()
            self._closed = self._closed or turn is self._parent
            turn.succeeded()
            self._tracker.succeeded()
            if turn in self._failing:
                self._failing.remove(turn)
                if not self._failing:
                    self._notes.append("the tracker answers again; what waited in the outbox is delivered")
            self._forget(turn)
            self._changed.notify_all()

    def _forget(self, turn: _Turn) -> None:
        """Keep no trial that is over: a sweep has thousands."""
        if isinstance(turn, _Trial) and turn.ended and not turn.log.waits:
            self._trials.pop(turn.log.trial.name, None)

    def _failed(self, turn: _Turn, error: Exception) -> None:
        with self._changed:
            longest = CLOSING_WAIT_SECONDS if self._closing else LONGEST_WAIT_SECONDS
            turn.put_off(longest)
            self._tracker.put_off(longest)
            if isinstance(turn, _Trial):  # its run may be gone, and reports were taken in vain
                turn.run_id = turn.replay = None
            if not self._failing:
                self._notes.append(f"the tracker fails: {_reason(error)}; records wait in the outbox")
            self._failing.add(turn)
            self._changed.notify_all()

    def _note_damage(self, trial: _Trial) -> None:
        with self._changed:
            if trial.damaged:
                return
            trial.damaged = True
            self._notes.append(
                f"a record for the tracker must be readable, one of trial {trial.log.trial.name} is not: "
                f"it is left out; {self._sync_command} records the final numbers from the study"
            )


def _reason(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return masked(f"{type(error).__name__}: {first_line}")


def _replayed(entries: Iterator[Entry]) -> Replay:
    replay = Replay()
    for entry in entries:
        replay.take(entry)
    return replay


def _lines_waiting(log: TrackLog) -> int:
    with contextlib.suppress(OSError):
        return len(log.waiting(log.size)) if log.waits else 0
    return 0


def _tracked_folders(trials: Path) -> Sequence[Path]:
    """The folders of trials that have a log, in the order of their numbers."""
    try:
        with os.scandir(trials) as entries:
            folders = [Path(entry.path) for entry in entries if entry.is_dir()]
    except OSError:
        return []
    return sorted(folders, key=lambda folder: (len(folder.name), folder.name))
