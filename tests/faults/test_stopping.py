"""SIGTERM in each phase, `stop` from another terminal, a second driver or Ctrl-C, a worker's notice."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.faults.conftest import MakePlace
from tests.faults.harness import Place, is_in, reports, same, worker_of

pytestmark = pytest.mark.slow


def test_sigterm_in_each_phase_is_a_clean_stop_and_changes_nothing_in_the_end(
    place: Place, uninterrupted: Place
) -> None:
    # A trial each for the last two: they are short, and it may have completed before it hears of the signal.
    moments = (("0", "loading", 0), ("0", "training", 6), ("1", "saving", 0), ("2", "evaluating", 0))
    driver = place.launch()
    for key, phase, step in moments:
        driver.wait_for(is_in(place, key, phase, step))
        driver.signal(signal.SIGTERM)
        assert driver.wait() == 4, driver.everything
        assert driver.said("the sweep stops: it was asked to stop")
        assert driver.said("-m sweepsvc resume tiny-1")
        status = place.status()
        assert status["state"] == "interrupted"
        assert {trial["state"] for trial in status["trials"]} <= {"interrupted", "completed"}
        driver = place.resume()
    assert driver.wait() == 0, driver.everything
    same(place, uninterrupted)


def test_sigterm_before_the_first_trial_leaves_a_sweep_that_can_be_resumed_or_none(
    place: Place, uninterrupted: Place
) -> None:
    driver = place.launch()
    driver.wait_for_a_word()
    driver.signal(signal.SIGTERM)
    assert driver.wait() == 4, driver.everything
    driver = place.resume() if place.has_begun() else place.launch()
    driver.wait_for_a_word()
    driver.signal(signal.SIGTERM)
    assert driver.wait() == 4, driver.everything
    driver = place.resume() if place.has_begun() else place.launch()
    assert driver.wait() == 0, driver.everything
    same(place, uninterrupted)


def test_stop_from_another_terminal_writes_a_checkpoint_and_a_second_driver_is_refused(
    make_place: MakePlace,
) -> None:
    place = make_place(steps=600, trials=1)
    driver = place.launch()
    driver.wait_for(is_in(place, "0", "training", 3))
    second = place.resume()
    assert second.wait() == 2, second.everything
    assert f"tiny-1 is driven by process {driver.pid} on" in "".join(second.errors)
    stop = place.start("stop", "tiny-1")
    assert stop.wait() == 0, stop.everything
    assert stop.said("-m sweepsvc resume tiny-1")
    assert driver.wait() == 4, driver.everything
    assert [trial["state"] for trial in place.status()["trials"]] == ["interrupted"]
    heard = reports(place, "0")[-1][-1][1]
    assert heard < 600
    driver = place.resume()
    assert driver.wait() == 0, driver.everything
    first = next(step for phase, step in reports(place, "0")[-1] if phase == "training" and step)
    assert first >= heard
    assert [trial["attempts"] for trial in place.status()["trials"]] == [2]


def test_a_second_ctrl_c_ends_at_once_and_the_sweep_can_be_resumed(
    place: Place, uninterrupted: Place
) -> None:
    driver = place.launch()
    driver.wait_for(is_in(place, "0", "training", 3))
    worker = worker_of(place, "0")
    assert worker is not None
    driver.signal(signal.SIGINT)
    driver.signal(signal.SIGINT)
    start = time.monotonic()
    assert driver.wait() == 4, driver.everything
    assert time.monotonic() - start < 30
    driver = place.resume()
    assert driver.wait() == 0, driver.everything
    same(place, uninterrupted)


def test_a_worker_that_is_given_notice_goes_on_elsewhere(place: Place, uninterrupted: Place) -> None:
    driver = place.launch()
    driver.wait_for(is_in(place, "0", "training", 5))
    worker = worker_of(place, "0")
    assert worker is not None
    os.kill(worker, signal.SIGTERM)
    assert driver.wait() == 0, driver.everything
    assert driver.said("process_lost: the worker was asked to stop, not by us; tried again (1 of 3)")
    same(place, uninterrupted)
