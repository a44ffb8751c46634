"""The folder of what is made once for all trials of this machine. It may be removed at any time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def cache_home() -> Path:
    """`$SWEEPSVC_CACHE`, or `~/.cache/sweepsvc`."""
    return Path(os.environ.get("SWEEPSVC_CACHE") or "~/.cache/sweepsvc").expanduser()


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, which lies in the cache, over all processes of this machine; it falls with the
    process. Raises `OSError` where there can be no lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
