"""The life of a sweep, from its file to its last result."""

from __future__ import annotations

import contextlib
import datetime
import re
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import ParamSpec, TypeVar

from sweeps.errors import CannotContinue, CannotStart, FailureClass, TakenOver, TrialError
from sweeps.result import Progress, TrialResult
from sweeps.signals import handled
from sweeps.sweep import Faults, Retries, Sweep
from sweeps.trial.paths import write_whole
from sweepsvc import owner
from sweepsvc.home import Home, SweepFolder
from sweepsvc.protocols import Later, Proposal, Scheduler, Study, SweepRecord, SweepState, Tracking
from sweepsvc.stored import TrialFiles
from sweepsvc.view import View

P = ParamSpec("P")
T = TypeVar("T")


class SweepRun:
    """One driver over one sweep: hands proposals to the scheduler, tells the study, then the tracker.

    The study is told first: it is the ledger. `queue` comes before whatever the study proposes next, of which
    there is nothing with `asks=False`. Of the queue, what was `told` failed or interrupted is opened again
    once it is its turn; what is `forgotten` begins anew, whatever it left.

    Nothing here raises into the scheduler but `TakenOver`, which ends all at once. Where the sweep cannot go
    on for another reason, no more is handed out, and what runs is asked to write a checkpoint and end.
    """

    def __init__(
        self,
        study: Study,
        tracking: Tracking,
        folder: SweepFolder,
        view: View,
        faults: Faults,
        queue: Iterable[Proposal] = (),
        asks: bool = True,
        told: Collection[str] = (),
        forgotten: Collection[str] = (),
    ) -> None:
        self._study = study
        self._tracking = tracking
        self._folder = folder
        self._files = TrialFiles(folder)
        self._view = view
        self._faults = faults
        self._queue = deque(queue)
        self._asks = asks
        self._told = set(told)
        self._forgotten = set(forgotten)
        self._open: set[str] = set()
        self._paused: list[tuple[float, Proposal]] = []  # to be tried again, each from its time on
        self._tries: Counter[tuple[str, FailureClass]] = Counter()
        self._failed_in_a_row: list[FailureClass] = []
        self._notes_shown = 0
        self._next_heartbeat = 0.0
        self._workers_asked = False
        self._end_was_said = False
        self.stopped_because = ""
        self.broken_by: CannotContinue | None = None

    def waiting(self) -> None:
        self._catch_up()

    def next(self) -> Proposal | Later | None:
        self._catch_up()
        proposal = None if self._is_stopping() else self._next_proposal()
        if proposal is None:
            return Later() if self._open or (self._paused and not self._is_stopping()) else None
        self._open.add(proposal.key)
        return proposal

    def _next_proposal(self) -> Proposal | None:
        for at, proposal in self._paused:
            if at <= time.monotonic():
                self._paused.remove((at, proposal))
                return self._prepared(proposal)
        if self._queue:
            return self._prepared(self._queue.popleft())
        if not self._asks:
            return None
        asked = self._written(self._study.ask)
        self._say_notes()
        if asked is not None:
            return self._prepared(asked)
        if not self._end_was_said and self.broken_by is None:
            self._end_was_said = True
            self._view.note(self._study.ended_because)
        return None

    def _prepared(self, proposal: Proposal) -> Proposal | None:
        """Open for another attempt, without the last word of an earlier one, which would pass for its own."""
        if proposal.key in self._told:
            self._told.discard(proposal.key)
            self._written(self._study.reopen, proposal)
        try:
            if proposal.key in self._forgotten:
                self._files.forget(proposal)
                self._forgotten.discard(proposal.key)
            else:
                self._files.clear(proposal)
        except TrialError as error:
            self.give_up(CannotContinue(str(error)))
            return None
        except OSError as error:
            folder = self.folder(proposal)
            self.give_up(
                CannotContinue(f"the trial's folder must be writable, got {folder}: {error.strerror}")
            )
            return None
        return proposal

    def started(self, proposal: Proposal) -> None:
        attempt = self._written(self._study.started, proposal) or 1
        self._tracking.start(proposal, attempt)
        self._view.started(proposal)
        self._catch_up()

    def reported(self, proposal: Proposal, progress: Progress) -> None:
        self._view.reported(proposal, progress)
        self._tracking.report(proposal, progress)
        self._catch_up()

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        self._open.discard(proposal.key)
        if self._is_tried_again(proposal, result):
            return
        self._written(self._study.tell, proposal, result)
        self._view.ended(proposal, result)
        self._tracking.end(proposal, result)
        self._count(proposal, result)
        self._catch_up()

    def folder(self, proposal: Proposal) -> Path:
        return self._folder.trial(proposal)

    def fetch(self, proposal: Proposal) -> None:
        try:
            self._files.fetch(proposal)
        except (TrialError, OSError) as error:  # what the scheduler heard of its end stands, or it runs again
            self._view.note(f"the files of {proposal.key} could not be fetched: {error}")

    def _end_unfinished(self, proposal: Proposal) -> None:
        result = TrialResult(outcome="interrupted")
        self._written(self._study.tell, proposal, result)
        self._tracking.end(proposal, result)

    # Trying again

    def _is_tried_again(self, proposal: Proposal, result: TrialResult) -> bool:
        kind = _to_be_mended(proposal, result)
        if kind is None or self._is_stopping():
            return False
        self._tries[proposal.key, kind] += 1
        tries, most = self._tries[proposal.key, kind], _most_tries(self._faults.retries, kind)
        if tries > most:
            return False
        pause = self._faults.backoff_seconds * 2 ** (tries - 1) if kind == "download_failed" else 0.0
        message = result.failure.message if result.failure else "the worker was asked to stop, not by us"
        when = f" in {pause:.0f} s" if pause else ""
        why = f"{kind}: {message}"
        self._written(self._study.setback, proposal, why)
        self._view.again(proposal, f"{why}; tried again{when} ({tries} of {most})")
        self._paused.append((time.monotonic() + pause, proposal))
        return True

    def _count(self, proposal: Proposal, result: TrialResult) -> None:
        """Stop the sweep where trial after trial fails for one reason: it is not in the trials."""
        if result.failure is None:
            self._failed_in_a_row.clear()
            return
        kind = result.failure.kind
        if kind not in self._failed_in_a_row:
            self._failed_in_a_row.clear()
        self._failed_in_a_row.append(kind)
        count, most = len(self._failed_in_a_row), self._faults.stop_after
        if kind == "disk_full":
            self._stop_because(
                f"trial {proposal.key} found no space: {result.failure.message}; free the disk"
            )
        elif most and count >= most:
            self._stop_because(
                f"{count} trials in a row failed as {kind}, the last one: {result.failure.message}; "
                "mend that, or raise faults.stop_after"
            )

    # Stopping

    def _is_stopping(self) -> bool:
        if not self.stopped_because and self._folder.stop.exists():
            self.ask_to_stop()
        return bool(self.stopped_because)

    def _stop_because(self, why: str) -> None:
        if not self.stopped_because:
            self.stopped_because = why
            self._view.note(f"the sweep stops: {why}")

    def ask_to_stop(self) -> None:
        """Hand out no more, and have every worker write a checkpoint and end."""
        self._ask_workers()
        self._stop_because("it was asked to stop; what runs writes a checkpoint and ends (again: at once)")

    def give_up(self, error: CannotContinue) -> None:
        """Stop the sweep, which cannot go on for that reason."""
        if self.broken_by is None:
            self.broken_by = error
            self._stop_because(str(error))
            self._ask_workers()

    def _ask_workers(self) -> None:
        self._workers_asked = True
        self._files.ask_to_stop()

    def _written(self, write: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T | None:
        """What `write` gives; None, and the sweep stops, where the ledger cannot be written."""
        try:
            return write(*arguments, **options)
        except TakenOver as error:  # the file that stops workers is the other driver's by now
            self.broken_by = error
            self.stopped_because = str(error)
            raise
        except CannotContinue as error:
            self.give_up(error)
            return None

    def _beat(self) -> None:
        """Say that this driver lives, and hear whether it is asked to stop."""
        if time.monotonic() < self._next_heartbeat or isinstance(self.broken_by, TakenOver):
            return
        self._next_heartbeat = time.monotonic() + owner.HEARTBEAT_SECONDS
        if self._written(self._study.heartbeat) and not self._workers_asked:
            self.ask_to_stop()

    # The tracker

    def _catch_up(self) -> None:
        """Hear from the tracker: which runs it has opened, and whether it fails."""
        self._beat()
        for key, run_id in self._tracking.opened():
            self._written(self._study.tracked, key, run_id)
        for note in self._tracking.notes():
            self._view.note(note)

    def _say_notes(self) -> None:
        for note in self._study.notes[self._notes_shown :]:
            self._view.note(note)
        self._notes_shown = len(self._study.notes)

    def close(self) -> SweepRecord:
        """Write down how the sweep stands, deliver what the tracker has not heard yet; the record.

        Raises `CannotContinue` if the ledger could not be written, now or before.
        """
        if isinstance(self.broken_by, TakenOver):
            raise self.broken_by
        for _, proposal in self._paused:
            self._end_unfinished(proposal)
        state = state_of(self._study.read())
        self._written(self._study.close, state)
        self._tracking.close(state)
        self._catch_up()
        if self.broken_by is not None:
            raise self.broken_by
        return self._study.read()


def state_of(record: SweepRecord) -> SweepState:
    """A sweep is done once nothing is left to propose and every trial has ended."""
    states = {trial.state for trial in (*record.baselines, *record.trials)}
    if not record.ended or states & {"waiting", "running", "interrupted"}:
        return "interrupted"
    return "failed" if "failed" in states else "completed"


def _to_be_mended(proposal: Proposal, result: TrialResult) -> FailureClass | None:
    """The class of a failure that another attempt may mend; None for an end that stands."""
    if result.outcome == "interrupted":  # while the sweep goes on: the node is taken from us
        return "process_lost"
    if result.failure is None:
        return None
    kind = result.failure.kind
    if kind == "evaluation_failed" and result.steps < proposal.spec.steps:
        return None  # found before the training: it would be found again
    return kind


def _most_tries(retries: Retries, kind: FailureClass) -> int:
    most: int = getattr(retries, kind, 0)
    return most


_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}(?<!\.db)")


def new_sweep_id(name: str) -> str:
    """The sweep's name with the time, so that ids sort and a prefix of them is easy to type."""
    return f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def prepare(sweep: Sweep, home: Home, sweep_id: str) -> SweepFolder:
    """Make the sweep's folder, with the sweep file as it was given."""
    if not _ID.fullmatch(sweep_id) or sweep_id == home.artifacts.name:
        raise CannotStart(
            f"an id must be letters, digits, _ - . and begin with a letter or digit, got {sweep_id!r}; "
            "give another --id"
        )
    folder = home.sweep(sweep_id)
    try:
        folder.path.mkdir(parents=True)
    except FileExistsError:
        raise _taken(folder, home) from None
    except OSError as error:
        raise CannotStart(
            f"the home must be writable, got {home.path}: {error.strerror}; give another --home"
        ) from error
    home.mark()
    write_whole(folder.sweep_file, sweep.text)
    return folder


def _taken(folder: SweepFolder, home: Home) -> CannotStart:
    sweep_id = folder.path.name
    driver = owner.driver_of(folder)
    if driver is not None:
        return owner.busy(sweep_id, driver)
    return CannotStart(
        f"a sweep needs an id of its own, got {sweep_id}, which is in {home.path}; give another --id, "
        f"or go on with it: python -m sweepsvc resume {sweep_id}"
    )


@contextlib.contextmanager
def all_or_nothing(folder: SweepFolder) -> Iterator[contextlib.ExitStack]:
    """Remove the sweep's folder, and whatever else the block put on the stack, if the block fails.

    A sweep that could not start leaves nothing: not a folder, not a study, not an id that is taken.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder.path, ignore_errors=True)
        yield undo
        undo.pop_all()


def drive(run: SweepRun, scheduler: Scheduler) -> SweepRecord:
    """Run the sweep to its end, or until a person stops it; how it stands then.

    The first SIGINT or SIGTERM has the running trials write a checkpoint and end as interrupted, the second
    ends them at once. Raises `CannotContinue` if the ledger could not be written, or the scheduler
    failed.
    """

    def hear(number: int, frame: FrameType | None) -> None:
        if run.stopped_because:
            raise KeyboardInterrupt
        run.ask_to_stop()

    with contextlib.suppress(KeyboardInterrupt), handled(hear, signal.SIGINT, signal.SIGTERM):
        try:
            scheduler.run(run)
        except CannotContinue as error:
            run.give_up(error)
    return run.close()
