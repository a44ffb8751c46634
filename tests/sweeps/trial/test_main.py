"""One trial without the service: signals in each phase, real processes, exit codes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sweeps.result import Progress, TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial import __main__ as program
from sweeps.trial import finetune as loop
from sweeps.trial.lock import FolderLock
from sweeps.trial.paths import TrialFolder
from tests.tiny import save_task, tiny_spec

STEPS = 40

pytestmark = pytest.mark.slow  # real processes


@pytest.fixture(scope="module")
def spec(tiny_model_dir: Path, alpaca_rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TrialSpec:
    return tiny_spec(
        tiny_model_dir,
        alpaca_rows_file,
        **{"lora.dropout": 0.2, "train.batch_size": 1, "train.samples": STEPS, "train.eval_every": 0},
        **{
            "evaluate.tasks": ["rivers"],
            "evaluate.task_dir": str(save_task(tmp_path_factory.mktemp("tasks"))),
        },
    )


@pytest.fixture(scope="module")
def spec_file(spec: TrialSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spec") / "spec.json"
    file.write_text(spec.model_dump_json())
    return file


@pytest.fixture(autouse=True)
def _signals_are_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def uncut(spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncut")
    assert main(spec_file, folder) == 0
    return folder


def main(spec_file: Path, folder: Path, *more: str) -> int:
    return program.main([str(spec_file), str(folder), *more])


def result_of(folder: Path) -> TrialResult:
    result = TrialFolder(folder).read_result()
    assert result is not None
    return result


def assert_equal(folder: Path, expected: Path) -> None:
    mine, theirs = result_of(folder), result_of(expected)
    assert (mine.outcome, mine.train_loss, mine.scores) == ("completed", theirs.train_loss, theirs.scores)
    first, second = (load_file(place / "adapter/adapter_model.safetensors") for place in (folder, expected))
    assert all(torch.equal(first[name], second[name]) for name in second)


def signalled(monkeypatch: pytest.MonkeyPatch, at: str, times: int = 1) -> None:
    """The process gets SIGTERM as it is about to print the report that begins with `at`."""
    real = program._line

    def line(progress: Progress) -> str:
        text = real(progress)
        if text.startswith(at):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
        return text

    monkeypatch.setattr(program, "_line", line)


@pytest.mark.parametrize(
    ("phase", "steps"), [("loading", 0), ("training  step 3/", 3), ("evaluating", STEPS)]
)
def test_sigterm_in_any_phase_ends_it_with_exit_4_and_the_same_command_goes_on(
    spec_file: Path, uncut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, steps: int
) -> None:
    with monkeypatch.context() as patch:
        signalled(patch, phase)
        assert main(spec_file, tmp_path) == 4
    result = result_of(tmp_path)
    assert (result.outcome, result.steps, result.failure) == ("interrupted", steps, None)
    assert (tmp_path / f"checkpoints/step-{steps:08d}").exists() == (steps > 0)
    assert main(spec_file, tmp_path) == 0
    assert_equal(tmp_path, uncut)


def test_a_second_signal_ends_it_at_once(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(monkeypatch, "training  step 3/", times=2)
    real = loop.learning_rate

    def rate(step: int, spec: TrialSpec) -> float:
        assert step < 3
        return real(step, spec)

    monkeypatch.setattr(loop, "learning_rate", rate)
    assert main(spec_file, tmp_path) == 4
    assert result_of(tmp_path).outcome == "interrupted"


def test_from_scratch_forgets_what_is_there(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        signalled(patch, "training  step 30/")
        assert main(spec_file, tmp_path) == 4
        signalled(patch, "training  step 1/")
        assert main(spec_file, tmp_path, "--from-scratch", "--checkpoint-minutes", "0") == 4
    assert result_of(tmp_path).steps == 1
    with FolderLock(tmp_path / "lock") as other:
        other.take()
        assert main(spec_file, tmp_path, "--from-scratch") == 2
    assert "must not be in use" in capsys.readouterr().err
    assert result_of(tmp_path).steps == 1


def test_a_result_that_cannot_be_written_is_said(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TrialFolder, "write_spec", full)
    monkeypatch.setattr(TrialFolder, "write_result", full)
    assert main(spec_file, tmp_path) == 3
    assert "No space left on device" in capsys.readouterr().err


def test_a_completed_trial_is_only_shown_again(
    spec_file: Path, uncut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(spec_file, uncut) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "completed"
    assert not [line for line in lines if line.startswith("training")]


def test_minutes_are_not_negative(spec_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(spec_file, tmp_path, "--checkpoint-minutes", "-1")
    assert ended.value.code == 2


def test_law_l2_a_real_process_that_is_killed_in_mid_training_is_taken_up_by_the_next(
    spec_file: Path, uncut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "sweeps.trial", str(spec_file), str(tmp_path)]
    with subprocess.Popen(
        [*command, "--checkpoint-minutes", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("training  step 5/") for line in process.stdout)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert TrialFolder(tmp_path).read_result() is None
    kept = max(int(path.name.removeprefix("step-")) for path in tmp_path.glob("checkpoints/step-*"))
    assert 4 <= kept < STEPS

    trained = []
    real = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda step, spec: trained.append(step) or real(step, spec))
    assert main(spec_file, tmp_path) == 0
    assert trained == list(range(kept, STEPS))
    assert_equal(tmp_path, uncut)
