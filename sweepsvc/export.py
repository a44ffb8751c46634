"""A completed trial as a folder to keep: its adapter, or the whole model with the adapter merged in."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sweeps.errors import CannotStart, OutOfMemory
from sweeps.trial.paths import TrialFolder, whole_folder, write_whole
from sweepsvc.card import Card, card_text
from sweepsvc.home import Home
from sweepsvc.protocols import SweepRecord, TrialRecord
from sweepsvc.view import best_trial, title

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Asked:
    """What is to be exported, and how. `number` is None for the sweep's best trial."""

    folder: Path
    number: int | None = None
    merge: bool = False
    register: str | None = None


@dataclass(frozen=True)
class Exported:
    """What was made: the trial, its folder, and the version in the registry if it was registered."""

    trial: TrialRecord
    asked: Asked
    folder: Path
    notes: tuple[str, ...]
    version: str | None

    def lines(self) -> list[str]:
        """What a person should know of it, and the command that comes next."""
        kind = "the whole model" if self.asked.merge else "the adapter"
        size = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        lines = [f"{title(self.trial.proposal)}: {kind}, {size / 1e6:,.1f} MB, in {self.folder}", *self.notes]
        if self.version is not None:
            lines.append(f"registered in MLflow as {self.asked.register}, version {self.version}")
        return [*lines, f"try it:  python -m sweepsvc generate {shlex.quote(str(self.folder))} --prompt ..."]


def export(record: SweepRecord, home: Home, asked: Asked) -> Exported:
    """Write the asked trial of a sweep into a folder, which appears whole or not at all.

    Raises `CannotStart` where the trial has not completed, left no adapter, or the folder is not empty;
    `BadModel` and what else loading a model raises.
    """
    folder = asked.folder.expanduser().resolve()
    trial = best(record) if asked.number is None else numbered(record, asked.number)
    files = TrialFolder(home.sweep(record.sweep_id).trial(trial.proposal))
    _check_adapter(trial, files)
    _check_free(folder)
    if asked.register is not None:
        _check_registry(home, record.sweep_id, trial, asked.register)
    with _saying_what_stopped_it(folder), whole_folder(folder) as draft:
        notes = _fill_merged(draft, trial, files) if asked.merge else _fill_adapter(draft, files)
        TrialFolder(draft).write_spec(trial.proposal.spec)
        text = card_text(Card(record, trial, asked.merge, notes, _command(record, home, trial, asked)))
        write_whole(draft / CARD_FILE, text)
        version = None if asked.register is None else _register(home, record, trial, draft, asked)
        _check_free(folder)  # somebody may have used it meanwhile
    return Exported(trial, asked, folder, notes, version)


# --- which trial ------------------------------------------------------------------------------------


def best(record: SweepRecord) -> TrialRecord:
    """The completed trial with the best objective."""
    trial = best_trial(record)
    if trial is None:
        counts = f"{len(record.trials)} trials, none of them completed with a {record.objective_metric}"
        raise CannotStart(
            f"--best needs a completed trial, got {counts} in {record.sweep_id}; go on with the sweep "
            f"(resume {record.sweep_id}), or name one with --trial"
        )
    return trial


def numbered(record: SweepRecord, number: int) -> TrialRecord:
    """The trial of that number, which has completed."""
    found = next((trial for trial in record.trials if trial.proposal.number == number), None)
    if found is None:
        known = f"0 to {len(record.trials) - 1}" if record.trials else "none yet"
        raise CannotStart(f"--trial must name a trial of {record.sweep_id} ({known}), got {number}")
    if found.state != "completed":
        failure = found.result.failure if found.result else None
        why = f" ({failure.kind}: {failure.message})" if failure else ""
        raise CannotStart(
            f"only a completed trial can be exported, got trial {number} of {record.sweep_id}, which is "
            f"{found.state}{why}; {_remedy(record, found)}"
        )
    return found


def _remedy(record: SweepRecord, trial: TrialRecord) -> str:
    if trial.state == "pruned":
        return "it was stopped early; name another, or say --best"
    if trial.state in ("running", "waiting") and record.state == "running":
        return "wait for it"
    return f"run it to its end (resume {record.sweep_id} --trial {trial.proposal.number}), or name another"


# --- what must hold before anything is written ------------------------------------------------------


def _check_adapter(trial: TrialRecord, files: TrialFolder) -> None:
    if trial.proposal.spec.train is None:
        raise CannotStart(
            f"only what was trained can be exported, got trial {trial.proposal.number} without training; "
            f"take its base model itself: {trial.proposal.spec.model.id}"
        )
    if not files.is_final(trial.proposal.spec) or not files.adapter.is_dir():
        raise CannotStart(
            f"the trial's folder must hold the adapter that it ended with, got {files.path} without it; give "
            "the --home that the sweep ran in, or bring the folder back"
        )


def _check_free(folder: Path) -> None:
    try:
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not is_free:
        what = "which has files in it" if folder.is_dir() else "which is a file"
        raise CannotStart(
            f"-o must name a new or empty folder, got {folder}, {what}; name another, or empty it"
        )
    above = next((parent for parent in folder.parents if parent.exists()), folder)
    if not above.is_dir():
        raise CannotStart(
            f"-o must name a new or empty folder, got {folder}, and {above} is a file; name another"
        )


def _unwritable(folder: Path, error: OSError) -> CannotStart:
    return CannotStart(
        f"-o must name a folder that can be made, got {folder}: {error.strerror}; name another"
    )


@contextlib.contextmanager
def _saying_what_stopped_it(folder: Path) -> Iterator[None]:
    """What a person can mend is said as such; the folder is not there then."""
    from torch import OutOfMemoryError

    from sweeps.trial.causes import os_error_number

    try:
        yield
    except OutOfMemoryError as error:
        raise OutOfMemory(
            f"the unquantised model must fit the device to be merged, got {str(error).partition('. ')[0]!r}; "
            "free the GPU, or merge on the CPU (CUDA_VISIBLE_DEVICES= in front of the command)"
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    except Exception as error:
        number = os_error_number(error)  # of a safetensors file, which says it in its text
        if number is None:
            raise
        raise _unwritable(folder, OSError(number, os.strerror(number))) from error


# --- what is written --------------------------------------------------------------------------------


def _fill_adapter(draft: Path, files: TrialFolder) -> tuple[str, ...]:
    for file in sorted(files.adapter.iterdir()):
        shutil.copy(file, draft / file.name)
    return ()


def _fill_merged(draft: Path, trial: TrialRecord, files: TrialFolder) -> tuple[str, ...]:
    """The whole model; the choices made while it was loaded, each with its reason."""
    from sweeps.trial.base import load_base
    from sweeps.trial.merge import merge, save_model

    base = load_base(trial.proposal.spec.model.unquantised())
    merge(base.model, files.adapter)
    save_model(base, draft)
    return tuple(note for note in base.notes if note.startswith(("device", "dtype")))


def _command(record: SweepRecord, home: Home, trial: TrialRecord, asked: Asked) -> str:
    """The command that exports the same again."""
    words = ["export", record.sweep_id, "--trial", str(trial.proposal.number), "-o", str(asked.folder)]
    if asked.merge:
        words.append("--merge")
    return f"python -m sweepsvc {shlex.join([*words, *home.option])}"


# --- the registry -----------------------------------------------------------------------------------


def _check_registry(home: Home, sweep_id: str, trial: TrialRecord, name: str) -> None:
    """Before minutes of merging, not after."""
    from sweepsvc.recorder import check_registry

    if trial.mlflow_run_id is None:
        raise CannotStart(
            f"--register needs the trial's run in MLflow, got trial {trial.proposal.number} without one; "
            f"make the tracker's copy whole first: sync {sweep_id}"
        )
    check_registry(home.tracking_uri, trial.mlflow_run_id, name)


def _register(home: Home, record: SweepRecord, trial: TrialRecord, draft: Path, asked: Asked) -> str:
    from sweepsvc.recorder import register_model

    assert trial.mlflow_run_id is not None, "checked before"
    assert asked.register is not None
    tags = {
        "sweep_id": record.sweep_id,
        "trial": trial.proposal.key,
        "kind": "merged" if asked.merge else "adapter",
        "base_model": trial.proposal.spec.model.id,
    }
    card = (draft / CARD_FILE).read_text(encoding="utf-8")
    return register_model(home.tracking_uri, trial.mlflow_run_id, draft, asked.register, card, tags)
