"""Seconds and peak memory of one trial. Memory is in decimal gigabytes (1e9 bytes)."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from pathlib import Path

import psutil
import torch

GB = 1e9
_PROC = Path("/proc/self")


class Stopwatch:
    """Seconds while it runs; a trial pauses its own while it waits for whoever reads its reports."""

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._total += time.perf_counter() - self._since
            self._since = None

    @property
    def seconds(self) -> float:
        running = time.perf_counter() - self._since if self._since is not None else 0.0
        return self._total + running


class HostPeak:
    """The peak resident memory of this process since this object was made, not since its birth.

    On Linux the kernel keeps the peak and `clear_refs` starts it anew; elsewhere a thread looks at the
    resident size twenty times a second, and `how` says so.
    """

    def __init__(self) -> None:
        _return_freed_memory()
        self._sampler: _Sampler | None = None
        try:
            (_PROC / "clear_refs").write_text("5")
            self.how = "the kernel's own peak"
        except OSError:
            self._sampler = _Sampler()
            self.how = "sampled every 0.05 s: this kernel does not let a process restart its peak"

    @property
    def gb(self) -> float:
        if self._sampler is not None:
            return self._sampler.peak_bytes / GB
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GB
        raise RuntimeError("/proc/self/status has no VmHWM")

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()


def _return_freed_memory() -> None:
    """Give what earlier trials freed back to the system, so that it is not counted again (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class _Sampler:
    def __init__(self) -> None:
        self._process = psutil.Process()
        self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host-memory", daemon=True)
        self._thread.start()

    @property
    def peak_bytes(self) -> int:
        self._peak = max(self._peak, self._process.memory_info().rss)
        return self._peak

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            _ = self.peak_bytes

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


class MemoryMeter:
    """Peak memory of one trial, on its accelerator and on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = HostPeak()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def allocated_gb(self) -> float | None:
        """What tensors held at most on the accelerator: the article's "memory used"."""
        return torch.cuda.max_memory_allocated(self._device) / GB if self._device.type == "cuda" else None

    @property
    def reserved_gb(self) -> float | None:
        """What the allocator held at most on the accelerator: nearer to what the card must have free."""
        return torch.cuda.max_memory_reserved(self._device) / GB if self._device.type == "cuda" else None

    @property
    def host_gb(self) -> float:
        return self._host.gb

    @property
    def peak_gb(self) -> float:
        """The accelerator's allocated peak; the host's where there is no accelerator."""
        allocated = self.allocated_gb
        return self.host_gb if allocated is None else allocated

    def close(self) -> None:
        self._host.close()
