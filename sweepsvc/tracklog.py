"""What the tracker is to hear of one trial: a durable log beside the trial, and how much of it was delivered.

`tracking/log.jsonl`        one JSON object a line: {"at_ms", "what": "start" | "report" | "end", ...}; only
                            ever appended to, and kept when it is delivered: it is the trial's history
`tracking/delivered.json`   the bytes of the log that the tracker has, and the run that has them
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeps.result import Progress, TrialResult
from sweepsvc.protocols import Proposal, Report
from sweepsvc.records import proposal_entry, proposal_of, result_entry, result_of


@dataclass(frozen=True)
class Started:
    """Attempt number `attempt`, from 1, began at `at_ms`."""

    proposal: Proposal
    attempt: int
    at_ms: int


@dataclass(frozen=True)
class Ended:
    """The attempt ended at `at_ms`."""

    result: TrialResult
    at_ms: int


Entry = Started | Report | Ended

CHUNK_BYTES = 1 << 17
"""How much of a log is read at a time: some hundred reports."""

_CURVES = ("train_loss", "eval_loss", "lr", "tokens_per_second")


@dataclass(frozen=True)
class Mark:
    """How far a log was delivered: its first `bytes`, into the run `run_id`.

    `maybe` says that a run may have been opened for the trial whose id nobody has written down.
    """

    bytes: int = 0
    run_id: str | None = None
    maybe: bool = False


@dataclass(frozen=True)
class Line:
    """One entry of a log, and the byte where it ends. A line that cannot be read has None as its entry."""

    entry: Entry | None
    end: int


class TrackLog:
    """The log of one trial. One process writes it, the sweep's owner; two of its threads may, one each:
    `append` is one thread's, `mark` the other's.
    """

    def __init__(self, trial: Path) -> None:
        self.trial = trial
        self._file = trial / "tracking" / "log.jsonl"
        self._mark_file = trial / "tracking" / "delivered.json"
        self.size = _whole_size(self._file)
        self.mark = _read_mark(self._mark_file) or Mark(maybe=self.size > 0)
        if self.mark.bytes > self.size:  # the log was lost: whatever comes now is new
            self.mark = Mark(self.size, self.mark.run_id, self.mark.maybe)

    @property
    def waits(self) -> bool:
        """Whether some of it is not delivered."""
        return self.mark.bytes < self.size

    def append(self, entry: Entry) -> None:
        """Write `entry` behind the others, whole or not at all. Raises OSError.

        An end is on the disk when this returns; what came before may be lost by a power cut.
        """
        line = _line(entry)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _write_whole_line(file, line, self.size)
            if isinstance(entry, Ended):
                os.fsync(file)
        finally:
            os.close(file)
        self.size += len(line)

    def delivered(self, mark: Mark) -> None:
        """Write down how far the tracker has heard. A power cut may lose it; then it hears a part again.

        Raises OSError where the disk refuses; this process knows it all the same.
        """
        self.mark = mark
        draft = self._mark_file.with_name(f".{self._mark_file.name}")
        told = {"bytes": mark.bytes, "run_id": mark.run_id, "maybe": mark.maybe}
        draft.write_text(json.dumps(told) + "\n", encoding="utf-8")
        draft.replace(self._mark_file)

    @property
    def lacks_an_end(self) -> bool:
        """Whether the last that was said of the trial is not its end."""
        if self.size == 0:
            return False
        with self._file.open("rb") as file:
            file.seek(max(0, self.size - CHUNK_BYTES))
            last = file.read(min(self.size, CHUNK_BYTES)).rstrip(b"\n").rpartition(b"\n")[2]
        # A line longer than a chunk can only be an end: it has a traceback.
        return last.startswith(b'{"at_ms"') and not isinstance(_entry(last), Ended)

    def waiting(self, at_most_bytes: int = CHUNK_BYTES) -> Sequence[Line]:
        """The next lines to deliver: those in `at_most_bytes`, at least one if there is one."""
        return list(self._lines(self.mark.bytes, self.size, at_most_bytes))

    def heard(self) -> Iterator[Entry]:
        """What the tracker has, the oldest first."""
        return (line.entry for line in self._lines(0, self.mark.bytes) if line.entry is not None)

    def history(self) -> Iterator[Entry]:
        """Everything, the oldest first, delivered or not."""
        return (line.entry for line in self._lines(0, self.size) if line.entry is not None)

    def _lines(self, begin: int, end: int, at_most_bytes: int | None = None) -> Iterator[Line]:
        if begin >= end:
            return
        with self._file.open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin if at_most_bytes is None else min(end - begin, at_most_bytes))
            if not data.endswith(b"\n"):  # never beyond `end`: the writer may be in the middle of a line
                data += file.readline(end - begin - len(data))
        for line in data.splitlines(keepends=True):
            begin += len(line)
            yield Line(_entry(line), begin)


def read_reports(trial: Path) -> list[Report]:
    """What was heard of a trial, without the steps that an attempt repeated; none if there is no log.

    Changes nothing, unlike a `TrackLog`, which is the owner's: the trial may be running elsewhere, and then
    the last line may be half written.
    """
    try:
        lines = (trial / "tracking" / "log.jsonl").read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    replay = Replay()
    parts = (replay.take(entry) for line in lines if (entry := _entry(line)) is not None)
    return [part for part in parts if isinstance(part, Report)]


def _whole_size(file: Path) -> int:
    """The size of the log, once the torn last line of a killed writer is cut off."""
    try:
        size = file.stat().st_size
    except OSError:
        return 0
    if size == 0:
        return 0
    with file.open("rb") as log:
        log.seek(size - 1)
        if log.read() == b"\n":
            return size
    whole = file.read_bytes().rfind(b"\n") + 1
    os.truncate(file, whole)
    return whole


def _write_whole_line(file: int, line: bytes, size: int) -> None:
    """One write, so that a killed process leaves the line or a torn end; a full disk leaves nothing."""
    try:
        written = os.write(file, line)
        if written < len(line):
            raise OSError(f"a record needs {len(line)} bytes of disk, got {written}; free some")
    except OSError:
        os.ftruncate(file, size)
        raise


def _read_mark(file: Path) -> Mark | None:
    """None where there is none, or where a power cut left a broken one."""
    try:
        mark = json.loads(file.read_bytes())
        return Mark(int(mark["bytes"]), mark["run_id"], bool(mark["maybe"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _line(entry: Entry) -> bytes:
    said: dict[str, Any] = {"at_ms": entry.at_ms}
    match entry:
        case Started():
            said |= {"what": "start", "attempt": entry.attempt, "proposal": proposal_entry(entry.proposal)}
        case Report():
            said |= {"what": "report", "progress": json.loads(entry.progress.model_dump_json())}
        case Ended():
            said |= {"what": "end", "result": result_entry(entry.result)}
    return json.dumps(said).encode() + b"\n"


def _entry(line: bytes) -> Entry | None:
    try:
        said = json.loads(line)
        match said["what"]:
            case "start":
                return Started(proposal_of(said["proposal"]), said["attempt"], said["at_ms"])
            case "report":
                return Report(Progress.model_validate_json(json.dumps(said["progress"])), said["at_ms"])
            case "end":
                return Ended(result_of(said), said["at_ms"])
    except (ValueError, KeyError, TypeError):
        pass
    return None


# --- attempts that repeat steps ---------------------------------------------------------------------


@dataclass
class Replay:
    """Follows a log from its beginning, and leaves out of each attempt what an earlier one has recorded.

    A trial that is resumed repeats the steps after its last checkpoint, and reports them again.
    """

    started: Started | None = None
    _last: dict[str, int] = field(default_factory=dict)
    _before: dict[str, int] = field(default_factory=dict)

    def take(self, entry: Entry) -> Entry:
        """`entry`, without the numbers of steps that an earlier attempt reported."""
        if isinstance(entry, Started):
            self.started = entry
            self._before = dict(self._last)
        return self._new_part(entry) if isinstance(entry, Report) else entry

    def _new_part(self, report: Report) -> Report:
        progress = report.progress
        given = [curve for curve in _CURVES if getattr(progress, curve) is not None]
        repeated = [curve for curve in given if progress.step <= self._before.get(curve, -1)]
        self._last |= {curve: max(progress.step, self._last.get(curve, -1)) for curve in given}
        if not repeated:
            return report
        return Report(progress.model_copy(update=dict.fromkeys(repeated)), report.at_ms)
