"""A real MLflow server that goes away in the middle of a sweep and comes back: nothing is lost or twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from sweeps.result import Progress
from sweeps.trial.paths import TrialFolder
from sweepsvc.home import SweepFolder
from sweepsvc.outbox import Outbox
from sweepsvc.plain import PlainStudy
from sweepsvc.protocols import Proposal
from sweepsvc.recorder import MlflowRecorder
from tests.mlflow_server import Server
from tests.sweepsvc.samples import result_of, sweep_of
from tests.waiting import until

pytestmark = pytest.mark.slow

SWEEP = sweep_of("sampler: grid, space: {lora.r: [4, 8, 16, 32]}")
STEPS = range(1, 7)


def steps(box: Outbox, trial: Proposal, numbers: range) -> None:
    for number in numbers:
        box.report(trial, Progress(phase="training", step=number, train_loss=float(-number), lr=1e-4))


def end(box: Outbox, folder: SweepFolder, trial: Proposal) -> None:
    files = TrialFolder(folder.trial(trial))
    files.write_spec(trial.spec)
    files.write_result(result_of("completed", 0.5))
    box.end(trial, result_of("completed", 0.5))


def losses(client: MlflowClient, run: Any) -> list[tuple[int, float]]:
    history = client.get_metric_history(run.info.run_id, "train.loss")
    return [(metric.step, metric.value) for metric in history]


def test_a_server_that_goes_away_in_mid_sweep_gets_everything_once_it_is_back(
    server: Server, tmp_path: Path
) -> None:
    folder = SweepFolder(tmp_path / "sweep-1")
    recorder = MlflowRecorder(SWEEP, "sweep-1", server.url, tmp_path, {})
    recorder.open()
    box = Outbox(recorder, folder)
    first, second, third, fourth = iter(PlainStudy(SWEEP, "sweep-1", {}).ask, None)

    box.start(first, 1)
    steps(box, first, STEPS)
    end(box, folder, first)
    box.start(second, 1)
    steps(box, second, range(1, 4))
    time.sleep(0.2)  # the server is stopped wherever it may be with these
    server.stop()

    began = time.monotonic()
    steps(box, second, range(4, 7))
    end(box, folder, second)
    box.start(third, 1)
    steps(box, third, range(1, 3))
    box.start(third, 2)  # its worker was lost meanwhile, and it repeats a step
    steps(box, third, range(2, 7))
    end(box, folder, third)
    assert time.monotonic() - began < 1  # nobody waited for the server
    said: list[str] = []
    until(lambda: said.extend(box.notes()) or said)
    assert said[0].startswith("the tracker fails: ")

    server.start()
    box.start(fourth, 1)
    steps(box, fourth, STEPS)
    end(box, folder, fourth)
    box.close("completed")

    said += box.notes()
    assert [note.partition(":")[0].partition(";")[0] for note in said] == [
        "the tracker fails",
        "the tracker answers again",
    ]
    client = MlflowClient(server.url, server.url)
    found = client.search_runs([client.get_experiment_by_name(SWEEP.name).experiment_id])
    runs = {run.data.tags.get("trial", "sweep"): run for run in found}
    assert len(found) == 5
    assert {key: run.info.status for key, run in runs.items()} == dict.fromkeys(
        ["sweep", "0", "1", "2", "3"], "FINISHED"
    )
    for key in ("0", "1", "2", "3"):
        assert losses(client, runs[key]) == [(step, float(-step)) for step in STEPS]
        assert runs[key].data.metrics["score.mean"] == 0.5
        held = {file.path for file in client.list_artifacts(runs[key].info.run_id)}
        assert held == {"spec.json", "result.json"}
    assert runs["2"].data.tags["attempts"] == "2"
    assert sorted(box.opened()) == [(key, runs[key].info.run_id) for key in ("0", "1", "2", "3")]


def test_a_server_that_is_down_is_noticed_in_seconds(tmp_path: Path) -> None:
    recorder = MlflowRecorder(SWEEP, "sweep-1", Server(tmp_path).url, tmp_path, {})
    began = time.monotonic()
    with pytest.raises(Exception, match="must be reachable"):
        recorder.open()
    assert time.monotonic() - began < 10
