from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train_gpu
from benchmarks.train_gpu import Measurement, best_that_fits, faults, make_rows, operations, report

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def arguments(*given: str) -> list[str]:
    return faults(train_gpu.parser().parse_args(given), CPU)


def test_operations_are_those_of_the_plan() -> None:
    # forward and the input's gradient of a frozen weight, and its own gradient of a trained one
    assert operations(10, frozen=100, trainable=1) == 10 * (4 * 100 + 6)


def test_the_share_of_the_peak_is_blank_where_the_devices_peak_is_unknown() -> None:
    known = Measurement("x", seconds=2.0, rows=4, tokens=10, operations=1e12, peak_tflops=1.0)
    assert known.share_of_peak == 0.5
    assert (known.tokens_per_second, known.seconds_for(8)) == (5.0, 4.0)
    assert Measurement("x", seconds=2.0, rows=4, tokens=10, operations=1e12).share_of_peak is None
    assert Measurement("x", note="out of memory").seconds_for(8) is None


def test_rows_have_alpacas_lengths() -> None:
    lengths = sorted(map(len, make_rows(128, 512)))
    assert (lengths[0], lengths[-1]) == (42, 1304)
    assert statistics.median(lengths) == pytest.approx(110, abs=2)


def test_batches_are_tried_up_to_the_first_that_does_not_fit() -> None:
    def measure(size: int) -> Measurement:
        if size > 2:
            raise torch.OutOfMemoryError
        return Measurement(f"batch {size}", seconds=1.0, rows=1)

    said: list[str] = []
    done = best_that_fits(measure, [1, 2, 4, 8], said.append)
    assert [one.way for one in done] == ["batch 1", "batch 2", "HF Trainer, batch 4"]
    assert done[-1].seconds is None
    assert said[-1] == "HF Trainer, batch 4: out of memory"


def test_every_fault_of_the_arguments_is_said_at_once() -> None:
    found = arguments("--shape", "7b", "--rows", "12", "--ways", "ours,fast")
    assert found == [
        "--shape 7b needs CUDA, and none is visible; say --shape tiny",
        "--batches must divide --rows 12, got 8, 16, 32",
        "--ways must be of single, trainer, ours, got fast",
    ]


def test_an_extrapolation_is_called_one_and_what_failed_is_not_extrapolated() -> None:
    done = [Measurement("a", seconds=1.0, rows=8), Measurement("b", note="out of memory")]
    text = report(done, train_gpu.parser().parse_args(["--rows", "8"]))
    before, after = text.split("Extrapolated, not measured: 50,000 rows")
    assert "out of memory" in before
    assert "6250" in after
    assert "| b" not in after


_BARE = """
import importlib.machinery
finder, absent = importlib.machinery.PathFinder, {absent}
real = finder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in absent else real(name, path, target)
finder.find_spec = staticmethod(find_spec)
from benchmarks.train_gpu import main
main({arguments})
"""


@pytest.mark.slow
def test_it_measures_all_ways_without_the_libraries_of_the_service(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    absent = {
        "ray",
        "optuna",
        "mlflow",
        "lm_eval",
        "datasets",
        "rich",
        "pandas",
        "pyarrow",
        "sklearn",
        "gguf",
    }
    wanted = ["--shape", "tiny", "--rows", "8", "--batches", "4,8", "--json", str(out)]
    code = _BARE.format(absent=absent, arguments=wanted)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(out.read_text())["measurements"]
    assert [one["way"] for one in kept] == [
        "one row at a time",
        "HF Trainer, batch 4",
        "HF Trainer, batch 8",
        "ours",
    ]
    assert len({one["tokens"] for one in kept}) == 1
    assert len({one["operations"] for one in kept}) == 1
    # a random model of 512 tokens knows nothing, whoever trains it
    assert all(one["loss"] == pytest.approx(6.24, abs=0.1) for one in kept)
    assert all(one["share_of_peak"] is None for one in kept)
