"""The trial's own peak memory, and stopwatches that wait."""

import time

import pytest
import torch

from sweeps.trial import measure

CPU = torch.device("cpu")
MEGABYTES = 200


def hold(megabytes: int) -> None:
    """Touch that much memory and let it go."""
    torch.ones(megabytes * 250_000)


def test_the_peak_is_the_trials_own_not_the_process_s() -> None:
    hold(2 * MEGABYTES)
    meter = measure.MemoryMeter(CPU)
    quiet = meter.host_gb
    hold(MEGABYTES)
    meter.close()
    assert meter.host_gb - quiet == pytest.approx(MEGABYTES / 1000, rel=0.25)


def test_without_the_kernels_help_the_peak_is_sampled_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(measure, "_PROC", tmp_path / "none")
    peak = measure.HostPeak()
    assert "sampled" in peak.how
    quiet = peak.gb
    block = torch.ones(MEGABYTES * 250_000)
    assert peak.gb - quiet == pytest.approx(MEGABYTES / 1000, rel=0.25)
    del block
    peak.close()


def test_on_a_cpu_the_peak_is_the_hosts_and_there_is_no_accelerator() -> None:
    meter = measure.MemoryMeter(CPU)
    assert meter.allocated_gb is None
    assert meter.reserved_gb is None
    assert meter.peak_gb == pytest.approx(meter.host_gb, rel=0.01)
    meter.close()


def test_a_paused_stopwatch_stands_still() -> None:
    watch = measure.Stopwatch()
    watch.start()
    time.sleep(0.02)
    watch.pause()
    seen = watch.seconds
    time.sleep(0.02)
    assert watch.seconds == seen >= 0.02
    watch.start()
    time.sleep(0.01)
    assert watch.seconds > seen
