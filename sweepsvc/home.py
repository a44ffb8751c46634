"""Where a person's sweeps live: `runs/` in the working folder, or `--home`, or `SWEEPSVC_HOME`."""

from __future__ import annotations

import os
from pathlib import Path

from sweepsvc.protocols import Proposal


class Home:
    """The files and stores of every sweep.

    study.db, mlflow.db, mlartifacts/      the embedded stores; SWEEPSVC_STUDY_URL and
                                           MLFLOW_TRACKING_URI point elsewhere
    <sweep-id>/sweep.yaml                  the sweep file as it was launched
    <sweep-id>/trials/<number>/            one trial's files
    <sweep-id>/ray/                        Ray's own state, never read by us
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path or os.environ.get("SWEEPSVC_HOME") or "runs").absolute()

    @property
    def study_url(self) -> str:
        return os.environ.get("SWEEPSVC_STUDY_URL") or f"sqlite:///{self.path / 'study.db'}"

    @property
    def tracking_uri(self) -> str:
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.path / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        return self.path / "mlartifacts"

    def sweep(self, sweep_id: str) -> SweepFolder:
        return SweepFolder(self.path / sweep_id)


class SweepFolder:
    """The files of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sweep_file = path / "sweep.yaml"
        self.ray = path / "ray"

    def trial(self, proposal: Proposal) -> Path:
        return self.path / "trials" / proposal.key
