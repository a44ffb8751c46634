"""The commands: what they print, how they exit, what they leave alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.result import Failure, Measured, Score, TrialResult
from sweeps.sweepfile import load_sweep_text
from sweepsvc import cli
from sweepsvc.facts import gather
from sweepsvc.home import Home
from sweepsvc.study import OptunaStudy, open_study

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "ray",
    "optuna",
    "mlflow",
    "lm_eval",
    "pandas",
    "numpy",
    "sqlalchemy",
}

SWEEP = """\
name: demo
trial: {evaluate: {tasks: [blimp_causative]}}
search:
  sampler: grid
  space:
    lora.r: [8, 256]
    lora.alpha: ["2*r", 1]
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SWEEPSVC_HOME", "SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sweepsvc", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def open_demo(sweep_id: str) -> OptunaStudy:
    sweep = load_sweep_text(SWEEP, str(Path("demo.yaml").absolute()), (), Path.cwd())
    return open_study(sweep, sweep_id, Home().study_url, gather(Path(sweep.source)))


def scored(value: float) -> TrialResult:
    measured = Measured(peak_memory_gb=1.5, wall_seconds=10, train_seconds=8, eval_seconds=2)
    return TrialResult(
        outcome="completed", scores={"blimp_causative": Score(value=value, stderr=0.1)}, measured=measured
    )


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['sweepsvc', '--help']\n"
        "from sweepsvc.cli import main\n"
        "try: main()\n"
        f"finally: print(sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "launch" in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("command", ["launch", "plan"])
def test_law_l7_a_bad_file_starts_nothing_and_says_everything(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.yaml").write_text(
        "name: demo\nsearch:\n  sampler: grid\n  space: {lora.rank: [8]}\ntrail: {}\n"
    )
    assert run(monkeypatch, command, "bad.yaml") == 2
    told = capsys.readouterr().err
    assert "bad.yaml:4:" in told
    assert "bad.yaml:5:" in told
    assert "lora.r" in told
    assert "2 faults; nothing was started" in told
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["bad.yaml"]


def test_a_file_that_is_not_there_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "launch", "none.yaml") == 2
    assert "none.yaml" in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_an_unknown_command_or_option_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "lunch") == 2
    assert run(monkeypatch, "status", "--jason") == 2


@pytest.mark.slow
def test_more_gpus_than_there_are_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("demo.yaml").write_text(SWEEP)
    assert run(monkeypatch, "launch", "demo.yaml", "--set", "resources.gpus=64") == 2
    assert "resources.gpus" in capsys.readouterr().err
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["demo.yaml"]


def test_plan_counts_parameters_without_weights_or_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", str(ROOT / "search_spaces/rank_alpha.yaml"), "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    counts = {trial["params"]["lora.r"]: trial["trainable_params"] for trial in plan["trials"]}
    assert (counts[8], counts[16], counts[256]) == (20_277_248, 40_554_496, 648_871_936)
    assert set(plan["trials"][0]) == {"number", "params", "trainable_params", "predicted"}
    assert set(plan["trials"][0]["predicted"]) >= {"peak_memory_gb", "train_seconds", "fits"}
    assert plan["device"] == "a100-40gb"  # resources.accelerator
    assert all(trial["predicted"]["fits"] for trial in plan["trials"])
    assert plan["total"]["gpu_hours"] > 5
    assert plan["sweep"] == "rank_alpha"
    assert plan["total"]["trials"] == 24
    assert {"lora.r": 256, "lora.alpha": 512.0, "lora.alpha_rule": "2*r"} in [
        trial["params"] for trial in plan["trials"]
    ]


def test_plan_lists_each_distinct_trial_once_and_takes_overrides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("demo.yaml").write_text(SWEEP)
    assert (
        run(monkeypatch, "plan", "demo.yaml", "--json", "--set", 'search.space.lora.alpha=["2*r", 16]') == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert [trial["params"]["lora.alpha"] for trial in plan["trials"]] == [16.0, 512.0, 16.0]
    assert plan["total"].items() >= {"trials": 3, "baselines": 1, "gpu_hours": None}.items()
    assert plan["trials"][0]["predicted"]["fits"] is None
    assert plan["trials"][0]["predicted"]["peak_memory_gb"] > 4
    assert not Path("runs").exists()


def test_plan_tells_hours_on_a_named_device_and_holds_them_against_a_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("demo.yaml").write_text(SWEEP)
    assert run(monkeypatch, "plan", "demo.yaml", "--device", "rtx4090", "--budget", "1", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    hours = plan["total"]["gpu_hours"]
    assert hours > 1
    assert plan["total"]["budget_gpu_hours"] == 1
    assert plan["total"]["within_budget"] is False
    assert run(monkeypatch, "plan", "demo.yaml", "--device", "rtx4090", "--budget", "1") == 0
    told = capsys.readouterr().out
    assert f"{hours:.1f} GPU hours in all, OVER the budget of 1" in told
    assert "on NVIDIA GeForce RTX 4090" in told


def test_an_unknown_device_is_bad_input_with_the_names_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("demo.yaml").write_text(SWEEP)
    assert run(monkeypatch, "plan", "demo.yaml", "--device", "a100") == 2
    assert "a100-40gb, a100-80gb" in capsys.readouterr().err


def test_plan_shows_examples_of_a_space_without_an_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SWEEP.replace("sampler: grid", "sampler: random\n  trials: 5").replace("[8, 256]", "[8]")
    Path("demo.yaml").write_text(text + "    optimizer.lr: {low: 1e-5, high: 1e-3, log: true}\n")
    assert run(monkeypatch, "plan", "demo.yaml", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert "examples" in plan["note"]
    assert len({trial["params"]["optimizer.lr"] for trial in plan["trials"]}) == 5
    assert run(monkeypatch, "plan", "demo.yaml") == 0
    assert "20,277,248" in capsys.readouterr().out


def test_status_shows_the_newest_sweep_or_the_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_demo("demo-1")
    proposal = first.ask()
    assert proposal is not None
    first.started(proposal)
    first.tracked(proposal.key, "run-0")
    first.tell(proposal, scored(0.75))
    first.close("completed")
    second = open_demo("demo-2")
    failing = second.ask()
    assert failing is not None
    second.started(failing)
    second.tell(failing, TrialResult(outcome="failed", failure=Failure(kind="diverged", message="too fast")))
    second.close("failed")

    assert run(monkeypatch, "status", "--json") == 0
    newest = json.loads(capsys.readouterr().out)
    assert (newest["sweep"], newest["state"]) == ("demo-2", "failed")
    assert newest["trials"][0]["error"] == "diverged: too fast"
    assert run(monkeypatch, "status", "demo-1", "--json") == 0
    named = json.loads(capsys.readouterr().out)
    assert (
        named["trials"][0] | {"score": 0.75, "peak_memory_gb": 1.5, "mlflow_run_id": "run-0"}
        == named["trials"][0]
    )
    assert run(monkeypatch, "status", "demo-1") == 0
    assert "0.750 ± 0.100" in capsys.readouterr().out


def test_export_reads_the_study_and_looks_for_the_trials_files_in_the_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = open_demo("demo-1")
    for result in (scored(0.5), scored(0.75)):
        proposal = study.ask()
        assert proposal is not None
        study.started(proposal)
        study.tell(proposal, result)
    assert run(monkeypatch, "export", "demo", "--best", "-o", "out") == 2
    told = capsys.readouterr().err
    assert f"must hold the adapter that it ended with, got {Path('runs/demo-1/trials/1').absolute()}" in told
    assert run(monkeypatch, "export", "demo", "--trial", "2", "-o", "out") == 2
    assert "--trial must name a trial of demo-1 (0 to 1), got 2" in capsys.readouterr().err
    assert run(monkeypatch, "export", "nope", "--best", "-o", "out") == 2
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["runs"]


def test_a_sweep_whose_driver_is_gone_is_shown_as_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = open_demo("demo-1")
    running = study.ask()
    assert running is not None
    study.started(running)
    assert run(monkeypatch, "status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["trials"][0]["state"] == "running"
    monkeypatch.setattr("sweepsvc.owner.lives", lambda owner, heartbeat: False)
    assert run(monkeypatch, "status", "--json") == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["state"], seen["trials"][0]["state"]) == ("interrupted", "interrupted")


@pytest.mark.slow
def test_a_tracker_that_cannot_be_used_leaves_no_sweep_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("demo.yaml").write_text(SWEEP + "resources: {gpus: 0}\n")
    Path("file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/file/mlflow.db")
    assert run(monkeypatch, "launch", "demo.yaml", "--id", "demo-1") == 2
    assert "the MLflow store must be reachable" in capsys.readouterr().err
    assert run(monkeypatch, "status") == 2
    assert not Path("runs/demo-1").exists()


def test_an_unknown_sweep_is_bad_input_and_looking_makes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "status", "nope") == 2
    assert capsys.readouterr().err
    assert run(monkeypatch, "status") == 2
    assert run(monkeypatch, "ui") == 2
    assert not list(Path.cwd().iterdir())


def test_ui_serves_the_store_of_the_home_on_loopback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs").mkdir()
    Path("runs/mlflow.db").touch()
    started: list[list[str]] = []

    def instead(program: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", instead)
    assert run(monkeypatch, "ui", "--port", "5123") == 0
    assert "http://127.0.0.1:5123" in capsys.readouterr().out
    command = " ".join(started[0])
    assert f"sqlite:///{Path.cwd()}/runs/mlflow.db" in command
    assert "--host 127.0.0.1 --port 5123" in command
