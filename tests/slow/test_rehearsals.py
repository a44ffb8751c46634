"""Every file of search_spaces/ is rehearsed; and what only a real trial can find is found."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.errors import CannotStart
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep
from sweeps.trial.run import TrialRunner
from sweeps.trial.tasks import task_names
from sweepsvc import rehearse, session
from sweepsvc.home import Home, SweepFolder
from sweepsvc.plain import PlainRecorder, SerialScheduler
from tests.tiny import save_task

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "search_spaces").glob("*.yaml"))
WHOLE = "06_layers.yaml"
"""Rehearsed as a person would, through Ray; the others in this process, which keeps its libraries."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name in ("SWEEPSVC_HOME", "SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return Home(tmp_path / "home")


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def scheduler(sweep: Sweep, folder: SweepFolder, joined: session.Joined) -> Iterator[SerialScheduler]:
        yield SerialScheduler(TrialRunner())

    monkeypatch.setattr(session, "_scheduler", scheduler)
    monkeypatch.setattr(session, "MlflowRecorder", lambda sweep, sweep_id, *_: PlainRecorder(sweep_id))
    monkeypatch.setattr(rehearse, "MOST_TRIALS", 10)


def test_there_is_a_file_for_each_experiment_of_the_article() -> None:
    numbered = {int(path.name[:2]) for path in FILES if path.name[:2].isdigit()}
    assert numbered == set(range(1, 12))
    assert WHOLE in {path.name for path in FILES}


@pytest.mark.usefixtures("_in_this_process")
@pytest.mark.parametrize("file", [path for path in FILES if path.name != WHOLE], ids=lambda path: path.stem)
def test_every_search_space_is_rehearsed(file: Path, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = load_sweep(file, (), task_names)
    record = session.rehearse(sweep, home, "rehearsed")
    assert record.state == "completed"
    assert all(trial.result and trial.result.steps in (0, 2) for trial in record.trials)
    scored = [trial.result for trial in (*record.baselines, *record.trials) if trial.result]
    assert all(len(result.scores) == len(sweep.template["evaluate.tasks"]) for result in scored)
    assert capsys.readouterr().out.rstrip().endswith("trials, all fine") or len(record.trials) == 1


def test_one_is_rehearsed_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sweepsvc", "launch", f"search_spaces/{WHOLE}", "--rehearse"]
    environment = {**os.environ, "SWEEPSVC_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "trial (lora.targets=qv): fine" in done.stdout
    assert done.stdout.rstrip().endswith("rehearsed: 2 trials, all fine")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["rehearsals"]


@pytest.mark.usefixtures("_in_this_process")
def test_a_broken_task_of_ones_own_is_found(tmp_path: Path, home: Home) -> None:
    save_task(tmp_path)
    (tmp_path / "rivers.jsonl").unlink()
    file = tmp_path / "demo.yaml"
    file.write_text("name: demo\ntrial: {evaluate: {tasks: [rivers], task_dir: .}}\nbaseline: false\n")
    with pytest.raises(CannotStart) as raised:
        session.rehearse(load_sweep(file, (), task_names), home, "demo")
    assert str(raised.value).startswith("the trial: evaluation_failed: the benchmark rivers must load")
