"""Instruction data: a file or a hub dataset -> rows -> prompts -> token rows."""

from __future__ import annotations

import hashlib
import itertools
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from sweeps.errors import BadData
from sweeps.prompts import RESPONSE, Prompt, read_prompt
from sweeps.spec import DataSpec
from sweeps.trial.readers import OVERFULL, read_file, read_hub
from sweeps.wording import shown

SPLIT_SEED = 42
"""Fixes the held-out rows whatever the trial's seed is, so that all trials and repeats share them."""

_MOST_NAMED = 5
_MOST_COLUMNS = 12


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that a trial needs."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Row:
    """One prompt with the response that follows it; `number` is the row's in the dataset, from 1."""

    number: int
    prompt: str
    response: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, by its number from 1, with the law that it breaks."""

    number: int
    reason: str


@dataclass(frozen=True)
class Rows:
    """Every row of a dataset: those that can be used, and those that were skipped as bad."""

    good: Sequence[Row]
    skipped: Sequence[BadRow] = ()


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
    """The rows that a trial trains on and those it is kept from; `skipped` are in neither."""

    train: Sequence[TokenRow]
    held_out: Sequence[TokenRow]
    truncated: int
    digest: str
    skipped: Sequence[BadRow] = ()

    @property
    def note(self) -> str:
        """What a trial says of its data: counts, split, digest."""
        return (
            f"data: {len(self.train)} rows to train on, {len(self.held_out)} held out (split seed "
            f"{SPLIT_SEED}), {self.truncated} cut at max_length, {skipped_text(self.skipped)} "
            f"(digest {self.digest})"
        )


def skipped_text(skipped: Sequence[BadRow]) -> str:
    """`2 bad rows skipped: row 3 (output must not be empty), row 8 (...)`."""
    if not skipped:
        return "no row skipped"
    named = [f"row {row.number} ({row.reason})" for row in skipped[:_MOST_NAMED]]
    more = ["..."] if len(skipped) > _MOST_NAMED else []
    return f"{len(skipped)} bad row{'s' if len(skipped) > 1 else ''} skipped: {', '.join([*named, *more])}"


# --- rows -------------------------------------------------------------------------------------------


def read_rows(spec: DataSpec) -> Rows:
    """Every row of the dataset. Where bad rows are refused, `BadData` names them by their numbers, from 1."""
    source = spec.path or spec.id or ""
    raw = read_file(Path(spec.path)) if spec.path else read_hub(source, spec.split)
    prompt = read_prompt(spec.prompt)
    read = [_row(number, columns, prompt, spec.columns) for number, columns in enumerate(raw, start=1)]
    good = [row for row in read if isinstance(row, Row)]
    bad = [row for row in read if isinstance(row, BadRow)]
    _refuse(bad, spec, source)
    _need_some(good, bad, source)
    return Rows(good, bad)


def _need_some(good: Sequence[Any], bad: Sequence[BadRow], source: str) -> None:
    if not good:
        why = f" that can be used: row {bad[0].number}: {bad[0].reason}" if bad else ""
        raise BadData(f"at least one row is needed, got none in {source}{why}")


def _refuse(bad: Sequence[BadRow], spec: DataSpec, source: str) -> None:
    if not bad or spec.on_bad_row == "skip":
        return
    others = [str(row.number) for row in bad[1 : 1 + _MOST_NAMED]] + ["..."] * (len(bad) > 1 + _MOST_NAMED)
    count = f" ({len(bad)} rows are bad, also {', '.join(others)})" if others else ""
    raise BadData(
        f"row {bad[0].number} of {source}: {bad[0].reason}{count}; mend the data, or write "
        "data.on_bad_row: skip"
    )


def _row(number: int, columns: Any, prompt: Prompt, named: Mapping[str, str]) -> Row | BadRow:
    try:
        values = _values(columns, prompt, named)
    except _Broken as error:
        return BadRow(number, str(error))
    return Row(number, prompt.render(values), values[RESPONSE])


class _Broken(Exception):
    """The law that one row breaks."""


def _values(columns: Any, prompt: Prompt, named: Mapping[str, str]) -> dict[str, str]:
    """The text of each field of the prompt, and of the response."""
    if not isinstance(columns, Mapping):
        raise _Broken(f"a row must be an object, got {type(columns).__name__}")
    if OVERFULL in columns:
        raise _Broken(
            f"a row must have as many values as the header, got more: {shown(columns[OVERFULL])}; put a "
            "text with commas in quotes"
        )
    values = {}
    for field in (*prompt.fields, RESPONSE):
        column = named.get(field, field)
        is_optional = field == prompt.optional
        if is_optional and field not in named and column not in columns:
            values[field] = ""
            continue
        text = values[field] = _text(columns, column, may_be_null=field not in (RESPONSE, *prompt.filled))
        must_be_filled = field in (RESPONSE, *prompt.filled) or (is_optional and text)
        if must_be_filled and not text.strip():
            raise _Broken(f"{column} must not be empty")
    if not any(values[field].strip() for field in prompt.fields):
        raise _Broken(f"one of {', '.join(prompt.fields)} must not be empty")
    return values


def _text(columns: Mapping[Any, Any], column: str, may_be_null: bool) -> str:
    if column not in columns:
        names = ", ".join(map(str, itertools.islice(columns, _MOST_COLUMNS))) or "none"
        more = ", ..." if len(columns) > _MOST_COLUMNS else ""
        raise _Broken(
            f"a row must have a column {column}, got {names}{more}; name the dataset's own in data.columns"
        )
    value = columns[column]
    if value is None and may_be_null:
        return ""
    if not isinstance(value, str):
        raise _Broken(f"{column} must be text, got {'null' if value is None else type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Broken(f"{column} must be Unicode, got half of a character") from None
    return value


# --- tokens -----------------------------------------------------------------------------------------


def tokenize(rows: Rows, spec: DataSpec, tokenizer: Tokenizer) -> TokenData:
    """BOS, prompt, response, EOS of every row, cut at `max_length`, split into train and held out."""
    return arrange(rows, encode(rows.good, spec.loss_on, tokenizer), spec)


def encode(rows: Sequence[Row], loss_on: Literal["all", "response"], tokenizer: Tokenizer) -> list[TokenRow]:
    """Every row whole, in the order of the dataset."""
    whole = _encoded([row.prompt + row.response for row in rows], tokenizer)
    if loss_on == "all":
        return [TokenRow(ids) for ids in whole]
    prompts = _encoded([row.prompt for row in rows], tokenizer)
    return [TokenRow(ids, _common(prompt, ids)) for prompt, ids in zip(prompts, whole, strict=True)]


def arrange(rows: Rows, encoded: Sequence[TokenRow], spec: DataSpec) -> TokenData:
    """Cut the encoded rows at `max_length` and split them. A row that keeps no token to predict is bad."""
    kept, bad, truncated = [], list(rows.skipped), 0
    for row, tokens in zip(rows.good, encoded, strict=True):
        cut = tokens if spec.max_length is None else TokenRow(tokens.ids[: spec.max_length], tokens.given)
        if cut.predicted < 1:
            bad.append(BadRow(row.number, _nothing_left(cut, spec)))
            continue
        kept.append(cut)
        truncated += len(cut) < len(tokens)
    bad.sort(key=lambda row: row.number)
    source = spec.path or spec.id or ""
    _refuse(bad, spec, source)
    _need_some(kept, bad, source)
    train, held_out = _split(kept, spec.held_out)
    return TokenData(train, held_out, truncated, _digest(train, held_out), bad)


def _nothing_left(row: TokenRow, spec: DataSpec) -> str:
    return (
        f"a token must remain to predict, got a prompt of {row.given} tokens with "
        f"data.max_length={spec.max_length}; raise max_length"
    )


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


def held_out_places(count: int, share: float) -> set[int]:
    """The places, of `count` rows, that are kept from training: at random, but the same every time.

    `round(share * count)` of them, at least one if any is asked for. Raises `BadData` if no other remains.
    """
    chosen = max(1, round(share * count)) if share else 0
    if chosen >= count:
        raise BadData(
            f"rows must remain to train on, got {count} rows with data.held_out={share}; "
            "lower held_out or add rows"
        )
    return set(random.Random(SPLIT_SEED).sample(range(count), chosen))


def _split(rows: Sequence[TokenRow], held_out: float) -> tuple[list[TokenRow], list[TokenRow]]:
    chosen = held_out_places(len(rows), held_out)
    return (
        [row for place, row in enumerate(rows) if place not in chosen],
        [row for place, row in enumerate(rows) if place in chosen],
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
