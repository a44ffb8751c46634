"""Where a sweep was made: commit, versions, owner. Kept with the study and with every run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

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


_CLOCK_STEP_SECONDS = 300


def gather(source: Path) -> dict[str, str]:
    """Facts of the sweep file's repository, this environment and this process, as text."""
    return {
        "git_commit": git_commit(source.parent),
        "python": platform.python_version(),
        **{f"version.{name}": _version(name) for name in LIBRARIES},
        "owner": owner(),
    }


def git_commit(folder: Path) -> str:
    """The commit of the repository around `folder`, `-dirty` behind it if files differ; "" outside one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return ""
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def owner() -> str:
    """This process, so that another can tell whether it still lives: `host:pid:start`."""
    process = psutil.Process()
    return f"{socket.gethostname()}:{process.pid}:{process.create_time():.0f}"


def owner_lives(facts: Mapping[str, str]) -> bool:
    """Whether the process that drove the sweep runs still; a process on another host counts as alive."""
    host, pid, start = facts.get("owner", "::").rsplit(":", 2)  # host names have no colon
    if not pid:
        return False
    if host != socket.gethostname():
        return True
    try:
        # Not to the second: the system's clock may have been set since, and a process's start moves with it.
        return abs(psutil.Process(int(pid)).create_time() - float(start)) < _CLOCK_STEP_SECONDS
    except psutil.NoSuchProcess:
        return False


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
