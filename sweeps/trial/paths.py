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


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears as `path` when the block ends without an error.

    A folder of that name is moved aside first and removed only once the new one stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        yield draft
        old = path.with_name(f".{path.name}.old.{uuid.uuid4().hex}")
        if path.exists():
            path.replace(old)
        draft.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class TrialFolder:
    """The folder of one trial, `runs/<sweep-id>/trials/<number>/`.

    spec.json          the resolved trial
    result.json        how it ended: the last file written, the worker's own last word
    evaluation.json    each benchmark's metrics and each document's score
    adapter/           the LoRA weights (safetensors) with their peft config
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.spec = self.path / "spec.json"
        self.result = self.path / "result.json"
        self.evaluation = self.path / "evaluation.json"
        self.adapter = self.path / "adapter"

    def write_spec(self, spec: TrialSpec) -> None:
        write_whole(self.spec, spec.model_dump_json(indent=2) + "\n")

    def write_result(self, result: TrialResult) -> None:
        write_whole(self.result, result.model_dump_json(indent=2) + "\n")

    def read_result(self) -> TrialResult | None:
        """The worker's last word, or None where it had none."""
        if not self.result.exists():
            return None
        return TrialResult.model_validate_json(self.result.read_text(encoding="utf-8"))
