"""The study on a real Postgres: a server that was started anew, and what a trial asks of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text

from sweeps.errors import TakenOver
from sweepsvc import database
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
    monkeypatch.setattr(database, "IDLE_SECONDS", 0.0)
    study = open_study(SWEEP, "idle-1", postgres.study_url, {"owner": "me"})
    run_a_trial(study)
    postgres.stop()
    postgres.start()
    run_a_trial(study)
    study.close("interrupted")
    assert [trial.state for trial in load_record("idle-1", postgres.study_url).trials] == ["completed"] * 2


def test_one_in_steady_use_is_not(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question to the server is a message and an answer: they are what a trial costs there."""
    monkeypatch.setattr(database, "IDLE_SECONDS", 3600.0)
    study = open_study(SWEEP, "steady-1", postgres.study_url, {"owner": "me"})
    run_a_trial(study)
    engines: list[Any] = [study._engine, study._storage.engine]  # type: ignore[attr-defined]  # a database has one
    pings: list[object] = []
    statements: list[str] = []
    for engine in engines:
        monkeypatch.setattr(engine.dialect, "do_ping", pings.append)
        event.listen(
            engine, "before_cursor_execute", lambda _, __, statement, *___: statements.append(statement)
        )
    run_a_trial(study)
    assert pings == []
    assert len(statements) == 21  # of them 12 for a new trial with two parameters, by Optuna
    study.close("interrupted")


def test_nobody_takes_a_sweep_over_in_the_middle_of_a_write(postgres: Postgres) -> None:
    """The write holds the owner's row: who takes over waits for it, and then sees what was written."""
    study = open_study(SWEEP, "held-1", postgres.study_url, {"owner": "me"})
    proposal = study.ask()
    assert proposal is not None
    other = create_engine(postgres.study_url)
    with other.begin() as taking:  # not yet committed
        taking.execute(text("UPDATE study_user_attributes SET value_json = '\"you\"' WHERE key = 'owner'"))
        errors: list[BaseException | None] = []
        writing = threading.Thread(target=lambda: errors.append(_raised(lambda: study.started(proposal))))
        writing.start()
        writing.join(0.5)
        assert writing.is_alive(), "it waits for whom it may belong to"
    writing.join(30)
    assert isinstance(errors[0], TakenOver)
    assert load_record("held-1", postgres.study_url).trials[0].state == "waiting"
    other.dispose()


def _raised(work: Callable[[], object]) -> BaseException | None:
    try:
        work()
    except TakenOver as error:
        return error
    return None
