"""What was measured of a device with a model, kept from plan to plan.

A calibration holds for what it was measured with: `Key` has all of it, the libraries' versions and the
formulas that it corrects included, so that it is forgotten by itself when one of them changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.resources
import platform
from dataclasses import dataclass
from pathlib import Path

from pydantic import PositiveFloat, RootModel, ValidationError

from sweeps.errors import CannotStart
from sweeps.result import Record
from sweeps.spec import ModelSpec
from sweeps.trial.cache import cache_home, only_one
from sweeps.trial.duration import Pace
from sweeps.trial.estimate import outline
from sweeps.trial.outline import Outline
from sweeps.trial.paths import write_whole

_CORRECTED = ("duration.py", "memory.py")


class Calibration(Record):
    """How a device does beside what is predicted of it, measured on `measured_on` (YYYY-MM-DD).

    On a GPU the factors are measured over predicted: `time_factor` of training, `eval_time_factor` of going
    forward alone, `memory_factor` of the peak. A CPU has no predicted times to correct: there training goes
    at `operations_per_second`, and `eval_time_factor` is against that.
    """

    device: str
    measured_on: str
    eval_time_factor: PositiveFloat
    time_factor: PositiveFloat | None = None
    memory_factor: PositiveFloat | None = None
    operations_per_second: PositiveFloat | None = None

    @property
    def pace(self) -> Pace | None:
        """A CPU's own; None for a GPU, whose pace is that of the table."""
        return Pace.measured(self.operations_per_second) if self.operations_per_second else None

    @property
    def note(self) -> str:
        """What a plan says of it."""
        if self.operations_per_second:
            said = f"times at {self.operations_per_second / 1e9:.3g} GFLOPS"
        else:
            said = (
                f"times x{self.time_factor:.2f} in training and x{self.eval_time_factor:.2f} in evaluation, "
                f"memory x{self.memory_factor:.2f}"
            )
        return f"{said}: measured on {self.device} on {self.measured_on}"


@dataclass(frozen=True)
class Key:
    """What a calibration holds for."""

    device: str
    model: ModelSpec

    def __str__(self) -> str:
        model = self.model
        versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "bitsandbytes"))
        parts = (
            self.device,
            f"model {_architecture(outline(model))}",
            model.quantization,
            f"double {model.double_quantization}",
            f"head {model.quantize_lm_head}",
            model.dtype,
            model.attention,
            *versions,
            f"formulas {_formulas()}",
        )
        return " | ".join(parts)


def _architecture(shapes: Outline) -> str:
    """A digest of the model's shapes, whatever its name is and wherever its config was read."""
    config = shapes.config
    about = (
        config.model_type,
        config.vocab_size,
        shapes.params,
        shapes.is_tied,
        sorted(shapes.layers.items()),
    )
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def _formulas() -> str:
    """A digest of the predictions' own code: a factor corrects the formula that it was measured against."""
    folder = importlib.resources.files("sweeps.trial")
    digest = hashlib.sha256()
    for name in _CORRECTED:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:8]


def cpu_title(threads: int) -> str:
    """This machine's CPU as people know it, computing with so many threads."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {threads} threads"


# --- the file ---------------------------------------------------------------------------------------


class _File(RootModel[dict[str, Calibration]]):
    """Calibrations by their keys."""


def calibrations_file() -> Path:
    """`calibrations.json` in the cache."""
    return cache_home() / "calibrations.json"


def kept() -> dict[str, Calibration]:
    """Every calibration of the cache, by its key as text. Raises `CannotStart` for a file that is damaged."""
    file = calibrations_file()
    try:
        return _File.model_validate_json(file.read_bytes()).root
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        found = str(error).splitlines()[0]
        raise CannotStart(f"calibrations must be readable, got {file} ({found}); remove the file") from error


def keep(key: Key, calibration: Calibration) -> None:
    """Keep it beside the others, in place of an older one. Raises `CannotStart` where it cannot be."""
    file = calibrations_file()
    try:
        with only_one(file):
            everything = _File({**kept(), str(key): calibration})
            write_whole(file, everything.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise CannotStart(
            f"a calibration is kept in {file}, which cannot be written ({error.strerror or error}); set "
            "SWEEPSVC_CACHE to a folder that can"
        ) from error
