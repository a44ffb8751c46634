"""One driver for each sweep."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.errors import CannotStart
from sweepsvc import owner
from sweepsvc.home import SweepFolder


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    (tmp_path / "demo-1").mkdir()
    return SweepFolder(tmp_path / "demo-1")


def test_an_owner_lives_as_long_as_its_process() -> None:
    assert owner.lives(owner.this_process())
    script = "from sweepsvc.owner import this_process; print(this_process())"
    gone = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert not owner.lives(gone.stdout.strip())


def test_a_recycled_pid_is_not_the_owner_and_another_host_is_believed() -> None:
    host, pid, start = owner.this_process().rsplit(":", 2)
    assert not owner.lives(f"{host}:{pid}:{int(start) - 1000}")
    assert owner.lives(f"elsewhere:{pid}:{start}")
    assert owner.is_elsewhere(f"elsewhere:{pid}:{start}")
    assert not owner.is_elsewhere(owner.this_process())
    assert not owner.lives("")


def test_a_second_driver_is_refused_and_told_of_the_first(folder: SweepFolder) -> None:
    refusal = rf"driven by process {os.getpid()} on .*sweepsvc stop demo-1"
    with owner.owning(folder), pytest.raises(CannotStart, match=refusal), owner.owning(folder):
        pass
    with owner.owning(folder):
        assert owner.lives(folder.owner.read_text())


def test_a_driver_that_died_leaves_nothing_to_clear_away(folder: SweepFolder) -> None:
    script = (
        "import os, sys, pathlib; from sweepsvc import owner; from sweepsvc.home import SweepFolder\n"
        "with owner.owning(SweepFolder(pathlib.Path(sys.argv[1]))): os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", script, str(folder.path)], check=False)
    assert died.returncode == -9
    assert not owner.lives(folder.owner.read_text())
    with owner.owning(folder):
        pass


def test_a_stop_asked_of_an_earlier_driver_is_forgotten(folder: SweepFolder) -> None:
    folder.stop.touch()
    with owner.owning(folder):
        assert not folder.stop.exists()


def test_a_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(CannotStart, match="folder must be writable"),
        owner.owning(SweepFolder(tmp_path / "x")),
    ):
        pass


def test_a_driver_on_another_host_is_judged_by_its_heartbeat() -> None:
    now = datetime.datetime.now(datetime.UTC)
    silent = now - datetime.timedelta(seconds=owner.SILENCE_SECONDS + 1)
    assert owner.lives("elsewhere:1:1", now.isoformat())
    assert not owner.lives("elsewhere:1:1", silent.isoformat())
    assert owner.lives("elsewhere:1:1", ""), "an earlier version gave none"
    assert owner.lives(owner.this_process(), silent.isoformat()), "here the process itself is looked at"
    assert owner.is_driven("running", "elsewhere:1:1", now.isoformat())
    assert not owner.is_driven("running", "elsewhere:1:1", silent.isoformat())


def test_containers_that_share_a_host_s_name_do_not_take_each_other_s_processes_for_theirs() -> None:
    place, pid, start = owner.this_process().rsplit(":", 2)
    host = place.partition("/")[0]
    other = f"{host}/{place.partition('/')[2]}0:{pid}:{start}"
    assert owner.is_elsewhere(other)
    now = datetime.datetime.now(datetime.UTC).isoformat()
    assert owner.lives(other, now), "its pid says nothing here, its heartbeat does"
    assert owner.named(other) == f"process {pid} on {host}"
    assert owner.lives(f"{host}:{pid}:{start}"), "as earlier versions wrote it"
