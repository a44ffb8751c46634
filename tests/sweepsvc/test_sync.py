"""Making MLflow whole from the study, the trials' folders and the logs beside them."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, ViewType
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from sweeps.result import Progress, TrialResult
from sweeps.sweep import Sweep
from sweeps.trial.paths import TrialFolder
from sweepsvc.home import SweepFolder
from sweepsvc.outbox import Outbox
from sweepsvc.plain import PlainStudy
from sweepsvc.protocols import Proposal, SweepRecord
from sweepsvc.recorder import MlflowRecorder
from sweepsvc.sync import Synced, synchronise
from tests.sweepsvc.samples import result_of, sweep_of

_names = (f"sync-{number}" for number in itertools.count())
RESULTS: dict[str, TrialResult] = {
    "baseline": result_of("completed", 0.25),
    "0": result_of("completed", 0.5, train_loss=0.125, data_digest="0123456789abcdef"),
    "1": result_of("failed", train_loss=float("nan"), notes=("dtype float32: a CPU",)),
    "2": result_of("pruned", 0.375, train_loss=float("inf")),
}
"""What became of the trials; number 3 was cut, number 4 never began."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores with their schema, which takes seconds: `one.db` and `two.db`."""
    folder = tmp_path_factory.mktemp("stores")
    one = f"sqlite:///{folder}/one.db"
    MlflowRecorder(sweep_of("sampler: grid", name="first"), "first", one, folder, {}).open()
    with (
        contextlib.closing(sqlite3.connect(folder / "one.db")) as database,
        contextlib.closing(sqlite3.connect(folder / "two.db")) as copy,
    ):
        database.backup(copy)
    return folder


@dataclass
class Swept:
    """A sweep that went through: its study, its files, and MLflow as its driver left it."""

    sweep: Sweep
    study: PlainStudy
    folder: SweepFolder
    stores: Path

    def recorder(self, store: str = "one") -> MlflowRecorder:
        uri = f"sqlite:///{self.stores}/{store}.db"
        return MlflowRecorder(self.sweep, "sweep-1", uri, self.folder.path / store, {})

    def client(self, store: str = "one") -> MlflowClient:
        uri = f"sqlite:///{self.stores}/{store}.db"
        return MlflowClient(uri, uri)

    def synchronise(self, store: str = "one", record: SweepRecord | None = None) -> Synced:
        return synchronise(record or self.study.read(), self.folder, self.recorder(store))

    def runs(self, store: str = "one") -> dict[str, Any]:
        """The runs by their trial's key, the parent's as `sweep`."""
        client = self.client(store)
        experiment = client.get_experiment_by_name(self.sweep.name)
        runs = client.search_runs([experiment.experiment_id])
        keys = [run.data.tags.get("trial", "sweep") for run in runs]
        assert len(set(keys)) == len(keys), f"two runs of a trial: {keys}"
        return dict(zip(keys, runs, strict=True))

    def curves(self, store: str = "one") -> dict[str, list[tuple[int, int, str]]]:
        """The history of the loss of each trial: step, time, value."""
        client = self.client(store)
        return {
            key: [
                (point.step, point.timestamp, str(point.value))
                for point in client.get_metric_history(run.info.run_id, "train.loss")
            ]
            for key, run in self.runs(store).items()
        }

    def looks(self, store: str = "one") -> dict[str, Any]:
        """All that a person sees of each run, but for ids and the time of the sweep's own end."""
        client = self.client(store)
        return {
            key: (
                *(
                    run.info.status,
                    run.info.run_name,
                    key != "sweep" and (run.info.start_time, run.info.end_time),
                ),
                *(run.data.params, sorted((name, str(value)) for name, value in run.data.metrics.items())),
                {name: text for name, text in run.data.tags.items() if name not in _IDS},
                sorted((file.path, file.file_size) for file in client.list_artifacts(run.info.run_id)),
                [file.path for file in client.list_artifacts(run.info.run_id, "adapter")],
                [used.dataset.digest for used in run.inputs.dataset_inputs],
            )
            for key, run in self.runs(store).items()
        }


_IDS = ("mlflow.parentRunId",)


@pytest.fixture
def swept(stores: Path, tmp_path: Path) -> Swept:
    sweep = sweep_of(
        "sampler: grid, space: {lora.r: [4, 8, 16, 32, 64]}", rest="baseline: true", name=next(_names)
    )
    made = Swept(sweep, PlainStudy(sweep, "sweep-1", {}), SweepFolder(tmp_path / "sweep-1"), stores)
    recorder = made.recorder()
    recorder.open()
    box = Outbox(recorder, made.folder)
    for trial in itertools.chain(made.study.baselines(), iter(made.study.ask, None)):
        if trial.key != "4":
            run_trial(made, box, trial)
    box.close("interrupted")
    for key, run_id in box.opened():
        made.study.tracked(key, run_id)
    made.study.close("interrupted")
    assert box.notes() == []
    return made


def run_trial(swept: Swept, box: Outbox, trial: Proposal) -> None:
    files = TrialFolder(swept.folder.trial(trial))
    box.start(trial, swept.study.started(trial))
    files.write_spec(trial.spec)
    for step in range(1, 4):
        box.report(trial, Progress(phase="training", step=step, train_loss=4.0 - step, lr=1e-4))
    if trial.key in RESULTS:
        result = RESULTS[trial.key]
        (files.path / "adapter").mkdir()
        (files.path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        files.write_result(result)
        swept.study.tell(trial, result)
        box.end(trial, result)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the writing calls that reach MLflow."""
    seen: list[str] = []

    def watch(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def watched(target: Any, *arguments: Any, **named: Any) -> Any:
            seen.append(name)
            return real(target, *arguments, **named)

        monkeypatch.setattr(kind, name, watched)

    for name in (
        *("create_run", "delete_run", "update_run", "set_terminated", "set_tag", "delete_tag"),
        *("log_batch", "log_inputs", "log_text"),
    ):
        watch(MlflowClient, name)
    for name in ("log_artifact", "log_artifacts"):
        watch(LocalArtifactRepository, name)
    return seen


def test_what_is_right_is_left_alone(swept: Swept, writes: list[str]) -> None:
    swept.synchronise()  # closes the run of the trial that was cut
    client, runs = swept.client(), swept.runs()
    client.set_tag(runs["2"].info.run_id, "git_commit", "of the driver that resumed it")
    before, looks = swept.runs(), swept.looks()
    writes.clear()
    synced = swept.synchronise()
    assert writes == []
    assert (synced.made, synced.completed, synced.right, synced.removed) == (0, 0, 5, 0)
    assert synced.runs == {key: run.info.run_id for key, run in before.items() if key != "sweep"}
    assert swept.looks() == looks


def test_a_trial_that_was_cut_is_closed_and_one_that_never_began_has_no_run(swept: Swept) -> None:
    assert swept.runs()["3"].info.status == "RUNNING"
    synced = swept.synchronise()
    assert str(synced) == (
        "5 runs of trials in the tracker: 0 made, 1 completed, 4 right already; "
        "0 removed that were a trial's second"
    )
    assert swept.runs()["3"].info.status == "KILLED"
    assert "4" not in swept.runs()


def test_an_empty_store_gets_all_that_the_lost_one_had(swept: Swept) -> None:
    swept.synchronise()
    synced = swept.synchronise("two")
    assert (synced.made, synced.completed, synced.right) == (5, 0, 0)
    lost, again = swept.looks(), swept.looks("two")
    for key in set(lost) - {"3"}:  # nobody heard when that one ended
        assert again[key] == lost[key]
    assert swept.curves("two") == swept.curves()
    parent = swept.runs("two")["sweep"].info
    assert parent.status == "KILLED"
    children = [run for key, run in swept.runs("two").items() if key != "sweep"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.run_id}


def test_a_later_driver_goes_on_in_the_runs_that_were_made(swept: Swept) -> None:
    synced = swept.synchronise("two")
    box = Outbox(swept.recorder("two"), swept.folder, synced.runs)
    trial = swept.study.read().trials[3].proposal
    box.start(trial, 2)
    box.report(trial, Progress(phase="training", step=3, train_loss=1.0))
    box.report(trial, Progress(phase="training", step=4, train_loss=0.5))
    box.end(trial, result_of("completed", 0.75, train_loss=0.5))
    box.close("completed")
    assert (box.opened(), box.notes()) == ([], [])
    run = swept.runs("two")["3"]
    assert (run.info.run_id, run.info.status) == (synced.runs["3"], "FINISHED")
    assert [step for step, _, _ in swept.curves("two")["3"]] == [1, 2, 3, 4, 4]  # the last is the result's


def test_a_store_that_lost_half_gets_the_other_half(swept: Swept) -> None:
    swept.synchronise()
    wanted, curves = swept.looks(), swept.curves()
    client, runs = swept.client("two"), swept.runs()
    recorder = swept.recorder("two")
    recorder.open()
    trials = {trial.proposal.key: trial for trial in swept.study.read().trials}
    for key in ("0", "1"):  # begun there, with one step, a note that is not right, and no end
        proposal = trials[key].proposal
        run_id = recorder.start(proposal, first=True, at_ms=runs[key].info.start_time)
        step, at_ms, value = curves[key][0]
        client.log_batch(run_id, metrics=[Metric("train.loss", float(value), at_ms, step)])
        client.set_tag(run_id, "mlflow.note.content", "half")
        client.set_tag(run_id, "attempts", "7")
    synced = swept.synchronise("two")
    assert (synced.made, synced.completed, synced.right) == (3, 2, 0)
    again = swept.looks("two")
    for key in ("baseline", "0", "1", "2"):
        assert again[key] == wanted[key]
    assert {key: swept.curves("two")[key] for key in ("0", "1")} == {key: curves[key] for key in ("0", "1")}


@pytest.mark.parametrize("key", ["0", "1"])
def test_what_went_missing_from_a_run_comes_back(swept: Swept, key: str) -> None:
    swept.synchronise()
    wanted = swept.looks()
    run_id = swept.runs()[key].info.run_id
    where = Path(swept.client().get_run(run_id).info.artifact_uri.removeprefix("file://"))
    (where / "adapter" / "adapter_model.safetensors").unlink()
    (where / "result.json").write_text("half")
    swept.client().set_terminated(run_id, "FAILED" if key == "0" else "FINISHED")
    synced = swept.synchronise()
    assert (synced.completed, synced.right) == (1, 4)
    assert swept.looks() == wanted


def test_of_two_runs_of_a_trial_the_one_that_the_study_has_is_kept(swept: Swept) -> None:
    swept.synchronise()
    trial = swept.study.read().trials[0]
    recorder = swept.recorder()
    recorder.open()
    second = recorder.start(trial.proposal, first=True, at_ms=1)  # the older one by its time
    synced = swept.synchronise()
    assert synced.removed == 1
    assert synced.runs["0"] == trial.mlflow_run_id
    deleted = swept.client().search_runs(
        [swept.runs()["0"].info.experiment_id], run_view_type=ViewType.DELETED_ONLY
    )
    assert [run.info.run_id for run in deleted] == [second]


def test_a_run_that_the_study_never_heard_of_is_found_by_its_tags(swept: Swept) -> None:
    record = swept.study.read()
    forgotten = replace(record, trials=[replace(trial, mlflow_run_id=None) for trial in record.trials])
    synced = swept.synchronise(record=forgotten)
    assert synced.made == 0
    assert synced.runs["2"] == record.trials[2].mlflow_run_id


def test_without_any_log_the_final_numbers_are_recorded_all_the_same(swept: Swept) -> None:
    for log in swept.folder.path.rglob("tracking"):
        shutil.rmtree(log)
    assert swept.synchronise("two").made == 5
    run = swept.runs("two")["0"]
    assert run.data.metrics["score.mean"] == 0.5
    assert [step for step, _, _ in swept.curves("two")["0"]] == [4]


def test_what_an_outbox_could_not_deliver_is_in_the_tracker_afterwards_and_waits_no_more(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = swept.study.read().trials[4].proposal
    monkeypatch.setattr("sweepsvc.outbox.PATIENCE_SECONDS", 0.1)
    away = Outbox(_Away(), swept.folder)
    run_trial(swept, away, trial)
    away.close("interrupted")
    assert "python -m sweepsvc sync sweep-1" in away.notes()[-1]
    synced = swept.synchronise()
    assert synced.made == 1
    assert [step for step, _, _ in swept.curves()["4"]] == [1, 2, 3]
    later = Outbox(_Away(), swept.folder, synced.runs)
    assert not any(trial.log.waits for trial in later._trials.values())


class _Away:
    """A recorder that cannot be reached."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise ConnectionError("no route")

        return refuse
