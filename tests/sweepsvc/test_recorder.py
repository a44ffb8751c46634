"""The tracker: one contract on every implementation, then what is MLflow's own."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import event
from sqlalchemy.engine import Engine

from sweeps.errors import CannotStart
from sweeps.result import Progress, TrialResult
from sweeps.spec import FIELDS
from sweeps.sweep import Sweep
from sweeps.trial.paths import TrialFolder
from sweepsvc.plain import PlainRecorder, PlainStudy
from sweepsvc.protocols import Proposal, Recorder, Report
from sweepsvc.recorder import (
    MlflowReader,
    MlflowRecorder,
    check_registry,
    register_model,
    run_name,
    ui_command,
)
from tests.sweepsvc.samples import TASK, result_of, sweep_of

FACTS = {"git_commit": "0123abc", "python": "3.11.0", "store": "postgresql://me:secret@db/x"}
STATUS = {"completed": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

_names = (f"experiment-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for many tests, with an experiment each: its schema takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def sweep() -> Sweep:
    space = 'space: {lora.r: [8, 32], lora.alpha: ["2*r", 1]}'
    return sweep_of(f"sampler: grid, repeats: 2, {space}", name=next(_names))


@pytest.fixture
def proposals(sweep: Sweep) -> list[Proposal]:
    """The baseline, then two repeats of each of r=8 and r=32 with alpha 2*r and 1."""
    study = PlainStudy(sweep, "sweep-1", FACTS)
    return [*study.baselines(), *iter(study.ask, None)]


@pytest.fixture
def recorder(sweep: Sweep, uri: str, tmp_path: Path) -> MlflowRecorder:
    made = MlflowRecorder(sweep, "sweep-1", uri, tmp_path / "mlartifacts", FACTS)
    made.open()
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trial's folder as a worker leaves it."""
    files = TrialFolder(tmp_path / "trial")
    files.write_spec(sweep_of("sampler: grid").resolve({}).spec)
    files.write_result(result_of("completed", 0.5))
    files.evaluation.write_text('{"documents": []}')
    files.adapter.mkdir()
    (files.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    return files.path


# --- the contract -----------------------------------------------------------------------------------


@dataclass
class Seen:
    """What an implementation holds of one trial."""

    status: str
    losses: list[tuple[int, float]]
    final: Mapping[str, float]
    files: set[str]


Look = Callable[[Proposal], Seen]


@pytest.fixture(params=["mlflow", "plain"])
def looked(request: pytest.FixtureRequest, sweep: Sweep, uri: str) -> tuple[Recorder, Look]:
    """A recorder of each implementation, opened, with a way to look into it."""
    if request.param == "plain":
        plain = PlainRecorder("sweep-1")
        plain.open()
        return plain, lambda proposal: seen_in_plain(plain, proposal)
    recorder: MlflowRecorder = request.getfixturevalue("recorder")
    return recorder, lambda proposal: seen_in_mlflow(uri, sweep, proposal)


def seen_in_plain(recorder: PlainRecorder, proposal: Proposal) -> Seen:
    run = recorder.runs[f"sweep-1/{proposal.key}"]
    return Seen(
        status=STATUS[run.result.outcome] if run.result else "RUNNING",
        losses=[
            (progress.step, progress.train_loss)
            for progress in (report.progress for report in run.reports)
            if progress.train_loss is not None
        ],
        final=run.result.metrics() if run.result else {},
        files=set(run.files),
    )


def seen_in_mlflow(uri: str, sweep: Sweep, proposal: Proposal) -> Seen:
    client = MlflowClient(uri, uri)
    run = run_of(uri, sweep, proposal)
    history = client.get_metric_history(run.info.run_id, "train.loss")
    return Seen(
        status=run.info.status,
        losses=[(metric.step, metric.value) for metric in history],
        final=run.data.metrics,
        files=artifacts(client, run.info.run_id),
    )


def runs_in(uri: str, sweep: Sweep) -> list[Any]:
    """Every run of the sweep's experiment, the oldest first."""
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name(sweep.name)
    return list(client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]))


def run_of(uri: str, sweep: Sweep, proposal: Proposal) -> Any:
    (run,) = [run for run in runs_in(uri, sweep) if run.data.tags.get("trial") == proposal.key]
    return run


def parent_of(uri: str, sweep: Sweep) -> Any:
    (run,) = [run for run in runs_in(uri, sweep) if "mlflow.parentRunId" not in run.data.tags]
    return run


def reports(*losses: float, first_step: int = 1) -> Sequence[Report]:
    """One a step, heard a second apart."""
    return [
        Report(
            Progress(phase="training", step=step, train_loss=loss, lr=1e-4), 1_700_000_000_000 + step * 1000
        )
        for step, loss in enumerate(losses, first_step)
    ]


def artifacts(client: MlflowClient, run_id: str, below: str | None = None) -> set[str]:
    found = client.list_artifacts(run_id, below)
    inner = [artifacts(client, run_id, entry.path) for entry in found if entry.is_dir]
    return {entry.path for entry in found if not entry.is_dir}.union(*inner)


def test_a_trial_is_recorded_from_its_start_to_its_end(
    looked: tuple[Recorder, Look], proposals: list[Proposal], folder: Path
) -> None:
    recorder, look = looked
    trial = proposals[1]
    run_id = recorder.start(trial)
    assert look(trial).status == "RUNNING"
    recorder.report(run_id, [Report(Progress(phase="loading"), 1_700_000_000_000)])
    recorder.report(run_id, reports(2.0, 1.0))
    recorder.end(run_id, trial, result_of("completed", 0.75), folder)
    seen = look(trial)
    assert (seen.status, seen.losses) == ("FINISHED", [(1, 2.0), (2, 1.0)])
    assert seen.final["score.mean"] == 0.75
    expected = {"spec.json", "result.json", "evaluation.json", "adapter/adapter_model.safetensors"}
    assert seen.files == expected


def test_each_trial_has_a_run_of_its_own(looked: tuple[Recorder, Look], proposals: list[Proposal]) -> None:
    recorder, _ = looked
    assert len({recorder.start(proposal) for proposal in proposals}) == len(proposals)


def test_another_attempt_goes_on_in_the_same_run(
    looked: tuple[Recorder, Look], proposals: list[Proposal], tmp_path: Path
) -> None:
    recorder, look = looked
    first = recorder.start(proposals[1])
    recorder.report(first, reports(2.0))
    recorder.end(first, proposals[1], result_of("interrupted"), tmp_path)
    assert recorder.start(proposals[1], first, attempt=2) == first
    assert look(proposals[1]).status == "RUNNING"
    recorder.report(first, reports(1.0, first_step=2))
    recorder.end(first, proposals[1], result_of("completed", 0.5), tmp_path)
    assert (look(proposals[1]).status, look(proposals[1]).losses) == ("FINISHED", [(1, 2.0), (2, 1.0)])


@pytest.mark.parametrize("outcome", ["completed", "pruned", "failed", "interrupted"])
def test_a_run_ends_as_its_trial_did(
    looked: tuple[Recorder, Look], proposals: list[Proposal], tmp_path: Path, outcome: Any
) -> None:
    recorder, look = looked
    recorder.end(recorder.start(proposals[1]), proposals[1], result_of(outcome), tmp_path)
    assert look(proposals[1]).status == STATUS[outcome]


def test_whatever_is_said_twice_is_recorded_once(
    looked: tuple[Recorder, Look], proposals: list[Proposal], folder: Path
) -> None:
    recorder, look = looked
    trial, result = proposals[1], result_of("completed", 0.5, train_loss=0.25)
    seen = []
    for _ in range(2):
        recorder.open()
        run_id = recorder.start(trial, at_ms=1_700_000_000_000)
        recorder.report(run_id, reports(2.0, math.nan))
        recorder.report(run_id, reports(2.0, math.nan))
        recorder.end(run_id, trial, result, folder, at_ms=1_700_000_009_000)
        seen.append(look(trial))
    assert repr(seen[0]) == repr(seen[1])
    assert [step for step, _ in seen[0].losses][:2] == [1, 2]


@pytest.mark.parametrize("run_id", ["0" * 32, "no id of this tracker"])
def test_a_run_that_is_gone_is_replaced_by_a_new_one(
    looked: tuple[Recorder, Look], proposals: list[Proposal], run_id: str
) -> None:
    recorder, look = looked
    assert recorder.start(proposals[1], run_id) != run_id
    assert look(proposals[1]).status == "RUNNING"


def test_another_recorder_of_the_sweep_goes_on_where_one_was_killed(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    run_id = recorder.start(proposals[1], first=True)  # and nobody hears of its id
    recorder.close("interrupted")
    another = MlflowRecorder(sweep, "sweep-1", uri, tmp_path / "mlartifacts", FACTS)
    another.open()
    assert another.start(proposals[1], attempt=2) == run_id
    assert parent_of(uri, sweep).info.status == "RUNNING"
    run = run_of(uri, sweep, proposals[1])
    assert run.data.tags["mlflow.parentRunId"] == parent_of(uri, sweep).info.run_id
    assert run.data.tags["attempts"] == "2"


# --- names, params, metrics, tags -------------------------------------------------------------------


def test_every_field_of_a_trial_is_a_param_with_how_it_was_written(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal]
) -> None:
    recorder.start(proposals[1])
    params = run_of(uri, sweep, proposals[1]).data.params
    assert set(params) == {*FIELDS, "lora.alpha_rule", "lora.alpha_over_r"}
    shown = {name: params[name] for name in params if name.startswith("lora.")}
    assert shown == {
        "lora.r": "8",
        "lora.alpha": "16",
        "lora.alpha_rule": "2*r",
        "lora.alpha_over_r": "2",
        "lora.dropout": "0.05",
        "lora.targets": "all",
        "lora.dtype": "auto",
        "lora.rslora": "false",
        "lora.dora": "false",
    }
    assert params["evaluate.tasks"] == f"[{TASK}]"
    assert (params["optimizer.lr"], params["train.clip_norm"]) == ("0.0003", "none")
    assert params["model.trust_remote_code"] == "false"


def test_a_baseline_has_no_params_of_a_training_that_never_was(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    recorder.end(recorder.start(proposals[0]), proposals[0], result_of("completed", 0.25), tmp_path)
    run = run_of(uri, sweep, proposals[0])
    assert run.data.tags["baseline"] == "true"
    assert run.data.params["train"] == "none"
    assert {name.partition(".")[0] for name in run.data.params} == {"model", "evaluate", "train"}
    assert run.info.run_name == "baseline Llama-2-7b-hf"


def test_run_names_tell_trials_apart(proposals: list[Proposal]) -> None:
    assert [run_name(proposal) for proposal in proposals[1:5]] == [
        "0 r=8 alpha=2*r",
        "1 r=8 alpha=2*r repeat 1",
        "2 r=8 alpha=1",
        "3 r=8 alpha=1 repeat 1",
    ]


def test_fields_of_one_name_are_named_in_full() -> None:
    space = "{optimizer.name: [sgd], schedule.name: [constant], lora.targets: [[q_proj, v_proj]]}"
    proposal = PlainStudy(sweep_of(f"sampler: grid, space: {space}"), "sweep-1", {}).ask()
    assert proposal is not None
    assert run_name(proposal) == "0 optimizer.name=sgd schedule.name=constant targets=[q_proj, v_proj]"


def test_a_prompt_of_many_lines_names_a_run_on_one() -> None:
    space = '{data.prompt: ["Q:\\n{question}"]}'
    proposal = PlainStudy(sweep_of(f"sampler: grid, space: {space}"), "sweep-1", {}).ask()
    assert proposal is not None
    assert run_name(proposal) == "0 prompt=Q: {question}"


def test_final_numbers_have_their_stable_names(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    result = result_of("completed", 0.75, trainable_params=20_277_248, train_loss=math.nan)
    recorder.end(recorder.start(proposals[1]), proposals[1], result, tmp_path)
    metrics = run_of(uri, sweep, proposals[1]).data.metrics
    assert set(metrics) == set(result.metrics())
    assert metrics[f"score.{TASK}"] == metrics["score.mean"] == 0.75
    assert (metrics["peak_memory_gb"], metrics["wall_seconds"]) == (1.5, 3.0)
    assert metrics["trainable_params"] == 20_277_248
    assert math.isnan(metrics["train.loss"])


def test_a_task_name_that_mlflow_refuses_is_written_with_underscores(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    result = result_of("completed", 0.75)
    odd = result.model_copy(update={"scores": {"my+task|v2": result.scores[TASK]}})
    recorder.end(recorder.start(proposals[1]), proposals[1], odd, tmp_path)
    assert run_of(uri, sweep, proposals[1]).data.metrics["score.my_task_v2"] == 0.75


def test_some_reports_are_one_request_and_one_without_numbers_is_none(
    recorder: MlflowRecorder,
    uri: str,
    sweep: Sweep,
    proposals: list[Proposal],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_id = recorder.start(proposals[1])
    batches: list[Any] = []
    real = MlflowClient.log_batch

    def counted(client: MlflowClient, *arguments: Any, **named: Any) -> Any:
        batches.append(named)
        return real(client, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    recorder.report(run_id, [Report(Progress(phase="evaluating", step=7, steps=7), 1)])
    assert batches == []
    full = Progress(phase="training", step=7, train_loss=2.0, eval_loss=2.5, lr=3e-4, tokens_per_second=812.0)
    recorder.report(run_id, [*reports(*[4.0] * 6), Report(full, 1_700_000_000_000)])
    assert len(batches) == 1
    metrics = run_of(uri, sweep, proposals[1]).data.metrics
    assert metrics == {"train.loss": 2.0, "eval.loss": 2.5, "lr": 3e-4, "tokens_per_second": 812.0}


def test_a_trial_is_a_child_of_its_sweep_with_the_tags_to_find_it(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal]
) -> None:
    recorder.start(proposals[2])
    tags = run_of(uri, sweep, proposals[2]).data.tags
    assert tags["mlflow.parentRunId"] == parent_of(uri, sweep).info.run_id
    wanted = {
        "sweep": sweep.name,
        "sweep_id": "sweep-1",
        "trial": "1",
        "git_commit": "0123abc",
        "repeat": "1",
    }
    assert wanted.items() <= tags.items()
    assert "baseline" not in tags


def test_the_parent_run_holds_the_sweep_its_facts_and_no_secret(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, tmp_path: Path
) -> None:
    run = parent_of(uri, sweep)
    assert (run.info.run_name, run.info.status) == ("sweep-1", "RUNNING")
    assert run.data.params["search.sampler"] == "grid"
    assert run.data.params["file_digest"] == sweep.file_digest
    assert run.data.tags["python"] == "3.11.0"
    assert run.data.tags["store"] == "postgresql://me:***@db/x"
    client = MlflowClient(uri, uri)
    file = client.download_artifacts(run.info.run_id, "sweep.yaml", str(tmp_path))
    assert Path(file).read_text() == sweep.text
    recorder.close("failed")
    assert parent_of(uri, sweep).info.status == "FAILED"


def test_a_failure_is_recorded_with_its_class_and_traceback(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    recorder.end(
        recorder.start(proposals[1]),
        proposals[1],
        result_of("failed", notes=("dtype bfloat16: the GPU has it",)),
        tmp_path,
    )
    run = run_of(uri, sweep, proposals[1])
    assert run.data.tags["failure"] == "diverged"
    note = run.data.tags["mlflow.note.content"]
    assert note == "**diverged**: the loss is nan\n\n- dtype bfloat16: the GPU has it"
    file = MlflowClient(uri, uri).download_artifacts(run.info.run_id, "traceback.txt", str(tmp_path))
    assert Path(file).read_text() == "Traceback ...\nDiverged: the loss is nan"


def test_the_data_is_an_input_with_its_digest(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    result = result_of("completed", 0.5, data_digest="0123456789abcdef")
    for proposal in proposals[:2]:
        recorder.end(recorder.start(proposal), proposal, result, tmp_path)
    (used,) = run_of(uri, sweep, proposals[1]).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("yahma/alpaca-cleaned", "0123456789abcdef")
    assert json.loads(used.dataset.source) == {"path": "yahma/alpaca-cleaned", "split": "train"}
    assert run_of(uri, sweep, proposals[0]).inputs.dataset_inputs == []  # a baseline reads no data


def test_a_run_that_was_made_here_is_never_read(
    recorder: MlflowRecorder, proposals: list[Proposal], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs as much as a third of the rest, be it read by us or by MLflow's client."""
    real, read = SqlAlchemyStore.get_run, []

    def reading(store: SqlAlchemyStore, run_id: str) -> Any:
        read.append(run_id)
        return real(store, run_id)

    monkeypatch.setattr(SqlAlchemyStore, "get_run", reading)
    run_id = recorder.start(proposals[1], first=True)
    recorder.end(run_id, proposals[1], result_of("completed", 0.5), folder)
    assert read == []
    recorder.end(run_id, proposals[1], result_of("completed", 0.5), folder)
    assert read == [run_id]


def test_a_run_ends_even_if_an_artifact_cannot_be_kept(
    recorder: MlflowRecorder,
    uri: str,
    sweep: Sweep,
    proposals: list[Proposal],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(LocalArtifactRepository, "log_artifact", no_space)
    run_id = recorder.start(proposals[1])
    with pytest.raises(OSError, match="no space left"):
        recorder.end(run_id, proposals[1], result_of("completed", 0.5), folder)
    assert run_of(uri, sweep, proposals[1]).info.status == "FINISHED"
    monkeypatch.undo()
    # What had come through is not doubled.
    recorder.end(run_id, proposals[1], result_of("completed", 0.5), folder)
    client = MlflowClient(uri, uri)
    assert len(client.get_metric_history(run_id, "wall_seconds")) == 1
    assert "result.json" in {file.path for file in client.list_artifacts(run_id)}


# --- the store --------------------------------------------------------------------------------------


def test_sweeps_of_one_name_share_an_experiment_and_nothing_else(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    second = MlflowRecorder(sweep, "sweep-2", uri, tmp_path / "mlartifacts", FACTS)
    second.open()
    ids = {recorder.start(proposals[1]), second.start(proposals[1])}
    second.end(second.start(proposals[1]), proposals[1], result_of("failed"), tmp_path)
    runs = {run.info.run_id: run for run in runs_in(uri, sweep)}
    assert len(ids) == 2
    assert len(runs) == 4
    found = {runs[str(run_id)].data.tags["sweep_id"]: runs[str(run_id)].info.status for run_id in ids}
    assert found == {"sweep-1": "RUNNING", "sweep-2": "FAILED"}


def test_trials_may_report_at_the_same_time(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    def record(proposal: Proposal) -> None:
        run_id = recorder.start(proposal)
        for step in range(3):
            recorder.report(run_id, reports(1.0, first_step=step))
        recorder.end(run_id, proposal, result_of("completed", 0.5), tmp_path)

    threads = [threading.Thread(target=record, args=(proposal,)) for proposal in proposals[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    children = [run for run in runs_in(uri, sweep) if "trial" in run.data.tags]
    assert [run.info.status for run in children] == ["FINISHED"] * 4
    assert all(run.data.metrics["train.loss"] == 1.0 for run in children)


_IN_A_FOLDER_WITH_MLRUNS = """
import sys
from pathlib import Path
import mlflow
from sweepsvc.plain import PlainStudy
from sweepsvc.recorder import MlflowRecorder
from tests.sweepsvc.samples import result_of, sweep_of
sweep, home = sweep_of("sampler: grid, space: {lora.r: [4]}"), Path(sys.argv[1])
recorder = MlflowRecorder(sweep, "sweep-1", f"sqlite:///{home}/mlflow.db", home / "mlartifacts", {})
recorder.open()
trial = PlainStudy(sweep, "sweep-1", {}).ask()
recorder.end(recorder.start(trial), trial, result_of("failed"), home)
recorder.close("failed")
assert mlflow.active_run() is None
"""


@pytest.mark.slow
def test_an_mlruns_folder_that_lies_about_gets_nothing_and_a_new_store_is_made_in_silence(
    tmp_path: Path,
) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    (work / "mlruns" / "0").mkdir(parents=True)
    (work / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\nname: Default\n")
    before = sorted(work.rglob("*"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", _IN_A_FOLDER_WITH_MLRUNS, str(home)]
    done = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(work.rglob("*")) == before
    assert len(runs_in(f"sqlite:///{home}/mlflow.db", sweep_of("sampler: grid"))) == 2
    assert list((home / "mlartifacts" / "demo").rglob("traceback.txt"))


def test_nothing_global_is_touched(recorder: MlflowRecorder, proposals: list[Proposal]) -> None:
    before = mlflow.get_tracking_uri()
    recorder.start(proposals[1])
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None


def test_a_deleted_experiment_is_not_written_to(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, tmp_path: Path
) -> None:
    client = MlflowClient(uri, uri)
    number = client.get_experiment_by_name(sweep.name).experiment_id
    client.delete_experiment(number)
    again = MlflowRecorder(sweep, "sweep-2", uri, tmp_path, FACTS)
    with pytest.raises(
        CannotStart, match=rf"must not be deleted.*got {sweep.name}; restore it \(.* -x {number}\)"
    ):
        again.open()


def test_reports_keep_the_time_at_which_they_were_heard_and_runs_that_of_their_trial(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    run_id = recorder.start(proposals[1], first=True, at_ms=1_700_000_000_000)
    recorder.report(run_id, reports(2.0, 1.0))
    recorder.end(run_id, proposals[1], result_of("completed", 0.5), tmp_path, at_ms=1_700_000_009_000)
    history = MlflowClient(uri, uri).get_metric_history(run_id, "train.loss")
    assert [metric.timestamp - 1_700_000_000_000 for metric in history] == [1000, 2000]
    info = run_of(uri, sweep, proposals[1]).info
    assert (info.start_time, info.end_time) == (1_700_000_000_000, 1_700_000_009_000)


def test_more_reports_than_a_request_holds_are_recorded_all(
    recorder: MlflowRecorder, uri: str, proposals: list[Proposal]
) -> None:
    run_id = recorder.start(proposals[1], first=True)
    recorder.report(run_id, reports(*[1.0] * 600))  # a loss and a rate each
    history = MlflowClient(uri, uri).get_metric_history(run_id, "lr")
    assert [metric.step for metric in history] == list(range(1, 601))


def test_the_last_result_stands_and_nothing_of_an_earlier_failure(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    trial = proposals[1]
    run_id = recorder.start(trial)
    late = result_of("failed").model_copy(update={"steps": 9, "trainable_params": 1})
    recorder.end(run_id, trial, late, tmp_path)
    recorder.start(trial, run_id, attempt=2)
    recorder.end(run_id, trial, result_of("completed", 0.5, trainable_params=2), tmp_path)  # 4 steps
    run = run_of(uri, sweep, trial)
    assert (run.info.status, run.data.tags["attempts"]) == ("FINISHED", "2")
    assert run.data.metrics["trainable_params"] == 2
    assert not {"failure", "mlflow.note.content"} & set(run.data.tags)


def test_a_result_that_is_told_again_later_adds_nothing(
    recorder: MlflowRecorder, uri: str, proposals: list[Proposal], tmp_path: Path
) -> None:
    run_id = recorder.start(proposals[1])
    result = result_of("completed", 0.5, train_loss=math.inf, eval_loss=math.nan)
    for at_ms in (1_700_000_000_000, 1_700_000_001_000):
        recorder.end(run_id, proposals[1], result, tmp_path, at_ms=at_ms)
    client = MlflowClient(uri, uri)
    assert {name: len(client.get_metric_history(run_id, name)) for name in result.metrics()} == (
        dict.fromkeys(result.metrics(), 1)
    )


def test_a_run_that_a_person_deleted_is_not_written_to(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal]
) -> None:
    run_id = recorder.start(proposals[1])
    MlflowClient(uri, uri).delete_run(run_id)
    again = recorder.start(proposals[1], run_id)
    assert again != run_id
    assert run_of(uri, sweep, proposals[1]).info.run_id == again


def test_the_runs_that_were_left_open_are_found(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    ended, left = recorder.start(proposals[1]), recorder.start(proposals[2])
    recorder.end(ended, proposals[1], result_of("completed", 0.5), tmp_path)
    other = MlflowRecorder(sweep, "sweep-2", uri, tmp_path, FACTS)
    other.open()
    other.start(proposals[3])
    assert recorder.open_runs() == {proposals[2].key: left}
    recorder.end(left, proposals[2], TrialResult(outcome="interrupted"), tmp_path)
    assert recorder.open_runs() == {}


def test_a_store_that_is_full_is_an_error_and_goes_on_once_there_is_room(
    recorder: MlflowRecorder, uri: str, sweep: Sweep, proposals: list[Proposal], tmp_path: Path
) -> None:
    limit: list[str] = ["PRAGMA max_page_count = 1"]

    def limited(connection: Any, *_: Any) -> None:
        connection.execute(limit[0])

    event.listen(Engine, "checkout", limited)
    try:
        with pytest.raises(MlflowException, match="full"):
            _ = [recorder.start(trial) for trial in proposals]
        limit[0] = "PRAGMA max_page_count = 1000000"
        run_id = recorder.start(proposals[1])
        recorder.end(run_id, proposals[1], result_of("completed", 0.5), tmp_path)
    finally:
        event.remove(Engine, "checkout", limited)
    assert run_of(uri, sweep, proposals[1]).info.status == "FINISHED"


def test_a_server_that_does_not_answer_is_named_without_its_password(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    recorder = MlflowRecorder(sweep, "sweep-1", "http://me:secret@127.0.0.1:9", tmp_path, FACTS)
    with pytest.raises(CannotStart) as caught:
        recorder.open()
    assert "must be reachable, got http://me:***@127.0.0.1:9" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_store_that_cannot_be_made_is_named(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recorder = MlflowRecorder(sweep, "sweep-1", f"sqlite:///{tmp_path}/file/mlflow.db", tmp_path, FACTS)
    with pytest.raises(CannotStart, match=r"must be reachable, got .*file/mlflow.db.*check --home"):
        recorder.open()


def test_the_ui_is_a_server_on_loopback_over_this_store(tmp_path: Path) -> None:
    command = ui_command("sqlite:////home/mlflow.db", tmp_path, port=5001)
    assert command[:4] == [sys.executable, "-m", "mlflow", "server"]
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options == {
        "--backend-store-uri": "sqlite:////home/mlflow.db",
        "--default-artifact-root": tmp_path.as_uri(),
        "--host": "127.0.0.1",
        "--port": "5001",
        "--workers": "1",
    }


# --- the model registry -----------------------------------------------------------------------------


@pytest.fixture
def run_id(recorder: MlflowRecorder, proposals: list[Proposal], folder: Path) -> str:
    """The run of a completed trial."""
    made = recorder.start(proposals[1])
    recorder.end(made, proposals[1], result_of("completed", 0.5), folder)
    return made


def registered_files(name: str, version: str, to: Path) -> dict[str, str]:
    """The files of a version, as anyone downloads them by its address."""
    to.mkdir()
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(to)))
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_registered_model_is_read_back_from_the_registry_and_no_later_version_changes_it(
    uri: str, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    name = next(_names)
    check_registry(uri, run_id, name)
    versions = []
    for text in ("one", "two"):
        (model / "weights.txt").write_text(text)
        versions.append(register_model(uri, run_id, model, name, "x" * 6000, {"kind": text}))
    assert versions == ["1", "2"]

    client = MlflowClient(uri, uri)
    first = client.get_model_version(name, "1")
    assert (first.run_id, first.status, first.tags) == (run_id, "READY", {"kind": "one"})
    assert set(first.description) == {"x"}
    assert artifacts(client, run_id) >= {"result.json", "adapter/adapter_model.safetensors"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert registered_files(name, "1", tmp_path / "back-1") == {"weights.txt": "one"}
    assert registered_files(name, "2", tmp_path / "back-2") == {"weights.txt": "two"}


def test_what_cannot_be_registered_is_known_before(
    uri: str, run_id: str, recorder: MlflowRecorder, tmp_path: Path
) -> None:
    for name in ("", " ", "a/b", "a:b", ".."):
        with pytest.raises(CannotStart, match="name must be text without / and :"):
            check_registry(uri, run_id, name)
    with pytest.raises(CannotStart, match=r"the MLflow store must be reachable.*not found"):
        check_registry(uri, "0" * 32, "rivers")
    recorder.delete(run_id)
    with pytest.raises(CannotStart, match=f"got {run_id}, deleted; restore it"):
        check_registry(uri, run_id, "rivers")


def test_a_registry_that_fails_is_said_with_its_address(
    uri: str, run_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise MlflowException("the registry is away")

    monkeypatch.setattr(MlflowClient, "create_model_version", fails)
    with pytest.raises(CannotStart, match=f"must be reachable, got {uri}: the registry is away"):
        register_model(uri, run_id, folder, "rivers", "", {})


# --- a report ---------------------------------------------------------------------------------------


def test_a_report_is_kept_with_the_sweeps_run_and_the_last_one_stands(
    recorder: MlflowRecorder, sweep: Sweep, uri: str, tmp_path: Path
) -> None:
    file = tmp_path / "report.md"
    other = MlflowRecorder(sweep, "sweep-1", uri, tmp_path / "mlartifacts", {})
    for text in ("first", "second"):
        file.write_text(text)
        other.keep([file], "report")
    client = MlflowClient(tracking_uri=uri)
    (parent,) = client.search_runs(
        [client.get_experiment_by_name(sweep.name).experiment_id], "tags.role = 'sweep'"
    )
    assert parent.info.status == "RUNNING"
    kept = client.download_artifacts(parent.info.run_id, "report/report.md", str(tmp_path))
    assert Path(kept).read_text() == "second"


def test_a_sweep_that_the_tracker_does_not_know_gets_no_run_for_a_report(uri: str, tmp_path: Path) -> None:
    unknown = MlflowRecorder(sweep_of("sampler: grid", name="unheard-of"), "x", uri, tmp_path, {})
    with pytest.raises(CannotStart, match="must have a run in sqlite"):
        unknown.keep([tmp_path / "report.md"], "report")
    assert MlflowClient(tracking_uri=uri).get_experiment_by_name("unheard-of") is None
    nowhere = f"sqlite:///{tmp_path / 'none.db'}"
    absent = MlflowRecorder(sweep_of("sampler: grid"), "x", nowhere, tmp_path, {})
    with pytest.raises(CannotStart, match="must have a run in sqlite"):
        absent.keep([], "report")
    assert not (tmp_path / "none.db").exists()


# --- reading ----------------------------------------------------------------------------------------


def training(step: int, loss: float, at_ms: int, held_out: float | None = None) -> Report:
    return Report(
        Progress(phase="training", step=step, steps=4, train_loss=loss, eval_loss=held_out, lr=1e-3), at_ms
    )


def test_a_reader_finds_the_newest_numbers_with_their_steps_and_the_history(
    recorder: MlflowRecorder, proposals: list[Proposal], folder: Path, uri: str
) -> None:
    run_id = recorder.start(proposals[1], first=True, at_ms=1_000)
    reader = MlflowReader(uri)
    assert reader.newest(run_id) == {}
    recorder.report(run_id, [training(1, 3.0, 2_000, held_out=2.5), training(2, math.nan, 3_000)])
    newest = reader.newest(run_id)
    assert newest is not None
    assert {name: (one.step, one.at_ms) for name, one in newest.items()} == {
        "train.loss": (2, 3_000),
        "eval.loss": (1, 2_000),
        "lr": (2, 3_000),
    }
    assert newest["eval.loss"].value == 2.5
    assert math.isnan(newest["train.loss"].value)
    assert reader.newest(run_id) == newest  # NaN is no news
    recorder.report(run_id, [training(3, math.inf, 4_000)])
    recorder.end(run_id, proposals[1], result_of("completed", 0.5), folder, at_ms=9_000)
    history = reader.history(run_id)
    assert history is not None
    assert history.started_ms == 1_000
    assert [(one.step, one.at_ms) for one in history.curves["train.loss"]] == [
        (1, 2_000),
        (2, 3_000),
        (3, 4_000),
    ]
    assert history.curves["train.loss"][2].value == math.inf
    assert [(one.step, one.at_ms, one.value) for one in history.curves["wall_seconds"]] == [(4, 9_000, 3.0)]


def test_a_reader_makes_nothing_and_knows_of_no_run_that_was_deleted(
    recorder: MlflowRecorder, proposals: list[Proposal], uri: str, tmp_path: Path
) -> None:
    absent = MlflowReader(f"sqlite:///{tmp_path}/none/mlflow.db")
    for look in (absent.newest, absent.history):
        with pytest.raises(CannotStart, match=r"the MLflow store must be reachable.*there is no such file"):
            look("0" * 32)
    assert not (tmp_path / "none").exists()
    reader = MlflowReader(uri)
    assert reader.newest("0" * 32) is None
    run_id = recorder.start(proposals[1], first=True)
    recorder.delete(run_id)
    assert reader.newest(run_id) is None
    assert reader.history(run_id) is None
