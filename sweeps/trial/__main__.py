"""One trial without the service: `python -m sweeps.trial SPEC.json FOLDER`.

Exit codes: 0 completed, 2 bad input and nothing started, 3 failed, 4 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from sweeps.result import Progress, TrialResult
from sweeps.spec import TrialSpec

_EXIT = {"completed": 0, "pruned": 0, "failed": 3, "interrupted": 4}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.trial", description="Run one trial by itself.")
    parser.add_argument(
        "spec", type=Path, help="the trial as JSON; fields left out take the article's values"
    )
    parser.add_argument("folder", type=Path, help="where the trial leaves its files")
    given = parser.parse_args(arguments)
    spec = _read(given.spec)
    if spec is None or not _can_write(given.folder):
        return 2

    from sweeps.trial.base import Resident  # seconds of imports, after the input is known to be good
    from sweeps.trial.paths import TrialFolder
    from sweeps.trial.run import run_trial

    signal.signal(signal.SIGTERM, _interrupt)
    trial = run_trial(spec, Resident(), given.folder)
    try:
        for progress in trial:
            print(_line(progress), flush=True)
    except KeyboardInterrupt:
        trial.close()
    result = TrialFolder(given.folder).read_result()
    assert result is not None
    print("\n".join(_summary(result)))
    return _EXIT[result.outcome]


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


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
