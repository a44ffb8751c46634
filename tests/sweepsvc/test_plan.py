"""How many trials a sweep runs, whatever its space is like."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep_text
from sweepsvc import plan as planning

HEAD = "name: demo\ntrial: {evaluate: {tasks: [blimp_causative]}}\nsearch:\n"


def sweep(search: str, tmp_path: Path) -> Sweep:
    return load_sweep_text(HEAD + search, "demo.yaml", (), tmp_path)


@pytest.fixture(autouse=True)
def _without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.trial.estimate.trainable_params", lambda spec: spec.lora.r)


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
