"""A driver that runs on the cluster: the errand that is sent there, and the driver that carries it out."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from sweeps.collecting import importing
from sweeps.errors import CannotStart
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep_text
from sweepsvc.facts import git_commit
from sweepsvc.home import Home
from sweepsvc.resume import Selection

if TYPE_CHECKING:
    from sweepsvc.protocols import SweepRecord

_FILE = "errand.json"
_BEGUN = "the driver is at work on the cluster"
"""What a driver says once everything that could have kept it from starting is checked."""

LEFT = 4
"""The exit code of somebody who stops watching: the sweep has not ended."""


@dataclass(frozen=True)
class ResumeOptions:
    """What `resume` is asked for besides its trials; see `session.Asked`."""

    add_trials: int = 0
    as_launched: bool = False
    take_over: bool = False


@dataclass(frozen=True)
class Place:
    """The home and the storage asked for, None for what the cluster's environment says.

    The home is a path there, and may mean nothing here.
    """

    home: Path | None = None
    storage: str | None = None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LaunchErrand(_Part):
    """A sweep as `load_sweep_text` gives it again; see `Sweep`. `home` is a path on the cluster."""

    command: Literal["launch"] = "launch"
    sweep_id: str
    text: str
    source: str
    git_commit: str
    overrides: tuple[str, ...]
    base_dir: str
    home: str | None
    storage: str | None


class ResumeErrand(_Part):
    """A sweep's id, or the start of one alone, and the options of `resume`."""

    command: Literal["resume"] = "resume"
    sweep_id: str
    failed: bool
    trials: tuple[str, ...]
    from_scratch: bool
    add_trials: int
    as_launched: bool
    take_over: bool
    home: str | None
    storage: str | None


Errand = LaunchErrand | ResumeErrand


class _Sent(_Part):
    errand: Errand


def launch_errand(sweep: Sweep, sweep_id: str, place: Place) -> LaunchErrand:
    return LaunchErrand(
        sweep_id=sweep_id,
        text=sweep.text,
        source=str(Path(sweep.source).absolute()),
        git_commit=git_commit(Path(sweep.source).absolute().parent),
        overrides=sweep.overrides,
        base_dir=str(sweep.base_dir),
        home=_path_there(place.home),
        storage=place.storage,
    )


def resume_errand(sweep_id: str, selection: Selection, options: ResumeOptions, place: Place) -> ResumeErrand:
    return ResumeErrand(
        sweep_id=sweep_id,
        failed=selection.failed,
        trials=selection.trials,
        from_scratch=selection.from_scratch,
        add_trials=options.add_trials,
        as_launched=options.as_launched,
        take_over=options.take_over,
        home=_path_there(place.home),
        storage=place.storage,
    )


def _path_there(home: Path | None) -> str | None:
    if home is not None and not home.is_absolute():
        raise CannotStart(
            f"the home of a driver on the cluster must be an absolute path there, got {home}; leave --home "
            "out to take the cluster's SWEEPSVC_HOME"
        )
    return None if home is None else str(home)


# --- here -------------------------------------------------------------------------------------------


def send(errand: Errand, address: str, detach: bool) -> int:
    """Have the cluster carry out `errand`; the exit code of this command.

    Detached it is 0 once the driver is at work, else the driver's own. What the driver prints is printed
    here.
    """
    from sweepsvc.scheduler import RayJobs

    jobs = RayJobs(address)
    job = f"{errand.command}-{re.sub(r'[^A-Za-z0-9_-]', '-', errand.sweep_id)}-{uuid.uuid4().hex[:6]}"
    with tempfile.TemporaryDirectory(prefix="sweepsvc-") as folder:
        Path(folder, _FILE).write_text(_Sent(errand=errand).model_dump_json(), encoding="utf-8")
        jobs.submit(job, f"python -m sweepsvc drive {_FILE}", Path(folder))
    print(f"sent to the cluster at {address} as job {job}", flush=True)
    has_begun = False
    try:
        for line in _lines(jobs.follow(job)):
            print(line, flush=True)
            has_begun = has_begun or _BEGUN in line
            if detach and has_begun:
                print(f"it goes on without this command\n{_from_anywhere(errand.sweep_id)}")
                return 0
        while (code := jobs.exit_code(job)) is None:  # the output ends a moment before the job does
            time.sleep(0.5)
        return code
    except KeyboardInterrupt:
        print(f"left; the sweep goes on\n{_from_anywhere(errand.sweep_id)}", file=sys.stderr)
        return LEFT
    except CannotStart as error:
        if not has_begun:
            raise
        print(f"{error}\nthe driver is not heard any more; its sweep may go on", file=sys.stderr)
        print(_from_anywhere(errand.sweep_id), file=sys.stderr)
        return LEFT


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        yield from whole
    if rest:
        yield rest


def _from_anywhere(sweep_id: str) -> str:
    commands = [
        ("see how it goes:  ", "watch"),
        ("and once:         ", "status"),
        ("have it stop:     ", "stop"),
    ]
    lines = [
        f"{title} {shlex.join(['python', '-m', 'sweepsvc', name, sweep_id])}" for title, name in commands
    ]
    return "\n".join([*lines, "(with SWEEPSVC_STUDY_URL and MLFLOW_TRACKING_URI as they are on the cluster)"])


# --- there ------------------------------------------------------------------------------------------


def drive(file: Path, task_names: Callable[[str | None], Collection[str]]) -> SweepRecord:
    """Carry out the errand in `file`, as the driver; how the sweep stands at the end."""
    with importing():
        from sweepsvc import session

    errand = _Sent.model_validate_json(file.read_text(encoding="utf-8")).errand
    os.chdir("/")  # Ray removes a job's working folder while the job runs
    home = _home_there(errand)
    if isinstance(errand, LaunchErrand):
        sweep = load_sweep_text(
            errand.text, errand.source, errand.overrides, errand.base_dir, task_names=task_names
        )
        home.check()
        joined = session.Joined("auto", _BEGUN, errand.git_commit)
        return session.launch(sweep, home, errand.sweep_id, joined)
    selection = Selection(errand.failed, errand.trials, errand.from_scratch)
    joined = session.Joined("auto", _BEGUN)
    asked = session.Asked(selection, errand.add_trials, errand.as_launched, errand.take_over, joined)
    return session.resume(errand.sweep_id, home, asked)


def _home_there(errand: Errand) -> Home:
    """The driver's working folder is Ray's, and goes with the job: a home must be named."""
    if errand.home is None and not os.environ.get("SWEEPSVC_HOME"):
        raise CannotStart(
            "a driver on the cluster must have a home in a folder that its machines share, got none; give "
            "--home with a path there, or set SWEEPSVC_HOME on the cluster"
        )
    return Home(errand.home, errand.storage)
