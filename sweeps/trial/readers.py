"""Rows as they stand in a file or in a hub dataset: mappings from columns to values, not yet checked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from sweeps.errors import BadData, DownloadFailed
from sweeps.trial.causes import hub_not_reached

OVERFULL = None
"""The key under which a row of a CSV file holds the values that have no column."""


def read_file(path: Path) -> list[Any]:
    """The rows of a file, by its suffix; `BadData` where it is missing or cannot be read as a whole."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise BadData(f"a data file ends in one of {known}, got {path}; convert it, or give it its suffix")
    try:
        return reader(path)
    except OSError as error:
        raise BadData(f"the data file {path} must be readable: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadData(f"the data file {path} must be UTF-8: {error}") from error
    except RecursionError as error:
        raise BadData(f"the data file {path} is nested too deeply; a row is one object of texts") from error


def _read_json(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadData(
            f"{path} must be one JSON list: {error}; a file with an object a line is .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise BadData(f"{path} must be one JSON list of rows, got {type(rows).__name__}")
    return rows


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise BadData(f"{path}:{number} must be one JSON object: {error}") from error
    return rows


def _read_csv(path: Path) -> list[Any]:
    csv.field_size_limit(2**31 - 1)  # the library's own is 128 KiB a field
    with path.open(encoding="utf-8-sig", newline="") as lines:  # Excel puts a mark before the first column
        try:
            return list(csv.DictReader(lines, restkey=OVERFULL, strict=True))
        except csv.Error as error:
            raise BadData(f"{path} must be CSV with a header: {error}") from error


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as file:
            return parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise BadData(f"{path} must be a whole Parquet file: {' '.join(str(error).split())[:200]}") from error


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def read_hub(dataset: str, split: str) -> list[Any]:
    """The rows of one split of a hub dataset. Raises `DownloadFailed` where the hub does not answer."""
    from datasets import load_dataset

    try:
        return load_dataset(dataset, split=split).to_list()
    except Exception as error:  # the library raises a dozen kinds, all of which mean: no data
        if hub_not_reached(error):
            raise DownloadFailed(
                f"the hub must be reached for the dataset {dataset} (split {split}), and was not; try again "
                f"later, or name a local file in data.path ({type(error).__name__}: {error})"
            ) from error
        raise BadData(
            f"the dataset {dataset} (split {split}) must load from the hub or its cache: "
            f"{type(error).__name__}: {error}; a local file goes into data.path"
        ) from error
