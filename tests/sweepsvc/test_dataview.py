"""`data FILE`: what a sweep trains on, as a table and as JSON; what is said where it cannot be had."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sweepsvc import cli
from sweepsvc.dataview import Lengths
from tests.tiny import alpaca_rows

SWEEP = """\
name: demo
trial:
  model: {id: MODEL, quantization: none}
  data: {path: rows.json, held_out: 0.25, on_bad_row: skip}
  evaluate: {tasks: [blimp_causative]}
search:
  sampler: grid
  space:
    lora.r: [8, 256]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWEEPSVC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    rows: list[Any] = [*alpaca_rows(), {"instruction": "q", "output": ""}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "demo.yaml").write_text(SWEEP.replace("MODEL", str(tiny_model_dir)))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sweepsvc", "data", "demo.yaml", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_data_counts_measures_and_renders_what_the_first_trial_trains_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--json", "--set", "data.max_length=150") == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["rows"], seen["train"], seen["held_out"], seen["split_seed"]) == (25, 18, 6, 42)
    assert seen["skipped"] == [{"number": 25, "reason": "output must not be empty"}]
    tokens = seen["tokens"]
    assert sum(bar["rows"] for bar in tokens["histogram"]) == 24
    assert tokens["shortest"] <= tokens["median"] <= tokens["longest"]
    assert tokens["truncated"] == 12
    assert tokens["truncated_share"] == 0.5
    assert [prompt["number"] for prompt in seen["prompts"]] == [1, 13, 24]
    assert seen["prompts"][0]["prompt"].endswith("Which river flows through Brask?\n\n### Response:")
    assert seen["prompts"][0]["response"] == "The Sarn."
    assert seen["prompts"][0]["tokens"] >= tokens["shortest"]
    assert (seen["trouble"], seen["others"]) == (None, [])


def test_data_gives_the_digest_and_leaves_the_tokens_of_the_trial_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tiny_model_dir: Path
) -> None:
    from sweeps.spec import DataSpec, ModelSpec
    from sweeps.trial import tokencache
    from sweeps.trial.base import load_base

    assert run(monkeypatch, "--json") == 0
    seen = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(tokencache, "encode", lambda *_: pytest.fail("tokenised again"))
    base = load_base(ModelSpec(id=str(tiny_model_dir), quantization="none"))
    spec = DataSpec(path=str(folder / "rows.json"), held_out=0.25, on_bad_row="skip")
    assert tokencache.prepare(spec, base.tokenizer)[0].digest == seen["digest"]


def test_data_shows_the_same_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "25 rows: 18 to train on, 6 held out (split seed 42), 1 bad row skipped: row 25 (output" in shown
    assert "0 rows cut, 0.0% (no max_length); digest " in shown
    assert "█" in shown
    assert shown.count("### Response:") == 3
    assert "--- row 24, " in shown


def test_what_would_steer_the_terminal_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    rows = [{"instruction": "\x1b[2J[bold]q[/bold]", "output": "a" * 3000}] * 4
    (folder / "rows.json").write_text(json.dumps(rows))
    assert run(monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\ufffd[2J[bold]q[/bold]" in shown
    assert "more characters)" in shown


def test_other_data_sections_of_the_sweep_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space = [
        "search.space.data.max_length=['r*10', 100]",
        "search.space.data.columns=[{}, {input: instruction}]",
        "search.space.lora.alpha=[1, 2]",
    ]
    assert run(monkeypatch, "--json", *(word for one in space for word in ("--set", one))) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["data"]["max_length"] == 80
    assert seen["others"] == [
        "data.columns={'input': 'instruction'}",
        "data.max_length=100",
        "data.columns={'input': 'instruction'}, data.max_length=100",
        "data.max_length=2560",
        "data.columns={'input': 'instruction'}, data.max_length=2560",
    ]


def test_a_tokenizer_that_cannot_be_had_is_said_and_the_rest_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--json", "--set", "model.id=org/none") == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["rows"], seen["train"], seen["held_out"]) == (25, 18, 6)
    assert (seen["tokens"], seen["digest"]) == (None, None)
    assert seen["trouble"].startswith("the tokenizer of org/none cannot be had, so no token is counted: ")
    assert run(monkeypatch, "--set", "model.id=org/none") == 0
    shown = capsys.readouterr().out
    assert "the tokenizer of org/none cannot be had" in shown
    assert shown.count("### Response:") == 3


def test_bad_rows_that_are_refused_are_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--set", "data.on_bad_row=refuse") == 2
    assert "row 25 of " in capsys.readouterr().err


def test_a_sweep_that_trains_nothing_has_no_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--set", "train=none", "--set", "search.space={lora.r: [8]}") == 2
    assert "data is for trials that train, got train: none" in capsys.readouterr().err


def test_a_bad_file_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--set", 'data.prompt="{q.__class__}"', "--set", "data.columns.wrong=x") == 2
    told = capsys.readouterr().err
    assert "data.prompt: a field is a name alone in braces" in told
    assert "nothing was started" in told


@pytest.mark.parametrize(
    ("lengths", "bars"),
    [
        ([5], [(5, 5, 1)]),
        ([5, 7, 7], [(5, 5, 1), (6, 6, 0), (7, 7, 2)]),
        ([42, 110, 1304], [(0, 199, 2), (200, 399, 0), (400, 599, 0), (600, 799, 0), (800, 999, 0)]),
    ],
)
def test_a_histogram_has_round_bars_and_every_row(
    lengths: list[int], bars: list[tuple[int, int, int]]
) -> None:
    made = Lengths(lengths, 0, "").histogram()
    assert made[: len(bars)] == bars
    assert len(made) <= 12
    assert sum(rows for _, _, rows in made) == len(lengths)


def test_a_model_file_that_is_none_is_said_as_trouble(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "model.gguf").write_bytes(b"GGUF nonsense")
    assert run(monkeypatch, "--json", "--set", "model.id=./model.gguf") == 0
    seen = json.loads(capsys.readouterr().out)
    assert "model.gguf cannot be had" in seen["trouble"]
    assert seen["rows"] == 25


def test_a_cache_that_cannot_be_used_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    monkeypatch.setenv("SWEEPSVC_CACHE", str(folder / "rows.json"))
    assert run(monkeypatch) == 0
    assert "tokens: not kept" in capsys.readouterr().out
