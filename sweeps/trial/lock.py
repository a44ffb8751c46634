"""One process at a time in a trial's folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from sweeps.errors import Interrupted, TrialError
from sweeps.trial.keeping import never

WAIT_SECONDS = 120.0
"""How long a process waits for the one before it: a worker needs seconds to notice that its driver died."""

_POLL_SECONDS = 0.2


class FolderLock:
    """The kernel's own lock on a file, which holds the `host:pid` of whoever has it.

    It goes with its process, however that dies. The file stays: removing it would let two in at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Take it if nobody has it; whether it is ours now."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return False
            raise
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # a full disk: it is held all the same, only not by name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{socket.gethostname()}:{os.getpid()}".encode(), 0)
        return True

    def wait(self, should_stop: Callable[[], bool] = never) -> None:
        """Take it once it is free; `TrialError` after `WAIT_SECONDS`, `Interrupted` when asked to stop."""
        until = time.monotonic() + WAIT_SECONDS
        while not self.take():
            if should_stop():
                raise Interrupted(f"asked to stop while {self.holder} had the folder {self._path.parent}")
            if time.monotonic() > until:
                raise TrialError(
                    f"one process at a time runs in a trial's folder, and {self.holder} still runs in "
                    f"{self._path.parent} after {WAIT_SECONDS:g} s; end it, and resume"
                )
            time.sleep(_POLL_SECONDS)

    @property
    def holder(self) -> str:
        """`host:pid` of the process that has it, or had it last."""
        return self._path.read_text(encoding="utf-8") or "another process"

    def release(self) -> None:
        """Let it go. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
