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
import math
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for each trial
# A server that is down is noticed at once, one that hangs within a minute, not in 4 and in 16 minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    InputTag,
    LifecycleStage,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.uri import add_databricks_profile_info_to_artifact_uri
from sqlalchemy.exc import SQLAlchemyError

from sweeps.errors import CannotStart
from sweeps.result import TrialResult
from sweeps.space import field_value
from sweeps.spec import FIELDS, DataSpec, TrialSpec
from sweeps.sweep import Sweep
from sweeps.trial.paths import TrialFolder
from sweepsvc import database
from sweepsvc.protocols import (
    History,
    Point,
    Proposal,
    Report,
    RunHistory,
    SweepState,
    TrialRecord,
    TrialState,
)
from sweepsvc.urls import masked, sqlite_file

T = TypeVar("T")

LONGEST_PARAM, LONGEST_TAG, LONGEST_NAME = 6000, 8000, 250
"""Characters that MLflow holds; we cut, as it would, but without its warnings."""

METRICS_IN_A_REQUEST = 1000
"""As many as MLflow takes."""

_RUN_STATUS: Mapping[TrialState | SweepState, str] = {
    "running": "RUNNING",
    "waiting": "KILLED",  # it ran, and is to run again
    "completed": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_NOT_IN_A_METRIC = re.compile(r"[^\w/.:\- ]")
_STUDY_TAGS = ("mlflow.parentRunId", "attempts")  # unlike the commit, which a resumed sweep has several of
_RESULT_TAGS = ("failure", "mlflow.note.content")
# The second is for an id that is not of MLflow's form.
_NO_SUCH_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
TRACEBACK = "traceback.txt"
EXPORTS = "exported"
LONGEST_DESCRIPTION = 5000


class MlflowRecorder:
    """The tracker over MLflow; see `protocols.Recorder`.

    `tracking_uri` is an SQLite address, made if it is not there, or a server's. Artifacts go below
    `artifact_root`, or where the server keeps its own. Raises MLflow's errors, but for `open`.

    A run is found again by its tags: a sweep's by `sweep_id` and `role: sweep`, a trial's by `sweep_id` and
    `trial`. Tags are made in one request with the run, so no crash leaves one that cannot be found.
    """

    def __init__(
        self, sweep: Sweep, sweep_id: str, tracking_uri: str, artifact_root: Path, facts: Mapping[str, str]
    ) -> None:
        self._sweep = sweep
        self._sweep_id = sweep_id
        self._uri = tracking_uri
        self._artifact_root = artifact_root
        self._facts = {name: masked(fact) for name, fact in facts.items()}
        self._parent: str | None = None
        self._is_open = False
        self._new: dict[str, str] = {}  # where the artifacts go of runs made here, with no end recorded

    def open(self) -> None:
        """Open the sweep's parent run, or the one it has again; `CannotStart` if the store cannot be used."""
        self._reach(self._open)

    def attach(self) -> None:
        """As `open`, but the sweep's run keeps its status; one that is made now is running until `close`."""
        self._reach(self._attach)

    def _open(self) -> None:
        self._attach()
        if not self._is_open:
            self._client.update_run(self._parent, status="RUNNING")
        self._is_open = True

    def _attach(self) -> None:
        if self._parent is None:
            self._client = _connect(self._uri)
            self._experiment_id = self._experiment()
            self._parent = self._parent_run()

    def _reach(self, call: Callable[[], T]) -> T:
        with _reaching(self._uri):
            return call()

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

    def _parent_run(self) -> str:
        search = self._sweep.search
        found = self._search("tags.role = 'sweep'", at_most=1)
        run = found[0] if found else self._make_parent()
        params = {
            "file_digest": self._sweep.file_digest,
            "objective.metric": self._sweep.objective.metric,
            "objective.maximize": self._sweep.objective.maximize,
            "search.sampler": search.sampler,
            "search.trials": search.trials,
            "search.repeats": search.repeats,
            "search.seed": search.seed,
        }
        self._add_params(run, params)
        if not self._client.list_artifacts(run.info.run_id):
            self._client.log_text(run.info.run_id, self._sweep.text, "sweep.yaml")
        return str(run.info.run_id)

    def _make_parent(self) -> Run:
        tags = {**_cut_tags(self._facts), **self._tags(), "role": "sweep"}
        return self._client.create_run(self._experiment_id, run_name=self._sweep_id, tags=tags)

    def _add_params(self, run: Run, values: Mapping[str, Any]) -> bool:
        """Record those that the run has not: they are write-once, and a later version may word them anew."""
        missing = {name: value for name, value in values.items() if name not in run.data.params}
        if missing:
            self._client.log_batch(run.info.run_id, params=_params(missing))
        return bool(missing)

    def _search(self, condition: str = "", at_most: int | None = None) -> list[Run]:
        """The sweep's runs under `condition`, the oldest first."""
        ours = f"tags.sweep_id = '{self._sweep_id}'"
        condition = f"{ours} and {condition}" if condition else ours
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                condition,
                max_results=at_most or 1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token or at_most:
                return runs

    def _tags(self) -> dict[str, str]:
        commit = self._facts.get("git_commit", "")
        return {
            "sweep": self._sweep.name,
            "sweep_id": self._sweep_id,
            "git_commit": commit,
            "mlflow.source.git.commit": commit,
            "mlflow.source.name": Path(self._sweep.source).name,
        }

    def keep(self, files: Sequence[Path], name: str) -> None:
        """Copy `files` to the sweep's run, as its artifacts below `name`.

        Makes neither a store nor a run. Raises `CannotStart` where the store cannot be used or has no run.
        """
        self._reach(lambda: self._keep(files, name))

    def _keep(self, files: Sequence[Path], name: str) -> None:
        file = sqlite_file(self._uri)
        absent = CannotStart(f"the sweep must have a run in {masked(self._uri)}, got none; `sync` makes one")
        if file is not None and not file.exists():
            raise absent
        self._client = _connect(self._uri)
        experiment = self._client.get_experiment_by_name(self._sweep.name)
        if experiment is None:
            raise absent
        self._experiment_id = str(experiment.experiment_id)
        found = self._search("tags.role = 'sweep'", at_most=1)
        if not found:
            raise absent
        for kept in files:
            self._client.log_artifact(found[0].info.run_id, str(kept), name)

    # --- a trial from its start to its end ----------------------------------------------------------

    def start(
        self,
        proposal: Proposal,
        run_id: str | None = None,
        *,
        attempt: int = 1,
        first: bool = False,
        at_ms: int | None = None,
    ) -> str:
        """Open the trial's run, or the one it has again; see `protocols.Recorder`."""
        run = _active_run(self._client, run_id) if run_id else None
        if run is None and not first:
            run = next(iter(self._search(f"tags.trial = '{proposal.key}'", at_most=1)), None)
        if run is None:
            run = self._client.create_run(
                self._experiment_id,
                start_time=at_ms,
                run_name=run_name(proposal),
                tags=self._trial_tags(proposal, attempt),
            )
            self._new[str(run.info.run_id)] = str(run.info.artifact_uri)
        else:
            self._reopen(run, attempt)
        self._add_params(run, trial_params(proposal))
        return str(run.info.run_id)

    def _reopen(self, run: Run, attempt: int) -> None:
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        if run.data.tags.get("attempts") != str(attempt):
            self._client.set_tag(run.info.run_id, "attempts", str(attempt))

    def _trial_tags(self, proposal: Proposal, attempt: int) -> dict[str, str]:
        assert self._parent is not None, "open comes before start"
        tags = {
            **self._tags(),
            "mlflow.parentRunId": self._parent,
            "trial": proposal.key,
            "attempts": str(attempt),
        }
        if proposal.is_baseline:
            tags["baseline"] = "true"
        if proposal.repeat:
            tags["repeat"] = str(proposal.repeat)
        return tags

    def report(self, run_id: str, reports: Sequence[Report]) -> None:
        """Record some reports. MLflow keeps one of two that are equal in time, step and value."""
        metrics = [metric for report in reports for metric in _report_metrics(report)]
        for begin in range(0, len(metrics), METRICS_IN_A_REQUEST):  # none at all while loading or evaluating
            self._client.log_batch(run_id, metrics=metrics[begin : begin + METRICS_IN_A_REQUEST])

    def end(
        self,
        run_id: str,
        proposal: Proposal,
        result: TrialResult,
        folder: Path,
        *,
        at_ms: int | None = None,
    ) -> None:
        """Record the final numbers and artifacts, and close the trial's run, whatever an earlier end said."""
        # To read a run is a third of what its end costs, and one that was made here holds no end yet.
        run = None if run_id in self._new else self._client.get_run(run_id)
        place = self._new.pop(run_id) if run is None else str(run.info.artifact_uri)
        tags = _result_tags(result)
        try:
            self._client.log_batch(
                run_id,
                metrics=self._final_metrics(run, result, at_ms or _now_ms()),
                tags=[RunTag(name, text) for name, text in tags.items()],
            )
            for name in _stale_tags(run, tags):
                self._client.delete_tag(run_id, name)
            self._log_data(run_id, proposal.spec, result)
            self._log_artifacts(run_id, place, TrialFolder(folder), result)
        finally:
            self._client.set_terminated(run_id, _RUN_STATUS[result.outcome], end_time=at_ms)

    def _final_metrics(self, run: Run | None, result: TrialResult, at_ms: int) -> list[Metric]:
        """The result's numbers, but for those that an earlier end has recorded; a new run has none."""
        held: Mapping[str, float] = run.data.metrics if run is not None else {}
        if run is None or "wall_seconds" not in held:  # it is in every result and in no report: the first end
            return _metrics(result.metrics(), result.steps, at_ms)
        # MLflow shows the number of the highest step, be it of an attempt that went further and failed.
        step = max(result.steps, *(self._last_step(run, name) for name in ("wall_seconds", *_LOSSES)))
        metrics = _metrics(result.metrics(), step, at_ms)
        return [one for one in metrics if one.key not in held or not _same(held[one.key], one.value)]

    def _last_step(self, run: Run, name: str) -> int:
        if name not in run.data.metrics:
            return 0
        return max(metric.step for metric in self._client.get_metric_history(run.info.run_id, name))

    def _log_data(self, run_id: str, spec: TrialSpec, result: TrialResult) -> None:
        if spec.train is not None and result.data_digest is not None:
            used = DatasetInput(
                _dataset(spec.data, result.data_digest), [InputTag("mlflow.data.context", "training")]
            )
            self._client.log_inputs(run_id, [used])

    def _log_artifacts(self, run_id: str, place: str, files: TrialFolder, result: TrialResult) -> None:
        # `MlflowClient.log_artifact` would read the run for its place.
        uri = add_databricks_profile_info_to_artifact_uri(place, self._uri)
        artifacts = get_artifact_repository(uri, tracking_uri=self._uri)
        for file in (files.spec, files.result, files.evaluation):
            if file.exists():
                artifacts.log_artifact(str(file))
        if files.adapter.is_dir():
            artifacts.log_artifacts(str(files.adapter), files.adapter.name)
        if result.failure is not None:
            self._client.log_text(run_id, result.failure.traceback, TRACEBACK)

    def close(self, state: SweepState) -> None:
        assert self._parent is not None, "open comes before close"
        if self._client.get_run(self._parent).info.status != _RUN_STATUS[state]:
            self._client.set_terminated(self._parent, _RUN_STATUS[state])
        self._is_open = False

    # --- to compare with the study, and to make whole ------------------------------------------------

    def open_runs(self) -> Mapping[str, str]:
        """The run of each trial of this sweep that MLflow calls running, by the trial's key.

        `CannotStart` if the store cannot be asked.
        """
        running = self._reach(lambda: self._search("attributes.status = 'RUNNING'"))
        return {run.data.tags["trial"]: str(run.info.run_id) for run in running if "trial" in run.data.tags}

    def runs(self) -> Mapping[str, Sequence[str]]:
        """The runs of the sweep's trials by their keys, the oldest of each first."""
        found: dict[str, list[str]] = {}
        for run in self._search():
            if "trial" in run.data.tags:
                found.setdefault(run.data.tags["trial"], []).append(str(run.info.run_id))
        return found

    def complete(self, run_id: str, trial: TrialRecord, history: History, folder: Path) -> bool:
        """Write what the run lacks of what is known of the trial; whether it lacked anything."""
        run = self._client.get_run(run_id)
        changes = [
            self._add_params(run, trial_params(trial.proposal)),
            self._add_tags(run, self._trial_tags(trial.proposal, trial.attempts)),
            self._add_reports(run, history.reports),
            self._add_end(run, trial, history, folder),
        ]
        return any(changes)

    def _add_tags(self, run: Run, tags: Mapping[str, str]) -> bool:
        """Record those that the run has not, and correct what the study knows better."""
        missing = {
            name: text
            for name, text in tags.items()
            if name not in run.data.tags or (name in _STUDY_TAGS and run.data.tags[name] != text)
        }
        if missing:
            wanted = [RunTag(name, text) for name, text in missing.items()]
            self._client.log_batch(run.info.run_id, tags=wanted)
        return bool(missing)

    def _add_reports(self, run: Run, reports: Sequence[Report]) -> bool:
        """Record the reports of which the run has no loss. Rates go with a loss, in the same request."""
        known = {
            (name, metric.step)
            for name in _LOSSES
            if name in run.data.metrics
            for metric in self._client.get_metric_history(run.info.run_id, name)
        }
        missing = [
            report
            for report in reports
            if any((metric.key, metric.step) not in known for metric in _losses(report))
        ]
        self.report(run.info.run_id, missing)
        return bool(missing)

    def _add_end(self, run: Run, trial: TrialRecord, history: History, folder: Path) -> bool:
        wrong_status = run.info.status != _status(trial)
        if trial.result is None:
            if wrong_status:
                self._client.set_terminated(run.info.run_id, _status(trial), end_time=history.ended_ms)
            return wrong_status
        complete = (
            _has_numbers(run, trial.result)
            and _has_tags(run, _result_tags(trial.result))
            and self._has_artifacts(run.info.run_id, TrialFolder(folder), trial.result)
        )
        if wrong_status or not complete:
            self.end(run.info.run_id, trial.proposal, trial.result, folder, at_ms=history.ended_ms)
        return wrong_status or not complete

    def _has_artifacts(self, run_id: str, files: TrialFolder, result: TrialResult) -> bool:
        wanted = {file.name: file for file in (files.spec, files.result, files.evaluation) if file.exists()}
        held = {entry.path: entry.file_size for entry in self._client.list_artifacts(run_id)}
        if files.adapter.is_dir():
            inside = self._client.list_artifacts(run_id, files.adapter.name)
            held |= {entry.path: entry.file_size for entry in inside}
            wanted |= {f"{files.adapter.name}/{file.name}": file for file in files.adapter.iterdir()}
        if result.failure is not None and TRACEBACK not in held:
            return False
        return all(held.get(name) == file.stat().st_size for name, file in wanted.items())

    def delete(self, run_id: str) -> None:
        """Take a run away that no trial has. MLflow keeps it among its deleted ones."""
        self._client.delete_run(run_id)


class MlflowReader:
    """The numbers in MLflow as they stand; see `protocols.Reader`.

    `tracking_uri` is an SQLite address, which is not made, or a server's.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri
        self._opened: MlflowClient | None = None

    def newest(self, run_id: str) -> Mapping[str, Point] | None:
        with _reaching(self._uri):
            run = _active_run(self._client(), run_id)
        if run is None:
            return None
        # Its public `metrics` have no steps.
        return {metric.key: _point(metric) for metric in run.data._metric_objs if metric.key in _READ}

    def history(self, run_id: str) -> RunHistory | None:
        with _reaching(self._uri):
            run = _active_run(self._client(), run_id)
            if run is None:
                return None
            names = [name for name in _READ if name in run.data.metrics]
            curves = {name: self._client().get_metric_history(run_id, name) for name in names}
        return RunHistory(
            run.info.start_time, {name: [_point(one) for one in curve] for name, curve in curves.items()}
        )

    def _client(self) -> MlflowClient:
        file = sqlite_file(self._uri)
        if file is not None and not file.exists():
            raise FileNotFoundError("there is no such file")
        if self._opened is None:
            self._opened = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        return self._opened


def _active_run(client: MlflowClient, run_id: str) -> Run | None:
    """None where there is no such run, or it was deleted."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in _NO_SUCH_RUN:
            return None
        raise
    return run if run.info.lifecycle_stage == LifecycleStage.ACTIVE else None


def _point(metric: Metric) -> Point:
    # MLflow keeps the greatest number for infinity.
    is_infinite = abs(metric.value) >= sys.float_info.max
    return Point(
        metric.step, metric.timestamp, math.copysign(math.inf, metric.value) if is_infinite else metric.value
    )


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


# --- the registry -----------------------------------------------------------------------------------


def check_registry(tracking_uri: str, run_id: str, name: str) -> None:
    """Raise `CannotStart` where `register_model` would, as far as that can be known before."""
    if not name.strip() or set(name) & set("/:") or name in (".", ".."):
        raise CannotStart(
            f"a registered model's name must be text without / and :, got {name!r}; give another"
        )
    with _reaching(tracking_uri):
        run = _connect(tracking_uri).get_run(run_id)
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        raise CannotStart(
            f"a model is registered with a run that is there, got {run_id}, deleted; restore it"
        )


def register_model(
    tracking_uri: str, run_id: str, folder: Path, name: str, description: str, tags: Mapping[str, str]
) -> str:
    """The files of `folder` as artifacts of the run, and those as a new version of the model `name`.

    The registered model is made if there is none of that name. Each version has files of its own
    (`exported/1/`, `exported/2/`, ... of the run), so that none changes later. The number of the version.
    """
    with _reaching(tracking_uri):
        client = _connect(tracking_uri)
        place = f"{EXPORTS}/{1 + len(client.list_artifacts(run_id, EXPORTS))}"
        client.log_artifacts(run_id, str(folder), place)
        # Somebody may have made it, now or long ago; if it could not be made, the version says why.
        with contextlib.suppress(MlflowException):
            client.create_registered_model(name)
        source = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{place}"
        version = client.create_model_version(
            name, source, run_id, tags=_cut_tags(tags), description=description[:LONGEST_DESCRIPTION]
        )
    return str(version.version)


# --- the store --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reaching(uri: str) -> Iterator[None]:
    """A store that does not answer, or refuses, is something that a person can mend."""
    try:
        yield
    except (MlflowException, OSError, sqlite3.Error, SQLAlchemyError) as error:
        reason = masked(str(error).strip().partition("\n")[0])
        raise CannotStart(
            f"the MLflow store must be reachable, got {masked(uri)}: {reason}; "
            "check --home and MLFLOW_TRACKING_URI"
        ) from error


def _connect(uri: str) -> MlflowClient:
    # It says at length that it makes its tables; that takes seconds, once for each home.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    file = sqlite_file(uri)
    if file is None:
        return database.make_on_a_server(lambda: MlflowClient(tracking_uri=uri, registry_uri=uri))
    with database.one_makes(file):
        # Once for the file: later connections, which are MLflow's, do the same.
        sqlite3.connect(file, **database.sqlite_options(for_writing=True)).close()
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


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
    return " ".join(" ".join([proposal.key, *words, *repeat]).split())[:LONGEST_NAME]  # a prompt has lines


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


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _metrics(values: Mapping[str, float], step: int, at_ms: int) -> list[Metric]:
    return [Metric(_metric_name(name), value, at_ms, step) for name, value in values.items()]


def _metric_name(name: str) -> str:
    return _NOT_IN_A_METRIC.sub("_", name)


_LOSSES = ("train.loss", "eval.loss")
_READ = (*_LOSSES, "lr", "tokens_per_second", "wall_seconds")
"""What a run has by step, and what each end adds."""


def _report_metrics(report: Report) -> list[Metric]:
    progress = report.progress
    named = {
        "train.loss": progress.train_loss,
        "eval.loss": progress.eval_loss,
        "lr": progress.lr,
        "tokens_per_second": progress.tokens_per_second,
    }
    measured = {name: value for name, value in named.items() if value is not None}
    return _metrics(measured, progress.step, report.at_ms)


def _losses(report: Report) -> list[Metric]:
    return [metric for metric in _report_metrics(report) if metric.key in _LOSSES]


def _result_tags(result: TrialResult) -> dict[str, str]:
    """The failure's class, and as the run's description what one should know before comparing it."""
    lines = [f"- {note}" for note in result.notes]
    tags: dict[str, str] = {}
    if result.failure is not None:
        tags["failure"] = result.failure.kind
        lines.insert(0, f"**{result.failure.kind}**: {result.failure.message}\n")
    if lines:
        tags["mlflow.note.content"] = "\n".join(lines)
    return _cut_tags(tags)


def _stale_tags(run: Run | None, tags: Mapping[str, str]) -> list[str]:
    """What an earlier attempt's result said, and this one's does not."""
    held = run.data.tags if run is not None else {}
    return [name for name in _RESULT_TAGS if name in held and name not in tags]


def _has_tags(run: Run, tags: Mapping[str, str]) -> bool:
    return all(run.data.tags.get(name) == tags.get(name) for name in _RESULT_TAGS)


def _has_numbers(run: Run, result: TrialResult) -> bool:
    held: Mapping[str, float] = run.data.metrics
    wanted = {_metric_name(name): value for name, value in result.metrics().items()}
    return all(name in held and _same(held[name], value) for name, value in wanted.items())


def _same(held: float, value: float) -> bool:
    """MLflow keeps NaN, and the greatest number for infinity."""
    if math.isnan(value):
        return math.isnan(held)
    greatest = sys.float_info.max
    return held == min(max(value, -greatest), greatest)


def _status(trial: TrialRecord) -> str:
    """A trial that is running in the study, and has no driver, was cut."""
    return _RUN_STATUS["interrupted" if trial.state == "running" else trial.state]


def _cut_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: text[:LONGEST_TAG] for name, text in tags.items()}


def _dataset(data: DataSpec, digest: str) -> Dataset:
    if data.path is not None:
        return Dataset(Path(data.path).name, digest, "local", json.dumps({"uri": data.path}))
    source = {"path": data.id, "split": data.split}
    return Dataset(str(data.id), digest, "hf", json.dumps(source))
