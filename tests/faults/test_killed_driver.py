"""`kill -9` of the driver, at any moment: nothing is lost, nothing is twice (law L6)."""

from __future__ import annotations

import random

import pytest

from tests.faults.harness import Place, is_in, reports, same

pytestmark = pytest.mark.slow

KILLS, SEED = 22, 20
LONGEST_SECONDS = 16.0
"""From a driver's first word, some seconds longer than what it needs for the whole sweep."""


def test_a_driver_killed_at_many_random_moments_changes_nothing_in_the_end(
    place: Place, uninterrupted: Place
) -> None:
    draw = random.Random(SEED)
    driver = place.launch()
    kills = 0
    while kills < KILLS:
        driver.wait_for_a_word()
        lasts = driver.ends_within(draw.uniform(0, LONGEST_SECONDS * draw.random()))
        if (
            lasts
        ):  # done before its kill: what is left of the kills falls on a sweep that only finds itself done
            assert driver.wait() == 0, driver.everything
        else:
            driver.kill()
            kills += 1
        driver = place.resume() if place.has_begun() else place.launch()
    assert driver.wait() == 0, driver.everything
    same(place, uninterrupted)
    _no_step_was_trained_twice(place)


def _no_step_was_trained_twice(place: Place) -> None:
    """Beyond the last checkpoint, which is at most one step behind: a step is heard of, then written."""
    for key in ("0", "1", "2", "3"):
        last = 0
        for attempt in reports(place, key):
            trained = [step for phase, step in attempt if phase == "training" and step]
            assert trained == sorted(set(trained))
            if trained:
                assert trained[0] >= last
                last = trained[-1]
        assert last == 20


def test_the_trial_that_was_cut_is_tried_twice_and_the_one_before_it_is_left_alone(
    place: Place, uninterrupted: Place
) -> None:
    driver = place.launch()
    driver.wait_for(is_in(place, "1", "training", 10))
    driver.kill()
    first = place.trial("0") / "result.json"
    before, written = first.read_bytes(), first.stat().st_mtime_ns
    driver = place.resume()
    assert driver.wait() == 0, driver.everything
    assert driver.said("finished: 2")
    assert driver.said("to resume: trial 1 from step 9") or driver.said("to resume: trial 1 from step 10")
    assert (first.read_bytes(), first.stat().st_mtime_ns) == (before, written)
    assert [trial["attempts"] for trial in place.status()["trials"]] == [1, 2, 1, 1]
    same(place, uninterrupted)


def test_a_driver_killed_in_the_evaluation_only_has_that_done_again(
    place: Place, uninterrupted: Place
) -> None:
    driver = place.launch()
    driver.wait_for(is_in(place, "1", "evaluating"))
    driver.kill()
    driver = place.resume()
    assert driver.wait() == 0, driver.everything
    again = reports(place, "1")[1:]
    assert [step for attempt in again for phase, step in attempt if phase == "training" and step < 20] == []
    same(place, uninterrupted)
