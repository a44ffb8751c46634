"""How many trials a sweep runs, whatever its space is like, and what they take in all."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sweeps.devices import Device
from sweeps.errors import OutOfMemory
from sweeps.spec import TrialSpec
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep_text
from sweeps.trial.calibration import Calibration, cpu_title
from sweeps.trial.memory import Memory
from sweeps.trial.predict import Prediction, predict
from sweepsvc import plan as planning
from sweepsvc.view import plan_lines, plan_table

HEAD = "name: demo\ntrial: {evaluate: {tasks: [blimp_causative]}}\nsearch:\n"


def sweep(search: str, tmp_path: Path) -> Sweep:
    return load_sweep_text(HEAD + search, "demo.yaml", (), tmp_path)


def foretold(
    spec: TrialSpec, device: Device | None, on_cpu: bool = False, calibration: Calibration | None = None
) -> Prediction:
    """An hour of training for each unit of rank, half an hour of evaluation, a GB for each unit of rank."""
    trains = spec.train is not None
    return Prediction(
        trainable_params=spec.lora.r if trains else 0,
        memory=Memory(base=4e9, activations=spec.lora.r * 1e9),
        least_gb=4.0 + spec.lora.r,
        token_budget=1024,
        fits=spec.lora.r < 16 if device else None,
        train_seconds=3600.0 * spec.lora.r if trains and device else None,
        eval_seconds=1800.0 if device else None,
        notes=("on a CPU",) if on_cpu else (),
    )


@pytest.fixture(autouse=True)
def _without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.trial.predict.predict", foretold)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_repeats_count_in_a_finite_space(tmp_path: Path) -> None:
    made = planning.plan(sweep("  {sampler: grid, repeats: 3, space: {lora.r: [4, 8]}}\n", tmp_path))
    assert (len(made.trials), made.runs) == (2, 6)


def test_repeats_count_in_a_space_without_an_end(tmp_path: Path) -> None:
    space = "{optimizer.lr: {low: 1e-5, high: 1e-3}}"
    made = planning.plan(sweep(f"  {{sampler: random, trials: 12, repeats: 3, space: {space}}}\n", tmp_path))
    assert (len(made.trials), made.runs) == (12, 36)


def test_a_very_large_grid_is_counted_and_listed_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MOST_LISTED", 20)
    space = "{lora.r: {low: 1, high: 10, step: 1}, lora.alpha: {low: 1, high: 8, step: 1}}"
    made = planning.plan(sweep(f"  {{sampler: grid, space: {space}}}\n", tmp_path))
    assert (len(made.trials), made.runs) == (20, 80)
    assert "the first 20 of up to 80" in made.note


GRID = "  {sampler: grid, space: {lora.r: [4, 8]}}\n"


def test_the_hours_are_those_of_every_run_and_every_baseline(tmp_path: Path) -> None:
    repeats = GRID.replace("grid,", "grid, repeats: 3,")
    made = planning.plan(sweep(repeats, tmp_path), "h100")
    assert made.gpu_hours == 3 * (4.5 + 8.5) + 0.5
    on_two = sweep(repeats + "resources: {gpus: 2}\n", tmp_path)
    assert planning.plan(on_two, "h100").gpu_hours == 2 * (3 * (4.5 + 8.5) + 0.5)


def test_the_hours_of_a_sampler_that_runs_some_trials_are_those_of_the_mean(tmp_path: Path) -> None:
    some = "  {sampler: random, trials: 1, space: {lora.r: [4, 8]}}\nbaseline: false\n"
    assert planning.plan(sweep(some, tmp_path), "h100").gpu_hours == 6.5


def test_trials_that_are_tried_first_are_listed_first_and_count_in_full(tmp_path: Path) -> None:
    head = (
        "  {sampler: random, trials: 2, space: {lora.r: [4, 8, 12]}, first: [{lora.r: 8}]}\nbaseline: false\n"
    )
    made = planning.plan(sweep(head, tmp_path), "h100")
    assert [(trial.resolved.spec.lora.r, trial.is_first) for trial in made.trials] == [
        (8, True),
        (4, False),
        (12, False),
    ]
    assert made.gpu_hours == 8.5 + (4.5 + 12.5) / 2
    assert "0 first" in shown(made)
    only = planning.plan(sweep(head.replace("trials: 2", "trials: 1"), tmp_path), "h100")
    assert only.gpu_hours == 8.5


def test_a_budget_is_kept_or_not_or_cannot_be_checked(tmp_path: Path) -> None:
    grid = sweep(GRID, tmp_path)
    assert planning.plan(grid, "h100", 13.5).within_budget is True
    assert planning.plan(grid, "h100", 13.4).within_budget is False
    unknown = planning.plan(grid, None, 13.4)
    assert unknown.within_budget is None
    assert "the budget of 13.4 GPU hours cannot be checked without times" in plan_lines(unknown)


@pytest.mark.parametrize(
    ("resources", "device", "note"),
    [
        ("{gpus: 1, accelerator: A100}", "a100-40gb", "resources.accelerator is A100"),
        ("{gpus: 1, accelerator: TPU-V4}", None, "resources.accelerator=TPU-V4 is not in the table"),
        ("{gpus: 1}", None, "no GPU is here; --device NAME"),
        ("{gpus: 0}", None, "on the CPU, no times; --device NAME"),
    ],
)
def test_the_device_is_the_sweeps_own_or_none(
    tmp_path: Path, resources: str, device: str | None, note: str
) -> None:
    made = planning.plan(sweep(GRID + f"resources: {resources}\n", tmp_path))
    assert (made.device.name if made.device else None) == device
    assert note in made.device_note
    assert made.notes == (["on a CPU"] if "CPU" in note else [])


def test_the_gpu_that_is_here_is_the_device_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for title, name in (("NVIDIA L4", "l4"), ("NVIDIA Nothing", None)):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda title=title: title)
        made = planning.plan(sweep(GRID, tmp_path))
        assert (made.device.name if made.device else None) == name


def shown(made: planning.Plan) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(made))
    return console.export_text()


def test_the_table_says_what_fits_and_for_how_long(tmp_path: Path) -> None:
    made = planning.plan(sweep(GRID.replace("8]", "32]"), tmp_path), "h100")
    text, lines = shown(made), plan_lines(made)
    assert "train h" in text
    assert "32.00" in text
    assert " no " in text
    assert made.unfit == [1]
    assert any(line.startswith("1 of 2 trials do not fit") for line in lines)
    assert "peak of trial 1: 36.00 GB = base 4.00 + activations 32.00" in lines


def test_the_table_has_no_hours_without_a_device(tmp_path: Path) -> None:
    assert "train h" not in shown(planning.plan(sweep(GRID, tmp_path)))


def test_the_json_has_the_stable_names(tmp_path: Path) -> None:
    told: Any = planning.plan_json(planning.plan(sweep(GRID, tmp_path), "h100", 20.0))
    assert told["trials"][0]["predicted"] == {
        "peak_memory_gb": 8.0,
        "memory_gb": {
            "base": 4.0,
            "adapters": 0,
            "gradients": 0,
            "optimizer": 0,
            "activations": 4.0,
            "logits": 0,
            "workspace": 0,
        },
        "least_memory_gb": 8.0,
        "token_budget": 1024,
        "train_seconds": 14400.0,
        "eval_seconds": 1800.0,
        "fits": True,
    }
    assert told["total"] == {
        "trials": 2,
        "baselines": 1,
        "hours": 13.5,
        "gpu_hours": 13.5,
        "budget_gpu_hours": 20.0,
        "within_budget": True,
    }


# --- what was measured ------------------------------------------------------------------------------

L4_SWEEP = GRID + "resources: {gpus: 1}\n"
CPU_SWEEP = GRID + "resources: {gpus: 0, cpus: 3}\n"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, str, int | None]]:
    """What was measured: rank, device and threads. An L4 is here; it takes twice the time and memory."""
    calls: list[tuple[int, str, int | None]] = []

    def calibrate(spec: TrialSpec, device: Device | None, threads: int | None = None) -> Calibration:
        calls.append((spec.lora.r, device.name if device else "cpu", threads))
        if device is None:
            return Calibration(
                device=cpu_title(threads or 0),
                measured_on="2026-11-25",
                eval_time_factor=0.5,
                operations_per_second=1e12,
            )
        return Calibration(
            device="NVIDIA L4",
            measured_on="2026-11-25",
            time_factor=2.0,
            eval_time_factor=3.0,
            memory_factor=2.0,
        )

    monkeypatch.setattr("sweeps.trial.predict.predict", predict)
    monkeypatch.setattr("sweeps.trial.calibrate.calibrate", calibrate)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setenv("SWEEPSVC_CACHE", str(tmp_path / "cache"))
    return calls


def test_a_calibration_corrects_times_memory_and_what_fits_and_is_kept_for_later_plans(
    tmp_path: Path, measured: list[Any]
) -> None:
    grid = sweep(L4_SWEEP, tmp_path)
    before = planning.plan(grid)
    assert before.calibration is None
    assert before.device_note.endswith("--calibrate measures a few steps here, and the plan goes by them")
    assert measured == []
    made = planning.plan(grid, calibrating=True)
    assert measured == [(8, "l4", None)]  # the largest
    for one, other in zip(before.trials, made.trials, strict=True):
        assert other.prediction.least_gb == pytest.approx(2 * one.prediction.least_gb)
        assert (one.prediction.fits, other.prediction.fits) == (True, False)
    note = (
        "times x2.00 in training and x3.00 in evaluation, memory x2.00: measured on NVIDIA L4 on 2026-11-25"
    )
    assert note in plan_lines(made)
    assert "--calibrate" not in made.device_note
    assert not any("half of its peak speed" in line for line in plan_lines(made))
    later = planning.plan(grid)
    assert len(measured) == 1
    assert planning.plan_json(later) == planning.plan_json(made)
    told: Any = planning.plan_json(later)["calibration"]
    assert (told["time_factor"], told["memory_factor"], told["measured_on"]) == (2.0, 2.0, "2026-11-25")


def test_another_model_or_device_is_not_corrected(tmp_path: Path, measured: list[Any]) -> None:
    planning.plan(sweep(L4_SWEEP, tmp_path), calibrating=True)
    other = sweep(L4_SWEEP.replace("lora.r: [4, 8]", "model.quantization: [nf4, none]"), tmp_path)
    made = planning.plan(other)
    assert [trial.calibration is None for trial in made.trials] == [False, True]
    assert made.calibration is None
    assert "half of its peak speed" in "\n".join(plan_lines(made))
    assert planning.plan_json(planning.plan(other, "a100-40gb"))["calibration"] is None


def test_each_model_of_a_sweep_is_measured_with_its_own_largest_trial(
    tmp_path: Path, measured: list[Any]
) -> None:
    space = "{model.id: [meta-llama/Llama-3.2-1B, meta-llama/Llama-2-7b-hf], lora.r: [4, 8]}"
    made = planning.plan(sweep(f"  {{sampler: grid, space: {space}}}\n", tmp_path), calibrating=True)
    assert [rank for rank, _, _ in measured] == [8, 8]
    assert made.calibration is not None


@pytest.mark.parametrize(
    ("device", "here", "why"),
    [
        ("h100", "NVIDIA L4", "not calibrated: the plan is for .*H100.*, and the GPU here is NVIDIA L4"),
        ("h100", None, "not calibrated: no GPU is here"),
        (None, "NVIDIA Nothing", "not calibrated: a device must be known whose times are corrected"),
    ],
)
def test_what_cannot_be_measured_here_is_said_and_the_plan_stays_uncorrected(
    tmp_path: Path,
    measured: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    device: str | None,
    here: str | None,
    why: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: here is not None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: here)
    made = planning.plan(sweep(GRID, tmp_path), device, calibrating=True)
    assert re.match(why, made.calibration_notes[0])
    assert made.calibration_notes[0] in plan_lines(made)
    assert planning.plan_json(made)["calibration"] is None
    assert measured == []


def test_trouble_in_measuring_leaves_the_plan_uncorrected(
    tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Calibration:
        raise OutOfMemory("the base must fit on cuda:0 to be measured, and did not")

    monkeypatch.setattr("sweeps.trial.calibrate.calibrate", full)
    grid = sweep(L4_SWEEP, tmp_path)
    made = planning.plan(grid, calibrating=True)
    why = "the base must fit on cuda:0 to be measured, and did not"
    assert made.calibration_notes == [f"not calibrated with meta-llama/Llama-2-7b-hf: {why}"]
    assert [trial.prediction for trial in made.trials] == [
        one.prediction for one in planning.plan(grid).trials
    ]
    too_large = sweep(L4_SWEEP.replace("lora.r: [4, 8]", "model.id: [meta-llama/Llama-2-70b-hf]"), tmp_path)
    assert "a trial must fit on the device" in planning.plan(too_large, calibrating=True).calibration_notes[0]
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache/calibrations.json").write_text("{")
    damaged = planning.plan(grid)
    assert "calibrations.json" in damaged.calibration_notes[0]
    assert damaged.calibration is None


def test_a_measured_cpu_has_minutes_and_no_gpu_hours(tmp_path: Path, measured: list[Any]) -> None:
    grid = sweep(CPU_SWEEP, tmp_path)
    assert planning.plan(grid).hours is None
    made = planning.plan(grid, calibrating=True)
    assert measured == [(8, "cpu", 3)]
    told: Any = planning.plan_json(made)
    operations = [one["predicted"]["train_seconds"] * 1e12 for one in told["trials"]]
    # 50,000 rows of 132 tokens in the mean, 4 operations for each of 6.6e9 weights, and some padding
    assert 1.74e17 < operations[0] < operations[1] < 2.3e17
    assert (told["calibration"]["time_factor"], told["calibration"]["memory_factor"]) == (None, None)
    assert made.device_note.startswith("on the CPU, as measured; --device NAME")
    assert told["total"]["gpu_hours"] is None
    assert told["total"]["hours"] == made.hours
    text = shown(made)
    assert "train min" in text
    assert "fits" not in text
    assert any(line.endswith("hours on the CPU in all, one trial at a time") for line in plan_lines(made))
