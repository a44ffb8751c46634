"""The tree of errors.

    SweepsError
    ├── InvalidSweep            the sweep file or its overrides: nothing was started (exit 2)
    ├── InvalidValue            one rule, range or choice that breaks a law; collected into an InvalidSweep
    ├── InvalidTrial            picks from a valid space that resolve to no valid trial
    ├── CannotStart             the file is good, this machine or home cannot run it (exit 2)
    ├── UnknownSweep            no sweep of that id (exit 2)
    ├── CannotContinue          the ledger or the disk failed in mid-sweep; the sweep can be resumed (exit 4)
    ├── Interrupted             a trial was asked to stop, and did: no failure
    └── TrialError              a trial ended without a result; `kind` is its failure class
        ├── Diverged            the loss is not finite, or stayed far above its start
        ├── OutOfMemory         one row alone does not fit
        ├── BadData             the dataset is missing, empty or malformed
        ├── BadModel            the model cannot be loaded, or the adapter does not fit it
        ├── EvaluationFailed    trained, but a benchmark raised
        ├── DownloadFailed      the hub could not be reached: may succeed later
        └── DiskFull            a file of the trial could not be written

An error states the law, then the values, then the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

FailureClass = Literal[
    "diverged",
    "out_of_memory",
    "bad_data",
    "bad_model",
    "evaluation_failed",
    "download_failed",
    "disk_full",
    "process_lost",
    "bug",
]


class SweepsError(Exception):
    """Base of everything this project raises on purpose."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a sweep file: where, and what with its remedy.

    `source` is set where that is not the sweep file itself: `--set`.
    """

    message: str
    path: str = ""
    line: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidSweep(SweepsError):
    """Every fault of a sweep file at once."""

    def __init__(self, source: str, faults: Sequence[Fault]) -> None:
        self.source = source
        self.faults = tuple(
            sorted(set(faults), key=lambda fault: (fault.line or 0, fault.path, fault.message))
        )
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """One line a fault: `file:line: field: message`."""
        return [f"{self._where(fault)}: {fault}" for fault in self.faults]

    def _where(self, fault: Fault) -> str:
        source = fault.source or self.source
        return f"{source}:{fault.line}" if fault.line else source


class InvalidValue(SweepsError):
    """One value that breaks a law of its own, such as a rule that cannot be read."""


class InvalidTrial(SweepsError):
    """Picks from a valid space that resolve to no valid trial, with every law that they break."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(str(fault) for fault in self.faults))


class CannotStart(SweepsError):
    """The sweep is valid, but this machine, cluster or home cannot run it."""


class UnknownSweep(SweepsError):
    """No sweep has the id that was asked for, or more than one does."""


class CannotContinue(SweepsError):
    """A running sweep must stop, and can be resumed once what it says is mended."""


class TakenOver(CannotContinue):
    """Another driver has the sweep: this one may write nothing more, and its workers are to end at once."""


class Interrupted(SweepsError):
    """A trial was asked to stop; what it has done so far is in its last checkpoint."""


class TrialError(SweepsError):
    """A trial that ended without a result, for a reason that has a name."""

    kind: ClassVar[FailureClass] = "bug"


class Diverged(TrialError):
    kind = "diverged"


class OutOfMemory(TrialError):
    kind = "out_of_memory"


class BadData(TrialError):
    kind = "bad_data"


class BadModel(TrialError):
    kind = "bad_model"


class EvaluationFailed(TrialError):
    kind = "evaluation_failed"


class DownloadFailed(TrialError):
    kind = "download_failed"


class DiskFull(TrialError):
    kind = "disk_full"


def failure_class(error: BaseException) -> FailureClass:
    """The class under which `error` is recorded; what we did not foresee is a `bug`."""
    return error.kind if isinstance(error, TrialError) else "bug"
