"""Measured factors, kept from plan to plan for what they were measured with and for nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeps.errors import CannotStart
from sweeps.spec import ModelSpec
from sweeps.trial import calibration
from sweeps.trial.calibration import Calibration, Key, calibrations_file, cpu_title, keep, kept

SEVEN_B = ModelSpec(id="meta-llama/Llama-2-7b-hf")
MEASURED = Calibration(
    device="NVIDIA L4", measured_on="2026-11-25", time_factor=1.31, eval_time_factor=0.9, memory_factor=1.02
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPSVC_CACHE", str(tmp_path))


def test_what_is_kept_is_read_back_beside_what_was_there() -> None:
    assert kept() == {}
    other = MEASURED.model_copy(update={"time_factor": 2.0})
    keep(Key("NVIDIA L4", SEVEN_B), MEASURED)
    keep(Key("NVIDIA T4", SEVEN_B), MEASURED)
    keep(Key("NVIDIA L4", SEVEN_B), other)
    assert kept() == {
        str(Key("NVIDIA L4", SEVEN_B)): other,
        str(Key("NVIDIA T4", SEVEN_B)): MEASURED,
    }


def test_it_holds_for_a_model_of_the_same_shapes_whatever_its_name_is() -> None:
    chat = ModelSpec(id="meta-llama/Llama-2-7b-chat-hf")
    assert str(Key("NVIDIA L4", chat)) == str(Key("NVIDIA L4", SEVEN_B))


@pytest.mark.parametrize(
    "other",
    [
        Key("NVIDIA T4", SEVEN_B),
        Key("NVIDIA L4", ModelSpec(id="meta-llama/Llama-2-13b-hf")),
        Key("NVIDIA L4", SEVEN_B.model_copy(update={"quantization": "none"})),
        Key("NVIDIA L4", SEVEN_B.model_copy(update={"double_quantization": True})),
        Key("NVIDIA L4", SEVEN_B.model_copy(update={"dtype": "float16"})),
    ],
    ids=["device", "shapes", "quantization", "constants", "dtype"],
)
def test_it_holds_for_nothing_else(other: Key) -> None:
    assert str(other) != str(Key("NVIDIA L4", SEVEN_B))


def test_it_does_not_outlive_a_library_or_the_formula_that_it_corrects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = str(Key("NVIDIA L4", SEVEN_B))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "0.0")
        assert str(Key("NVIDIA L4", SEVEN_B)) != before
    monkeypatch.setattr(calibration, "_CORRECTED", ("duration.py", "lengths.py"))
    assert str(Key("NVIDIA L4", SEVEN_B)) != before


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"x": {"device": "y"}}', b'{"x": {"time_factor": -1}}'])
def test_a_damaged_file_is_refused_with_its_name(content: bytes) -> None:
    calibrations_file().write_bytes(content)
    with pytest.raises(CannotStart, match=r"calibrations\.json.*remove the file"):
        kept()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SWEEPSVC_CACHE", str(tmp_path / "file"))
    with pytest.raises(CannotStart, match="cannot be written"):
        keep(Key("NVIDIA L4", SEVEN_B), MEASURED)


def test_a_person_reads_factors_device_and_date() -> None:
    said = (
        "times x1.31 in training and x0.90 in evaluation, memory x1.02: measured on NVIDIA L4 on 2026-11-25"
    )
    assert MEASURED.note == said
    on_cpu = Calibration(
        device=cpu_title(2), measured_on="2026-11-25", eval_time_factor=0.5, operations_per_second=2e10
    )
    assert on_cpu.note.startswith("times at 20 GFLOPS: measured on ")
    assert on_cpu.note.endswith(", 2 threads on 2026-11-25")
