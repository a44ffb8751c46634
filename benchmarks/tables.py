"""Tables of measurements in Markdown, and what they were made with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_LIBRARIES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "lm_eval", "ray", "optuna", "mlflow",
)  # fmt: skip
_INSTRUCTIONS = ("avx512f", "avx512_bf16", "amx_bf16")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up; None is a blank cell."""
    cells = [[*map(cell, row)] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
             for row in cells]  # fmt: skip
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def cell(value: object) -> str:
    """Three digits that matter of a number; nothing for what was not measured."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def times(ratio: float | None) -> str:
    """`1.84 x`, blank where it was not measured."""
    return "" if ratio is None else f"{ratio:.2f} x"


def facts() -> dict[str, str]:
    """The date, the machine and the versions of whatever of our libraries is installed."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version for name in _LIBRARIES if (version := _version(name))},
    }


def facts_line(known: Mapping[str, str]) -> str:
    """The same as one line under a table."""
    versions = ", ".join(f"{name} {version}" for name, version in known.items() if name not in _BEFORE)
    return f"{known['date']}, commit {known['commit'] or 'unknown'}; {known['machine']}; {versions}."


_BEFORE = ("date", "machine", "commit")


def machine() -> str:
    """Cores, processor and memory of this machine."""
    model, flags, memory = platform.machine(), "", ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        known = dict(_pair(line) for line in info.read_text().splitlines() if ":" in line)
        model = known.get("model name", model)
        flags = ", ".join(name for name in _INSTRUCTIONS if name in known.get("flags", "").split())
    total = Path("/proc/meminfo")
    if total.exists():
        memory = f", {int(total.read_text().split()[1]) / 2**20:.0f} GiB"
    return f"{os.cpu_count()} cores of {model}{f' ({flags})' if flags else ''}{memory}"


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Of the working tree, with a + where it differs; empty outside of a repository."""
    place = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=9", "--exclude=*"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
