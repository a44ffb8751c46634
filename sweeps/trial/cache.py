"""The folder of what is made once for all trials of this machine. It may be removed at any time."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT_GB = 4.0
"""Decimal GB that the files of one kind may take, unless `$SWEEPSVC_CACHE_GB` says otherwise."""

_OLD_SECONDS = 86_400.0  # of a draft that nobody can be writing any more


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


def limit_bytes(
    variable: str = "SWEEPSVC_CACHE_GB", default_gb: float = LIMIT_GB
) -> tuple[float, tuple[str, ...]]:
    """The most bytes that what is kept of one kind may take, as `variable` of the environment has it in
    decimal GB; and a note where that cannot be read."""
    written = os.environ.get(variable)
    try:
        limit = float(written) if written else default_gb
    except ValueError:
        limit = math.nan
    if limit >= 0:
        return limit * 1e9, ()
    said = f"{variable} must be a number of GB from 0 on, got {written!r}: {default_gb:g} is used"
    return default_gb * 1e9, (said,)


@dataclass(frozen=True, order=True)
class Kept:
    """A file or a folder of the cache, and when it was last used, in nanoseconds."""

    used_at: int
    size_bytes: int
    path: Path


def make_room(kept: Iterable[Kept], most_bytes: float, forget: Callable[[Path], None]) -> float:
    """Have `forget` remove what was used longest ago, until the rest takes `most_bytes` at most.

    What it raises `OSError` for stays: somebody else's, in a folder that is shared. Returns the rest's bytes.
    """
    kept = sorted(kept)
    left = float(sum(one.size_bytes for one in kept))
    for one in kept:
        if left <= most_bytes:
            break
        with contextlib.suppress(OSError):
            forget(one.path)
            left -= one.size_bytes
    return left


def used(file: Path) -> None:
    """Remember that a file of the cache was used now; the system's own access times are rarely kept."""
    with contextlib.suppress(OSError):  # of a cache that others fill and we only read
        os.utime(file)


def prune(newest: Path, limit: float) -> None:
    """Remove least recently used files beside `newest`, of its suffix, until they take `limit` bytes at most.

    `newest` stays, however large it is. A process that has a file open reads it to its end; one that comes
    later finds none, and makes it anew. What another process removes at the same time is gone either way.
    """
    remembered = []
    for file in newest.parent.iterdir():
        with contextlib.suppress(OSError):  # gone by now
            status = file.stat()
            if file.name.startswith("."):
                if status.st_mtime < time.time() - _OLD_SECONDS:  # of a process that was killed
                    file.unlink()
            elif file.suffix == newest.suffix:
                remembered.append(Kept(status.st_mtime_ns, status.st_size, file))
    others = [kept for kept in remembered if kept.path != newest]
    of_newest = sum(kept.size_bytes for kept in remembered) - sum(kept.size_bytes for kept in others)
    make_room(others, limit - of_newest, _forget)


def _forget(file: Path) -> None:
    file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        # Whoever waits for this lock may come to compute the same as another: which costs time alone.
        file.with_suffix(".lock").unlink(missing_ok=True)
