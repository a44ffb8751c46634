"""One driver for each sweep: who drives it, and how a second one is refused."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from sweeps.errors import CannotStart
from sweepsvc.home import SweepFolder
from sweepsvc.protocols import SweepRecord, TrialRecord

_CLOCK_STEP_SECONDS = 300

HEARTBEAT_SECONDS = 5.0
"""How often a driver says in the study that it lives."""

SILENCE_SECONDS = 120.0
"""After so long without a heartbeat a driver on another host is taken for dead: clocks may differ a little,
and a database may be away for a moment."""


def this_process() -> str:
    """This process, so that another can tell whether it still lives: `host/place:pid:start`."""
    process = psutil.Process()
    return f"{_here()}:{process.pid}:{process.create_time():.0f}"


def _here() -> str:
    """Where a process's id means something: two containers may have one host's name, and number their own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
        return f"{socket.gethostname()}/{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    return socket.gethostname()


def _is_here(place: str) -> bool:
    """Whether `place` is where this process is; earlier versions wrote down the host's name alone."""
    return place == (_here() if "/" in place else socket.gethostname())


def lives(owner: str, heartbeat: str = "") -> bool:
    """Whether the process that drove a sweep runs still.

    One on another host is judged by its last `heartbeat`, and counts as alive if it never gave one.
    """
    if owner.count(":") < 2:
        return False
    place, pid, start = owner.rsplit(":", 2)  # host names have no colon
    if not _is_here(place):
        return silence_seconds(heartbeat) < SILENCE_SECONDS
    try:
        process = psutil.Process(int(pid))
        # Not to the second: the system's clock may have been set since, and a process's start moves with it.
        is_same = abs(process.create_time() - float(start)) < _CLOCK_STEP_SECONDS
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def silence_seconds(heartbeat: str) -> float:
    """How long ago that was; 0 for none, or one that cannot be read."""
    try:
        beat = datetime.datetime.fromisoformat(heartbeat)
    except ValueError:
        return 0.0
    return (datetime.datetime.now(datetime.UTC) - beat).total_seconds()


def is_driven(state: str, owner: str, heartbeat: str = "") -> bool:
    """Whether a sweep in that state runs; a driver that was killed has left "running" behind."""
    return state == "running" and lives(owner, heartbeat)


def as_it_stands(record: SweepRecord) -> SweepRecord:
    """A sweep whose driver is gone is interrupted, and so is what ran, whatever the driver last wrote."""
    if is_driven(record.state, record.owner, record.heartbeat):
        return record

    def stopped(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        return [
            replace(trial, state="interrupted") if trial.state == "running" else trial for trial in trials
        ]

    state = "interrupted" if record.state == "running" else record.state
    return replace(record, state=state, baselines=stopped(record.baselines), trials=stopped(record.trials))


def is_elsewhere(owner: str) -> bool:
    """Whether it is a process of another host, of which nothing can be known from here."""
    return owner.count(":") >= 2 and not _is_here(owner.rsplit(":", 2)[0])


def named(owner: str) -> str:
    """`process 4711 on gpu-3`."""
    place, pid, _ = owner.rsplit(":", 2) if owner.count(":") >= 2 else ("an unknown host", "?", "")
    return f"process {pid} on {place.partition('/')[0]}"


@contextlib.contextmanager
def owning(folder: SweepFolder) -> Iterator[None]:
    """Be the sweep's one driver inside the block; `CannotStart` names the one that is.

    The lock is the kernel's, on `<sweep-id>/owner`: it goes with the process, however that ends. A stop that
    was asked of an earlier driver is forgotten. On a folder that several hosts share it is as good as their
    locks are, and the study refuses the writes of a driver that lost the sweep to another.
    """
    try:
        file = folder.owner.open("a+", encoding="utf-8")
    except OSError as error:
        raise CannotStart(
            f"the sweep's folder must be writable, got {folder.path}: {error.strerror}; check --home"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise busy(folder.path.name, file.read().strip()) from None
        file.truncate(0)
        file.write(this_process())
        file.flush()
        folder.stop.unlink(missing_ok=True)
        yield


def driver_of(folder: SweepFolder) -> str | None:
    """The process that drives the sweep just now, as far as this host knows; None if there is none."""
    with contextlib.suppress(OSError), folder.owner.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip()
    return None


def busy(sweep_id: str, owner: str) -> CannotStart:
    """The refusal of a second driver."""
    return CannotStart(
        f"a sweep has one driver, and {sweep_id} is driven by {named(owner)}; wait for it, or end it with "
        f"`python -m sweepsvc stop {sweep_id}`"
    )
