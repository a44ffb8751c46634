"""Rehearsals: which trials, what is found, and where they live."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.errors import CannotStart
from sweeps.result import Failure, Progress, TrialResult
from sweeps.spec import TrialSpec
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep
from sweeps.trial.paths import TrialFolder
from sweepsvc import cli, rehearse, session
from sweepsvc.home import Home, SweepFolder
from sweepsvc.plain import PlainRecorder, SerialScheduler
from sweepsvc.rehearse import RehearsalHome, set_stage, trials_of
from tests.sweepsvc.samples import sweep_of
from tests.tiny import alpaca_rows, save_task


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name in ("SWEEPSVC_HOME", "SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return Home()


class Trials:
    """A runner that completes every trial, or fails as it is told."""

    def __init__(self) -> None:
        self.ran: list[TrialSpec] = []
        self.failure: Failure | None = None

    def __call__(self, spec: TrialSpec, folder: Path) -> Iterator[Progress]:
        self.ran.append(spec)
        files = TrialFolder(folder)
        files.write_spec(spec)
        yield Progress(phase="training", step=1, steps=2)
        files.write_result(
            TrialResult(outcome="failed" if self.failure else "completed", failure=self.failure)
        )


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    made = Trials()

    @contextlib.contextmanager
    def scheduler(sweep: Sweep, folder: SweepFolder, joined: session.Joined) -> Iterator[SerialScheduler]:
        assert (sweep.resources.gpus, sweep.resources.accelerator) == (0, None)
        yield SerialScheduler(made)

    monkeypatch.setattr(session, "_scheduler", scheduler)
    return made


@pytest.fixture
def _untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow takes seconds to make its database."""
    monkeypatch.setattr(session, "MlflowRecorder", lambda sweep, sweep_id, *_: PlainRecorder(sweep_id))


# --- which trials -----------------------------------------------------------------------------------


def test_of_a_grid_with_a_budget_only_what_it_runs_is_rehearsed() -> None:
    sweep = sweep_of("trials: 3, repeats: 2, space: {lora.r: [1, 2, 4], lora.alpha: [1, 2]}")
    chosen, total = trials_of(sweep)
    assert total == 3
    assert [(trial.spec.lora.r, trial.spec.lora.alpha) for trial in chosen] == [(1, 1), (1, 2), (2, 1)]


def test_of_a_sampler_over_a_finite_space_every_distinct_trial_is_rehearsed() -> None:
    sweep = sweep_of('sampler: random, trials: 2, space: {lora.r: [1, 2, 4], lora.alpha: ["2*r", 2]}')
    assert len(trials_of(sweep)[0]) == 5  # r=1 with 2*r is r=1 with 2


def test_of_an_infinite_space_as_many_are_rehearsed_as_the_budget_draws() -> None:
    space = "space: {optimizer.lr: {low: 1e-5, high: 1e-3, log: true}}"
    assert len(trials_of(sweep_of(f"sampler: random, trials: 4, {space}"))[0]) == 4
    many, total = trials_of(sweep_of(f"sampler: random, trials: 400, {space}"))
    assert (len(many), total) == (rehearse.MOST_TRIALS, 400)


def test_of_too_many_trials_every_value_is_rehearsed_at_least_once() -> None:
    ranks, rates = list(range(1, 21)), [10**-power for power in range(2, 12)]
    sweep = sweep_of(f"space: {{lora.r: {ranks}, optimizer.lr: {json.dumps(rates)}}}")
    chosen, total = trials_of(sweep)
    assert (len(chosen), total) == (rehearse.MOST_TRIALS, 200)
    assert {trial.spec.lora.r for trial in chosen} == set(ranks)
    assert {trial.spec.optimizer.lr for trial in chosen} == set(rates)


# --- what is run ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_untracked")
def test_trials_that_are_equal_in_small_run_once_and_are_counted_as_the_real_ones(
    home: Home, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of("space: {train.samples: [50000, 100000], lora.r: [8, 16]}")
    record = session.rehearse(sweep, home, "demo")
    assert record.state == "completed"
    assert [spec.lora.r for spec in trials.ran if spec.train is not None] == [8, 16]
    told = capsys.readouterr().out
    assert told.rstrip().endswith("rehearsed: 4 trials, all fine")
    assert "trial (train.samples=50000, lora.r=8), and 1 that equal it in small: fine" in told
    assert "whether the memory suffices" in told
    assert "the rows of yahma/alpaca-cleaned are on the hub" in told
    assert not RehearsalHome(home).stage("demo").exists()


def test_a_rehearsal_never_touches_the_stores_of_real_sweeps(
    home: Home, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPSVC_STUDY_URL", "postgresql://nowhere/study")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere:1")
    session.rehearse(sweep_of("space: {lora.r: [8]}"), home, "demo")
    assert [path.name for path in home.path.iterdir()] == ["rehearsals"]
    names = {path.name for path in (home.path / "rehearsals").iterdir()}
    assert names >= {"study.db", "mlflow.db", "demo"}


@pytest.mark.usefixtures("_untracked")
def test_a_failure_is_a_fault_of_every_real_trial_that_it_stands_for(home: Home, trials: Trials) -> None:
    trials.failure = Failure(kind="bad_model", message="the adapter must fit; say less")
    sweep = sweep_of("space: {train.samples: [50000, 100000]}", "baseline: false")
    with pytest.raises(CannotStart) as raised:
        session.rehearse(sweep, home, "demo")
    assert str(raised.value).splitlines() == [
        "trial (train.samples=50000) and 1 more: bad_model: the adapter must fit; say less",
        "rehearsed: 2 trials, 1 fault; nothing of the sweep was started",
    ]
    assert (RehearsalHome(home).path / "demo/sweep.yaml").exists()


@pytest.mark.usefixtures("_untracked")
def test_divergence_on_random_weights_is_said_and_is_no_fault(
    home: Home, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    trials.failure = Failure(kind="diverged", message="the loss is nan")
    session.rehearse(sweep_of("space: {lora.r: [8]}", "baseline: false"), home, "demo")
    told = capsys.readouterr().out
    assert "diverged on random weights, which says little" in told
    assert told.rstrip().endswith("rehearsed: 1 trial, all fine")


def test_benchmarks_whose_rows_are_on_the_hub_are_left_out_and_said(tmp_path: Path) -> None:
    save_task(tmp_path)
    (tmp_path / "demo.yaml").write_text(
        "name: demo\ntrial:\n"
        f"  evaluate: {{tasks: [hellaswag, rivers, blimp_causative], task_dir: {tmp_path}}}\n"
        "  train: none\n"
    )
    made = set_stage(load_sweep(tmp_path / "demo.yaml"), tmp_path / "stage")
    assert made.sweep is not None
    assert made.sweep.template["evaluate.tasks"] == ("rivers", "blimp_causative")
    assert "not scored here, since their rows are on the hub: hellaswag" in made.notes
    assert "rows are invented for blimp_causative" in made.notes


def test_a_layer_named_in_full_that_the_small_model_lacks_is_played_by_its_kind(tmp_path: Path) -> None:
    targets = "[model.layers.31.self_attn.q_proj, v_proj]"
    sweep = sweep_of("space: {lora.r: [8]}", trial=f", lora: {{targets: {targets}}}")
    made = set_stage(sweep, tmp_path / "stage")
    assert made.sweep is not None
    assert made.sweep.template["lora.targets"] == ("q_proj", "v_proj")


def test_an_untrained_trial_needs_no_targets(tmp_path: Path) -> None:
    text = "name: demo\ntrial: {train: none, lora: {targets: [nowhere]}}\n"
    (tmp_path / "demo.yaml").write_text(text)
    made = set_stage(load_sweep(tmp_path / "demo.yaml"), tmp_path / "stage")
    assert (made.faults, made.trials) == ({}, 1)


# --- what is found ----------------------------------------------------------------------------------


def faults_of(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "demo.yaml"
    file.write_text(text)
    return list(set_stage(load_sweep(file), tmp_path / "stage").faults)


def test_a_target_that_matches_nothing_is_found_on_the_real_layers(tmp_path: Path) -> None:
    text = "name: demo\ntrial: {lora: {targets: [q_proj, v_porj]}}\nsearch: {space: {lora.r: [4, 8]}}\n"
    (fault,) = faults_of(tmp_path, text)
    assert fault.startswith("bad_model: every name in lora.targets must match a linear layer")
    assert "did you mean 'v_proj'?" in fault


def test_a_rank_wider_than_the_real_layers_is_found(tmp_path: Path) -> None:
    text = "name: demo\nsearch: {space: {lora.r: [2048, 8192]}}\n"
    (fault,) = faults_of(tmp_path, text)
    assert "lora.r <= the smaller side" in fault
    assert "lower lora.r to 4096" in fault


def test_columns_that_are_not_there_are_found_with_the_row(tmp_path: Path) -> None:
    rows = [*alpaca_rows() * 3, {"prompt": "a", "response": "b"}]  # the last of 73
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (fault,) = faults_of(tmp_path, "name: demo\ntrial: {data: {path: rows.json}}\n")
    assert fault.startswith("bad_data: row 73 of ")
    assert "must have a column instruction" in fault


def test_a_max_length_that_cuts_the_response_away_is_found(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(alpaca_rows()))
    text = "name: demo\ntrial: {data: {path: rows.json, max_length: 8, loss_on: response}}\n"
    (fault,) = faults_of(tmp_path, text)
    assert fault.startswith("bad_data: row 1")
    assert "a token must remain to predict" in fault
    assert "raise max_length" in fault


def test_invented_rows_have_the_columns_of_the_data_and_the_fields_of_its_prompt(tmp_path: Path) -> None:
    data = '{id: some/rows, prompt: "{topic} {question}", columns: {topic: about, output: answer}}'
    assert faults_of(tmp_path, f"name: demo\ntrial: {{data: {data}}}\n") == []


def test_rows_that_are_cut_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(alpaca_rows()))
    file = tmp_path / "demo.yaml"
    file.write_text("name: demo\ntrial: {data: {path: rows.json, max_length: 8}}\n")
    assert "24 of 24 rows are cut at data.max_length=8" in set_stage(load_sweep(file), tmp_path / "s").notes


def test_a_model_that_nobody_knows_is_found(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, "name: demo\ntrial: {model: {id: nobody/knows-this}}\n")
    assert "nobody/knows-this" in fault


def test_everything_wrong_with_a_trial_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"prompt": "a"}]')
    text = "name: demo\ntrial: {lora: {targets: [porj]}, data: {path: rows.json}}\n"
    assert [fault.partition(":")[0] for fault in faults_of(tmp_path, text)] == ["bad_model", "bad_data"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sweepsvc", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_task_that_task_dir_does_not_have_is_bad_input_before_anything_is_made(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = Path("tasks")
    tasks.mkdir()
    save_task(tasks)
    Path("demo.yaml").write_text("name: demo\ntrial: {evaluate: {tasks: [rivres], task_dir: tasks}}\n")
    assert run(monkeypatch, "launch", "demo.yaml", "--rehearse") == 2
    assert "rivres" in capsys.readouterr().err
    assert not home.path.exists()


def test_the_command_says_each_fault_on_stderr_and_exits_with_two(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "name: demo\ntrial: {lora: {targets: [v_porj]}}\nsearch: {space: {lora.r: [4, 8]}}\n"
    Path("demo.yaml").write_text(text)
    assert run(monkeypatch, "launch", "demo.yaml", "--rehearse") == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("trial (lora.r=4) and 1 more: bad_model: every name in lora.targets")
    assert told[1] == "rehearsed: 2 trials, 1 fault; nothing of the sweep was started"


def test_a_home_that_cannot_be_written_is_said(home: Home, trials: Trials) -> None:
    home.path.write_text("a file")
    with pytest.raises(CannotStart, match="the home must be writable"):
        session.rehearse(sweep_of("space: {lora.r: [8]}"), home, "demo")


@pytest.mark.usefixtures("_untracked")
def test_the_command_exits_with_zero_where_all_is_fine(
    home: Home, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("demo.yaml").write_text("name: demo\nsearch: {space: {lora.r: [4, 8]}}\n")
    assert run(monkeypatch, "launch", "demo.yaml", "--rehearse", "--id", "demo") == 0
    assert len(trials.ran) == 3
