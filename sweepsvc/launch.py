"""The life of a sweep, from its file to its last result."""

from __future__ import annotations

import contextlib
import datetime
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from sweeps.errors import CannotStart
from sweeps.result import Progress, TrialResult
from sweeps.sweep import Sweep
from sweeps.trial.paths import write_whole
from sweepsvc.home import Home, SweepFolder
from sweepsvc.protocols import Proposal, Recorder, Scheduler, Study, SweepState
from sweepsvc.urls import masked
from sweepsvc.view import View

T = TypeVar("T")


class SweepRun:
    """One driver over one sweep: hands proposals to the scheduler, tells the study, then the tracker.

    The study is told first: it is the ledger. The tracker is a copy for people, so trouble with it is
    shown and stops nothing.
    """

    def __init__(self, study: Study, recorder: Recorder, folder: SweepFolder, view: View) -> None:
        self._study = study
        self._recorder = recorder
        self._folder = folder
        self._view = view
        self._baselines = list(study.baselines())
        self._notes_shown = 0
        self.outcomes: list[str] = []

    def next(self) -> Proposal | None:
        proposal = self._baselines.pop(0) if self._baselines else self._study.ask()
        for note in self._study.notes[self._notes_shown :]:
            self._view.note(note)
        self._notes_shown = len(self._study.notes)
        if proposal is None:
            self._view.note(self._study.ended_because)
        return proposal

    def started(self, proposal: Proposal) -> None:
        run_id = self._tracked(lambda: self._recorder.start(proposal))
        self._study.started(proposal, run_id)
        self._view.started(proposal)

    def reported(self, proposal: Proposal, progress: Progress) -> None:
        self._view.reported(proposal, progress)
        self._tracked(lambda: self._recorder.report(proposal, progress))

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        self._study.tell(proposal, result)
        self.outcomes.append(result.outcome)
        self._view.ended(proposal, result)
        self._tracked(lambda: self._recorder.end(proposal, result, self.folder(proposal)))

    def folder(self, proposal: Proposal) -> Path:
        return self._folder.trial(proposal)

    def close(self, state: SweepState) -> None:
        self._study.close(state)
        self._tracked(lambda: self._recorder.close(state))

    def _tracked(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except Exception as error:
            reason = masked(f"{type(error).__name__}: {error}")
            self._view.note(f"the tracker failed, the study has every result: {reason}")
            return None


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
        raise CannotStart(
            f"a sweep needs an id of its own, got {sweep_id}, which is in {home.path}; give another --id"
        ) from None
    except OSError as error:
        raise CannotStart(
            f"the home must be writable, got {home.path}: {error.strerror}; give another --home"
        ) from error
    write_whole(folder.sweep_file, sweep.text)
    return folder


@contextlib.contextmanager
def all_or_nothing(folder: SweepFolder) -> Iterator[contextlib.ExitStack]:
    """Remove the sweep's folder, and whatever else the block put on the stack, if the block fails.

    A sweep that could not start leaves nothing: not a folder, not a study, not an id that is taken.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder.path, ignore_errors=True)
        yield undo
        undo.pop_all()


def drive(run: SweepRun, scheduler: Scheduler) -> SweepState:
    """Run the sweep to its end, or until the person stops it; its final state."""
    state: SweepState = "interrupted"
    try:
        scheduler.run(run)
        state = "failed" if "failed" in run.outcomes else "completed"
    except KeyboardInterrupt:
        pass
    finally:
        run.close(state)
    return state
