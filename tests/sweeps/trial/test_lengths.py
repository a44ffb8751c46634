"""How long rows are taken to be, and what that makes of a step and of a benchmark."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from sweeps.errors import BadData
from sweeps.prompts import read_prompt
from sweeps.spec import ARTICLE_TASKS, DataSpec, EvaluateSpec
from sweeps.trial.lengths import RowLengths, row_lengths, scoring, step_shape


def test_alpaca_has_its_published_lengths() -> None:
    rows = row_lengths(DataSpec())
    assert (rows.longest, min(rows.tokens), rows.source) == (1304, 42, "")
    assert statistics.median(rows.tokens) == 110
    assert 120 < rows.mean < 140


def test_rows_are_no_longer_than_max_length() -> None:
    assert row_lengths(DataSpec(max_length=512)).longest == 512
    assert row_lengths(DataSpec(max_length=5000)).longest == 1304


def test_the_rows_of_another_hub_data_set_are_taken_to_be_alpacas_and_that_is_said() -> None:
    rows = row_lengths(DataSpec(id="someone/something"))
    assert rows.longest == 1304
    assert rows.source == "the rows of someone/something are taken to be as long as Alpaca's"


def test_the_rows_of_a_file_are_as_long_as_their_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["a" * 400, "b" * 40]
    rows = [{"instruction": text, "input": "", "output": "c" * 40} for text in texts]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    lengths = row_lengths(DataSpec(path=str(path)))
    around = len(read_prompt("alpaca").render({"instruction": "", "input": ""})) + 40
    assert (lengths.tokens, lengths.rows) == (tuple(round((around + n) / 4) + 2 for n in (400, 40)), 2)
    assert "rows.jsonl are estimated from its characters" in lengths.source


def test_a_file_that_cannot_be_read_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(BadData):
        row_lengths(DataSpec(path=str(tmp_path / "none.json")))


def test_a_small_budget_makes_a_micro_batch_of_each_row_and_no_padding() -> None:
    rows = RowLengths((10, 20, 30), 3, "")
    micro_batches, tokens = step_shape(rows, 8, 1)
    assert micro_batches == 8
    assert 8 * 10 < tokens < 8 * 30
    assert step_shape(rows, 8, 8 * 30)[0] == 1
    assert step_shape(rows, 8, 8 * 30)[1] > tokens  # all as long as the longest


def test_on_a_cpu_rows_are_cut_as_a_trial_there_cuts_them() -> None:
    """A call costs less there, so that more of them pad less."""
    on_cuda, on_cpu = (step_shape(row_lengths(DataSpec()), 64, 4096, device) for device in ("cuda", "cpu"))
    assert on_cpu[0] > on_cuda[0]
    assert on_cpu[1] < on_cuda[1]


def test_the_articles_benchmarks_are_about_two_million_tokens() -> None:
    asked, unknown = scoring(EvaluateSpec())
    assert unknown == ()
    assert 2.0e6 < asked.tokens < 2.3e6
    assert asked.longest == 233
    assert 5 < asked.tokens / asked.computed < 15  # most of them are shared


def test_a_limit_asks_for_that_share_of_each_benchmark() -> None:
    whole, _ = scoring(EvaluateSpec(tasks=("arithmetic_2ds",)))
    half, _ = scoring(EvaluateSpec(tasks=("arithmetic_2ds",), limit=1000))
    more, _ = scoring(EvaluateSpec(tasks=("arithmetic_2ds",), limit=10_000))
    assert half.requests == whole.requests / 2 == 1000
    assert more == whole


def test_benchmarks_that_nobody_counted_are_named() -> None:
    assert scoring(EvaluateSpec(tasks=("facts", "arithmetic_2ds")))[1] == ("facts",)
    assert scoring(EvaluateSpec(num_fewshot=5))[1] == ARTICLE_TASKS
