"""A second Ctrl-C."""

from __future__ import annotations

import signal
import time

import pytest

from tests.faults.harness import Place, is_in, same, worker_of

pytestmark = pytest.mark.slow


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
