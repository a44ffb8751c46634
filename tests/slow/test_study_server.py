"""The study on a real Postgres: a server that was started anew, and what a trial asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event

from sweepsvc import study as ledger
from sweepsvc.study import OptunaStudy, load_record, open_study
from tests.servers import Postgres
from tests.sweepsvc.samples import result_of, sweep_of

pytestmark = pytest.mark.slow

SWEEP = sweep_of(
    "sampler: random, trials: 20, space: {lora.r: [4, 8, 16, 32], optimizer.lr: {low: 1e-4, high: 1e-2}}"
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


def run_a_trial(study: OptunaStudy) -> None:
    proposal = study.ask()
    assert proposal is not None
    study.started(proposal)
    study.tracked(proposal.key, "run")
    study.tell(proposal, result_of("completed", 0.5))


def test_a_connection_that_lay_unused_is_tried_before_it_is_used(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "IDLE_SECONDS", 0.0)
    study = open_study(SWEEP, "idle-1", postgres.study_url, {"owner": "me"})
    run_a_trial(study)
    postgres.stop()
    postgres.start()
    run_a_trial(study)
    study.close("interrupted")
    assert [trial.state for trial in load_record("idle-1", postgres.study_url).trials] == ["completed"] * 2


def test_one_in_steady_use_is_not(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question to the server is a message and an answer: they are what a trial costs there."""
    monkeypatch.setattr(ledger, "IDLE_SECONDS", 3600.0)
    study = open_study(SWEEP, "steady-1", postgres.study_url, {"owner": "me"})
    run_a_trial(study)
    engine: Any = study._storage.engine  # type: ignore[attr-defined]  # of a database, as this one is
    pings: list[object] = []
    monkeypatch.setattr(engine.dialect, "do_ping", lambda connection: pings.append(connection) or True)
    statements: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        statements.append(statement)

    run_a_trial(study)
    assert pings == []
    assert len(statements) < 24
    study.close("interrupted")
