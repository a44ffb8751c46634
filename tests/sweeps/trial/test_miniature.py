"""Small models of the kinds that people fine-tune."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sweeps.errors import BadModel
from sweeps.spec import ModelSpec
from sweeps.trial import base as bases
from sweeps.trial.base import load_base
from sweeps.trial.estimate import config_of
from sweeps.trial.invented import alpaca_rows
from sweeps.trial.miniature import make_tokenizer, save_miniature, shrunk
from sweeps.trial.targets import linear_layers

SHIPPED = (
    "meta-llama/Llama-2-7b-hf",
    "mistralai/Mistral-7B-v0.1",
    "microsoft/phi-1_5",
    "tiiuae/falcon-40b",
)
KINDS = ("gpt2", "gpt_neox", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral", "opt")
TEXTS = [" ".join(row.values()) for row in alpaca_rows()]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_has_its_layers_by_name_and_loads_in_four_bits(name: str, tmp_path: Path) -> None:
    made = save_miniature(ModelSpec(id=name), tmp_path / "small", TEXTS)
    with torch.device("meta"):
        real = linear_layers(AutoModelForCausalLM.from_config(config_of(ModelSpec(id=name))))
    assert set(made.layers) <= set(real)
    assert {layer.rpartition(".")[2] for layer in made.layers} == {layer.rpartition(".")[2] for layer in real}
    base = load_base(ModelSpec(id=str(made.folder), quantization="nf4"))
    packed = [layer for layer in base.layers if "4bit" in type(base.model.get_submodule(layer)).__name__]
    assert len(packed) >= len(base.layers) - 1  # the head stays out
    assert sum(weight.numel() for weight in base.model.parameters()) < 1e6


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_any_common_kind_shrinks_and_runs(kind: str) -> None:
    tokenizer = make_tokenizer(TEXTS)
    model = AutoModelForCausalLM.from_config(shrunk(AutoConfig.for_model(kind), tokenizer))
    assert sum(weight.numel() for weight in model.parameters()) < 3e6
    ids = torch.tensor(tokenizer(["What is a river?"])["input_ids"])
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))


def test_grouped_heads_stay_grouped() -> None:
    small = shrunk(config_of(ModelSpec(id="mistralai/Mistral-7B-v0.1")), make_tokenizer(TEXTS))
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 2)


def test_a_miniature_is_equal_every_time(tmp_path: Path) -> None:
    for name in "ab":
        save_miniature(ModelSpec(), tmp_path / name, TEXTS)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_local_model_brings_its_own_tokenizer(tiny_model_dir: Path, tmp_path: Path) -> None:
    made = save_miniature(ModelSpec(id=str(tiny_model_dir)), tmp_path / "small", TEXTS)
    assert "its own tokenizer" in made.note
    assert len(made.tokenizer) == 300
    other = save_miniature(ModelSpec(), tmp_path / "other", TEXTS)
    assert "made on the spot" in other.note


def test_the_tokenizer_made_on_the_spot_gives_back_what_it_was_given() -> None:
    tokenizer = make_tokenizer(TEXTS)
    text = "Ein Fluß, 河, and\n\n### Response: <s>"
    ids = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer)


def test_an_architecture_that_nobody_knows_is_a_bad_model(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="must load"):
        save_miniature(ModelSpec(id="nobody/knows-this"), tmp_path / "small", TEXTS)
    assert not (tmp_path / "small").exists()


def test_a_model_of_which_nothing_is_packed_in_four_bits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = save_miniature(ModelSpec(id="tiiuae/falcon-40b"), tmp_path / "small", TEXTS)
    monkeypatch.setattr(bases, "_of_the_class_linear", lambda *_: contextlib.nullcontext())
    with pytest.raises(BadModel, match="must put linear layers of"):
        load_base(ModelSpec(id=str(made.folder), quantization="nf4"))


def test_a_falcon_in_four_bits_computes_what_its_own_layers_do(tmp_path: Path) -> None:
    made = save_miniature(ModelSpec(id="tiiuae/falcon-40b"), tmp_path / "small", TEXTS)
    ids = torch.tensor([[5, 6, 7, 8]])
    spec = {"id": str(made.folder), "dtype": "float32"}
    with torch.no_grad():
        plain = load_base(ModelSpec(**spec, quantization="none")).model(input_ids=ids).logits
        packed = load_base(ModelSpec(**spec, quantization="nf4")).model(input_ids=ids).logits
    assert 0 < (plain - packed).abs().max() < 0.3 * plain.abs().max()
