"""Whether a cluster can carry a sweep: the stores, files and versions that its machines must share."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from sweeps.checks import values_of_field
from sweeps.errors import CannotStart
from sweeps.overrides import LOCAL_FIELDS, is_local
from sweeps.sweep import Sweep
from sweepsvc.home import Home
from sweepsvc.mirror import Storage
from sweepsvc.protocols import Node
from sweepsvc.urls import masked, sqlite_file

T = TypeVar("T")

VISIBLE_SECONDS = 10.0
"""How long a file that one machine has written may take to appear on another: network file systems keep
what they know of a folder for some seconds."""

_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval")
"""Libraries that a trial's numbers depend on."""


class Machines(Protocol):
    """The machines of a scheduler; see `scheduler.RayScheduler`."""

    def nodes(self) -> Sequence[Node]: ...

    def on_each_node(self, work: Callable[..., T], *arguments: object) -> Mapping[Node, T]: ...


@dataclass(frozen=True)
class Seen:
    """What one machine says: which of the files it lacks, why the home is of no use to it ("" if it is), the
    file that it has left there, and its versions of what a trial stands on."""

    lacks: Sequence[str]
    fault: str
    left: str
    versions: Mapping[str, str]


def check(sweep: Sweep, machines: Machines, home: Home) -> list[str]:
    """Raise `CannotStart` with everything that keeps the machines from running trials of one sweep.

    Asked before anything is started; nothing is left behind. One machine, this one, needs nothing. Gives what
    a person should know all the same.
    """
    if all(node.is_here for node in machines.nodes()):
        if home.storage:
            Storage(home.storage).check()
        return []
    faults, paths = _store_faults(home), local_paths(sweep)
    seen: Mapping[Node, Seen]
    if home.storage:
        storage = Storage(home.storage)
        probe = storage.leave_probe()
        seen = machines.on_each_node(look_into, storage, probe, paths)
        for node, answer in seen.items():
            faults += [*_lacking(node, answer), *([f"{node.name}: {answer.fault}"] if answer.fault else [])]
        try:
            storage.take_probe(probe)
        except CannotStart as error:
            faults += [] if faults else [str(error)]  # a worker that could not answer has said why
    else:
        with _probe(home) as folder:
            seen = machines.on_each_node(look, folder, paths)
            for node, answer in seen.items():
                faults += _node_faults(node, answer, folder)
    if faults:
        raise CannotStart("\n".join(faults))
    return _notes(seen)


def _store_faults(home: Home) -> list[str]:
    """SQLite is a file that one machine writes."""
    faults = []
    for what, url, variable, example in (
        ("study", home.study_url, "SWEEPSVC_STUDY_URL", "postgresql+psycopg2://user@host/study"),
        ("tracker", home.tracking_uri, "MLFLOW_TRACKING_URI", "http://host:5000"),
    ):
        if sqlite_file(url) is not None:
            faults.append(
                f"with several machines the {what} must be a server's, got {masked(url)}; set {variable}, "
                f"such as {example}"
            )
    return faults


@contextlib.contextmanager
def _probe(home: Home) -> Iterator[Path]:
    """A folder in the home in which driver and workers show each other that they see the same."""
    was_there = home.path.is_dir()
    probe = home.path / f".probe-{uuid.uuid4().hex}"
    try:
        probe.mkdir(parents=True)
        (probe / "driver").write_text(probe.name, encoding="utf-8")
    except OSError as error:
        raise CannotStart(
            f"the home must be writable, got {home.path}: {error.strerror}; give another --home"
        ) from error
    try:
        yield probe
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        if not was_there:
            with contextlib.suppress(OSError):  # somebody has put something in it meanwhile
                home.path.rmdir()


def look(probe: Path, paths: Sequence[str]) -> Seen:
    """What this machine sees; runs on each of them."""
    left, fault = f"worker-{uuid.uuid4().hex}", ""
    try:
        if not _appears(probe / "driver"):
            fault = "is not there"
        else:
            (probe / left).write_text(left, encoding="utf-8")
    except OSError as error:
        fault = f"cannot be written: {error.strerror}"
    return Seen(_lacks(paths), fault, left, _versions())


def look_into(storage: Storage, probe: str, paths: Sequence[str]) -> Seen:
    """The same where trials' folders are kept in a storage."""
    fault = ""
    try:
        storage.answer_probe(probe)
    except CannotStart as error:
        fault = str(error)
    return Seen(_lacks(paths), fault, "", _versions())


def _lacks(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


def _appears(file: Path) -> bool:
    until = time.monotonic() + VISIBLE_SECONDS
    while not file.exists():
        if not file.parent.parent.exists() or time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in _VERSIONS}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _node_faults(node: Node, seen: Seen, probe: Path) -> list[str]:
    fault = seen.fault
    if not fault and not _appears(probe / seen.left):
        fault = "is another folder there"
    home, faults = probe.parent, _lacking(node, seen)
    if fault:
        faults.append(
            f"every machine must share the home, got {home}, which {fault} on {node.name}; give a --home in "
            "a folder that all of them mount, or a --storage"
        )
    return faults


def _lacking(node: Node, seen: Seen) -> list[str]:
    return [
        f"every machine must see what the sweep names, got no {path} on {node.name}; put it in a folder that "
        "all of them share, under the same path, or name it by its hub id"
        for path in seen.lacks
    ]


def local_paths(sweep: Sweep) -> list[str]:
    """The files and folders of a machine that any trial of the sweep may name."""
    return [
        value
        for path in LOCAL_FIELDS
        for value in values_of_field(path, sweep.template, sweep.search.space)
        if is_local(path, value)
    ]


def _notes(seen: Mapping[Node, Seen]) -> list[str]:
    """How the machines differ where that may show in the numbers."""
    notes = []
    for name in _VERSIONS:
        by_version: dict[str, list[str]] = {}
        for node, answer in seen.items():
            by_version.setdefault(answer.versions[name], []).append(node.name)
        if len(by_version) > 1:
            listed = "; ".join(f"{version} on {', '.join(names)}" for version, names in by_version.items())
            notes.append(f"the machines have different versions of {name}, and so may the numbers: {listed}")
    return notes
