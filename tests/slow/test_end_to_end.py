"""The main job: a sweep on a real model through real Ray, Optuna, MLflow, bitsandbytes nf4 and lm-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("the quickstart, shortened")]

ROOT = Path(__file__).parents[2]
METRICS = {
    "score.facts",
    "score.mean",
    "peak_memory_gb",
    "wall_seconds",
    "train_seconds",
    "eval_seconds",
    "tokens_per_second",
    "trainable_params",
}


def sweepsvc(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SWEEPSVC_HOME": str(home)}
    for name in ("SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI", "OMP_NUM_THREADS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "sweepsvc", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def launched(home: Path) -> subprocess.CompletedProcess[str]:
    """The quickstart, shortened: two trials of two steps."""
    short = ["--set", "train.samples=48", "--set", "search.space.lora.r=[4]", "--id", "short"]
    return sweepsvc(home, "launch", "search_spaces/quickstart.yaml", *short)


@pytest.fixture(scope="module")
def runs(home: Path, launched: subprocess.CompletedProcess[str]) -> list[Run]:
    assert launched.returncode == 0, launched.stderr
    client = MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("quickstart")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]))


def test_it_ends_with_a_table_and_how_to_open_the_ui(launched: subprocess.CompletedProcess[str]) -> None:
    assert launched.returncode == 0, launched.stderr
    assert "baseline" in launched.stdout
    assert "8 (2*r)" in launched.stdout
    assert "python -m sweepsvc ui" in launched.stdout


def test_status_lists_every_trial_with_its_scores_memory_and_seconds(
    home: Path, launched: subprocess.CompletedProcess[str]
) -> None:
    status = json.loads(sweepsvc(home, "status", "--json").stdout)
    assert (status["sweep"], status["state"]) == ("short", "completed")
    trials: list[dict[str, Any]] = [*status["baselines"], *status["trials"]]
    assert [trial["number"] for trial in trials] == [None, 0, 1]
    for trial in trials:
        assert (trial["state"], trial["attempts"], trial["error"]) == ("completed", 1, None)
        assert 0 <= trial["scores"]["facts"] == trial["score"] <= 1
        assert trial["peak_memory_gb"] > 0.1
        assert trial["wall_seconds"] > trial["eval_seconds"] > 0
    assert [trial["params"]["lora.alpha_rule"] for trial in status["trials"]] == ["2*r", "1"]
    assert [trial["trainable_params"] for trial in trials] == [0, 1_420_032, 1_420_032]


def test_mlflow_holds_one_parent_and_one_finished_child_a_trial(runs: list[Run]) -> None:
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run not in parents]
    assert len(parents) == 1
    assert len(children) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert [run.data.tags.get("baseline") for run in children] == ["true", None, None]


def test_every_child_has_the_stable_params_metrics_and_artifacts(home: Path, runs: list[Run]) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")
    trained = [run for run in runs if run.data.tags.get("trial") in ("0", "1")]
    assert len(trained) == 2
    for run in trained:
        assert run.data.metrics.keys() >= METRICS
        params = run.data.params
        assert params["lora.r"] == "4"
        assert params["model.quantization"] == "nf4"
        assert float(params["lora.alpha_over_r"]) == float(params["lora.alpha"]) / 4
        assert client.get_metric_history(run.info.run_id, "train.loss")[0].step == 3
        names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert names >= {"spec.json", "result.json", "evaluation.json", "adapter"}
        assert run.inputs.dataset_inputs[0].dataset.digest
    assert [run.data.params["lora.alpha_rule"] for run in trained] == ["2*r", "1"]


def test_the_actor_kept_its_base(home: Path, launched: subprocess.CompletedProcess[str]) -> None:
    seconds = [
        json.loads((home / "short/trials" / key / "result.json").read_text())["measured"]["load_seconds"]
        for key in ("baseline", "0", "1")
    ]
    assert seconds[2] < seconds[0] / 2
