"""Where two sweep files mean the same, and where they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sweeps.errors import InvalidSweep
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep_text
from sweepsvc.meaning import as_it_is_now, differences

TEXT = """\
name: demo
trial:
  lora: {dropout: 0.1}
  optimizer: {lr: 3e-4}
search:
  sampler: random
  trials: 8
  space:
    lora.r: [4, 8]
    lora.alpha: ["2*r", 1]
    optimizer.weight_decay: {low: 0.0, high: 0.1}
  first: [{lora.r: 4, lora.alpha: 1, optimizer.weight_decay: 0.05}]
resources: {gpus: 1}
"""


def sweep_of(text: str, *overrides: str) -> Sweep:
    return load_sweep_text(text, "/sweeps/demo.yaml", overrides, "/sweeps")


LAUNCHED = sweep_of(TEXT)


def changed(old: str, new: str) -> list[str]:
    assert old in TEXT
    return differences(LAUNCHED, sweep_of(TEXT.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr: 3e-4", "lr: 1e-4", "trial.optimizer.lr: 0.0003 -> 0.0001"),
        ("{dropout: 0.1}", "{}", "trial.lora.dropout: 0.1 -> not set"),
        ("[4, 8]", "[4, 8, 16]", "search.space.lora.r: [4, 8] -> [4, 8, 16]"),
        ('["2*r", 1]', '["r", 1]', 'search.space.lora.alpha: ["2*r", 1] -> ["r", 1]'),
        ("trials: 8", "trials: 4", "search.trials: 8 -> 4"),
        ("sampler: random", "sampler: tpe", "search.sampler: random -> tpe"),
        ("high: 0.1}", "high: 0.2}", '"high": 0.1} -> {"low": 0.0, "high": 0.2}'),
        ("name: demo", "name: other", "name: demo -> other"),
    ],
)
def test_a_change_of_meaning_is_named_with_what_was_and_what_is(old: str, new: str, said: str) -> None:
    [line] = changed(old, new)
    assert said in line


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: demo", "# a comment\nname:   demo"),
        ("lr: 3e-4", "lr: 0.0003"),
        ("trials: 8", "trials: 80"),
        ("{gpus: 1}", "{gpus: 0, cpus: 2}\nfaults: {stop_after: 9}"),
    ],
    ids=["comments", "another spelling", "a larger budget", "resources and faults"],
)
def test_what_changes_no_trial_is_no_change_of_meaning(old: str, new: str) -> None:
    assert changed(old, new) == []


def test_the_file_as_it_is_now_is_read_with_the_overrides_of_the_launch(tmp_path: Path) -> None:
    file = tmp_path / "demo.yaml"
    file.write_text(TEXT)
    launched = load_sweep_text(TEXT, str(file), ("search.trials=3",), tmp_path)
    assert as_it_is_now(launched, tmp_path / "none") is launched
    file.write_text(TEXT.replace("[4, 8]", "[4]"))
    now = as_it_is_now(launched, tmp_path / "none")
    assert now.search.trials == 3
    assert differences(launched, now) == ["search.space.lora.r: [4, 8] -> [4]"]


def test_a_file_that_is_gone_changes_nothing_and_one_that_is_broken_says_why(tmp_path: Path) -> None:
    launched = replace(LAUNCHED, source=str(tmp_path / "gone.yaml"))
    assert as_it_is_now(launched, tmp_path / "none") is launched
    copy = tmp_path / "copy.yaml"
    copy.write_text("name: [")
    with pytest.raises(InvalidSweep):
        as_it_is_now(launched, copy)
