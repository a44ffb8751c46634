"""Which benchmarks there are, and where: read from lm-eval's task files without importing it.

lm-eval's own index takes six seconds a process, and its import more. Of a task file we need only a few keys
at its top, which takes under one; from them we know the folder that lm-eval has to index for one benchmark.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WANTED = frozenset({"class", "group", "include", "tag", "task"})
_Keys = Mapping[str, tuple[str, ...]]


class Benchmark(NamedTuple):
    """A name that lm-eval knows: a task, a group with its members, or a tag, which has no file of its own."""

    file: Path | None
    members: tuple[str, ...] = ()


def task_names(task_dir: str | None = None) -> frozenset[str]:
    """Every name that `evaluate.tasks` may hold: tasks, groups and tags of lm-eval and of `task_dir`."""
    return frozenset(benchmarks(task_dir))


def benchmarks(task_dir: str | None = None) -> Mapping[str, Benchmark]:
    """What lm-eval knows by each name; what a file in `task_dir` defines takes the place of lm-eval's own."""
    return {**_shipped(), **(_read_folder(Path(task_dir)) if task_dir else {})}


def index_roots(name: str, task_dir: str | None = None) -> list[Path]:
    """The folders that lm-eval must index to know `name` and all that is behind it; none if it is unknown.

    They are the folder of lm-eval that holds all of it, and `task_dir`, in this order: the last one wins.
    """
    known, files = benchmarks(task_dir), set[Path]()
    waiting, seen = [name], {name}
    while waiting:
        benchmark = known.get(waiting.pop())
        if benchmark is None:
            continue  # a group may define a member in place
        if benchmark.file is not None:
            files.add(benchmark.file)
        waiting += set(benchmark.members) - seen
        seen.update(benchmark.members)
    own = Path(task_dir) if task_dir else None
    shipped = [file.parent for file in files if own is None or not file.is_relative_to(own)]
    roots = [Path(os.path.commonpath(shipped))] if shipped else []
    return [*roots, own] if own and len(shipped) < len(files) else roots


@functools.cache
def _shipped() -> Mapping[str, Benchmark]:
    package = importlib.util.find_spec("lm_eval")
    assert package is not None
    assert package.submodule_search_locations
    return _read_folder(Path(package.submodule_search_locations[0]) / "tasks")


def _read_folder(folder: Path) -> dict[str, Benchmark]:
    """As in lm-eval: the first file of a name counts, and one that cannot be read defines none."""
    known: dict[str, Benchmark] = {}
    tagged: dict[str, list[str]] = {}
    read = functools.cache(_read_keys)  # a template is included by many
    for path in sorted(folder.rglob("*.yaml"), key=Path.as_posix):
        try:
            keys = _with_includes(path, read)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
            continue
        if "group" in keys and "class" not in keys:
            for name in keys["group"]:
                known.setdefault(name, Benchmark(path, keys.get("task", ())))
        else:
            for name in keys.get("task", ()):
                known.setdefault(name, Benchmark(path))
                for tag in keys.get("tag", ()):
                    tagged.setdefault(tag, []).append(name)
    for tag, names in tagged.items():
        known.setdefault(tag, Benchmark(None, tuple(names)))
    return known


def _with_includes(path: Path, read: Callable[[Path], _Keys]) -> _Keys:
    """The keys of a task file; its own win over those of the files that it includes."""
    keys = read(path)
    included: dict[str, tuple[str, ...]] = {}
    for name in keys.get("include", ()):
        included |= _with_includes(path.parent / name, read)
    return {**included, **keys}


def _read_keys(path: Path) -> _Keys:
    root = yaml.compose(path.read_bytes(), Loader=_Parser)
    if not isinstance(root, yaml.MappingNode):
        return {}
    return {key.value: tuple(_names(value)) for key, value in root.value if key.value in _WANTED}


def _names(node: yaml.Node) -> Iterator[str]:
    """A name, each name of a list, or the names in a group's member that is written in place."""
    if isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":null"):
        yield node.value
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _names(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value in ("group", "task"):
                yield from _names(value)
