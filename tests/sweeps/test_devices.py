"""The table of devices: found by every name that people and programs have for one."""

from __future__ import annotations

import pytest

from sweeps.devices import device_named, device_of_accelerator, device_reported, devices
from sweeps.errors import CannotStart


def test_the_table_has_the_devices_that_people_name_and_every_row_is_sound() -> None:
    assert {"a100-40gb", "a100-80gb", "h100", "rtx4090"} <= set(devices())
    for device in devices().values():
        assert 0 < device.usable_bytes < device.memory_gib * 2**30
        assert device.bf16_tflops > 50
        assert device.bandwidth_gb_per_s >= 300
        assert device.source


def test_an_a100_has_the_figures_of_its_datasheet() -> None:
    device = device_named("A100-40GB")
    assert (device.memory_gib, device.bf16_tflops, device.bandwidth_gb_per_s) == (40, 312, 1555)


def test_an_unknown_device_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(CannotStart, match=r"one of a100-40gb.*did you mean rtx4090.*got rtx4900"):
        device_named("rtx4900")


def test_rays_name_and_the_drivers_name_find_a_device() -> None:
    ray, driver = device_of_accelerator("A100"), device_reported("NVIDIA A100-SXM4-80GB")
    assert ray is not None
    assert driver is not None
    assert (ray.name, driver.name) == ("a100-40gb", "a100-80gb")
    assert device_of_accelerator("TPU-V4") is None
    assert device_reported("NVIDIA A1") is None


def test_no_name_means_two_devices() -> None:
    for names in (
        [name.lower() for device in devices().values() for name in device.accelerators],
        [name for device in devices().values() for name in device.reports],
    ):
        assert len(names) == len(set(names)) > 5
