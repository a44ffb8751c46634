"""A trial's own random numbers: seeded once, in force only while the trial computes.

The process's generators are put back after every use, so that a trial depends on its seed alone and
not on what ran before it in the same process (law L3).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch


class _Streams(NamedTuple):
    python: Any
    numpy: Any
    torch: torch.Tensor
    cuda: torch.Tensor | None


def _uses_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _now(device: torch.device) -> _Streams:
    cuda = torch.cuda.get_rng_state(device) if _uses_cuda(device) else None
    return _Streams(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def _restore(streams: _Streams, device: torch.device) -> None:
    random.setstate(streams.python)
    np.random.set_state(streams.numpy)
    torch.set_rng_state(streams.torch)
    if streams.cuda is not None:
        torch.cuda.set_rng_state(streams.cuda, device)


class TrialRng:
    """The generators of python, numpy, torch and the trial's device, as one state."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        outside = _now(device)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if _uses_cuda(device):
            torch.cuda.manual_seed(seed)
        self._streams = _now(device)
        _restore(outside, device)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Draw from the trial's generators inside the block.

        A block that raises draws nothing: the next one repeats its numbers. So a step that ran out of
        memory is redone with the same dropout.
        """
        outside = _now(self._device)
        _restore(self._streams, self._device)
        try:
            yield
            self._streams = _now(self._device)
        finally:
            _restore(outside, self._device)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The generators as tensors and as values that JSON keeps."""
        version, numbers, gauss = self._streams.python
        kind, keys, *rest = self._streams.numpy
        tensors = {"torch": self._streams.torch, "numpy": torch.from_numpy(keys.astype(np.int64))}
        if self._streams.cuda is not None:
            tensors["cuda"] = self._streams.cuda
        return tensors, {"python": [version, list(numbers), gauss], "numpy": [kind, *rest]}

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `state` gave, of a trial on the same kind of device."""
        version, numbers, gauss = values["python"]
        kind, *rest = values["numpy"]
        self._streams = _Streams(
            (version, tuple(numbers), gauss),
            (kind, tensors["numpy"].numpy().astype(np.uint32), *rest),
            tensors["torch"],
            tensors.get("cuda"),
        )
