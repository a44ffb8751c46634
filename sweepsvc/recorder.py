"""The tracker: the one file that imports mlflow.

One experiment per sweep name, a parent run per sweep, a child run per trial. What they hold is a copy of the
study and of the trials' folders, for people to compare in, and can be made again from them.

Every address is given explicitly. MLflow otherwise picks a store by what lies in the working folder: a
`./mlruns` left from years ago would get everything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sqlite3
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault(
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"
)  # a lost server is noticed in 15 s, not in 4 min

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, LifecycleStage, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy import event
from sqlalchemy.engine import Engine

from sweeps.errors import CannotStart
from sweeps.result import Outcome, Progress, TrialResult
from sweeps.space import field_value
from sweeps.spec import FIELDS, DataSpec, TrialSpec
from sweeps.sweep import Sweep
from sweeps.trial.paths import TrialFolder
from sweepsvc.protocols import Proposal, SweepState
from sweepsvc.urls import masked, sqlite_file

LONGEST_PARAM, LONGEST_TAG, LONGEST_NAME = 6000, 8000, 250
"""Characters that MLflow holds; we cut, as it would, but without its warnings."""

BUSY_SECONDS = 60
"""How long one writer waits for another on the same SQLite file."""

_RUN_STATUS: Mapping[Outcome | SweepState, str] = {
    "running": "RUNNING",
    "completed": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_NOT_IN_A_METRIC = re.compile(r"[^\w/.:\- ]")


class MlflowRecorder:
    """The tracker over MLflow; see `protocols.Recorder`.

    `tracking_uri` is an SQLite address, made if it is not there, or a server's. Artifacts go below
    `artifact_root`, or where the server keeps its own. Raises MLflow's errors, but for `open`.
    """

    def __init__(
        self, sweep: Sweep, sweep_id: str, tracking_uri: str, artifact_root: Path, facts: Mapping[str, str]
    ) -> None:
        self._sweep = sweep
        self._sweep_id = sweep_id
        self._uri = tracking_uri
        self._artifact_root = artifact_root
        self._facts = {name: masked(fact) for name, fact in facts.items()}
        self._runs: dict[str, str] = {}

    def open(self) -> None:
        """Open the sweep's parent run; `CannotStart` if the store cannot be used."""
        try:
            self._client = _connect(self._uri)
            self._experiment_id = self._experiment()
            self._parent = self._open_parent()
        except (MlflowException, OSError, sqlite3.Error) as error:
            reason = masked(str(error).strip().partition("\n")[0])
            raise CannotStart(
                f"the MLflow store must be reachable, got {masked(self._uri)}: {reason}; "
                "check --home and MLFLOW_TRACKING_URI"
            ) from error

    def _experiment(self) -> str:
        name = self._sweep.name
        found = self._client.get_experiment_by_name(name)
        if found is None:
            found = self._create_experiment(name)
        if found.lifecycle_stage == LifecycleStage.DELETED:
            raise CannotStart(
                f"an experiment must not be deleted to be recorded in, got {name}; "
                f"restore it (mlflow experiments restore -x {found.experiment_id}), or rename the sweep"
            )
        return str(found.experiment_id)

    def _create_experiment(self, name: str) -> Experiment:
        location = None if _is_server(self._uri) else (self._artifact_root.absolute() / name).as_uri()
        # Another driver may have made it a moment ago.
        with contextlib.suppress(MlflowException):
            self._client.create_experiment(name, artifact_location=location)
        made = self._client.get_experiment_by_name(name)
        if made is None:
            raise MlflowException(f"no experiment {name} after making it")
        return made

    def _open_parent(self) -> str:
        search = self._sweep.search
        run = self._client.create_run(
            self._experiment_id,
            run_name=self._sweep_id,
            tags={**_cut_tags(self._facts), **self._tags()},
        )
        params = {
            "file_digest": self._sweep.file_digest,
            "objective.metric": self._sweep.objective.metric,
            "objective.maximize": self._sweep.objective.maximize,
            "search.sampler": search.sampler,
            "search.trials": search.trials,
            "search.repeats": search.repeats,
            "search.seed": search.seed,
        }
        self._client.log_batch(run.info.run_id, params=_params(params))
        self._client.log_text(run.info.run_id, self._sweep.text, "sweep.yaml")
        return str(run.info.run_id)

    def _tags(self) -> dict[str, str]:
        commit = self._facts.get("git_commit", "")
        return {
            "sweep": self._sweep.name,
            "sweep_id": self._sweep_id,
            "git_commit": commit,
            "mlflow.source.git.commit": commit,
            "mlflow.source.name": Path(self._sweep.source).name,
        }

    def start(self, proposal: Proposal) -> str | None:
        """Open the trial's run, or the one it has again where this is another attempt."""
        run_id = self._runs.get(proposal.key)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        run = self._client.create_run(
            self._experiment_id, run_name=run_name(proposal), tags=self._trial_tags(proposal)
        )
        self._runs[proposal.key] = run_id = str(run.info.run_id)
        self._client.log_batch(run_id, params=_params(trial_params(proposal)))
        return run_id

    def _trial_tags(self, proposal: Proposal) -> dict[str, str]:
        tags = {**self._tags(), "mlflow.parentRunId": self._parent, "trial": proposal.key}
        if proposal.is_baseline:
            tags["baseline"] = "true"
        if proposal.repeat:
            tags["repeat"] = str(proposal.repeat)
        return tags

    def report(self, proposal: Proposal, progress: Progress) -> None:
        metrics = {
            "train.loss": progress.train_loss,
            "eval.loss": progress.eval_loss,
            "lr": progress.lr,
            "tokens_per_second": progress.tokens_per_second,
        }
        measured = {name: value for name, value in metrics.items() if value is not None}
        if measured:  # loading and evaluating have nothing to plot
            self._client.log_batch(self._runs[proposal.key], metrics=_metrics(measured, progress.step))

    def end(self, proposal: Proposal, result: TrialResult, folder: Path) -> None:
        run_id = self._runs.get(proposal.key) or self.start(proposal)
        try:
            self._client.log_batch(
                run_id, metrics=_metrics(result.metrics(), result.steps), tags=_result_tags(result)
            )
            self._log_data(run_id, proposal.spec, result)
            self._log_artifacts(run_id, TrialFolder(folder), result)
        finally:
            self._client.set_terminated(run_id, _RUN_STATUS[result.outcome])

    def _log_data(self, run_id: str | None, spec: TrialSpec, result: TrialResult) -> None:
        if spec.train is not None and result.data_digest is not None:
            used = DatasetInput(
                _dataset(spec.data, result.data_digest), [InputTag("mlflow.data.context", "training")]
            )
            self._client.log_inputs(run_id, [used])

    def _log_artifacts(self, run_id: str | None, files: TrialFolder, result: TrialResult) -> None:
        for file in (files.spec, files.result, files.evaluation):
            if file.exists():
                self._client.log_artifact(run_id, str(file))
        if files.adapter.is_dir():
            self._client.log_artifacts(run_id, str(files.adapter), files.adapter.name)
        if result.failure is not None:
            self._client.log_text(run_id, result.failure.traceback, "traceback.txt")

    def close(self, state: SweepState) -> None:
        self._client.set_terminated(self._parent, _RUN_STATUS[state])


def ui_command(
    tracking_uri: str, artifact_root: Path, host: str = "127.0.0.1", port: int = 5000
) -> list[str]:
    """The command of an MLflow server on this store; on loopback, since it asks nobody for a password.

    One worker serves one person, and starts in a quarter of the time of MLflow's four.
    """
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", tracking_uri),
        *("--default-artifact-root", artifact_root.absolute().as_uri()),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]


# --- the store --------------------------------------------------------------------------------------


def _connect(uri: str) -> MlflowClient:
    file = sqlite_file(uri)
    if file is not None:
        _make_quick(file)
    # It says at length that it makes its tables; that takes seconds, once for each home.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_quick(file: Path) -> None:
    """Have the database append to a log: a fifth of the time for a write, and readers wait for nobody."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(file, timeout=BUSY_SECONDS)) as database:
        database.execute("PRAGMA journal_mode=WAL")


@event.listens_for(Engine, "connect")
def _do_not_wait_for_the_disk(connection: Any, record: Any) -> None:
    """Halves the time of a write. A power cut may take the last moments of a copy, and leaves it whole."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=NORMAL")


def _is_server(uri: str) -> bool:
    return uri.startswith(("http:", "https:", "databricks"))


# --- our words as MLflow's --------------------------------------------------------------------------


def run_name(proposal: Proposal) -> str:
    """What tells runs apart at a glance: "3 r=32 alpha=2*r", "baseline Llama-2-7b-hf"."""
    if proposal.is_baseline:
        return f"{proposal.key} {Path(proposal.spec.model.id).name}"[:LONGEST_NAME]
    picked = {path: proposal.rules.get(path, _text(value)) for path, value in proposal.params.items()}
    names = [path.rpartition(".")[2] for path in picked]
    words = [
        f"{path if names.count(name) > 1 else name}={text}"
        for (path, text), name in zip(picked.items(), names, strict=True)
    ]
    repeat = [f"repeat {proposal.repeat}"] if proposal.repeat else []
    return " ".join([proposal.key, *words, *repeat])[:LONGEST_NAME]


def trial_params(proposal: Proposal) -> dict[str, Any]:
    """Every field of the spec by its path, and how what was picked by a rule was written.

    A trial without training has no adapter, optimiser or data: their defaults would read as if it had.
    """
    spec = proposal.spec
    sections = ("model", "evaluate") if spec.train is None else tuple(TrialSpec.model_fields)
    params = {path: field_value(spec, path) for path in FIELDS if path.partition(".")[0] in sections}
    if spec.train is None:
        params["train"] = None
    else:
        params["lora.alpha_over_r"] = spec.lora.alpha_over_r
    return params | {f"{path}_rule": written for path, written in proposal.rules.items()}


def _params(values: Mapping[str, Any]) -> list[Param]:
    return [Param(name, _text(value)[:LONGEST_PARAM]) for name, value in values.items()]


def _text(value: Any) -> str:
    """As one would write it in a sweep file: 16 for 16.0, none, true, [a, b]."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_text(one) for one in value)}]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def _metrics(values: Mapping[str, float], step: int) -> list[Metric]:
    now = int(time.time() * 1000)
    return [Metric(_NOT_IN_A_METRIC.sub("_", name), value, now, step) for name, value in values.items()]


def _result_tags(result: TrialResult) -> list[RunTag]:
    """The failure's class, and as the run's description what one should know before comparing it."""
    lines = [f"- {note}" for note in result.notes]
    tags: dict[str, str] = {}
    if result.failure is not None:
        tags["failure"] = result.failure.kind
        lines.insert(0, f"**{result.failure.kind}**: {result.failure.message}\n")
    if lines:
        tags["mlflow.note.content"] = "\n".join(lines)
    return [RunTag(name, text) for name, text in _cut_tags(tags).items()]


def _cut_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: text[:LONGEST_TAG] for name, text in tags.items()}


def _dataset(data: DataSpec, digest: str) -> Dataset:
    if data.path is not None:
        return Dataset(Path(data.path).name, digest, "local", json.dumps({"uri": data.path}))
    source = {"path": data.id, "split": data.split}
    return Dataset(str(data.id), digest, "hf", json.dumps(source))
