"""A cluster as a team has it: Postgres, an MLflow server with passwords, three Ray nodes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.cluster.rays import RayCluster
from tests.servers import ROOT, MlflowWithAuth, Postgres, plain_environment
from tests.tiny import save_task

SWEEP = """\
name: {name}
trial:
  model:     {{id: {model}, quantization: none, dtype: float32}}
  data:      {{path: {rows}, held_out: 0.25}}
  lora:      {{dropout: 0.1, targets: all}}
  optimizer: {{lr: 2e-2}}
  schedule:  {{warmup_steps: 2}}
  train:     {{batch_size: 2, samples: {samples}, token_budget: 1024, log_every: 1}}
  evaluate:  {{tasks: [rivers], task_dir: {tasks}}}
search:
  sampler: grid
  trials: {trials}
  space:
    lora.r: [2, 4, 8]
    lora.alpha: ["2*r", 1]
baseline: true
resources: {{gpus: 0, cpus: 1{resources}}}
faults: {{checkpoint_minutes: 0}}
"""


class Team:
    """The servers, the nodes, a folder that all of them share, and a person's machine that has none of it."""

    def __init__(self, postgres: Postgres, mlflow: MlflowWithAuth, shared: Path, laptop: Path) -> None:
        self.postgres, self.mlflow = postgres, mlflow
        self.home = shared / "runs"
        self.laptop = laptop
        self.stores = {"SWEEPSVC_STUDY_URL": postgres.study_url, **mlflow.client_environment}
        self.rays = RayCluster(**self.stores, SWEEPSVC_HOME=str(self.home))

    def checkpoints(self, sweep_id: str) -> set[str]:
        """The trials that have one."""
        trials = self.home / sweep_id / "trials"
        return {path.parents[1].name for path in trials.glob("*/checkpoints/step-*")}

    def run(self, *words: str, more: Mapping[str, str] | None = None, seconds: float = 420) -> Said:
        """A command of ours as a person types it on the laptop."""
        command = self.start(*words, more=more)
        return command.wait(seconds)

    def start(self, *words: str, more: Mapping[str, str] | None = None) -> Command:
        environment = plain_environment(**{**self.stores, **self.rays.access, **(more or {})})
        return Command(words, environment, self.laptop)


class Said(str):
    """What a command printed, and the code that it ended with."""

    code: int


class Command:
    """One command of ours that runs."""

    def __init__(self, words: tuple[str, ...], environment: Mapping[str, str], folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sweepsvc", *words],
            env={**environment, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            self._lines.extend(lines)

    @property
    def text(self) -> str:
        return "".join(self._lines)

    def wait_for(self, words: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert self._process.poll() is None, f"ended before {words!r}: {self.text}"
            assert time.monotonic() < deadline, f"waited {seconds} s for {words!r}: {self.text}"
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 420) -> Said:
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"waited {seconds} s for its end: {self.text}") from None
        self._reader.join(10)
        said = Said(self.text)
        said.code = code
        return said


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with Postgres() as postgres, MlflowWithAuth(postgres) as mlflow:
        team = Team(postgres, mlflow, tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("laptop"))
        with team.rays:
            yield team


@pytest.fixture(scope="module")
def write_sweep(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, alpaca_rows_file: Path
) -> WriteSweep:
    return WriteSweep(tmp_path_factory.mktemp("tasks"), tiny_model_dir, alpaca_rows_file)


class WriteSweep:
    """Sweep files whose model, rows and benchmark lie where every node sees them."""

    def __init__(self, tasks: Path, model: Path, rows: Path) -> None:
        self._places = {"tasks": save_task(tasks), "model": model, "rows": rows}

    def __call__(self, team: Team, name: str, *, steps: int, trials: int = 6, resources: str = "") -> Path:
        file = team.laptop / f"{name}.yaml"
        text = SWEEP.format(name=name, samples=2 * steps, trials=trials, resources=resources, **self._places)
        file.write_text(text, encoding="utf-8")
        return file
