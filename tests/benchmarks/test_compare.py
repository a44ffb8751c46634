from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.compare import Run, check_same_work, faults, parts, ratios, say_found
from benchmarks.work import Found, Outcome, TrialRecord
from tests.tiny import save_tiny_model


def trial(number: int = 0, **values: Any) -> TrialRecord:
    """One of 2 + 5 + 3 seconds, that ended 11 seconds after the one before it."""
    known: dict[str, Any] = {
        "r": 8 + number,
        "rule": "2*r",
        "load_seconds": 2.0,
        "train_seconds": 5.0,
        "evaluate_seconds": 3.0,
        "ended": 100.0 + 11.0 * number,
        "tokens": 50,
    }
    return TrialRecord(**{**known, **values})


def run(side: compare.Side, *trials: TrialRecord, whole: float = 40.0, peak_gb: float = 1.0) -> Run:
    return Run(side, Outcome(trials=trials, whole_seconds=whole), peak_gb, processor_seconds=60.0)


def arguments(*given: str) -> list[str]:
    return faults(compare.parser().parse_args(["--part", "train", *given]))


def test_between_two_trials_is_what_is_none_of_their_parts() -> None:
    seconds = parts(run("ours", trial(0), trial(1), trial(2), whole=50.0).outcome)
    assert seconds == {"load": 2.0, "train": 5.0, "evaluate": 3.0, "between": 1.0, "around": 18.0}


def test_of_a_single_trial_nothing_is_known_between_trials() -> None:
    assert parts(run("ours", trial()).outcome)["between"] is None


def test_a_ratio_is_theirs_over_ours_round_by_round() -> None:
    rounds = [
        [run("plain", trial(train_seconds=10.0)), run("ours", trial(train_seconds=4.0))],
        [run("plain", trial(train_seconds=9.0)), run("ours", trial(train_seconds=3.0))],
    ]
    assert ratios(rounds, "train", "ours", "plain") == [2.5, 3.0]
    assert ratios(rounds, "between", "ours", "plain") == []
    assert ratios(rounds, "train", "ours", "tuned") == []


@pytest.mark.parametrize("what", ["tokens", "trainable", "rows"])
def test_sides_that_did_other_work_are_not_compared(what: str) -> None:
    with pytest.raises(RuntimeError, match=f"{what} must be equal, got plain"):
        check_same_work([run("plain", trial()), run("ours", trial(**{what: 51}))])


def test_sides_that_scored_other_benchmarks_are_not_compared() -> None:
    with pytest.raises(RuntimeError, match="benchmarks must be equal"):
        check_same_work([run("plain", trial(scores={"a": 1.0})), run("ours", trial(scores={"b": 1.0}))])


def test_the_fastest_batch_is_taken_and_what_was_tried_is_said() -> None:
    found = Found(train_seconds={4: 3.0, 8: 2.0, 16: 2.5})
    assert (found.batch, found.eval_batch) == (8, 8)
    assert say_found(found) == ["tuned: training in batches of 8 (4 in 3.0 s, 8 in 2.0 s, 16 in 2.5 s)"]


def test_every_fault_of_the_arguments_is_said_at_once(tmp_path: Path) -> None:
    found = arguments("--samples", "20", "--update", "12", "--trials", "99", "--rows", str(tmp_path / "no"))
    assert len(found) == 5
    assert arguments("--sides", "plain,fast") == [
        "--sides must be of plain, tuned, ours, ours-auto, got fast",
    ]
    assert arguments() == []


def test_a_process_and_its_children_are_seen() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        while len(family := compare.descendants(parent.pid)) < 2:
            assert parent.poll() is None
        assert family[0] == parent.pid
        assert compare.high_water_bytes(family[0]) > 1e6
        assert 0 < compare.processor_seconds(family[0]) < 60
    finally:
        parent.communicate(b"\n")
    assert (compare.high_water_bytes(parent.pid), compare.processor_seconds(parent.pid)) == (0, 0.0)


@pytest.mark.slow
def test_both_sides_do_the_same_sweep_and_its_figures_are_printed(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", tied=True)
    out = tmp_path / "figures.json"
    command = [
        *(sys.executable, "-m", "benchmarks.compare", "--part", "sweep", "--trials", "2"),
        *("--model", str(model), "--samples", "16", "--update", "8", "--documents", "2"),
        *("--tasks", "blimp_causative,arithmetic_2ds", "--sides", "tuned,ours"),
        *("--tuned-batch", "8", "--tuned-eval-batch", "8", "--json", str(out)),
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(out.read_text())
    tuned, ours = kept["rounds"][0]
    assert (tuned["side"], ours["side"]) == ("tuned", "ours")
    for side in (tuned, ours):
        assert all(side[part] > 0 for part in ("load", "train", "evaluate", "whole", "processor", "peak"))
        assert side["between"] is not None
        trials = side["outcome"]["trials"]
        assert [(one["rows"], len(one["scores"])) for one in trials] == [(16, 2), (16, 2)]
        assert all(abs(one["train_loss"] - kept["base_held_out_loss"]) < 0.5 for one in trials)
    for theirs, mine in zip(kept["held_out_losses"]["tuned"], kept["held_out_losses"]["ours"], strict=True):
        assert mine == pytest.approx(theirs, abs=0.02)
    assert "| whole, s" in done.stdout
    assert "ours / tuned" in done.stdout
