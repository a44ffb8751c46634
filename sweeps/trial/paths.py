"""Every file a trial may leave. Files and folders appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from sweeps.result import TrialResult
from sweeps.spec import TrialSpec


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears as `path` when the block ends without an error.

    What is in it is on the disk by then, so that a power cut leaves no name without its bytes. A folder of
    that name is moved aside first and removed only once the new one stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        yield draft
        for file in draft.iterdir():
            _sync(file)
        _sync(draft)
        old = path.with_name(f".{path.name}.old.{uuid.uuid4().hex}")
        if path.exists():
            path.replace(old)
        draft.replace(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


CHECKPOINT = "step-"
"""What the name of a checkpoint's folder begins with; its step follows."""


class TrialFolder:
    """The folder of one trial, `runs/<sweep-id>/trials/<number>/`.

    spec.json          the resolved trial
    result.json        how it ended: the last file written, the worker's own last word
    evaluation.json    each benchmark's metrics and each document's score
    adapter/           the LoRA weights (safetensors) with their peft config
    checkpoints/       where the trial can be taken up again, until it has completed
    lock               held by the process that runs the trial: its host and id
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.spec = self.path / "spec.json"
        self.result = self.path / "result.json"
        self.evaluation = self.path / "evaluation.json"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.lock = self.path / "lock"

    def write_spec(self, spec: TrialSpec) -> None:
        write_whole(self.spec, spec.model_dump_json(indent=2) + "\n")

    def write_result(self, result: TrialResult) -> None:
        write_whole(self.result, result.model_dump_json(indent=2) + "\n")

    def read_result(self) -> TrialResult | None:
        """The worker's last word, or None where it had none."""
        if not self.result.exists():
            return None
        return TrialResult.model_validate_json(self.result.read_text(encoding="utf-8"))

    def last_checkpoint_step(self) -> int:
        """The step of the newest checkpoint, whole or not; 0 without any."""
        steps = [path.name.removeprefix(CHECKPOINT) for path in self.checkpoints.glob(f"{CHECKPOINT}*")]
        return max((int(step) for step in steps if step.isdecimal()), default=0)

    def is_final(self, spec: TrialSpec) -> bool:
        """Whether `spec` has completed or was pruned here: then nothing is to be computed again."""
        try:
            result = self.read_result()
        except ValueError:  # it cannot be read: no last word
            return False
        return result is not None and result.outcome in ("completed", "pruned") and self._holds(spec)

    def begin(self, spec: TrialSpec) -> None:
        """Make it the folder of an attempt at `spec`: with nothing of another trial, and no draft, in it."""
        if self.spec.exists() and not self._holds(spec):
            self.forget()
        self.result.unlink(missing_ok=True)
        self._remove_drafts()
        self.write_spec(spec)

    def forget(self) -> None:
        """Remove what the trial has come to: result, checkpoints, adapter, evaluation.

        The next attempt begins anew. Not for a folder in which a process runs.
        """
        # The result first: without the rest it would still be taken for final.
        for path in (self.result, self.checkpoints, self.adapter, self.evaluation):
            remove(path)

    def _remove_drafts(self) -> None:
        """What a killed process was about to write; others may be writing files of theirs beside ours."""
        for path in (self.spec, self.result, self.evaluation, self.adapter):
            for draft in self.path.glob(f".{path.name}.*"):
                remove(draft)
        for draft in self.checkpoints.glob(".*"):
            remove(draft)

    def _holds(self, spec: TrialSpec) -> bool:
        try:
            return TrialSpec.model_validate_json(self.spec.read_text(encoding="utf-8")).digest == spec.digest
        except (OSError, ValueError):
            return False
