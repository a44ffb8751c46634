"""A base that was quantised once is loaded from the disk, bit for bit the same; trouble costs time alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sweeps.spec import ModelSpec
from sweeps.trial import base as base_module
from sweeps.trial import basecache
from sweeps.trial.base import Base, Resident, load_base
from sweeps.trial.basecache import KeptBase
from sweeps.trial.paths import TrialFolder
from sweeps.trial.run import run_trial
from tests.tiny import tiny_spec


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where bases are kept, however small they are."""
    monkeypatch.setenv("SWEEPSVC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SWEEPSVC_BASES_GB", raising=False)
    monkeypatch.setattr(basecache, "LEAST_BYTES", 0)
    return tmp_path / "cache" / "bases"


@pytest.fixture
def model(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """The tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def load(folder: Path, **fields: Any) -> Base:
    return load_base(ModelSpec.model_validate({"id": str(folder), **fields}))


def said(base: Base) -> str:
    """What was said of the cache."""
    return "; ".join(note for note in base.notes if note.startswith("base: "))


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def loss_and_gradient(base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the embeddings, so that every layer is passed forward and backward."""
    ids = torch.arange(24).reshape(2, 12)
    rows = base.model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = base.model(inputs_embeds=rows, labels=ids).loss
    loss.backward()
    assert rows.grad is not None
    return loss.detach(), rows.grad


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization": "nf4"},
        {"quantization": "fp4", "double_quantization": True, "dtype": "bfloat16"},
        {"quantization": "nf4", "quantize_lm_head": False},
    ],
    ids=["nf4", "fp4 twice", "without the head"],
)
def test_a_kept_base_is_what_quantising_anew_gives_bit_for_bit(
    cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    fresh = load(model, **fields)
    assert "kept in 4 bits" in said(fresh)
    monkeypatch.setattr(base_module, "_quantization_config", lambda *_: pytest.fail("quantised again"))
    kept = load(model, **fields)
    assert "loaded from the cache" in said(kept)
    weights, again = fresh.model.state_dict(), kept.model.state_dict()
    assert list(weights) == list(again)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert {name: value.dtype for name, value in weights.items()} == {n: v.dtype for n, v in again.items()}
    assert fresh.model.config.to_dict() == kept.model.config.to_dict()
    assert [torch.equal(*pair) for pair in zip(*map(loss_and_gradient, (fresh, kept)), strict=True)] == [
        True
    ] * 2
    assert fresh.notes[:4] == kept.notes[:4]


def test_a_trial_on_a_kept_base_ends_as_one_on_a_fresh_base(
    cache: Path, model: Path, alpaca_rows_file: Path, tmp_path: Path
) -> None:
    spec = tiny_spec(model, alpaca_rows_file, **{"model.quantization": "nf4"})
    ends = []
    for name in ("fresh", "kept"):
        files = TrialFolder(tmp_path / name)
        for _ in run_trial(spec, Resident(), files.path):
            pass
        result = files.read_result()
        assert result is not None
        ends.append((result.train_loss, (files.adapter / "adapter_model.safetensors").read_bytes()))
    assert any("loaded from the cache" in note for note in result.notes)
    assert ends[0] == ends[1]


def test_what_is_kept_is_not_taken_for_another_base(cache: Path, model: Path) -> None:
    load(model, quantization="nf4")
    for fields in ({"quantization": "fp4"}, {"quantization": "nf4", "dtype": "bfloat16"}):
        assert "kept in 4 bits" in said(load(model, **fields))
    weights = next(model.glob("*.safetensors"))
    os.utime(weights, (1, 1))  # as a replaced file has
    assert "kept in 4 bits" in said(load(model, quantization="nf4"))
    assert len(folders(cache)) == 4


def test_a_damaged_one_is_refused_and_made_anew(cache: Path, model: Path) -> None:
    fresh = load(model)
    weights = next(cache.glob("*/*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    for damage in (bytes(content), content[:-3]):
        weights.write_bytes(damage)
        mended = load(model)
        assert f"{weights.parent} was damaged, and is made anew" in said(mended)
        assert "kept in 4 bits" in said(mended)
        again = load(model)
        assert "loaded from the cache" in said(again)
        for one in (mended, again):
            assert torch.equal(loss_and_gradient(one)[1], loss_and_gradient(fresh)[1])


def test_a_cache_that_cannot_be_written_costs_a_note_alone(cache: Path, model: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    base = load(model)
    assert said(base).startswith(f"base: not kept, {cache} cannot be written")


def test_a_disk_that_would_be_full_is_left_alone(
    cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=basecache.SPARE_BYTES))
    assert "has 2.0 GB free" in said(load(model))
    assert folders(cache) == []


def test_nothing_is_kept_of_a_base_that_is_not_quantised_is_small_or_has_code_of_its_own(
    cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(load(model, quantization="none")) == ""
    assert said(load(model, trust_remote_code=True)) == ""
    monkeypatch.setattr(basecache, "LEAST_BYTES", 10**9)
    assert said(load(model)) == ""
    assert not cache.exists() or folders(cache) == []


def kept(cache: Path, name: str, size: int = 400) -> tuple[str, ...]:
    def save(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(bytes(size))

    return KeptBase(cache / name, {}).keep(save, size)


def test_those_used_longest_ago_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    for seconds, name in enumerate(("oldest", "older", "old")):
        kept(cache, name)
        os.utime(cache / name / "kept.json", (seconds, seconds))
    KeptBase(cache / "oldest", {}).check()  # used now
    monkeypatch.setenv("SWEEPSVC_BASES_GB", "0.0000013")  # 1300 bytes; each has 400 and its kept.json
    kept(cache, "newest")
    assert sorted(path.name for path in folders(cache)) == ["newest", "oldest"]


def test_what_is_larger_than_the_limit_is_not_kept_and_zero_keeps_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    monkeypatch.setenv("SWEEPSVC_BASES_GB", "0.0000001")
    assert "more than SWEEPSVC_BASES_GB" in kept(cache, "large")[0]
    monkeypatch.setenv("SWEEPSVC_BASES_GB", "0")
    assert kept(cache, "any", 1) == ()
    assert folders(cache) == []


@pytest.mark.parametrize("written", ["much", "-1", "nan"])
def test_a_limit_that_cannot_be_read_is_said_and_the_default_holds(
    cache: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    cache.mkdir(parents=True)
    monkeypatch.setenv("SWEEPSVC_BASES_GB", written)
    said, kept_it = kept(cache, "one")
    assert said == f"SWEEPSVC_BASES_GB must be a number of GB from 0 on, got {written!r}: 50 is used"
    assert "kept in 4 bits" in kept_it


def test_what_makes_no_room_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    kept(cache, "others")
    monkeypatch.setenv("SWEEPSVC_BASES_GB", "0.0000006")

    def refuses(*_: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(basecache, "remove", refuses)
    [note] = kept(cache, "one")
    assert "GB of others cannot be removed" in note
    assert [path.name for path in folders(cache)] == ["others"]


def test_the_draft_of_a_killed_process_goes_when_the_base_is_made(cache: Path) -> None:
    draft = cache / ".one.0123abc"
    draft.mkdir(parents=True)
    kept(cache, "one")
    assert [path.name for path in folders(cache)] == ["one"]
