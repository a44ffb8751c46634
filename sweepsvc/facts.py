"""Where a sweep was made: commit, versions, owner. Kept with the study and with every run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from sweepsvc.owner import this_process

LIBRARIES = (
    "sweepsvc",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "lm_eval",
    "ray",
    "optuna",
    "mlflow",
)


def gather(source: Path) -> dict[str, str]:
    """Facts of the sweep file's repository, this environment and this process, as text."""
    return {
        "git_commit": git_commit(source.parent),
        "python": platform.python_version(),
        **{f"version.{name}": _version(name) for name in LIBRARIES},
        "owner": this_process(),
    }


def git_commit(folder: Path) -> str:
    """The commit of the repository around `folder`, `-dirty` behind it if files differ; "" outside one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return ""
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
