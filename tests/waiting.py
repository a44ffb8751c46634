"""Waiting for something that another thread, process or machine does."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable


def until(is_so: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain"
        time.sleep(0.02)


def let_go_at_once(processes: Iterable[subprocess.Popen[str]]) -> None:
    """Once each has said that it is ready, have all of them go on; each waits for a line of its input."""
    started = list(processes)
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
