"""What a sweep trains on, looked at before it is paid for: counts, token lengths, prompts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.errors import CannotStart, TrialError
from sweeps.space import Space, field_value
from sweeps.spec import FIELDS, DataSpec, ModelSpec, TrialSpec
from sweeps.sweep import Sweep, dependencies
from sweeps.trial.data import (
    SPLIT_SEED,
    BadRow,
    Row,
    Rows,
    TokenRow,
    arrange,
    held_out_places,
    read_rows,
    skipped_text,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_BARS = 12
MOST_DISTINCT = 1000
_BAR_WIDTH = 40
_LONGEST_SHOWN = 2000
_SHOWN_PROMPTS = 3


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows that are used, before any is cut; `truncated` rows are longer than `max_length`."""

    lengths: Sequence[int]
    truncated: int
    digest: str

    @property
    def truncated_share(self) -> float:
        return self.truncated / len(self.lengths)

    def histogram(self) -> list[tuple[int, int, int]]:
        """`(low, high, rows)`, high included: bars of equal, round widths over all lengths."""
        low, high = min(self.lengths), max(self.lengths)
        width = next(width for width in _round_numbers() if high // width - low // width < MOST_BARS)
        counts = [0] * (high // width - low // width + 1)
        for length in self.lengths:
            counts[length // width - low // width] += 1
        starts = itertools.count(low // width * width, width)
        return [(start, start + width - 1, rows) for start, rows in zip(starts, counts, strict=False)]


def _round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    return (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))


@dataclass(frozen=True)
class DataView:
    """The data of a sweep's first trial, and how the data of its other trials differs.

    `lengths` is None, and `trouble` says why, where the model's tokenizer cannot be had. `notes` is what a
    trial would say of the cache of tokens, where that cannot be used.
    """

    sweep: str
    model: str
    data: DataSpec
    others: Sequence[str]
    train: int
    held_out: int
    skipped: Sequence[BadRow]
    examples: Sequence[tuple[Row, int | None]]
    lengths: Lengths | None
    trouble: str | None
    notes: Sequence[str] = ()

    @property
    def rows(self) -> int:
        """Every row of the dataset, the skipped ones included."""
        return self.train + self.held_out + len(self.skipped)


def look(sweep: Sweep) -> DataView:
    """Read and tokenise the data as a trial does. Raises `BadData` or `DownloadFailed` where a trial would,
    `CannotStart` for a sweep that trains nothing."""
    first, others = _distinct(sweep)
    data = first.data
    rows = read_rows(data)
    encoded, trouble, notes = _encoded(rows, first)
    examples = [
        (rows.good[place], len(encoded[place]) if encoded else None) for place in _examples(len(rows.good))
    ]
    if encoded is None:
        held_out = len(held_out_places(len(rows.good), data.held_out))
        train, skipped, lengths = len(rows.good) - held_out, rows.skipped, None
    else:
        arranged = arrange(rows, encoded, data)
        train, held_out, skipped = len(arranged.train), len(arranged.held_out), arranged.skipped
        dropped = {row.number for row in skipped}
        used = [
            len(tokens) for row, tokens in zip(rows.good, encoded, strict=True) if row.number not in dropped
        ]
        lengths = Lengths(used, arranged.truncated, arranged.digest)
    return DataView(
        sweep.name, first.model.id, data, others, train, held_out, skipped, examples, lengths, trouble, notes
    )


def _examples(count: int) -> list[int]:
    """The first row, the last one, and what lies between them."""
    return sorted({round(part * (count - 1) / (_SHOWN_PROMPTS - 1)) for part in range(_SHOWN_PROMPTS)})


def _encoded(rows: Rows, spec: TrialSpec) -> tuple[list[TokenRow] | None, str | None, tuple[str, ...]]:
    """The rows in tokens; or None, with the reason. And notes of the cache."""
    try:
        tokenizer = _tokenizer(spec.model)
    except TrialError as error:
        return None, f"the tokenizer of {spec.model.id} cannot be had, so no token is counted: {error}", ()
    from sweeps.trial.tokencache import encoded_once

    encoded, notes = encoded_once(rows.good, spec.data.loss_on, tokenizer)
    return encoded, None, notes


def _tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer of the model's files. A GGUF file is made safetensors first, as for a trial."""
    from sweeps.trial.source import FolderModel, GgufModel, locate, read_tokenizer, unloadable

    source = locate(spec)
    if isinstance(source, GgufModel):
        from sweeps.trial.gguf import converted

        try:
            source = FolderModel(converted(source.path))
        except TrialError:
            raise
        except Exception as error:  # transformers raises a dozen kinds for a file that is none
            raise unloadable(spec, error) from error
    return read_tokenizer(source, spec)


# --- the data of a sweep ----------------------------------------------------------------------------

_TOKENS = ("model.id", "model.revision")
"""What decides of the tokens, beside the data section."""


def _distinct(sweep: Sweep) -> tuple[TrialSpec, list[str]]:
    """The first trial of the sweep, and what differs for each other data section or tokenizer."""
    varied = _varied(sweep)
    first = sweep.resolve(sweep.search.space.first()).spec
    if first.train is None:
        raise CannotStart("data is for trials that train, got train: none; there is none to show")
    paths = [path for path in FIELDS if path.startswith("data.") or path in _TOKENS]
    seen = {_key(first, paths)}
    others = []
    for picks in itertools.islice(varied.combinations(), MOST_DISTINCT):
        spec = sweep.resolve({**sweep.search.space.first(), **picks}).spec
        if (key := _key(spec, paths)) not in seen:
            seen.add(key)
            changed = [path for path in paths if field_value(spec, path) != field_value(first, path)]
            others.append(", ".join(f"{path}={field_value(spec, path)}" for path in changed))
    return first, others


def _key(spec: TrialSpec, paths: Sequence[str]) -> str:
    return repr([field_value(spec, path) for path in paths])


def _varied(sweep: Sweep) -> Space:
    """The searched fields that the data or its tokens follow from; of a range without steps, its low end."""
    template, space = sweep.template, sweep.search.space
    paths = {path for path in (*template, *space) if path.startswith("data.") or path in _TOKENS}
    paths = paths.union(*(dependencies(path, template, space) for path in paths))
    return space.only(path for path in paths if path in space and space[path].size is not None)


# --- what is shown ----------------------------------------------------------------------------------


def data_json(view: DataView) -> Mapping[str, Any]:
    """The form of `data --json`. `tokens` is null where the tokenizer cannot be had, which `trouble` says."""
    lengths = view.lengths
    return {
        "sweep": view.sweep,
        "model": view.model,
        "data": view.data.model_dump(mode="json"),
        "others": list(view.others),
        "rows": view.rows,
        "train": view.train,
        "held_out": view.held_out,
        "split_seed": SPLIT_SEED,
        "skipped": [{"number": row.number, "reason": row.reason} for row in view.skipped],
        "digest": lengths.digest if lengths else None,
        "tokens": _tokens_json(lengths) if lengths else None,
        "trouble": view.trouble,
        "notes": list(view.notes),
        "prompts": [
            {"number": row.number, "prompt": row.prompt, "response": row.response, "tokens": tokens}
            for row, tokens in view.examples
        ],
    }


def _tokens_json(lengths: Lengths) -> Mapping[str, Any]:
    return {
        "total": sum(lengths.lengths),
        "shortest": min(lengths.lengths),
        "median": statistics.median(lengths.lengths),
        "longest": max(lengths.lengths),
        "truncated": lengths.truncated,
        "truncated_share": lengths.truncated_share,
        "histogram": [{"low": low, "high": high, "rows": rows} for low, high, rows in lengths.histogram()],
    }


def shown(view: DataView) -> list[RenderableType]:
    """The same for a terminal."""
    from rich.text import Text

    source = view.data.path or f"{view.data.id} (split {view.data.split})"
    counts = f"{view.rows:,} rows: {view.train:,} to train on, {view.held_out:,} held out"
    head = [
        f"{view.sweep}: {source}",
        f"{counts} (split seed {SPLIT_SEED}), {skipped_text(view.skipped)}",
    ]
    if view.others:
        several = "trials with other data" if len(view.others) > 1 else "trial with other data"
        head.append(f"{len(view.others)} more {several}: {'; '.join(view.others)}")
    parts: list[RenderableType] = [Text("\n".join([*head, *view.notes]))]
    parts += _tokens_shown(view.lengths, view) if view.lengths else [Text(str(view.trouble))]
    for row, tokens in view.examples:
        size = f", {tokens:,} tokens" if tokens is not None else ""
        parts += [Text(f"\n--- row {row.number}{size}", style="bold"), _prompt(row)]
    return parts


def _tokens_shown(lengths: Lengths, view: DataView) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    counts = lengths.lengths
    limit = "no max_length" if view.data.max_length is None else f"max_length {view.data.max_length:,}"
    facts = (
        f"{sum(counts):,} tokens by the tokenizer of {view.model}: shortest {min(counts):,}, median "
        f"{statistics.median(counts):,.10g}, longest {max(counts):,}\n"
        f"{lengths.truncated:,} rows cut, {lengths.truncated_share:.1%} ({limit}); digest {lengths.digest}"
    )
    bars = lengths.histogram()
    most = max(rows for _, _, rows in bars)
    table = Table("tokens", "rows", "", box=None, padding=(0, 1))
    for column in table.columns[:2]:
        column.justify = "right"
    for low, high, rows in bars:
        bar = "█" * max(round(rows / most * _BAR_WIDTH), 1 if rows else 0)
        table.add_row(f"{low}" if low == high else f"{low}-{high}", f"{rows:,}", bar)
    return [Text(facts), table]


def _prompt(row: Row) -> RenderableType:
    from rich.text import Text

    return Text.assemble(_printable(row.prompt), (_printable(row.response), "green"))


def _printable(text: str) -> str:
    """Without what would steer a terminal, and cut where it is long."""
    kept = "".join(one if one.isprintable() or one in "\n\t" else "\ufffd" for one in text[:_LONGEST_SHOWN])
    more = len(text) - _LONGEST_SHOWN
    return f"{kept}... ({more:,} more characters)" if more > 0 else kept
