"""Signals that are heard in another way for a while."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


class Interrupting:
    """A handler that raises `KeyboardInterrupt` wherever the program is, and remembers it.

    Raised while Python frees an object, the exception is lost. Who can stop at a later moment looks at
    `was_heard` then.
    """

    def __init__(self) -> None:
        self.was_heard = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.was_heard = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def handled(handler: Handler, *numbers: int) -> Iterator[None]:
    """Inside the block `handler` hears the signals `numbers`; behind it whoever did before."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, heard in before.items():
            signal.signal(number, heard)
