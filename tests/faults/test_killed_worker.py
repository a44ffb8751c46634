"""`kill -9` of the worker: its trial goes on from the last checkpoint, by itself, in the same sweep."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Place, is_in, reports, same, worker_of

pytestmark = pytest.mark.slow


def is_writing_a_checkpoint(place: Place, key: str) -> Callable[[], bool]:
    folder = place.trial(key) / "checkpoints"

    def happened() -> bool:
        return is_in(place, key, "training", 5)() and any(_drafts(folder))

    return happened


def _drafts(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.startswith(".")]  # noqa: PTH208 (10 times faster)
    except OSError:
        return []


def test_a_worker_killed_in_a_step_in_a_checkpoint_and_in_the_evaluation_changes_nothing_in_the_end(
    place: Place, uninterrupted: Place
) -> None:
    moments = {
        "0": is_in(place, "0", "training", 7),
        "1": is_writing_a_checkpoint(place, "1"),
        "2": is_in(place, "2", "evaluating"),
    }
    driver = place.launch()
    for key, moment in moments.items():
        driver.wait_for(moment)
        worker = worker_of(place, key)
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
    assert driver.wait() == 0, driver.everything
    assert sum("process_lost" in line and "tried again (1 of 3)" in line for line in driver.lines) == 3
    assert [trial["attempts"] for trial in place.status()["trials"]] == [2, 2, 2, 1]
    assert [step for _, step in reports(place, "2")[1] if step < 20] == [0]  # loading
    same(place, uninterrupted)


def test_a_worker_that_is_always_killed_is_given_up_and_resumed_later(
    place: Place, uninterrupted: Place
) -> None:
    driver = place.launch()
    seen: set[int] = set()
    for attempt in range(1, 5):
        driver.wait_for(lambda attempt=attempt: len(reports(place, "0")) == attempt)  # type: ignore[misc]
        driver.wait_for(is_in(place, "0", "training", attempt))
        worker = worker_of(place, "0")
        assert worker is not None
        assert worker not in seen
        seen.add(worker)
        os.kill(worker, signal.SIGKILL)
    assert driver.wait() == 3, driver.everything
    status = place.status()
    assert [trial["state"] for trial in status["trials"]] == ["failed", "completed", "completed", "completed"]
    assert status["trials"][0]["attempts"] == 4
    assert "process_lost" in status["trials"][0]["error"]
    driver = place.resume()
    assert driver.wait() == 0, driver.everything
    assert place.status()["trials"][0]["attempts"] == 5
    same(place, uninterrupted)
