"""Checkpoints of one trial: written whole, read back bit for bit or refused. Nothing is unpickled.

checkpoints/step-00000012/
  tensors.safetensors   adapter, optimiser, random numbers, losses not yet read
  state.json            everything else: step, tokens, losses, times, notes
  manifest.json         format, trial, device, and the size and SHA-256 of the other two
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sweeps.errors import Interrupted
from sweeps.trial.causes import os_error_number
from sweeps.trial.finetune import Training
from sweeps.trial.keeping import Keeping
from sweeps.trial.paths import CHECKPOINT, remove, whole_folder

FORMAT = 3
"""Counts up whenever an older reader, or an older file, would be misunderstood."""

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_GAP_IN_WRITES = 100  # times the last write's seconds: writing costs at most 1 % of the training


@dataclass(frozen=True)
class Checkpoint:
    """What a trial was after `step` updates. `written` is UTC, ISO 8601."""

    step: int
    written: str
    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]


class _Refused(Exception):
    """Why a checkpoint is not to be trusted."""


class Checkpoints:
    """The checkpoints of one trial, of which the newest good one and the one before it are kept.

    One of another trial or of another kind of device is refused, as one that is damaged is: numbers from it
    would not be the trial's.
    """

    def __init__(self, folder: Path, spec_digest: str, device_type: str) -> None:
        self._folder = folder
        self._identity = {"format": FORMAT, "spec": spec_digest, "device": device_type}
        self._last_good: Path | None = None

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that can be trusted, and for each newer one the reason why it was refused."""
        refused = []
        for path in sorted(self._folder.glob(f"{CHECKPOINT}*"), reverse=True):
            try:
                checkpoint = self._read(path)
            except (_Refused, OSError, SafetensorError) as error:
                refused.append(f"refused the checkpoint {path.name}: {error}")
                continue
            self._last_good = path
            return checkpoint, refused
        if refused:
            refused.append("no checkpoint could be used: the trial begins anew")
        return None, refused

    def write(self, step: int, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> Path:
        """Write one; only once it stands are older ones removed, and those that were refused.

        Raises `OSError` or `SafetensorError` where it cannot be written; those before it are then untouched.
        """
        path = self._folder / f"{CHECKPOINT}{step:08d}"
        with whole_folder(path) as draft:
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, draft / _TENSORS
            )
            (draft / _STATE).write_text(json.dumps(values), encoding="utf-8")
            (draft / _MANIFEST).write_text(self._manifest(draft), encoding="utf-8")
        kept = {path, self._last_good}
        self._last_good = path
        for other in self._folder.glob(f"{CHECKPOINT}*"):
            if other not in kept:
                with contextlib.suppress(OSError):  # the next write tries again
                    remove(other)
        return path

    def _manifest(self, draft: Path) -> str:
        content = {
            **self._identity,
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "files": {name: _fingerprint(draft / name) for name in (_TENSORS, _STATE)},
        }
        return json.dumps({"sha256": _digest(content), "content": content}, indent=2)

    def _read(self, path: Path) -> Checkpoint:
        content = _checked_manifest(path / _MANIFEST)
        for field, ours in self._identity.items():
            if content.get(field) != ours:
                raise _Refused(f"its {field} must be {ours}, got {content.get(field)}")
        for name, expected in content["files"].items():
            if not (path / name).is_file():
                raise _Refused(f"{name} is missing")
            if (found := _fingerprint(path / name)) != expected:
                raise _Refused(f"{name} must be as it was written, got {_difference(found, expected)}")
        values = json.loads((path / _STATE).read_text(encoding="utf-8"))
        # Copies: what load_file gives is the file itself in memory, and the file will be removed.
        tensors = {name: tensor.clone() for name, tensor in load_file(path / _TENSORS).items()}
        return Checkpoint(values["step"], content["written"], tensors, values)


def _checked_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        content: dict[str, Any] = manifest["content"]
        intact = manifest["sha256"] == _digest(content)
    except FileNotFoundError:
        raise _Refused(f"{_MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _Refused(f"{_MANIFEST} must be as it was written, and cannot be read") from error
    if not intact:
        raise _Refused(f"{_MANIFEST} must be as it was written, got other values")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    if found["bytes"] != expected["bytes"]:
        return f"{found['bytes']} bytes where there were {expected['bytes']}"
    return "other bytes"


class Keeper:
    """Decides after each step of a training whether a checkpoint is due, writes it, and ends it when asked.

    `about` gives what the trial's owner wants to find again beside the training's own state. Where a
    checkpoint cannot be written the training goes on, and it is said in `notes`. `kept_step` is the step of
    the checkpoint that the training was resumed from, 0 where there was none.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        keeping: Keeping,
        about: Callable[[], dict[str, Any]],
        notes: list[str],
        kept_step: int = 0,
    ) -> None:
        self._checkpoints = checkpoints
        self._keeping = keeping
        self._about = about
        self._notes = notes
        self._kept_step = kept_step
        self._looked = time.monotonic()
        self._write_seconds = 0.0
        self._reasons: set[str] = set()

    def after_step(self, training: Training) -> None:
        """A checkpoint if one is due, as the last step's is. Raises `Interrupted` when asked to stop."""
        stops = self._keeping.should_stop()
        if stops or training.is_done or self._is_due():
            self.now(training)
        if stops:
            raise Interrupted(f"asked to stop after step {training.trained.step}")

    def now(self, training: Training) -> None:
        """A checkpoint of this step, unless there is one."""
        step = training.trained.step
        if step == self._kept_step:
            return
        start = time.monotonic()
        tensors, values = training.state()
        try:
            self._checkpoints.write(step, tensors, {"step": step, "training": values, **self._about()})
            self._kept_step = step
        except (OSError, SafetensorError) as error:
            self._note(step, error)
        self._looked = time.monotonic()
        self._write_seconds = self._looked - start

    def _is_due(self) -> bool:
        minutes = self._keeping.checkpoint_minutes
        gap_seconds = max(60 * minutes, _GAP_IN_WRITES * self._write_seconds) if minutes else 0.0
        return time.monotonic() - self._looked >= gap_seconds

    def _note(self, step: int, error: Exception) -> None:
        """Once for each reason: a disk stays full for many steps."""
        number = os_error_number(error)
        reason = os.strerror(number) if number else str(error)
        if reason not in self._reasons:
            self._reasons.add(reason)
            self._notes.append(
                f"the checkpoint of step {step} could not be written: {reason}; the training goes on, and "
                "the next ones are tried"
            )
