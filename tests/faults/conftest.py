"""What every sweep here shares: a tiny model, rows, a benchmark; and one sweep that nothing happened to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Place

MakePlace = Callable[..., Place]


@pytest.fixture(scope="session")
def make_place(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, alpaca_rows_file: Path
) -> MakePlace:
    """A home and a sweep file in a new folder, or in the one given as `folder`."""
    from tests.tiny import save_task

    tasks = save_task(tmp_path_factory.mktemp("tasks"))

    def make(folder: Path | None = None, **more: Any) -> Place:
        place = folder or tmp_path_factory.mktemp("place")
        return Place(place, tiny_model_dir, alpaca_rows_file, tasks, **more)

    return make


@pytest.fixture
def place(make_place: MakePlace) -> Iterator[Place]:
    made = make_place()
    yield made
    made.leave()


@pytest.fixture(scope="session")
def uninterrupted(make_place: MakePlace) -> Place:
    """What every sweep here must come to, whatever happens to it."""
    quiet = make_place()
    driver = quiet.launch()
    assert driver.wait() == 0, driver.everything
    return quiet
