"""The proposals that a scheduler has placed, between the conductor and the scheduler's own ids."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sweeps.result import Progress, TrialResult
from sweeps.trial.paths import TrialFolder
from sweepsvc.protocols import Conductor, Later, Proposal


class Placed:
    """What is placed now, by the scheduler's ids; `room` says how many there may be at once."""

    def __init__(self, conductor: Conductor, room: Callable[[], int]) -> None:
        self.conductor = conductor
        self._room = room
        self._open: dict[str, Proposal] = {}
        self._has_all = False
        self.failure: Exception | None = None
        """What the conductor raised; Tune raises only a text of it."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to place, and what was placed has ended."""
        return self._has_all and not self._open

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tuner writes a pickle of itself, for a restore that we never do."""
        return {}

    def take(self, trial_id: str) -> Proposal | Later | None:
        with self._noting_failure():
            if len(self._open) >= self._room():
                self.conductor.waiting()
                return Later()
            proposal = self.conductor.next()
        if isinstance(proposal, Proposal):
            self._open[trial_id] = proposal
        self._has_all = proposal is None
        return proposal

    def start(self, trial_id: str) -> None:
        with self._noting_failure():
            self.conductor.started(self._open[trial_id])

    def report(self, trial_id: str, progress: Progress) -> None:
        with self._noting_failure():
            self.conductor.reported(self._open[trial_id], progress)

    def end(self, trial_id: str, otherwise: TrialResult) -> None:
        """Tell the worker's last word, or `otherwise` where it had none."""
        proposal = self._open.pop(trial_id, None)
        if proposal is not None:
            with self._noting_failure():
                self.conductor.fetch(proposal)
                self.conductor.ended(proposal, _last_word(self.conductor.folder(proposal)) or otherwise)

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failure = error
            raise

    def close_open_trials(self) -> None:
        """End what the scheduler stopped midway as interrupted."""
        with contextlib.ExitStack() as each:  # one that cannot be told does not keep the others from it
            for trial_id in list(self._open):
                each.callback(self.end, trial_id, TrialResult(outcome="interrupted"))


def _last_word(folder: Path) -> TrialResult | None:
    with contextlib.suppress(OSError, ValueError):  # a file that cannot be read says nothing
        return TrialFolder(folder).read_result()
    return None
