"""One trial without the service: `python -m sweeps.trial SPEC.json FOLDER`.

Run again after it was cut, it goes on from its last checkpoint. SIGTERM or Ctrl-C once: it writes a
checkpoint and ends; twice: at once.

Exit codes: 0 completed, 2 bad input and nothing started, 3 failed, 4 interrupted (the same command goes on).
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from sweeps.collecting import importing
from sweeps.errors import Interrupted, TrialError
from sweeps.result import Progress, TrialResult
from sweeps.signals import handled
from sweeps.spec import TrialSpec
from sweeps.sweep import CHECKPOINT_MINUTES
from sweeps.trial.keeping import Keeping
from sweeps.trial.lock import FolderLock
from sweeps.trial.paths import TrialFolder

_EXIT = {"completed": 0, "pruned": 0, "failed": 3, "interrupted": 4}


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    spec = _read(given.spec)
    if spec is None or not _can_write(given.folder):
        return 2
    asked = _StopOnSignal()
    with handled(asked.hear, signal.SIGTERM, signal.SIGINT):
        return _run(given, spec, asked)


def _run(given: argparse.Namespace, spec: TrialSpec, asked: _StopOnSignal) -> int:
    with importing():  # for seconds, after the input is known to be good
        from sweeps.trial.base import Resident
        from sweeps.trial.run import run_trial

    files = TrialFolder(given.folder)
    if given.from_scratch and not _forget(files):
        return 2
    trial = run_trial(spec, Resident(), given.folder, Keeping(given.checkpoint_minutes, asked))
    try:
        for progress in trial:
            print(_line(progress), flush=True)
            for note in progress.notes if progress.phase == "loading" else ():
                print(f"note: {note}", flush=True)
    except KeyboardInterrupt:
        trial.close()
    except Interrupted:  # another process has the folder, and whatever result is in it
        return _EXIT["interrupted"]
    except (TrialError, OSError) as error:  # there is no result of ours
        print(f"{given.folder}: {error}", file=sys.stderr)
        return _EXIT["failed"]
    result = files.read_result()
    if result is None:
        return _EXIT["interrupted"]
    print("\n".join(_summary(result)))
    return _EXIT[result.outcome]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sweeps.trial",
        description="Run one trial by itself, or go on with it where it was cut.",
    )
    parser.add_argument(
        "spec", type=Path, help="the trial as JSON; fields left out take the article's values"
    )
    parser.add_argument("folder", type=Path, help="where the trial leaves its files")
    parser.add_argument(
        "--checkpoint-minutes",
        type=_minutes,
        default=CHECKPOINT_MINUTES,
        metavar="M",
        help="minutes between two checkpoints, 0 for one after every step (default: %(default)g)",
    )
    parser.add_argument(
        "--from-scratch", action="store_true", help="forget checkpoints and result, and begin anew"
    )
    return parser


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"0 <= minutes must hold, got {text}")
    return value


class _StopOnSignal:
    """Says yes once SIGTERM or SIGINT has come; the second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self._came = False

    def __call__(self) -> bool:
        return self._came

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True


def _forget(files: TrialFolder) -> bool:
    with FolderLock(files.lock) as lock:
        if lock.take():
            files.forget()
            return True
        print(f"{files.path}: must not be in use, and {lock.holder} runs in it; end that", file=sys.stderr)
        return False


def _read(path: Path) -> TrialSpec | None:
    try:
        return TrialSpec.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        print(f"{path}: must be readable: {error.strerror}", file=sys.stderr)
    except UnicodeDecodeError as error:
        print(f"{path}: must be UTF-8: {error}", file=sys.stderr)
    except ValidationError as error:
        for fault in error.errors():
            where = ".".join(str(part) for part in fault["loc"])
            print(f"{path}: {where}: {fault['msg']}", file=sys.stderr)
    return None


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        print(f"{folder}: must be a folder that can be written: {error.strerror}", file=sys.stderr)
        return False
    return True


def _line(progress: Progress) -> str:
    parts: list[str] = [progress.phase]
    if progress.step:
        parts.append(f"step {progress.step}/{progress.steps}")
    if progress.train_loss is not None:
        parts.append(f"loss {progress.train_loss:.4f}")
    if progress.eval_loss is not None:
        parts.append(f"eval loss {progress.eval_loss:.4f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if progress.peak_memory_gb is not None:
        parts.append(f"{progress.peak_memory_gb:.2f} GB")
    return "  ".join(parts)


def _summary(result: TrialResult) -> list[str]:
    lines = [f"note: {note}" for note in result.notes]
    lines += [f"{name} {value:.6g}" for name, value in sorted(result.metrics().items())]
    lines.append(f"{result.outcome}: {result.failure.message}" if result.failure else result.outcome)
    return lines


if __name__ == "__main__":
    sys.exit(main())
