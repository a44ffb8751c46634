"""An MLflow server goes away in the middle of a sweep: the sweep does not notice, and `sync` delivers."""

from __future__ import annotations

import pytest

from tests.faults.conftest import MakePlace
from tests.faults.harness import Place, is_in, same_results, tracked
from tests.mlflow_server import Server

pytestmark = pytest.mark.slow


def test_a_sweep_ends_without_its_server_and_sync_delivers_what_waited(
    make_place: MakePlace, uninterrupted: Place, server: Server
) -> None:
    place = make_place(tracking_uri=server.url)
    driver = place.launch()
    driver.wait_for(is_in(place, "1", "training", 5))
    server.stop()
    assert driver.wait() == 0, driver.everything
    assert driver.said("sync tiny-1")
    same_results(place, uninterrupted)
    server.start()
    sync = place.start("sync", "tiny-1")
    assert sync.wait() == 0, sync.everything
    assert tracked(place) == tracked(uninterrupted)
