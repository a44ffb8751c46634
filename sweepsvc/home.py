"""Where a person's sweeps live: `runs/` in the working folder, or `--home`, or `SWEEPSVC_HOME`."""

from __future__ import annotations

import os
from pathlib import Path

from sweeps.errors import CannotStart
from sweeps.trial.paths import write_whole
from sweepsvc.protocols import Proposal
from sweepsvc.urls import masked

FORMAT = 1
"""Of a home and of a study in it. A higher one was made by a later version of sweepsvc, and is refused."""


class Home:
    """The files and stores of every sweep.

    format                                 one number, see `FORMAT`
    study.db, mlflow.db, mlartifacts/      the embedded stores; SWEEPSVC_STUDY_URL and
                                           MLFLOW_TRACKING_URI point elsewhere
    rehearsals/                            a home of rehearsals, with stores of its own
    <sweep-id>/sweep.yaml                  the sweep file as it was launched
    <sweep-id>/trials/<number>/            one trial's files
    <sweep-id>/owner                       the process that drives the sweep, locked by it
    <sweep-id>/stop                        there while the sweep is asked to stop
    <sweep-id>/ray/                        Ray's own state, never read by us

    `storage` is an address of object storage for what workers write, where they do not share the home.
    """

    def __init__(self, path: Path | str | None = None, storage: str | None = None) -> None:
        """`storage` "" is none; None is what the environment says."""
        self.path = Path(path or os.environ.get("SWEEPSVC_HOME") or "runs").absolute()
        self.storage = os.environ.get("SWEEPSVC_STORAGE", "") if storage is None else storage
        self._asked_storage = storage

    @property
    def study_url(self) -> str:
        return os.environ.get("SWEEPSVC_STUDY_URL") or f"sqlite:///{self.path / 'study.db'}"

    @property
    def tracking_uri(self) -> str:
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.path / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        return self.path / "mlartifacts"

    @property
    def option(self) -> list[str]:
        """The words that name it in a command; none where a command finds it by itself."""
        return [] if self.path == Path("runs").absolute() else ["--home", str(self.path)]

    def storing(self, launched: str) -> Home:
        """The same home with the storage that a sweep was launched with, "" for none.

        That is so whatever the environment says: another storage knows nothing of the sweep. Raises
        `CannotStart` if another one is asked for.
        """
        if self._asked_storage and self._asked_storage != launched:
            raise CannotStart(
                f"a sweep keeps its storage, got {masked(self._asked_storage)} for one that was launched "
                f"with {masked(launched) or 'none'}; leave --storage out"
            )
        return Home(self.path, launched)

    def check(self) -> None:
        """Raise `CannotStart` if a later version made this home."""
        try:
            text = (self.path / "format").read_text(encoding="utf-8").strip()
        except OSError:
            return  # not made yet, or somebody else says why it cannot be read
        if not text.isdecimal() or int(text) > FORMAT:
            raise CannotStart(
                f"a home must be of format {FORMAT} or lower, got {text[:20]!r} in {self.path}: a later "
                "version of sweepsvc made it; use that version, or another --home"
            )

    def mark(self) -> None:
        """Say which format the home has, if nothing says so yet."""
        if not (self.path / "format").exists():
            write_whole(self.path / "format", f"{FORMAT}\n")

    def sweep(self, sweep_id: str) -> SweepFolder:
        return SweepFolder(self.path / sweep_id, self.storage)


class SweepFolder:
    """The files of one sweep.

    `storage` is the address of the store in which the workers keep their trials' folders, "" where
    they share this one: what is here is then copies.
    """

    def __init__(self, path: Path, storage: str = "") -> None:
        self.path = path
        self.storage = storage
        self.sweep_file = path / "sweep.yaml"
        self.ray = path / "ray"
        self.owner = path / "owner"
        self.stop = path / "stop"

    def trial(self, proposal: Proposal) -> Path:
        return self.path / "trials" / proposal.key
