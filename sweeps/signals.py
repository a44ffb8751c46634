"""Signals that are heard in another way for a while."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


@contextlib.contextmanager
def handled(handler: Handler, *numbers: int) -> Iterator[None]:
    """Inside the block `handler` hears the signals `numbers`; behind it whoever did before."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, heard in before.items():
            signal.signal(number, heard)
