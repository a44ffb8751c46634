"""A real sweep, followed by other processes that have its study and its tracker, and none of its files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.signals import handled
from tests.faults.conftest import MakePlace
from tests.faults.harness import ROOT, SWEEP_ID, Place, is_in
from tests.mlflow_server import Server
from tests.waiting import until

pytestmark = pytest.mark.slow


class Follower:
    """A command in a home of its own, with the addresses of the two stores; `on_terminal`, on a terminal."""

    def __init__(self, place: Place, home: Path, *arguments: str, on_terminal: bool = False) -> None:
        environment = {
            **os.environ,
            "SWEEPSVC_HOME": str(home),
            "SWEEPSVC_STUDY_URL": f"sqlite:///{place.home}/study.db",
            "MLFLOW_TRACKING_URI": place.tracking_uri or f"sqlite:///{place.home}/mlflow.db",
            "TERM": "xterm-256color",
        }
        ours, theirs = pty.openpty() if on_terminal else os.pipe()
        if on_terminal:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        with handled(signal.SIG_IGN, signal.SIGINT):  # as a shell has it for what runs in the background
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sweepsvc", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=theirs,
                stderr=subprocess.STDOUT,
            )
        os.close(theirs)
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, ours: int) -> None:
        with contextlib.suppress(OSError):  # a terminal whose last writer is gone
            while chunk := os.read(ours, 1 << 16):
                self._chunks.append(chunk)
        os.close(ours)

    @property
    def text(self) -> str:
        return b"".join(self._chunks).decode(errors="replace")

    def wait(self) -> int:
        code = self.process.wait(120)
        self._reader.join(10)
        return code


@pytest.fixture
def followers(tmp_path: Path) -> Iterator[list[Follower]]:
    made: list[Follower] = []
    yield made
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
    assert not (tmp_path / "elsewhere").exists()


def without_times(text: str) -> list[str]:
    """The events of a `LineView`."""
    return [line.partition("] ")[2] for line in text.splitlines() if line.startswith("[")]


def test_a_sweep_is_followed_through_pipes_and_on_a_terminal_to_its_end(
    make_place: MakePlace, followers: list[Follower], tmp_path: Path
) -> None:
    place = make_place(steps=300, trials=2)
    elsewhere = tmp_path / "elsewhere"
    driver = place.launch()
    try:
        driver.wait_for(is_in(place, "0", "training", 3))
        os.kill(driver.pid, signal.SIGSTOP)  # no trial begins or ends before everybody looks on
        watched = Follower(place, elsewhere, "watch", "tiny")
        table = Follower(place, elsewhere, "watch", on_terminal=True)
        left = Follower(place, elsewhere, "watch")
        followers += [watched, table, left]
        until(lambda: all("Ctrl-C ends the watching alone" in one.text for one in (watched, table, left)))
        left.process.send_signal(signal.SIGINT)
        assert left.wait() == 0, left.text
        os.kill(driver.pid, signal.SIGCONT)
        assert left.text.splitlines()[-1].startswith("the watching has ended, the sweep tiny-1 has not")
        driver.wait_for(is_in(place, "1", "training", 3))
        told = Follower(place, elsewhere, "logs", SWEEP_ID, "--trial", "1", "-f")
        followers.append(told)
        assert driver.wait() == 0, driver.everything
    finally:
        place.leave()

    assert watched.wait() == 0, watched.text
    events = without_times(watched.text)
    assert len(events) == len(set(events))
    trial = "trial 1 (lora.r=2, lora.alpha=1)"
    assert f"{trial} started" in events
    assert any(
        re.fullmatch(re.escape(trial) + r" training step \d+/300  loss [\d.]+.*", event) for event in events
    )
    ends = [event for event in without_times(driver.text) if " completed: " in event]
    assert [event for event in events if " completed: " in event] == [
        event
        for event in ends
        if event.partition(" completed")[0] in {one.partition(" completed")[0] for one in events}
    ]
    assert watched.text.splitlines()[-2:] == [
        line.replace(str(place.home), str(elsewhere)) for line in driver.text.splitlines()[-2:]
    ]
    last_table = driver.text.rindex(f"{SWEEP_ID}: completed")
    assert (
        driver.text[last_table:].splitlines()[:6]
        == watched.text[watched.text.rindex(f"{SWEEP_ID}: completed") :].splitlines()[:6]
    )

    assert table.wait() == 0, table.text
    assert "\x1b[?25h" in table.text[table.text.rindex("\x1b[?25l") :]  # the cursor is shown again
    assert "━" in table.text
    assert re.search(r"training step \d+/300  loss [\d.]+", table.text)
    assert "ended, 0 failed" in table.text
    assert table.text.rindex(f"{SWEEP_ID}: completed") > table.text.rindex("training step")

    assert told.wait() == 0, told.text
    steps = [int(step) for step in re.findall(r"training step (\d+)/300  loss", told.text)]
    assert steps == list(range(1, 301))
    assert f"{trial} completed: rivers" in told.text.splitlines()[-1]


def test_a_tracker_that_is_stopped_and_started_again_is_said_and_the_study_goes_on(
    make_place: MakePlace, followers: list[Follower], tmp_path: Path, server: Server
) -> None:
    place = make_place(steps=600, trials=3, tracking_uri=server.url)
    driver = place.launch()
    try:
        driver.wait_for(is_in(place, "0", "training", 3))
        watched = Follower(place, tmp_path / "elsewhere", "watch", "tiny")
        followers.append(watched)
        until(lambda: re.search(r"trial 0 .* training step", watched.text))
        server.stop()
        until(lambda: "the tracker does not answer" in watched.text)
        until(lambda: re.search(r"trial 0 .* completed", watched.text), seconds=120)
        os.kill(driver.pid, signal.SIGSTOP)  # so that trials are left for when the server is back
        server.start()
        os.kill(driver.pid, signal.SIGCONT)
        until(lambda: "the tracker answers again" in watched.text, seconds=120)
        assert driver.wait() == 0, driver.everything
    finally:
        place.leave()
    assert watched.wait() == 0, watched.text
    assert watched.text.count("the tracker does not answer") == 1
    assert watched.text.count("the tracker answers again") == 1
    assert watched.text.count("trial 1 (lora.r=2, lora.alpha=1) completed") == 1
