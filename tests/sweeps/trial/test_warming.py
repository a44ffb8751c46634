"""Rows are tokenised beside whatever else is starting, and the trial finds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sweeps.trial import tokencache, warming
from sweeps.trial.base import load_base
from sweeps.trial.tokencache import prepare
from tests.tiny import tiny_spec


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWEEPSVC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(warming, "LEAST_BYTES", 0)
    return tmp_path / "cache" / "tokens"


def test_the_trial_finds_the_rows_under_the_tokenizer_of_its_base(
    cache: Path, tiny_model_dir: Path, alpaca_rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(tiny_model_dir, alpaca_rows_file)
    warming.warm(spec)
    monkeypatch.setattr(tokencache, "encode", lambda *_: pytest.fail("tokenised again"))
    rows, _ = prepare(spec.data, load_base(spec.model).tokenizer)
    assert len(rows.train) == 18


def test_no_process_is_started_for_a_few_rows_or_without_training(
    tiny_model_dir: Path, alpaca_rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warming.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    spec = tiny_spec(tiny_model_dir, alpaca_rows_file)
    for given in (spec, spec.model_copy(update={"train": None})):
        with warming.warming(given) as process:
            assert process is None
    assert not warming.is_large(spec.data.model_copy(update={"path": "/not/there"}))
    assert warming.is_large(spec.data.model_copy(update={"path": None, "id": "yahma/alpaca-cleaned"}))


@pytest.mark.slow
def test_the_process_fills_the_cache_and_is_gone_after_the_block(
    cache: Path, tiny_model_dir: Path, alpaca_rows_file: Path
) -> None:
    spec = tiny_spec(tiny_model_dir, alpaca_rows_file)
    with warming.warming(spec) as process:
        assert process is not None
        assert process.wait(120) == 0
    assert len(list(cache.glob("*.safetensors"))) == 1
    with warming.warming(spec) as process:
        assert process is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
