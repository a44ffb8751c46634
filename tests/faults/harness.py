"""Real drivers over a tiny sweep, to be killed, stopped, starved; and what is left, to be compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
SWEEP_ID = "tiny-1"

SWEEP = """\
name: tiny
trial:
  model:     {{id: {model}, quantization: none, dtype: float32}}
  data:      {{path: {rows}, held_out: 0.25}}
  lora:      {{dropout: 0.1, targets: all}}
  optimizer: {{lr: 2e-2}}
  schedule:  {{warmup_steps: 2}}
  train:     {{batch_size: 2, samples: {samples}, token_budget: 1024, log_every: 1, eval_every: 5}}
  evaluate:  {{tasks: [rivers], task_dir: {tasks}}}
search:
  sampler: grid
  trials: {trials}
  space:
    lora.r: [2, 4]
    lora.alpha: ["2*r", 1]
baseline: true
resources: {{gpus: 0}}
faults: {{checkpoint_minutes: 0}}
"""

_TIMES = ("seconds", "peak_memory", "peak_host", "tokens_per_second")


class Place:
    """A home and a sweep file in a folder of their own."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        rows: Path,
        tasks: Path,
        *,
        steps: int = 20,
        trials: int = 4,
        tracking_uri: str = "",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.home = folder / "home"
        self.file = folder / "tiny.yaml"
        self.drivers: list[Driver] = []
        self.tracking_uri = tracking_uri
        text = SWEEP.format(samples=2 * steps, trials=trials, model=model, rows=rows, tasks=tasks)
        self.file.write_text(text, encoding="utf-8")

    @property
    def sweep(self) -> Path:
        return self.home / SWEEP_ID

    def trial(self, key: str) -> Path:
        return self.sweep / "trials" / key

    def has_begun(self) -> bool:
        """Whether there is a sweep to resume: a driver killed before that has started nothing."""
        return (self.home / "study.db").exists() and self.start("status", SWEEP_ID).wait() == 0

    def start(self, *arguments: str) -> Driver:
        driver = Driver(self, *arguments)
        self.drivers.append(driver)
        return driver

    def launch(self, *arguments: str) -> Driver:
        return self.start("launch", str(self.file), "--id", SWEEP_ID, *arguments)

    def resume(self, *arguments: str) -> Driver:
        return self.start("resume", SWEEP_ID, *arguments)

    def leave(self) -> None:
        """End every driver that a failed test has left."""
        for driver in self.drivers:
            if driver.is_running:
                driver.kill()

    def status(self) -> dict[str, Any]:
        driver = self.start("status", SWEEP_ID, "--json")
        assert driver.wait() == 0, driver.text
        status: dict[str, Any] = json.loads(driver.text)
        return status


class Driver:
    """One `python -m sweepsvc ...` in a process of its own."""

    def __init__(self, place: Place, *arguments: str) -> None:
        environment = {**os.environ, "SWEEPSVC_HOME": str(place.home), "PYTHONUNBUFFERED": "1"}
        for name in ("SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI"):
            environment.pop(name, None)
        if place.tracking_uri:
            environment["MLFLOW_TRACKING_URI"] = place.tracking_uri
        command = [sys.executable, "-m", "sweepsvc", *arguments]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=_read, args=(self._process.stdout, self.lines), daemon=True),
            threading.Thread(target=_read, args=(self._process.stderr, self.errors), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def text(self) -> str:
        return "".join(self.lines)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def said(self, words: str) -> bool:
        return any(words in line for line in list(self.lines))

    def wait_for_a_word(self) -> None:
        self.wait_for(lambda: bool(self.lines))

    def wait_for(self, happened: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait until `happened`, which must be before the driver ends."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.is_running, f"ended before: {self.everything}"
            assert time.monotonic() < end, f"too late: {self.everything}"
            time.sleep(0.002)

    def ends_within(self, seconds: float) -> bool:
        """Whether the driver ends by itself in that time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """`kill -9`, of the driver alone: what it started lives on for as long as it likes."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 240.0) -> int:
        code = self._process.wait(seconds)
        for reader in self._readers:
            reader.join(5)
        return code

    @property
    def everything(self) -> str:
        return "".join([*self.lines, *self.errors])


def _read(stream: Any, into: list[str]) -> None:
    with stream:
        into.extend(stream)


# --- what happens in a trial ------------------------------------------------------------------------


def worker_of(place: Place, key: str) -> int | None:
    """The process that runs the trial, if one does."""
    try:
        return int((place.trial(key) / "lock").read_text().strip().rpartition(":")[2])
    except (OSError, ValueError):
        return None


def reports(place: Place, key: str) -> list[list[tuple[str, int]]]:
    """The phase and step of every report that the driver heard of a trial, a list for each attempt."""
    attempts: list[list[tuple[str, int]]] = []
    file = place.trial(key) / "tracking" / "log.jsonl"
    if not file.exists():
        return []
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:  # the driver may be writing the last one
        entry = json.loads(line)
        if entry["what"] == "start":
            attempts.append([])
        elif entry["what"] == "report":
            progress = entry["progress"]
            attempts[-1].append((progress["phase"], progress.get("step", 0)))
    return attempts


def is_in(place: Place, key: str, phase: str, step: int = 0) -> Callable[[], bool]:
    """Whether the driver has heard of that phase and step, or a later one, in the trial's latest attempt."""

    def happened() -> bool:
        heard = reports(place, key)
        return bool(heard) and any(one == phase and at >= step for one, at in heard[-1])

    return happened


# --- what is left -----------------------------------------------------------------------------------


def ledger(place: Place) -> list[dict[str, Any]]:
    """What the study says of every trial, less its times and how often it was tried."""
    status = place.status()
    assert status["state"] == "completed"
    left_out = {
        "attempts",
        "mlflow_run_id",
        "peak_memory_gb",
        "wall_seconds",
        "train_seconds",
        "eval_seconds",
    }
    return [
        {name: value for name, value in trial.items() if name not in left_out}
        for trial in (*status["baselines"], *status["trials"])
    ]


def results(place: Place) -> dict[str, dict[str, Any]]:
    """The numbers of every trial's own result file."""
    found = {}
    for file in sorted(place.sweep.glob("trials/*/result.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        names = ("outcome", "scores", "train_loss", "eval_loss", "steps", "trainable_params", "data_digest")
        found[file.parent.name] = {name: result[name] for name in names}
    return found


def adapters(place: Place) -> dict[str, bytes]:
    """The weights of every trial."""
    files = place.sweep.glob("trials/*/adapter/adapter_model.safetensors")
    return {file.parent.parent.name: file.read_bytes() for file in files}


def tracked(place: Place) -> dict[str, dict[str, Any]]:
    """Every trial's run in MLflow by its key, less times; there must be one run for each, and one parent."""
    client = MlflowClient(tracking_uri=place.tracking_uri or f"sqlite:///{place.home}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED"]
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run in parents:
            continue
        key = run.data.tags["trial"]
        assert key not in found, f"two runs for trial {key}"
        history = client.get_metric_history(run.info.run_id, "train.loss") if key != "baseline" else []
        found[key] = {
            "status": run.info.status,
            "params": run.data.params,
            "metrics": _without_times(run.data.metrics),
            "curve": sorted({(point.step, point.value) for point in history}),
            "files": sorted(
                artifact.path
                for artifact in client.list_artifacts(run.info.run_id)
                if artifact.path != "traceback.txt"  # of an attempt that failed: MLflow deletes no artifact
            ),
        }
    return found


def _without_times(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not any(word in name for word in _TIMES)}


def same(place: Place, other: Place) -> None:
    """Assert that the two sweeps came to the same, bit for bit."""
    same_results(place, other)
    assert tracked(place) == tracked(other)


def same_results(place: Place, other: Place) -> None:
    """Assert that of what is the truth; MLflow is a copy of it."""
    assert ledger(place) == ledger(other)
    assert results(place) == results(other)
    assert adapters(place) == adapters(other)
