"""The ledger: one contract on every implementation, then what is Optuna's own."""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from sweeps.errors import CannotStart, FailureClass, UnknownSweep
from sweeps.result import Failure, TrialResult
from sweeps.sweep import Sweep
from sweepsvc import proposing
from sweepsvc import study as study_module
from sweepsvc.plain import PlainStudy
from sweepsvc.protocols import Proposal, Study
from sweepsvc.study import (
    OptunaStudy,
    list_sweeps,
    load_importance,
    load_record,
    open_study,
    reopen_study,
    scratch_study,
)
from tests.sweepsvc.samples import TASK, result_of, sweep_of

Open = Callable[[Sweep], Study]

RULES = 'lora.r: [8, 16], lora.alpha: ["2*r", 16]'  # r=8 makes 16 of both
FACTS = {"git_commit": "0123abc", "python": "3.11.0"}
SOME_INVALID = (  # of 1000 samples, large batches leave fewer steps than there may be of warmup
    "train.batch_size: {low: 1, high: 100}, schedule.warmup_steps: {low: 0, high: 30}, "
    "optimizer.lr: {low: 1e-5, high: 1e-3}"
)
LEARNERS = ("tpe", "gp", "cmaes", "qmc")
MIXED = 'lora.alpha: ["2*r", 1], optimizer.lr: {low: 1e-5, high: 1e-3, log: true}, lora.r: {low: 4, high: 64}'

_ids = (f"sweep-{number:03}" for number in itertools.count())


@pytest.fixture(scope="module")
def shared_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the sweeps of many tests: its schema takes half a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('study') / 'study.db'}"


@pytest.fixture
def open_in_file(shared_url: str) -> Open:
    return lambda sweep: open_study(sweep, next(_ids), shared_url, FACTS)


@pytest.fixture(params=["optuna-sqlite", "optuna-memory", "plain"])
def opened(request: pytest.FixtureRequest, open_in_file: Open) -> Open:
    """Opens a study of each implementation."""
    ways: dict[str, Open] = {
        "optuna-sqlite": open_in_file,
        "optuna-memory": scratch_study,
        "plain": lambda sweep: PlainStudy(sweep, "plain-1", FACTS),
    }
    return ways[request.param]


def asked(study: Study) -> list[Proposal]:
    """Everything that `study` proposes."""
    return list(iter(study.ask, None))


def run_all(study: Study, value: Callable[[Proposal], float]) -> list[Proposal]:
    """Everything that `study` proposes, each started and told before the next."""
    proposals = []
    while (proposal := study.ask()) is not None:
        proposals.append(proposal)
        study.started(proposal)
        study.tell(proposal, result_of("completed", value(proposal)))
    return proposals


def picks(proposals: list[Proposal]) -> list[tuple[Any, ...]]:
    return [tuple(proposal.params.values()) for proposal in proposals]


# --- the contract: what is proposed -----------------------------------------------------------------


def test_a_grid_is_every_combination_once_in_order_with_dense_numbers(opened: Open) -> None:
    study = opened(sweep_of('sampler: grid, space: {lora.r: [4, 8], lora.alpha: ["2*r", 1]}'))
    proposals = asked(study)
    assert picks(proposals) == [(4, 8.0), (4, 1.0), (8, 16.0), (8, 1.0)]
    assert [proposal.number for proposal in proposals] == [0, 1, 2, 3]
    assert [proposal.key for proposal in proposals] == ["0", "1", "2", "3"]
    assert [proposal.rules["lora.alpha"] for proposal in proposals] == ["2*r", "1", "2*r", "1"]
    assert study.ended_because == "the space has 4 distinct trials, all proposed"
    assert study.ask() is None


def test_a_grid_goes_no_further_than_its_budget(opened: Open) -> None:
    study = opened(sweep_of("sampler: grid, trials: 2, space: {lora.r: [4, 8, 16]}"))
    assert picks(asked(study)) == [(4,), (8,)]
    assert study.ended_because == "search.trials is 2, and as many distinct trials are proposed"


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_picks_that_mean_the_same_trial_are_one_trial(opened: Open, sampler: str) -> None:
    study = opened(sweep_of(f"sampler: {sampler}, trials: 4, space: {{{RULES}}}"))
    assert sorted(picks(asked(study))) == [(8, 16.0), (16, 16.0), (16, 32.0)]
    assert study.ended_because == "the space has 3 distinct trials, all proposed"


def test_a_finite_space_is_exhausted_whatever_the_sampler_draws(opened: Open) -> None:
    study = opened(sweep_of("sampler: tpe, trials: 99, space: {lora.r: [1, 2, 3, 4, 5, 6]}"))
    proposals = run_all(study, lambda proposal: 0.5)
    assert sorted(picks(proposals)) == [(1,), (2,), (3,), (4,), (5,), (6,)]
    assert [proposal.number for proposal in proposals] == list(range(6))
    assert study.ended_because == "the space has 6 distinct trials, all proposed"


def test_an_infinite_space_that_gives_nothing_new_ends(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposing, "GIVE_UP_AFTER", 10)
    two_numbers = "optimizer.lr: {low: 1.0, high: 1.0000000000000002}"
    study = opened(sweep_of(f"sampler: random, trials: 5, space: {{{two_numbers}}}"))
    distinct = len(asked(study))
    assert distinct in (1, 2)  # Optuna never draws the high end
    assert study.ended_because == (
        f"10 draws in a row gave no new trial, {distinct} distinct trials are proposed"
    )


def test_a_space_too_large_to_list_ends_like_an_infinite_one(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposing, "LONGEST_LIST", 1)
    monkeypatch.setattr(proposing, "GIVE_UP_AFTER", 20)
    study = opened(sweep_of("sampler: random, trials: 5, space: {lora.r: [4, 8]}"))
    assert len(asked(study)) == 2
    assert study.ended_because == "20 draws in a row gave no new trial, 2 distinct trials are proposed"


def test_what_the_file_names_first_comes_first_and_not_again(opened: Open) -> None:
    first = "first: [{lora.r: 16, lora.alpha: 32}, {lora.r: 4, lora.alpha: 1}]"
    space = 'space: {lora.r: [4, 16], lora.alpha: ["2*r", 1]}'
    proposals = asked(opened(sweep_of(f"sampler: random, trials: 4, {space}, {first}")))
    assert picks(proposals)[:2] == [(16, 32.0), (4, 1.0)]
    assert proposals[0].rules == {"lora.alpha": "2*r"}
    assert len(set(picks(proposals))) == 4


def test_repeats_follow_their_trial_with_other_seeds_and_do_not_count(opened: Open) -> None:
    study = opened(sweep_of("sampler: random, trials: 2, repeats: 3, space: {lora.r: [4, 8, 16]}"))
    proposals = asked(study)
    assert [proposal.repeat for proposal in proposals] == [0, 1, 2, 0, 1, 2]
    assert [proposal.number for proposal in proposals] == [0, 1, 2, 3, 4, 5]
    seeds = [proposal.spec.train.seed for proposal in proposals if proposal.spec.train]
    assert seeds == [1337, 1338, 1339] * 2
    assert picks(proposals[:3]) == [picks(proposals)[0]] * 3


@pytest.mark.parametrize(("listed", "run"), [("1, 2, 9", [1, 2, 9, 10]), ("2, 1, 9", [2, 3, 1, 9, 10])])
def test_a_repeat_that_the_space_proposes_itself_runs_once(opened: Open, listed: str, run: list[int]) -> None:
    study = opened(sweep_of(f"sampler: grid, repeats: 2, space: {{train.seed: [{listed}]}}"))
    seeds = [proposal.spec.train.seed for proposal in asked(study) if proposal.spec.train]
    assert seeds == run


def test_a_sweep_without_a_space_is_one_trial(opened: Open) -> None:
    study = opened(sweep_of("sampler: random, trials: 5"))
    assert len(asked(study)) == 1
    assert study.ended_because == "the space has 1 distinct trials, all proposed"


def test_picks_that_break_a_law_together_are_left_out(opened: Open) -> None:
    sweep = sweep_of(
        f"sampler: random, trials: 12, space: {{{SOME_INVALID}}}", trial=", train: {samples: 1000}"
    )
    proposals = asked(opened(sweep))
    assert len(proposals) == 12
    assert all(proposal.spec.schedule.warmup_steps < proposal.spec.steps for proposal in proposals)


def test_the_same_seed_proposes_the_same(opened: Open) -> None:
    def proposed(seed: int) -> list[tuple[Any, ...]]:
        return picks(asked(opened(sweep_of(f"sampler: random, trials: 5, seed: {seed}, space: {{{MIXED}}}"))))

    assert proposed(1) == proposed(1) != proposed(2)


def test_the_baseline_is_the_untouched_base_and_asking_again_gives_it_again(opened: Open) -> None:
    study = opened(sweep_of("sampler: grid, space: {lora.r: [4, 8]}"))
    (baseline,) = study.baselines()
    assert (baseline.key, baseline.number, baseline.spec.train) == ("baseline", None, None)
    assert study.baselines() == [baseline]
    assert [record.proposal for record in study.read().baselines] == [baseline]


def test_several_bases_have_a_baseline_each_in_order(opened: Open) -> None:
    names = ", ".join(f"some/model-{number}" for number in range(11))
    study = opened(sweep_of(f"sampler: grid, space: {{model.id: [{names}]}}"))
    keys = [baseline.key for baseline in study.baselines()]
    assert keys == [f"baseline-{number}" for number in range(11)]
    assert [record.proposal.key for record in study.read().baselines] == keys


def test_no_baseline_where_the_file_wants_none(opened: Open) -> None:
    study = opened(sweep_of("sampler: grid, space: {lora.r: [4]}", rest="baseline: false"))
    assert list(study.baselines()) == list(study.read().baselines) == []


# --- the contract: what is kept ---------------------------------------------------------------------


def test_a_trial_waits_then_runs_then_ends(opened: Open) -> None:
    study = opened(sweep_of("sampler: grid, space: {lora.r: [4, 8]}"))
    proposal = study.ask()
    assert proposal is not None
    states = [study.read().trials[0].state]
    study.started(proposal)
    study.tracked(proposal.key, "run-a")
    states.append(study.read().trials[0].state)
    study.started(proposal)
    study.tracked(proposal.key, "run-b")
    study.tell(proposal, result_of("completed", 0.75))
    record = study.read().trials[0]
    assert [*states, record.state] == ["waiting", "running", "completed"]
    assert (record.attempts, record.mlflow_run_id, record.value) == (2, "run-b", 0.75)
    assert record.result == result_of("completed", 0.75)


@pytest.mark.parametrize("outcome", ["failed", "interrupted", "pruned"])
def test_a_trial_that_did_not_complete_has_its_state_and_no_value(opened: Open, outcome: Any) -> None:
    study = opened(sweep_of("sampler: grid, space: {lora.r: [4]}"))
    proposal = study.ask()
    assert proposal is not None
    study.started(proposal)
    study.tell(proposal, result_of(outcome, 0.9))
    (record,) = study.read().trials
    assert (record.state, record.value) == (outcome, None)
    assert record.result == result_of(outcome, 0.9)


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_trial_without_a_finite_objective_is_completed_without_a_value(
    opened: Open, score: float | None
) -> None:
    study = opened(sweep_of("sampler: grid, space: {lora.r: [4]}"))
    proposal = study.ask()
    assert proposal is not None
    study.tell(proposal, result_of("completed", score))
    (record,) = study.read().trials
    assert (record.state, record.value) == ("completed", None)


def test_the_objective_may_be_a_cost(opened: Open) -> None:
    study = opened(
        sweep_of("sampler: grid, space: {lora.r: [4]}", rest="objective: {minimize: peak_memory_gb}")
    )
    proposal = study.ask()
    assert proposal is not None
    study.tell(proposal, result_of("completed", 0.1))
    record = study.read()
    assert (record.objective_metric, record.maximize) == ("peak_memory_gb", False)
    assert record.trials[0].value == 1.5


def test_what_is_read_is_what_was_asked(opened: Open) -> None:
    space = 'lora.targets: [qv, [q_proj, v_proj]], lora.alpha: ["2*r", 1], data.max_length: [null, 256]'
    study = opened(sweep_of(f"sampler: random, trials: 8, repeats: 2, space: {{{space}}}"))
    proposals = asked(study)
    assert [record.proposal for record in study.read().trials] == proposals
    assert len(proposals) == 16


def test_a_baseline_is_started_and_told_like_a_trial(opened: Open) -> None:
    study = opened(sweep_of("sampler: grid, space: {lora.r: [4]}"))
    (baseline,) = study.baselines()
    study.started(baseline)
    study.tracked(baseline.key, "run-0")
    study.tell(baseline, result_of("completed", 0.25))
    (record,) = study.read().baselines
    assert (record.state, record.attempts, record.mlflow_run_id, record.value) == (
        "completed",
        1,
        "run-0",
        0.25,
    )
    assert study.baselines() == [baseline]
    assert study.read().baselines[0].state == "completed"


def test_a_second_result_is_refused_and_the_first_stays(opened: Open) -> None:
    study = opened(sweep_of("sampler: grid, space: {lora.r: [4]}"))
    told = [*study.baselines(), *asked(study)]
    for proposal in told:
        study.tell(proposal, result_of("completed", 0.5))
        with pytest.raises(ValueError, match=f"told once, got a second result for {proposal.key} .failed."):
            study.tell(proposal, result_of("failed"))
    record = study.read()
    assert [trial.state for trial in (*record.baselines, *record.trials)] == ["completed", "completed"]


def test_what_was_never_proposed_is_refused(opened: Open) -> None:
    study = opened(sweep_of("sampler: grid, space: {lora.r: [4]}"))
    stranger = Proposal("7", sweep_of("sampler: grid").resolve({}).spec, 7)
    with pytest.raises(ValueError, match="got 7; ask first"):
        study.started(stranger)
    with pytest.raises(ValueError, match="got 7; ask first"):
        study.tell(stranger, result_of("completed", 0.5))


def test_the_sweep_runs_until_it_is_closed(opened: Open) -> None:
    study = opened(sweep_of("sampler: grid, space: {lora.r: [4]}"))
    before = study.read().state
    study.close("failed")
    assert (before, study.read().state) == ("running", "failed")


# --- samplers ---------------------------------------------------------------------------------------


@pytest.fixture
def optuna_is_heard() -> Iterator[None]:
    """What Optuna logs reaches pytest."""
    optuna.logging.enable_propagation()
    yield
    optuna.logging.disable_propagation()


@pytest.mark.parametrize("sampler", LEARNERS)
def test_each_sampler_draws_from_choices_and_ranges_without_a_warning(
    sampler: str, caplog: pytest.LogCaptureFixture, optuna_is_heard: None
) -> None:
    study = scratch_study(sweep_of(f"sampler: {sampler}, trials: 6, space: {{{MIXED}}}"))
    with caplog.at_level(logging.WARNING):
        proposals = run_all(study, lambda proposal: proposal.spec.lora.r / 64)
    assert len(proposals) == 6
    assert {proposal.rules["lora.alpha"] for proposal in proposals} <= {"2*r", "1"}
    assert all(4 <= proposal.spec.lora.r <= 64 for proposal in proposals)
    assert not caplog.records


@pytest.mark.parametrize("sampler", ["tpe", "qmc", "cmaes"])
def test_each_sampler_is_seeded(sampler: str) -> None:
    def proposed(seed: int) -> list[tuple[Any, ...]]:
        sweep = sweep_of(f"sampler: {sampler}, trials: 8, seed: {seed}, space: {{{MIXED}}}")
        proposals = run_all(scratch_study(sweep), lambda proposal: proposal.spec.optimizer.lr)
        return picks(proposals)[1:]  # the first is drawn at random by each of them

    assert proposed(5) == proposed(5) != proposed(6)


def test_results_reach_the_sampler() -> None:
    def share_of_large_ranks(sign: int) -> float:
        space = "lora.r: {low: 1, high: 200}, optimizer.lr: {low: 1e-5, high: 1e-3, log: true}"
        study = scratch_study(sweep_of(f"sampler: tpe, trials: 40, space: {{{space}}}"))
        ranks = [p.spec.lora.r for p in run_all(study, lambda proposal: sign * proposal.spec.lora.r)]
        return sum(rank > 100 for rank in ranks[20:]) / 20

    assert share_of_large_ranks(1) > 0.7 > 0.3 > share_of_large_ranks(-1)


def test_choices_made_for_the_user_are_announced() -> None:
    tpe = scratch_study(sweep_of("sampler: tpe, trials: 12, space: {lora.r: [1, 2, 3]}"))
    run_all(tpe, lambda proposal: 0.5)
    assert tpe.notes == (
        "tpe: drawn at random until 4 trials have completed",
        "tpe: 3 draws in a row repeated earlier trials; whenever they do, "
        "a trial not proposed yet is picked at random",
    )
    cmaes = scratch_study(sweep_of(f"sampler: cmaes, trials: 4, space: {{{MIXED}}}"))
    assert cmaes.notes == ("cmaes: it models numeric ranges only, lora.alpha drawn at random beside them",)


def test_a_sampler_sees_an_alpha_as_a_choice_of_rules(open_in_file: Open, shared_url: str) -> None:
    study = open_in_file(sweep_of(f"sampler: random, trials: 1, space: {{{MIXED}}}"))
    asked(study)
    (trial,) = in_optuna(study, shared_url).trials
    assert trial.distributions["lora.alpha"].choices == ("2*r", 1)
    assert trial.distributions["lora.r"] == optuna.distributions.IntDistribution(4, 64)
    assert trial.distributions["optimizer.lr"] == optuna.distributions.FloatDistribution(1e-5, 1e-3, log=True)


# --- Optuna's own -----------------------------------------------------------------------------------


def in_optuna(study: Study, url: str) -> optuna.Study:
    """The study as Optuna sees it in the database."""
    return optuna.load_study(study_name=study.read().sweep_id, storage=url)


def test_a_duplicate_draw_is_a_failed_trial_that_no_record_lists(open_in_file: Open, shared_url: str) -> None:
    study = open_in_file(sweep_of("sampler: tpe, trials: 3, space: {lora.r: [4, 8, 16]}"))
    run_all(study, lambda proposal: 0.5)
    everything = in_optuna(study, shared_url).trials
    duplicates = [trial for trial in everything if "duplicate_of" in trial.user_attrs]
    assert duplicates
    assert len(everything) == 3 + len(duplicates)
    assert all(trial.state == optuna.trial.TrialState.FAIL for trial in duplicates)
    ranks = {record.proposal.number: record.proposal.spec.lora.r for record in study.read().trials}
    assert all(ranks[trial.user_attrs["duplicate_of"]] == trial.params["lora.r"] for trial in duplicates)
    assert sorted(ranks) == [0, 1, 2]


def test_random_draws_what_optuna_itself_would_and_leaves_a_row_for_each_trial_alone(
    open_in_file: Open, shared_url: str
) -> None:
    sweep = sweep_of(f"sampler: random, trials: 12, space: {{{MIXED}, lora.dropout: [0.1]}}")
    study = open_in_file(sweep)
    proposed = asked(study)
    optunas = optuna.create_study()
    domains = {path: study_module._distribution(domain) for path, domain in sweep.search.space.items()}
    source = study_module._OptunaSource(sweep, optunas, domains, 0)
    rows = in_optuna(study, shared_url).trials
    assert len(rows) == len(proposed) == 12
    assert [trial.params for trial in rows] == [source.draw() for _ in rows]


def test_a_resumed_random_sampler_counts_the_draws_that_left_no_row(shared_url: str) -> None:
    sweep = sweep_of("sampler: random, trials: 60, space: {lora.r: {low: 1, high: 100}}")
    [expected, resumed] = [next(_ids), next(_ids)]
    whole = asked(open_study(sweep, expected, shared_url, FACTS))
    begun = open_study(sweep, resumed, shared_url, FACTS)
    first = [begun.ask() for _ in range(40)]
    again = reopen_study(sweep, resumed, shared_url, {**FACTS, "owner": "here:1"})
    assert again._source.draws == begun._source.draws > 40
    assert [*first, *asked(again)] == whole


def test_nothing_but_its_run_is_kept_in_memory_of_a_trial_that_was_told(open_in_file: Open) -> None:
    study = open_in_file(sweep_of("trials: 2, space: {lora.r: [4, 8]}"))
    assert isinstance(study, OptunaStudy)
    run_all(study, lambda proposal: 0.5)
    assert {len(str(row.entry)) < 200 for row in study._rows.values()} == {True}
    assert [trial.value for trial in study.read().trials] == [0.5, 0.5]


def test_an_end_is_an_end(open_in_file: Open, shared_url: str) -> None:
    study = open_in_file(sweep_of("sampler: random, trials: 9, space: {lora.r: [4, 8]}"))
    asked(study)
    drawn = len(in_optuna(study, shared_url).trials)
    assert study.ask() is study.ask() is None
    assert len(in_optuna(study, shared_url).trials) == drawn


def test_a_draw_that_makes_no_valid_trial_keeps_its_reason(open_in_file: Open, shared_url: str) -> None:
    sweep = sweep_of(f"sampler: tpe, trials: 12, space: {{{SOME_INVALID}}}", trial=", train: {samples: 1000}")
    study = open_in_file(sweep)
    asked(study)
    invalid = [trial for trial in in_optuna(study, shared_url).trials if "invalid" in trial.user_attrs]
    assert invalid
    assert all("warmup_steps < steps must hold" in trial.user_attrs["invalid"] for trial in invalid)


def test_optuna_learns_how_each_trial_ended(
    open_in_file: Open, shared_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    study = open_in_file(sweep_of("sampler: grid, space: {lora.r: [1, 2, 3, 4, 5]}"))
    results = [
        result_of("completed", 0.5),
        result_of("failed"),
        result_of("pruned", 0.4),
        result_of("interrupted"),
        result_of("completed", math.nan),
    ]
    for proposal, result in zip(asked(study), results, strict=True):
        study.tell(proposal, result)
    trials = in_optuna(study, shared_url).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "PRUNED", "FAIL", "FAIL"]
    assert trials[0].value == 0.5
    assert "trial 4 completed without a finite score.mean" in caplog.text


def test_the_sampler_keeps_away_from_what_does_not_fit_and_not_from_a_lost_process() -> None:
    def share_of_large_ranks(kind: FailureClass) -> float:
        space = "lora.r: {low: 1, high: 200}, optimizer.lr: {low: 1e-5, high: 1e-3, log: true}"
        study = scratch_study(sweep_of(f"sampler: tpe, trials: 40, space: {{{space}}}"))
        failed = TrialResult(outcome="failed", failure=Failure(kind=kind, message="", traceback=""))
        ranks = []
        while (proposal := study.ask()) is not None:
            rank = proposal.spec.lora.r
            ranks.append(rank)
            study.tell(proposal, failed if rank > 100 else result_of("completed", float(rank)))
            assert study.read().trials[-1].state == ("failed" if rank > 100 else "completed")
        return sum(rank > 100 for rank in ranks[20:]) / 20

    assert share_of_large_ranks("out_of_memory") < 0.5 < share_of_large_ranks("process_lost")


def test_the_database_tells_what_was_swept(open_in_file: Open, shared_url: str) -> None:
    sweep = sweep_of("sampler: grid, space: {lora.r: [4]}", rest="objective: {minimize: eval.loss}")
    study = in_optuna(open_in_file(sweep), shared_url)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    kept = study.user_attrs
    assert kept["sweep_file"] == sweep.text
    assert kept["file_digest"] == sweep.file_digest
    assert kept["facts"] == FACTS
    assert kept["objective"] == {"metric": "eval.loss", "maximize": False}
    assert (kept["name"], kept["source"], kept["overrides"]) == ("demo", "/sweeps/demo.yaml", [])


def test_a_reader_sees_what_the_driver_has_open(shared_url: str, open_in_file: Open) -> None:
    study = open_in_file(sweep_of("sampler: grid, space: {lora.r: [4, 8]}"))
    proposals = asked(study)
    study.started(proposals[0])
    study.tracked(proposals[0].key, "run-0")
    assert load_record(study.read().sweep_id, shared_url) == study.read()
    file = shared_url.removeprefix("sqlite:///")
    connection = sqlite3.connect(file)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_closed_sweep_is_one_file_and_can_be_read_on(tmp_path: Path) -> None:
    study = open_study(sweep_of("sampler: grid"), "mine", f"sqlite:///{tmp_path / 'study.db'}", FACTS)
    asked(study)
    study.close("completed")
    assert [file.name for file in tmp_path.iterdir()] == ["study.db"]
    assert study.read().state == "completed"


def test_an_id_that_is_taken_is_refused_and_the_first_sweep_stays(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'study.db'}"
    study = open_study(sweep_of("sampler: grid, space: {lora.r: [4]}"), "mine", url, FACTS)
    asked(study)
    with pytest.raises(CannotStart, match="an id of its own, the study database has mine; give another --id"):
        open_study(sweep_of("sampler: grid"), "mine", url, FACTS)
    assert load_record("mine", url) == study.read()


# --- after a kill -----------------------------------------------------------------------------------

_DRIVER = """
import os, signal, sys
from sweepsvc.study import open_study
from tests.sweepsvc.samples import result_of, sweep_of
sweep = sweep_of("sampler: random, trials: 9, space: {lora.r: [4, 8, 16, 32]}")
study = open_study(sweep, "killed", sys.argv[1], {})
(baseline,) = study.baselines()
study.started(baseline)
study.tracked(baseline.key, "run-0")
first, second, third = study.ask(), study.ask(), study.ask()
for proposal in (first, second):
    study.started(proposal)
    study.tracked(proposal.key, "run-" + proposal.key)
study.tell(first, result_of("completed", 0.5))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_written_survives_the_death_of_the_driver(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", _DRIVER, url], env=environment, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    record = load_record("killed", url)
    assert record.state == "running"
    assert [trial.state for trial in record.baselines] == ["running"]
    assert [trial.state for trial in record.trials] == ["completed", "running", "waiting"]
    assert record.trials[0].value == 0.5


def test_a_draw_that_never_became_a_proposal_is_no_trial(open_in_file: Open, shared_url: str) -> None:
    study = open_in_file(sweep_of("sampler: random, trials: 2, space: {lora.r: [4, 8, 16, 32]}"))
    in_optuna(study, shared_url).ask()  # as far as a driver came that was killed while asking
    proposals = asked(study)
    assert [record.proposal for record in study.read().trials] == proposals
    assert [proposal.number for proposal in proposals] == [0, 1]


def test_a_result_stands_even_if_optuna_was_not_told(open_in_file: Open, shared_url: str) -> None:
    study = open_in_file(sweep_of("sampler: grid, space: {lora.r: [4]}"))
    asked(study)
    storage = optuna.storages.RDBStorage(shared_url)
    (trial,) = in_optuna(study, shared_url).trials
    entry = {"outcome": "completed", "scores": {TASK: {"value": 0.75}}}
    storage.set_trial_user_attr(trial._trial_id, "result", entry)
    (record,) = load_record(study.read().sweep_id, shared_url).trials
    assert (record.state, record.value) == ("completed", 0.75)


def test_a_study_that_was_not_launched_whole_is_no_sweep(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(study_name="half", storage=url).set_user_attr("name", "half")
    assert list_sweeps(url) == []
    with pytest.raises(UnknownSweep, match="must have been launched, got none in"):
        load_record("half", url)


# --- finding a sweep --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_sweeps(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('three') / 'study.db'}"
    for sweep_id in ("alpha-1", "beta-1", "alpha-2"):
        study = open_study(sweep_of("sampler: grid, space: {lora.r: [4, 8, 16]}"), sweep_id, url, FACTS)
        first, second, _ = asked(study)
        study.started(first)
        study.tell(first, result_of("completed", 0.5))
        study.started(second)
    study.close("interrupted")
    return url


def test_sweeps_are_listed_the_newest_first_with_their_counts(three_sweeps: str) -> None:
    listed = list_sweeps(three_sweeps)
    assert [summary.sweep_id for summary in listed] == ["alpha-2", "beta-1", "alpha-1"]
    assert [summary.state for summary in listed] == ["interrupted", "running", "running"]
    assert listed[0].counts == {"completed": 1, "running": 1, "waiting": 1}
    assert listed[0].name == "demo"
    assert listed[0].launched > listed[1].launched > listed[2].launched


@pytest.mark.parametrize(
    ("wanted", "found"), [("alpha-1", "alpha-1"), ("beta-1", "beta-1"), ("b", "beta-1"), (None, "alpha-2")]
)
def test_a_sweep_is_found_by_id_by_a_unique_prefix_or_as_the_newest(
    three_sweeps: str, wanted: str | None, found: str
) -> None:
    assert load_record(wanted, three_sweeps).sweep_id == found


def test_an_id_is_not_ambiguous_for_being_a_prefix_of_another(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    for sweep_id in ("demo", "demo-2"):
        open_study(sweep_of("sampler: grid"), sweep_id, url, FACTS)
    assert load_record("demo", url).sweep_id == "demo"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("alpha", "got 'alpha', which starts alpha-2, alpha-1; write more of it"),
        ("alhpa-2", "got 'alhpa-2'; did you mean alpha-2, alpha-1?"),
        ("zzz", "got 'zzz'; there is alpha-2, beta-1, alpha-1"),
        ("", "got '', which starts alpha-2, beta-1, alpha-1; write more of it"),
    ],
)
def test_a_sweep_that_is_not_found_is_an_error_with_what_there_is(
    three_sweeps: str, wanted: str, message: str
) -> None:
    with pytest.raises(UnknownSweep) as caught:
        load_record(wanted, three_sweeps)
    assert message in str(caught.value)


def test_reading_makes_no_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'nowhere' / 'study.db'}"
    assert list_sweeps(url) == []
    with pytest.raises(
        UnknownSweep, match=r"must have been launched, got none in .*; launch one, or give --home"
    ):
        load_record(None, url)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    file.write_text("not a database, however long this text may get" * 100)
    url = f"sqlite:///{file}"
    with pytest.raises(
        CannotStart, match=r"must be reachable .*study.db.*; check --home and SWEEPSVC_STUDY_URL"
    ):
        open_study(sweep_of("sampler: grid"), "mine", url, FACTS)
    with pytest.raises(CannotStart, match=r"must be reachable"):
        list_sweeps(url)


def test_an_address_without_a_driver_is_refused_and_its_password_not_shown() -> None:
    with pytest.raises(CannotStart) as caught:
        open_study(sweep_of("sampler: grid"), "mine", "nosuchdb://me:secret@localhost/x", FACTS)
    assert "nosuchdb://me:***@localhost/x" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_optuna_study_is_a_study() -> None:
    study: Study = scratch_study(sweep_of("sampler: grid"))
    assert isinstance(study, OptunaStudy)


# --- importance -------------------------------------------------------------------------------------


def told(sweep: Sweep, url: str, scores: dict[tuple[int, float], float]) -> str:
    """The id of a sweep whose trials got the score of their r and alpha, or failed without one."""
    study = open_study(sweep, sweep_id := next(_ids), url, FACTS)
    for proposal in iter(study.ask, None):
        score = scores.get((proposal.spec.lora.r, proposal.spec.lora.alpha))
        study.tell(proposal, result_of("failed") if score is None else result_of("completed", score))
    return sweep_id


def test_importance_is_of_the_field_that_moves_the_objective_and_the_same_each_time(shared_url: str) -> None:
    sweep = sweep_of("sampler: grid, space: {lora.r: [8, 16, 32], lora.alpha: [1, 2]}")
    scores = {(r, alpha): 0.1 * alpha + 0.001 * r for r in (8, 16, 32) for alpha in (1.0, 2.0)}
    sweep_id = told(sweep, shared_url, scores)
    found = load_importance(sweep_id, shared_url)
    assert list(found.shares) == ["lora.alpha", "lora.r"]
    assert found.shares["lora.alpha"] > 0.8
    assert (found.trials, found.why_not) == (6, "")
    assert load_importance(sweep_id, shared_url) == found


@pytest.mark.parametrize(
    ("space", "scores", "why"),
    [
        ("lora.r: [8, 16, 32]", {}, "4 completed trials are needed at least, there are 0"),
        ("lora.r: [8, 16, 32]", {(8, 16.0): 0.5}, "4 completed trials are needed at least, there are 1"),
        (
            "lora.r: [8, 16, 32, 64, 128]",
            {(r, 16.0): 0.5 for r in (8, 16, 32, 64)},
            "every completed trial has the same value of the objective",
        ),
    ],
)
def test_importance_that_cannot_be_said_has_a_reason(
    shared_url: str, space: str, scores: dict[tuple[int, float], float], why: str
) -> None:
    sweep_id = told(sweep_of(f"sampler: grid, space: {{{space}}}"), shared_url, scores)
    found = load_importance(sweep_id, shared_url)
    assert (found.shares, found.why_not) == ({}, why)


def test_a_field_with_one_value_among_the_completed_has_no_importance(shared_url: str) -> None:
    sweep = sweep_of("sampler: grid, space: {lora.r: [8, 16, 32, 64], lora.alpha: [1, 2]}")
    scores = {(r, 1.0): 0.01 * r for r in (8, 16, 32, 64)}
    found = load_importance(told(sweep, shared_url, scores), shared_url)
    assert found.shares == {"lora.r": 1.0}
