"""A benchmark's rows from local files.

A `task` here is a task of lm-eval that has read its configuration and is about to get its `dataset`: the
rows of each split.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

from sweeps.errors import BadData
from sweeps.spec import EvaluateSpec
from sweeps.trial.readers import read_file

_FILE_FORMATS = {"arrow", "csv", "json", "parquet", "text"}  # as `dataset_path`, these stand for files
_DEV_SPLIT = "rows of <task>_dev.jsonl"
_TASK_FILES = {".yaml", ".yml", ".py", ".jinja", ".txt", ".json"}
NOT_A_FILE = "a folder or a pattern: what it stands for may change"


def take_local_rows(task: Any, spec: EvaluateSpec) -> bool:
    """Give the task its rows from `evaluate.data_dir`, or else from local files that it names itself.

    False if they are to come from elsewhere, which with a `data_dir` is not allowed (`BadData`).
    """
    given = None if spec.data_dir is None else Path(spec.data_dir) / f"{task.config.task}.jsonl"
    if given and given.exists():
        _take_given_rows(task, given, spec.num_fewshot)
    elif _names_local_files(task):
        _take_named_files(task)
    elif given:
        raise BadData(
            f"every benchmark must have its rows in evaluate.data_dir, got no file {given}; "
            "add it, or drop the benchmark"
        )
    else:
        return False
    task.config.process_docs = _once(task.config.process_docs)
    task.fewshot_cfg.process_docs = _once(task.fewshot_cfg.process_docs)
    return True


def local_files(task: Any, spec: EvaluateSpec) -> list[Path]:
    """Every file that decides which rows `take_local_rows` gives, one that does not exist included."""
    files = []
    if spec.data_dir is not None:
        given = Path(spec.data_dir) / f"{task.config.task}.jsonl"
        files += [given, _dev_file(given)]
    if _names_local_files(task):
        named = _absolute(task.config.dataset_kwargs["data_files"], _task_folder(task))
        files += [Path(file) for file in _flat(named)]
    return files


def contents(files: Iterable[Path]) -> Mapping[Path, str | None]:
    """A digest of each file's content, None where there is none."""
    return {file: _content(file) for file in files}


def _content(file: Path) -> str | None:
    if file.is_dir() or any(sign in str(file) for sign in "*?["):
        return NOT_A_FILE
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None


def task_files(spec: EvaluateSpec) -> set[Path]:
    """The task files of `task_dir`, and the code and templates beside them."""
    if spec.task_dir is None:
        return set()
    return {file for file in Path(spec.task_dir).rglob("*") if file.suffix in _TASK_FILES}


def fewshot_count(own: int | None, wanted: int | None) -> int:
    """How many few-shot rows a task gets, as lm-eval has it: a task that says 0 itself keeps it."""
    return own or 0 if wanted is None or own == 0 else wanted


def _take_given_rows(task: Any, file: Path, num_fewshot: int | None) -> None:
    """Score the rows of `file`; few-shot rows are those of `<task>_dev.jsonl` beside it.

    Without that file they are drawn from the scored rows, if that is what the task does anyway.
    """
    config, fewshot = task.config, task.fewshot_cfg
    scored = config.test_split or config.validation_split
    drawn_from = fewshot.split or config.training_split or config.validation_split
    named = {config.training_split, config.validation_split, config.test_split, fewshot.split} - {None}
    task.dataset = dict.fromkeys(named, _read_rows(file))  # also a split that is not used must be there
    dev = _dev_file(file)
    if dev.exists():
        task.dataset[_DEV_SPLIT] = _read_rows(dev)
        fewshot.split = _DEV_SPLIT
    elif (
        drawn_from not in (None, scored)
        and not (fewshot.samples and not fewshot.split)
        and fewshot_count(config.num_fewshot, num_fewshot)
    ):
        raise BadData(
            f"few-shot rows of {config.task} must be in {dev}, got no such file; "
            "add it, or set evaluate.num_fewshot: 0"
        )


def _names_local_files(task: Any) -> bool:
    files = (task.config.dataset_kwargs or {}).get("data_files")
    return task.config.dataset_path in _FILE_FORMATS and bool(files) and not _is_remote(files)


def _take_named_files(task: Any) -> None:
    """The files that a task file names; a relative path starts at the folder of the task file."""
    config = task.config
    files = _absolute(config.dataset_kwargs["data_files"], _task_folder(task))
    settings = {**config.dataset_kwargs, "data_files": files}
    settings.pop("trust_remote_code", None)  # as lm-eval does: nothing here runs code
    # The library's cache tells files apart by path and time alone, and so may hold rows of an older content.
    with tempfile.TemporaryDirectory(prefix="sweeps-rows-") as cache:
        settings |= {"cache_dir": cache, "keep_in_memory": True}
        task.dataset = datasets.load_dataset(config.dataset_path, config.dataset_name, **settings)


def _once(process_docs: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """`process_docs`, which gives the same documents whenever it is asked.

    lm-eval asks five times, for the prompts and again for the judgement, and some tasks shuffle choices.
    From the hub it is the library's cache on disk that gives the same documents; rows in memory have none.
    """
    if process_docs is None:
        return None
    done: dict[int, Any] = {}

    @functools.wraps(process_docs)
    def processed(rows: Any) -> Any:
        if id(rows) not in done:
            done[id(rows)] = process_docs(rows)
        return done[id(rows)]

    return processed


def _dev_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}_dev.jsonl")


def _task_folder(task: Any) -> Path:
    return Path((task.config.metadata or {}).get("config_source", "")).parent


def _flat(files: Any) -> list[str]:
    if isinstance(files, str):
        return [files]
    parts = files.values() if isinstance(files, Mapping) else files
    return [file for part in parts for file in _flat(part)]


def _is_remote(files: Any) -> bool:
    if isinstance(files, str):
        return "://" in files
    return any(map(_is_remote, files.values() if isinstance(files, Mapping) else files))


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, str):
        return str((folder / files).absolute())
    if isinstance(files, Mapping):
        return {split: _absolute(file, folder) for split, file in files.items()}
    return [_absolute(file, folder) for file in files]


def _read_rows(file: Path) -> datasets.Dataset:
    """The rows of a JSONL file with the columns of all of them, in memory: there is no cache to go stale."""
    rows = read_file(file)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise BadData(f"{file} must hold one JSON object a line, at least one")
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return datasets.Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except (TypeError, ValueError) as error:
        raise BadData(f"a column of {file} must hold values of one type: {error}") from error
