"""A home whose disk is full, or read-only: what is said, and that the sweep ends the same once it is not."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MakePlace
from tests.faults.harness import Place, is_in, same, same_results, tracked
from tests.waiting import until

pytestmark = pytest.mark.slow


class Disk:
    """A small disk in memory."""

    def __init__(self, path: Path, megabytes: int) -> None:
        self.path = path
        self._filler = path / "filler"
        path.mkdir()
        refused = _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path))
        if refused:
            pytest.skip(f"only root can mount a disk: {refused}")

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def free(self) -> None:
        self._filler.unlink()

    def make(self, mode: str) -> None:
        """Make it `ro` or `rw`, once no process of a driver that was killed writes to it any more."""
        until(lambda: not _mount("-o", f"remount,{mode}", str(self.path)))

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


def _mount(*arguments: str) -> str:
    """Why it could not be mounted; empty if it was."""
    mounted = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    return mounted.stderr.strip() if mounted.returncode else ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", megabytes=64)
    yield made
    made.remove()


def test_a_disk_that_fills_up_stops_the_sweep_with_a_reason_and_loses_nothing(
    make_place: MakePlace, uninterrupted: Place, disk: Disk
) -> None:
    place = make_place(disk.path / "place")
    driver = place.launch()
    driver.wait_for(is_in(place, "1", "training", 3))
    disk.fill()
    # 3 where the trial was told failed, 4 where that could not be written either.
    assert driver.wait() in (3, 4), driver.everything
    assert "space" in driver.everything
    assert "Traceback" not in driver.everything
    assert place.status()["trials"][0]["state"] == "completed"
    driver = place.resume()
    assert driver.wait() in (2, 3, 4), driver.everything
    assert "space" in driver.everything or "full" in driver.everything
    assert "Traceback" not in driver.everything
    disk.free()
    driver = place.resume()
    assert driver.wait() == 0, driver.everything
    same_results(place, uninterrupted)
    sync = place.start("sync", "tiny-1")
    assert sync.wait() == 0, sync.everything
    _same_but_for_points_that_found_no_room(tracked(place), tracked(uninterrupted))


def _same_but_for_points_that_found_no_room(runs: dict[str, Any], others: dict[str, Any]) -> None:
    """A step that was checkpointed, and whose report could not be kept, is never trained nor told again."""
    assert runs.keys() == others.keys()
    for key, run in runs.items():
        other = others[key]
        assert all(run[name] == other[name] for name in ("status", "params", "files"))
        assert {*run["curve"]} <= {*other["curve"]}
        told = [{k: v for k, v in one["metrics"].items() if "score" in k} for one in (run, other)]
        assert told[0] == told[1]
        assert told[0]


def test_a_read_only_home_is_refused_by_launch_and_resume_and_read_by_status(
    make_place: MakePlace, uninterrupted: Place, disk: Disk
) -> None:
    place = make_place(disk.path / "place")
    disk.make("ro")
    driver = place.launch()
    assert driver.wait() == 2, driver.everything
    assert "must be writable" in driver.everything
    disk.make("rw")
    driver = place.launch()
    driver.wait_for(is_in(place, "0", "training", 3))
    driver.kill()
    disk.make("ro")
    assert place.status()["state"] == "interrupted"
    driver = place.resume()
    assert driver.wait() == 2, driver.everything
    assert "must be writable" in driver.everything
    disk.make("rw")
    driver = place.resume()
    assert driver.wait() == 0, driver.everything
    same(place, uninterrupted)
