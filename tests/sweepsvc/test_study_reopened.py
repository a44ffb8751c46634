"""A study that another driver left, at whatever moment: everything is finished from there (law L6)."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage

from sweeps.errors import CannotContinue, CannotStart, TakenOver
from sweeps.result import TrialResult
from sweeps.sweep import Sweep
from sweepsvc import database
from sweepsvc import study as study_module
from sweepsvc.protocols import Proposal, SweepRecord
from sweepsvc.study import (
    OptunaStudy,
    ask_to_stop,
    load_driving,
    load_launched,
    load_record,
    open_study,
    reopen_study,
)
from tests.sweepsvc.samples import result_of, sweep_of

FACTS = {"git_commit": "0123abc", "owner": "host:1:1"}
SPACE = (
    'space: {lora.r: [4, 8, 16], lora.alpha: ["2*r", 1], optimizer.lr: {low: 1e-5, high: 1e-3, log: true}}'
)
LEARNS = sweep_of(f"sampler: tpe, trials: 6, repeats: 2, {SPACE}")
LISTED = sweep_of("sampler: grid, space: {lora.r: [4, 8, 16], lora.alpha: ['2*r', 1]}")
WRITES = (
    "create_new_trial",
    "set_trial_param",
    "set_trial_user_attr",
    "set_study_user_attr",
    "set_trial_state_values",
)

_ids = (f"sweep-{number:03}" for number in itertools.count())


class Killed(BaseException):
    """The process is gone: nothing after this was done."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('study') / 'study.db'}"


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Arms the database: its write of that number, and none after it, is done. Gives the writes so far."""
    writes: list[str] = []
    limit = [10**9]

    def armed(kind: type, name: str) -> Callable[..., Any]:
        real = getattr(kind, name)

        def write(self: Any, *arguments: Any, **options: Any) -> Any:
            if len(writes) >= limit[0]:
                raise Killed
            writes.append(name)
            return real(self, *arguments, **options)

        return write

    for kind, name in (*((RDBStorage, name) for name in WRITES), (OptunaStudy, "_upserted")):
        monkeypatch.setattr(kind, name, armed(kind, name))

    def at(number: int) -> list[str]:
        writes.clear()
        limit[0] = number
        return writes

    return at


def value_of(proposal: Proposal) -> float:
    return 1 / (1 + proposal.spec.lora.r) + proposal.spec.optimizer.lr


def run_one(study: OptunaStudy, proposal: Proposal) -> None:
    study.started(proposal)
    study.tell(proposal, result_of("completed", value_of(proposal)))


def drive(study: OptunaStudy) -> SweepRecord:
    """Everything that is not done, one after another, as a driver would."""
    study.baselines()
    record = study.read()
    for trial in (*record.baselines, *record.trials):
        if trial.state in ("failed", "interrupted"):
            study.reopen(trial.proposal)
        if trial.state != "completed":
            run_one(study, trial.proposal)
    while (proposal := study.ask()) is not None:
        run_one(study, proposal)
    study.close("completed")
    return study.read()


def whole(record: SweepRecord) -> list[tuple[Any, ...]]:
    return [
        (trial.proposal.key, trial.proposal.spec.digest, trial.state, trial.value)
        for trial in (*record.baselines, *record.trials)
    ]


def rows(url: str, sweep_id: str) -> list[Any]:
    study = optuna.load_study(study_name=sweep_id, storage=url)
    return study.get_trials(deepcopy=False)


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [LEARNS, LISTED], ids=["tpe", "grid"])
def test_a_driver_killed_before_any_of_its_writes_changes_nothing_in_the_end(
    url: str, killed_at: Callable[[int], list[str]], sweep: Sweep
) -> None:
    writes = killed_at(10**9)
    expected = whole(drive(open_study(sweep, next(_ids), url, FACTS)))
    count = len(writes)
    assert count > 30
    # Those of opening come first: a sweep without its attributes never began.
    first = writes.index("create_new_trial") - 1
    for number in range(first, count, 3 if sweep is LEARNS else 1):
        sweep_id = next(_ids)
        killed_at(number)
        with pytest.raises(Killed):
            drive(open_study(sweep, sweep_id, url, FACTS))
        killed_at(10**9)
        assert whole(drive(reopen_study(sweep, sweep_id, url, FACTS))) == expected, (number, writes[:number])
        states = [trial.state.name for trial in rows(url, sweep_id) if "proposal" in trial.user_attrs]
        assert states == ["COMPLETE"] * (len(expected) - 1)
        assert not [trial for trial in rows(url, sweep_id) if not trial.state.is_finished()]


@pytest.mark.slow
def test_a_resumed_sampler_draws_what_it_would_have_drawn(url: str) -> None:
    """Not its first draws again, as a sampler with a seed would."""
    for sampler in ("random", "tpe", "gp", "cmaes", "qmc"):
        sweep = sweep_of(f"sampler: {sampler}, trials: 8, {SPACE}")
        expected = whole(drive(open_study(sweep, next(_ids), url, FACTS)))
        sweep_id = next(_ids)
        study = open_study(sweep, sweep_id, url, FACTS)
        for _ in range(4):
            proposal = study.ask()
            assert proposal is not None
            run_one(study, proposal)
        resumed = whole(drive(reopen_study(sweep, sweep_id, url, FACTS)))
        assert len({digest for _, digest, *_ in resumed}) == len(resumed)
        if sampler not in ("gp", "cmaes"):  # these keep a state of their own, beside their random numbers
            assert resumed == expected, sampler


def interrupted(url: str, sweep: Sweep = LISTED, **result: Any) -> tuple[str, OptunaStudy, Proposal]:
    """A sweep whose first trial was told `result`."""
    sweep_id = next(_ids)
    study = open_study(sweep, sweep_id, url, FACTS)
    proposal = study.ask()
    assert proposal is not None
    study.started(proposal)
    study.tracked(proposal.key, "run-0")
    study.tell(proposal, TrialResult(**(result or {"outcome": "interrupted"})))
    return sweep_id, study, proposal


def test_a_trial_that_runs_again_keeps_its_number_its_attempts_and_its_run(url: str) -> None:
    sweep_id, _, proposal = interrupted(url)
    study = reopen_study(LISTED, sweep_id, url, FACTS)
    study.reopen(proposal)
    [trial] = study.read().trials
    assert (trial.state, trial.attempts, trial.mlflow_run_id) == ("running", 1, "run-0")
    assert study.started(proposal) == 2
    study.tell(proposal, result_of("completed", 0.5))
    [trial] = study.read().trials
    assert (trial.proposal.number, trial.state, trial.attempts, trial.value) == (0, "completed", 2, 0.5)
    assert [one.state.name for one in rows(url, sweep_id)] == ["FAIL", "COMPLETE"]
    following = study.ask()
    assert following is not None
    assert following.number == 1


def test_what_completed_is_never_opened_again(url: str) -> None:
    sweep_id, study, proposal = interrupted(url, **result_of("completed", 0.5).model_dump())
    with pytest.raises(ValueError, match="only what failed or was interrupted runs again, got 0"):
        study.reopen(proposal)
    assert [one.state.name for one in rows(url, sweep_id)] == ["COMPLETE"]


def test_a_run_that_becomes_known_after_the_end_is_known_all_the_same(url: str) -> None:
    sweep_id = next(_ids)
    study = open_study(LISTED, sweep_id, url, FACTS)
    proposal = study.ask()
    assert proposal is not None
    run_one(study, proposal)
    study.tracked(proposal.key, "run-late")
    [trial] = load_record(sweep_id, url).trials
    assert (trial.state, trial.mlflow_run_id) == ("completed", "run-late")


def test_a_setback_is_kept_with_the_trial(url: str) -> None:
    study = open_study(LISTED, next(_ids), url, FACTS)
    proposal = study.ask()
    assert proposal is not None
    study.started(proposal)
    study.setback(proposal, "process_lost: killed")
    study.started(proposal)
    [trial] = study.read().trials
    assert (trial.attempts, trial.setbacks, trial.state) == (2, ("process_lost: killed",), "running")


def test_more_trials_go_on_behind_the_first_budget(url: str) -> None:
    sweep = sweep_of(f"sampler: random, trials: 2, {SPACE}")
    sweep_id = next(_ids)
    first = drive(open_study(sweep, sweep_id, url, FACTS))
    assert (len(first.trials), first.ended) == (2, True)
    study = reopen_study(sweep, sweep_id, url, FACTS, added_trials=3)
    assert not study.read().ended
    more = drive(study)
    assert (len(more.trials), more.ended) == (5, True)
    assert whole(more)[:3] == whole(first)
    launched = load_launched(sweep_id, url)
    assert (launched.added_trials, launched.sweep.search.trials) == (3, 2)


def test_a_study_gives_back_the_sweep_that_it_was_opened_with(url: str) -> None:
    sweep_id = next(_ids)
    open_study(LEARNS, sweep_id, url, FACTS)
    launched = load_launched(sweep_id, url)
    assert launched.sweep.search == LEARNS.search
    assert launched.sweep.template == LEARNS.template
    assert (launched.driving.owner, launched.driving.state) == ("host:1:1", "running")


def test_a_study_of_a_later_version_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep_id = next(_ids)
    study = open_study(LISTED, sweep_id, url, FACTS)
    study._study.set_user_attr("format", 99)
    with pytest.raises(CannotStart, match=f"got 99 in {sweep_id}: a later version"):
        load_record(sweep_id, url)
    study._study.set_user_attr("format", 1)
    study.ask()
    entry = study._rows["0"].entry["proposal"]
    study._write("0", "proposal", {**entry, "spec": {**entry["spec"], "from_the_future": 1}})
    with pytest.raises(CannotStart, match="fields that this version does not know"):
        load_record(sweep_id, url)


def test_a_locked_database_is_a_clear_error_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    url = f"sqlite:///{tmp_path}/study.db"
    study = open_study(LISTED, "demo-1", url, FACTS)
    proposal = study.ask()
    assert proposal is not None
    study.started(proposal)
    holder = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(CannotContinue, match=r"the study must be writable, got .*locked"):
        study.tell(proposal, result_of("completed", 0.5))
    with pytest.raises(CannotStart, match="locked"):
        reopen_study(LISTED, "demo-1", url, FACTS)
    with pytest.raises(CannotStart, match="locked"):
        open_study(LISTED, "demo-2", url, FACTS)
    holder.execute("ROLLBACK")
    holder.close()
    study.tell(proposal, result_of("completed", 0.5))
    assert whole(drive(reopen_study(LISTED, "demo-1", url, FACTS)))[1][2:] == ("completed", 0.5)


# --- several drivers, several hosts -----------------------------------------------------------------


def test_a_driver_says_that_it_lives_and_hears_that_it_is_to_stop(url: str) -> None:
    sweep_id = next(_ids)
    study = open_study(LISTED, sweep_id, url, FACTS)
    first = load_driving(sweep_id, url)
    assert (first.state, first.owner) == ("running", "host:1:1")
    assert study.heartbeat() is False
    assert load_driving(sweep_id, url).heartbeat > first.heartbeat
    assert load_record(sweep_id, url).heartbeat == load_driving(sweep_id, url).heartbeat
    ask_to_stop(first, url)
    assert study.heartbeat() is True
    study.close("interrupted")
    again = reopen_study(LISTED, sweep_id, url, FACTS)
    assert again.heartbeat() is False, "the word was for the driver before"


def test_a_word_to_an_earlier_driver_stops_no_later_one(url: str) -> None:
    sweep_id = next(_ids)
    open_study(LISTED, sweep_id, url, FACTS)
    earlier = load_driving(sweep_id, url)
    later = reopen_study(LISTED, sweep_id, url, {"owner": "other:2:2"})
    ask_to_stop(earlier, url)
    assert later.heartbeat() is False


def test_a_driver_that_lost_its_sweep_to_another_writes_nothing_any_more(url: str) -> None:
    sweep_id = next(_ids)
    lost = open_study(LISTED, sweep_id, url, FACTS)
    proposal = lost.ask()
    assert proposal is not None
    lost.started(proposal)
    now = reopen_study(LISTED, sweep_id, url, {"owner": "other:2:2"})
    before = load_record(sweep_id, url)
    for write in (
        lambda: lost.tell(proposal, result_of("completed", 0.5)),  # it has not even looked since
        lost.heartbeat,
        lost.ask,
        lambda: lost.tell(proposal, result_of("completed", 0.5)),
        lambda: lost.setback(proposal, "lost"),
        lambda: lost.close("interrupted"),
    ):
        with pytest.raises(TakenOver, match="process 2 on other has taken this one over"):
            write()
    assert load_record(sweep_id, url) == before
    assert now.heartbeat() is False


def test_a_database_that_is_away_for_a_moment_does_not_stop_a_driver(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(LISTED, next(_ids), url, FACTS)

    def away(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("the server restarts")

    with monkeypatch.context() as patched:
        for asks in ("_attributes", "_change"):
            patched.setattr(OptunaStudy, asks, away)
        assert study.heartbeat() is False
    assert study.heartbeat() is False


def test_a_driver_that_waits_for_something_else_says_all_the_same_that_it_lives(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "HEARTBEAT_SECONDS", 0.01)
    sweep_id = next(_ids)
    study = open_study(LISTED, sweep_id, url, FACTS)
    before = load_driving(sweep_id, url).heartbeat
    until = time.monotonic() + 10
    with study.beating():
        while load_driving(sweep_id, url).heartbeat == before:
            assert time.monotonic() < until
    reopen_study(LISTED, sweep_id, url, {"owner": "other:2:2"})
    taken = load_driving(sweep_id, url).heartbeat
    with study.beating():
        time.sleep(0.1)
    assert load_driving(sweep_id, url).heartbeat == taken, "it is not its sweep any more"
