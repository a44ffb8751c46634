"""How long rows are, as far as that is known before they are tokenised."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sweeps.spec import DataSpec, EvaluateSpec
from sweeps.trial.batches import CALL_TOKENS, rectangles
from sweeps.trial.data import read_rows

# Alpaca with a Llama tokenizer: its known median, shortest and longest row. That one row in 50,000 is the
# longest gives the spread of a log-normal distribution, whose mean of 132 tokens nobody counted.
_ALPACA_ROWS, _ALPACA_MEDIAN, _ALPACA_SHORTEST, _ALPACA_LONGEST = 51_760, 110, 42, 1304
ALPACA_IDS = ("yahma/alpaca-cleaned", "tatsu-lab/alpaca")

# English text in a Llama tokenizer; the beginning and the end of each row.
_CHARACTERS_PER_TOKEN, _FIRST_AND_LAST = 4.0, 2
_QUANTILES = 2000
_STEPS_LOOKED_AT = 16


@dataclass(frozen=True, eq=False)  # known by identity: what is counted of many rows is cached
class RowLengths:
    """Tokens of rows that stand for all `rows` of a data set, and where that is known from."""

    tokens: tuple[int, ...]
    rows: int
    source: str

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.tokens)

    @functools.cached_property
    def mean(self) -> float:
        """Tokens of a row in the mean."""
        return statistics.fmean(self.tokens)

    def cut(self, max_length: int | None) -> RowLengths:
        """The same with longer rows cut."""
        if max_length is None or max_length >= self.longest:
            return self
        return RowLengths(tuple(min(n, max_length) for n in self.tokens), self.rows, self.source)


def row_lengths(data: DataSpec) -> RowLengths:
    """Of a local file by its characters, of Alpaca as published, and of any other hub data set as Alpaca's.

    Raises `BadData` for a file that cannot be read, or with bad rows that are refused.
    """
    return _row_lengths(data.model_dump_json())


@functools.lru_cache(maxsize=64)
def _row_lengths(data_json: str) -> RowLengths:
    data = DataSpec.model_validate_json(data_json)  # a spec with a mapping in it cannot be a key
    if data.path is not None:
        return _of_file(data, data.path).cut(data.max_length)
    known = _alpaca()
    if data.id not in ALPACA_IDS:
        source = f"the rows of {data.id} are taken to be as long as Alpaca's"
        known = RowLengths(known.tokens, known.rows, source)
    return known.cut(data.max_length)


@functools.cache
def _alpaca() -> RowLengths:
    normal = statistics.NormalDist()
    spread = math.log(_ALPACA_LONGEST / _ALPACA_MEDIAN) / normal.inv_cdf(1 - 1 / _ALPACA_ROWS)
    shares = [(number + 0.5) / _QUANTILES for number in range(_QUANTILES)]
    tokens = [round(_ALPACA_MEDIAN * math.exp(spread * normal.inv_cdf(share))) for share in shares]
    inside = tuple(max(_ALPACA_SHORTEST, count) for count in tokens[:-1])
    return RowLengths((*inside, _ALPACA_LONGEST), _ALPACA_ROWS, "")


def _of_file(data: DataSpec, path: str) -> RowLengths:
    texts = [row.prompt + row.response for row in read_rows(data).good]
    tokens = tuple(round(len(text) / _CHARACTERS_PER_TOKEN) + _FIRST_AND_LAST for text in texts)
    source = f"the tokens of {Path(path).name} are estimated from its characters, 4 to a token"
    return RowLengths(tokens, len(tokens), source)


@functools.lru_cache(maxsize=256)
def step_shape(
    lengths: RowLengths, batch_size: int, budget: int, device: str = "cuda"
) -> tuple[float, float]:
    """Micro-batches of one step in the mean, and the tokens in them, padding included, as they are cut on a
    kind of `device`."""
    draw = random.Random(0)
    micro_batches = tokens = 0
    for _ in range(_STEPS_LOOKED_AT):
        rows = draw.choices(lengths.tokens, k=batch_size)
        groups = rectangles(rows, budget, CALL_TOKENS[device])
        micro_batches += len(groups)
        tokens += sum(len(group) * rows[group[0]] for group in groups)  # the longest stands first
    return micro_batches / _STEPS_LOOKED_AT, tokens / _STEPS_LOOKED_AT


@dataclass(frozen=True)
class Scoring:
    """What a model is asked when it is scored: rows of context and choice, their tokens, the longest.

    `computed` are the tokens that are left where what rows share is computed once, as `scoring.py` does. Of
    several benchmarks it is their sum: what two of them share, MC1 and MC2 their choices, counts twice.
    """

    requests: float
    tokens: float
    computed: float
    longest: int


@functools.lru_cache(maxsize=64)
def scoring(spec: EvaluateSpec) -> tuple[Scoring, tuple[str, ...]]:
    """Of all benchmarks whose size is known (`benchmarks.json`), and the names of the others.

    A benchmark whose prompts are changed by `num_fewshot` is one of the others.
    """
    known = {task: facts for task in spec.tasks if (facts := _benchmarks().get(task)) is not None}
    if spec.num_fewshot:
        known = {}
    shares = {task: min(1.0, (spec.limit or math.inf) / facts["documents"]) for task, facts in known.items()}
    total = Scoring(
        requests=sum(facts["requests"] * shares[task] for task, facts in known.items()),
        tokens=sum(facts["tokens"] * shares[task] for task, facts in known.items()),
        computed=sum(facts["computed"] * shares[task] for task, facts in known.items()),
        longest=max((facts["longest"] for facts in known.values()), default=0),
    )
    return total, tuple(task for task in spec.tasks if task not in known)


@functools.cache
def _benchmarks() -> Mapping[str, Mapping[str, int]]:
    file = importlib.resources.files("sweeps") / "benchmarks.json"
    sizes: Mapping[str, Mapping[str, int]] = json.loads(file.read_text("utf-8"))
    return sizes
