"""How a running trial is kept: how often it is written down, and how it is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sweeps.sweep import CHECKPOINT_MINUTES


def never() -> bool:
    """Nobody asks."""
    return False


@dataclass(frozen=True)
class Keeping:
    """What the trial's owner wants of it besides its result.

    A checkpoint is written every `checkpoint_minutes`, after every step for 0. `should_stop` is asked
    after each step and each batch that is scored; once it says yes, the trial writes a checkpoint and ends as
    interrupted.
    """

    checkpoint_minutes: float = CHECKPOINT_MINUTES
    should_stop: Callable[[], bool] = never
