"""Instruction data: a file or a hub dataset -> rows -> prompts -> token rows."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sweeps.errors import BadData, DownloadFailed
from sweeps.spec import DataSpec
from sweeps.trial.causes import hub_not_reached

SPLIT_SEED = 42
"""Fixes the held-out rows whatever the trial's seed is, so that all trials and repeats share them."""

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that a trial needs."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Row:
    """One instruction with its response; `input` may be empty."""

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        template = WITH_INPUT if self.input else WITHOUT_INPUT
        return template.format(instruction=self.instruction, input=self.input)


@dataclass(frozen=True)
class TokenRow:
    """The token ids of one row, beginning-of-text and end-of-text included.

    The first `given` of them are never predicted: the first token alone, or the whole prompt.
    """

    ids: array[int]
    given: int = 1

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> int:
        """How many tokens the loss is taken over."""
        return len(self.ids) - self.given


@dataclass(frozen=True)
class TokenData:
    """The rows that a trial trains on and those it is kept from."""

    train: Sequence[TokenRow]
    held_out: Sequence[TokenRow]
    truncated: int
    digest: str


def read_rows(spec: DataSpec) -> list[Row]:
    """Every row of the dataset; `BadData` names the first bad one by its number, from 1."""
    source = spec.path or spec.id or ""
    raw = read_file(Path(spec.path)) if spec.path else _read_hub(source, spec.split)
    rows = [_checked(number, columns, source) for number, columns in enumerate(raw, start=1)]
    if not rows:
        raise BadData(f"at least one row is needed, got none in {source}")
    return rows


def tokenize(rows: Sequence[Row], spec: DataSpec, tokenizer: Tokenizer) -> TokenData:
    """BOS, prompt, response, EOS of every row, cut at `max_length`, split into train and held out."""
    prompts = [row.prompt for row in rows]
    whole = _encoded([row.prompt + row.output for row in rows], tokenizer)
    if spec.loss_on == "response":
        given = [_common(*pair) for pair in zip(_encoded(prompts, tokenizer), whole, strict=True)]
    else:
        given = [1] * len(rows)
    kept = [TokenRow(ids[: spec.max_length], count) for ids, count in zip(whole, given, strict=True)]
    for number, row in enumerate(kept, start=1):
        if row.predicted < 1:
            raise BadData(
                f"row {number}: a token must remain to predict, got a prompt of {row.given} tokens with "
                f"data.max_length={spec.max_length}; raise max_length"
            )
    truncated = sum(len(row) < len(ids) for row, ids in zip(kept, whole, strict=True))
    train, held_out = _split(kept, spec.held_out)
    return TokenData(train, held_out, truncated, _digest(train, held_out))


def _encoded(texts: list[str], tokenizer: Tokenizer) -> list[array[int]]:
    """BOS, text, EOS, as far as the tokenizer has them."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    token_lists = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [array("i", [*before, *tokens, *after]) for tokens in token_lists]


def _common(prompt: array[int], whole: array[int]) -> int:
    """How many tokens both begin with: the prompt, less a token that merged with the response; at least 1."""
    differs = (number for number, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1])
    return max(1, next(differs, min(len(prompt), len(whole))))


def _split(rows: Sequence[TokenRow], held_out: float) -> tuple[list[TokenRow], list[TokenRow]]:
    """`round(held_out * rows)` rows at random for the held-out loss, at least one if any is asked for."""
    count = max(1, round(held_out * len(rows))) if held_out else 0
    if count >= len(rows):
        raise BadData(
            f"rows must remain to train on, got {len(rows)} rows with data.held_out={held_out}; "
            "lower held_out or add rows"
        )
    chosen = set(random.Random(SPLIT_SEED).sample(range(len(rows)), count))
    return (
        [row for number, row in enumerate(rows) if number not in chosen],
        [row for number, row in enumerate(rows) if number in chosen],
    )


def _digest(*parts: Iterable[TokenRow]) -> str:
    """Of the very tokens in their order, with the split: 16 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        for row in part:
            state.update(array("i", [len(row), row.given]).tobytes())
            state.update(row.ids.tobytes())
        state.update(b"|")
    return state.hexdigest()[:16]


def _checked(number: int, columns: Any, source: str) -> Row:
    where = f"row {number} of {source}"
    if not isinstance(columns, Mapping):
        raise BadData(f"{where} must be an object, got {type(columns).__name__}")
    return Row(
        instruction=_text(columns, "instruction", where),
        input=_text(columns, "input", where) if columns.get("input") else "",
        output=_text(columns, "output", where),
    )


def _text(columns: Mapping[str, Any], name: str, where: str) -> str:
    value = columns.get(name)
    if value is None:
        raise BadData(f"{where} must have a column {name}, got {sorted(columns)}")
    if not isinstance(value, str):
        raise BadData(f"{where}: {name} must be text, got {type(value).__name__}")
    if not value.strip():
        raise BadData(f"{where}: {name} must not be empty")
    return value


def read_file(path: Path) -> list[Any]:
    """The rows of a JSON, JSONL or CSV file, as they stand; `BadData` where it is missing or malformed."""
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BadData(f"a data file ends in .json, .jsonl or .csv, got {path}")
    try:
        return reader(path)
    except OSError as error:
        raise BadData(f"the data file {path} must be readable: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadData(f"the data file {path} must be UTF-8: {error}") from error


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
            rows = list(csv.DictReader(lines, strict=True))
        except csv.Error as error:
            raise BadData(f"{path} must be CSV with a header: {error}") from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise BadData(
                f"row {number} of {path} must have as many values as the header, got more: {row[None]}; "
                "put a text with commas in quotes"
            )
    return rows


def _read_hub(dataset: str, split: str) -> list[Any]:
    from datasets import load_dataset

    try:
        return list(load_dataset(dataset, split=split))
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
