"""The commands that come next, ready to be copied."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path

from sweepsvc.home import Home
from sweepsvc.protocols import SweepRecord


def next_steps(home: Home, record: SweepRecord) -> str:
    """What a person can do with a sweep that has ended, a line for each command."""
    lines = [
        f"compare the trials in the MLflow UI:  {command(home, 'ui')}",
        f"see them again here:                  {command(home, 'status', record.sweep_id)}",
    ]
    if record.state != "completed":
        lines.append(resume_line(home, record.sweep_id))
    return "\n".join(lines)


def resume_line(home: Home, sweep_id: str) -> str:
    """How to go on with a sweep that was cut."""
    return f"go on from the last checkpoints:      {command(home, 'resume', sweep_id)}"


def command(home: Home, *words: str) -> str:
    """`python -m sweepsvc ...` for this home, as one would type it here."""
    return shlex.join([_python(), "-m", "sweepsvc", *words, *home.option])


def _python() -> str:
    """This Python, as one would type it here: `.venv/bin/python`."""
    with contextlib.suppress(ValueError, OSError):  # not below the working folder, or that is gone
        short = Path(sys.executable).relative_to(Path.cwd())
        if Path.cwd() != Path("/"):  # where everything is below, and nobody types
            return str(short)
    return sys.executable
