"""Every sweep file that we ship is planned without a network, a GPU or any weights."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from sweeps.sweepfile import load_sweep
from sweepsvc.plan import plan

FILES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_there_are_files_to_plan() -> None:
    assert len(FILES) >= 2


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_search_spaces_is_planned_offline(file: Path) -> None:
    made = plan(load_sweep(file), "a100-80gb")
    assert made.trials
    for trial in made.trials:
        told = trial.prediction
        assert told.fits is not None
        assert told.peak_memory_gb > 0.1
        assert trial.resolved.spec.train is None or told.train_seconds
