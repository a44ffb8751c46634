"""The trials' folders of one sweep as the driver sees them: here, or in a store that workers write."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from sweeps.errors import TrialError
from sweeps.trial.paths import TrialFolder
from sweepsvc.home import SweepFolder
from sweepsvc.protocols import Proposal

if TYPE_CHECKING:
    from sweepsvc.mirror import Mirror, Storage


class TrialFiles:
    """Where workers leave what they write: the sweep's own folder, unless it has a storage.

    Raises `TrialError` where the store does not answer, and `OSError` where a folder here cannot be written.
    """

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        self._storage: Storage | None = None
        if folder.storage:
            from sweepsvc.mirror import Storage

            self._storage = Storage(folder.storage)

    def of(self, proposal: Proposal) -> TrialFolder:
        """The trial's folder here."""
        return TrialFolder(self._folder.trial(proposal))

    def fetch(self, proposal: Proposal, checkpoints: bool = False) -> TrialFolder:
        """The trial's folder here as its worker has left it; checkpoints stay in a store unless asked for."""
        files = self.of(proposal)
        if self._storage is not None:
            self._mirror(proposal).pull(checkpoints)
        return files

    def last_step(self, proposal: Proposal) -> int:
        """The step of the newest checkpoint; 0 without any."""
        if self._storage is None:
            return self.of(proposal).last_checkpoint_step()
        return self._mirror(proposal).last_word().step

    def clear(self, proposal: Proposal) -> None:
        """Remove the last word of an earlier attempt, which would pass for the next one's."""
        files = self.of(proposal)
        if self._storage is not None:
            self.fetch(proposal)
        if files.is_final(proposal.spec):
            return
        if self._storage is not None and files.result.exists():
            self._mirror(proposal).drop_result()
        files.result.unlink(missing_ok=True)

    def forget(self, proposal: Proposal) -> None:
        """Remove what the trial has come to: the next attempt begins anew."""
        self.of(proposal).forget()
        if self._storage is not None:
            self._mirror(proposal).forget()

    def ask_to_stop(self) -> None:
        """Have the running trials write a checkpoint and end. Never waits for a store."""
        with contextlib.suppress(OSError):  # on a full disk those that run go on to their ends
            self._folder.stop.touch()
        if self._storage is not None:
            threading.Thread(target=self._ask_in_the_store, daemon=True).start()

    def _ask_in_the_store(self) -> None:
        assert self._storage is not None
        with contextlib.suppress(TrialError):  # tried for a while: those that run go on to their ends
            self._storage.ask_to_stop(self._folder.path.name)

    def forget_stop(self) -> None:
        """A stop that was asked of an earlier driver is none of this one's."""
        if self._storage is not None:
            self._storage.forget_stop(self._folder.path.name)

    def _mirror(self, proposal: Proposal) -> Mirror:
        assert self._storage is not None
        return self._storage.trial(self._folder.path.name, proposal.key, self._folder.trial(proposal))
