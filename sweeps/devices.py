"""Accelerators by name: what a plan needs to know of each. The table, with its sources, is `devices.json`."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass

from sweeps.errors import CannotStart

# The CUDA context with the kernels of torch, cuBLAS and bitsandbytes, which no allocator counts ...
_CONTEXT_BYTES = 0.6e9
# ... and the share that PyTorch's allocator holds in pieces too small to use.
_FRAGMENTED = 0.05


@dataclass(frozen=True)
class Device:
    """One kind of GPU: `bf16_tflops` are dense, `accelerators` Ray's names, `reports` the driver's."""

    name: str
    title: str
    memory_gib: float
    bf16_tflops: float
    bandwidth_gb_per_s: float
    accelerators: tuple[str, ...]
    reports: tuple[str, ...]
    source: str

    @property
    def usable_bytes(self) -> float:
        """What tensors can fill."""
        return self.memory_gib * 2**30 * (1 - _FRAGMENTED) - _CONTEXT_BYTES


@functools.cache
def devices() -> Mapping[str, Device]:
    """Every device of the table by its name."""
    text = (importlib.resources.files("sweeps") / "devices.json").read_text("utf-8")
    return {
        name: Device(
            name=name,
            **{
                **facts,
                "accelerators": tuple(facts["accelerators"]),
                "reports": tuple(facts["reports"]),
            },
        )
        for name, facts in json.loads(text).items()
    }


def device_named(name: str) -> Device:
    """The device that a person calls `name`, in any case. Raises `CannotStart` with the names there are."""
    known = devices()
    if device := known.get(name.lower()):
        return device
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise CannotStart(f"--device must name one of {', '.join(known)}; {hint}got {name}")


def device_of_accelerator(accelerator: str) -> Device | None:
    """The device that Ray calls `accelerator`; the smaller one where that may be two. None if unknown."""
    wanted = accelerator.lower()
    named = (device for device in devices().values() if wanted in map(str.lower, device.accelerators))
    return next(named, None)


def device_reported(title: str) -> Device | None:
    """The device whose driver reports `title`."""
    return next((device for device in devices().values() if title in device.reports), None)
