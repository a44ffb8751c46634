"""When a checkpoint is due, what it may cost, and how it appears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sweeps.errors import Interrupted
from sweeps.trial import checkpoint as checkpoints
from sweeps.trial.checkpoint import Checkpoints, Keeper
from sweeps.trial.finetune import Trained
from sweeps.trial.keeping import Keeping

TENSORS = {"adapter.w": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "step": torch.tensor(3.0)}


class Clock:
    """Time as the test wants it; `time.monotonic` for the keeper."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


class FakeTraining:
    """A training of a thousand steps with hardly any state."""

    def __init__(self) -> None:
        self.trained = Trained()
        self.is_done = False

    def state(self) -> Any:
        return {}, {}


class Recorded:
    """Takes the place of `Checkpoints`; a write takes `write_seconds`."""

    def __init__(self, clock: Clock, write_seconds: float = 0.0) -> None:
        self.clock, self.write_seconds = clock, write_seconds
        self.steps: list[int] = []

    def write(self, step: int, *_: Any) -> None:
        self.clock.seconds += self.write_seconds
        self.steps.append(step)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(checkpoints, "time", clock)
    return clock


def kept_steps(clock: Clock, minutes: float, write_seconds: float, steps: int = 1000) -> list[int]:
    """Which steps are kept, of steps of 10 seconds each."""
    recorded, training = Recorded(clock, write_seconds), FakeTraining()
    keeper = Keeper(recorded, Keeping(minutes), dict, [])  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        clock.seconds += 10
        training.trained.step = step
        training.is_done = step == steps
        keeper.after_step(training)  # type: ignore[arg-type]
    return recorded.steps


def test_a_checkpoint_is_due_every_so_many_minutes_and_after_the_last_step(clock: Clock) -> None:
    assert kept_steps(clock, minutes=5, write_seconds=0, steps=100) == [30, 60, 90, 100]


def test_a_slow_write_stretches_the_interval_so_that_it_costs_one_percent(clock: Clock) -> None:
    """12 seconds a write: after the first one, every 1,200 seconds."""
    assert kept_steps(clock, minutes=5, write_seconds=12, steps=400) == [30, 150, 270, 390, 400]


def test_zero_minutes_is_after_every_step_however_slow_the_disk(clock: Clock) -> None:
    assert kept_steps(clock, minutes=0, write_seconds=60, steps=4) == [1, 2, 3, 4]


def test_asked_to_stop_the_step_is_kept_and_the_training_ends(clock: Clock) -> None:
    recorded, training = Recorded(clock), FakeTraining()
    keeper = Keeper(recorded, Keeping(60, lambda: True), dict, [], kept_step=4)  # type: ignore[arg-type]
    training.trained.step = 5
    with pytest.raises(Interrupted, match="after step 5"):
        keeper.after_step(training)  # type: ignore[arg-type]
    keeper.now(training)  # type: ignore[arg-type]
    assert recorded.steps == [5]


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "a", "cpu").write(3, TENSORS, {"step": 3, "loss": 0.1 + 0.2, "notes": ["ä"]})
    found, refused = Checkpoints(tmp_path, "a", "cpu").newest()
    assert found is not None
    assert (found.step, refused) == (3, [])
    assert found.values == {"step": 3, "loss": 0.1 + 0.2, "notes": ["ä"]}
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_older_ones_stay_until_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path, "a", "cpu")
    for step in (1, 2):
        kept.write(step, TENSORS, {"step": step})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no rename today")))
    with pytest.raises(OSError, match="no rename today"):
        kept.write(3, TENSORS, {"step": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_refused_one_is_removed_once_a_new_one_stands_and_the_good_one_stays(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path, "a", "cpu")
    for step in (1, 2):
        first.write(step, TENSORS, {"step": step})
    (tmp_path / "step-00000002/state.json").unlink()
    again = Checkpoints(tmp_path, "a", "cpu")
    again.newest()
    again.write(3, TENSORS, {"step": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
