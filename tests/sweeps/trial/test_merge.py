"""An adapter in the weights of its base: equal to peft's own merging, and to the adapter beside them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sweeps.errors import BadModel
from sweeps.spec import LoraSpec, ModelSpec
from sweeps.trial.adapter import attach
from sweeps.trial.base import load_base
from sweeps.trial.merge import merge, save_model

IDS = torch.arange(3, 43).view(4, 10)
LLAMA_TARGETS = ["q_proj", "down_proj", "lm_head"]


@pytest.fixture(autouse=True)
def _peft_may_say_that_the_head_is_tied() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield


def llama(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def gpt2() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        ).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=IDS).logits
    return output.float()


def with_adapter(model: Any, folder: Path, targets: list[str], **config: Any) -> Any:
    """`model` with an adapter of random weights, as peft has it; saved in `folder`."""
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": targets} | config
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter.dtype)
        if "magnitude" in name:
            parameter.data *= 1.5
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_it_is_what_peft_merges(variant: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    adapted = with_adapter(llama(tiny_model_dir), tmp_path, LLAMA_TARGETS, **variant)
    beside = logits(adapted)
    merged = llama(tiny_model_dir)
    before = logits(merged)
    merge(merged, tmp_path)
    theirs = adapted.merge_and_unload()
    assert (beside - before).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), beside, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(merged.named_parameters()), dict(theirs.named_parameters()))


def test_the_layers_of_gpt2_whose_weights_lie_the_other_way_are_merged_too(tmp_path: Path) -> None:
    for name, variant in {"lora": {}, "dora": {"use_dora": True}}.items():
        adapted = with_adapter(gpt2(), tmp_path / name, ["c_attn", "c_fc"], fan_in_fan_out=True, **variant)
        beside = logits(adapted)
        merged = gpt2()
        merge(merged, tmp_path / name)
        torch.testing.assert_close(logits(merged), beside, rtol=1e-4, atol=1e-5)


def test_a_weight_of_16_bits_is_rounded_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapted = with_adapter(llama(tiny_model_dir, torch.bfloat16), tmp_path, LLAMA_TARGETS)
    merged = llama(tiny_model_dir, torch.bfloat16)
    weight = merged.model.layers[0].self_attn.q_proj.weight.float()
    merge(merged, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = (saved[f"{prefix}.lora_{letter}.weight"] for letter in "AB")
    assert a.dtype == torch.bfloat16
    exact = weight.double() + 6 / 4 * b.double() @ a.double()
    ours = merged.model.layers[0].self_attn.q_proj.weight
    assert ours.dtype == torch.bfloat16
    assert (ours == exact.to(torch.bfloat16)).float().mean() > 0.999  # float32 may round a tie the other way
    theirs = adapted.merge_and_unload()
    torch.testing.assert_close(
        dict(merged.named_parameters()), dict(theirs.named_parameters()), rtol=2**-6, atol=2**-8
    )


def test_a_head_that_was_tied_is_merged_and_the_embedding_is_not(
    tiny_tied_model_dir: Path, tmp_path: Path
) -> None:
    adapted = with_adapter(llama(tiny_tied_model_dir), tmp_path, LLAMA_TARGETS)
    merged = llama(tiny_tied_model_dir)
    embedding = merged.get_input_embeddings().weight.clone()
    merge(merged, tmp_path)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not torch.equal(merged.lm_head.weight, embedding)
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)


def test_a_head_that_carries_no_adapter_stays_tied(tiny_tied_model_dir: Path, tmp_path: Path) -> None:
    with_adapter(llama(tiny_tied_model_dir), tmp_path, ["q_proj"])
    merged = llama(tiny_tied_model_dir)
    merge(merged, tmp_path)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings is True


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_trial_saved_is_merged_saved_in_shards_and_read_back_by_transformers(
    tiny_model_dir: Path,
    tiny_tied_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
) -> None:
    monkeypatch.setattr("sweeps.trial.merge.SHARD_SIZE", "200KB")
    spec = ModelSpec(id=str(tiny_tied_model_dir if tied else tiny_model_dir), quantization="none")
    base = load_base(spec)
    with attach(base, LoraSpec(r=4, alpha=8.0), 0) as adapter:
        for number, parameter in enumerate(adapter.parameters()):
            parameter.data += 0.01 * (number % 5)
        adapter.save(tmp_path / "adapter")
        beside = logits(adapter.model)
    merge(base.model, tmp_path / "adapter")
    save_model(base, tmp_path / "merged")
    torch.testing.assert_close(logits(base.model), beside, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(llama(tmp_path / "merged")), logits(base.model))
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "merged").iterdir()} == {"0o644"}
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert (config["use_cache"], config["tie_word_embeddings"]) == (True, False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("Which river?").input_ids == base.tokenizer("Which river?").input_ids


def test_a_generation_config_that_contradicts_itself_does_not_stand_in_the_way(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    llama(tiny_model_dir).save_pretrained(model)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(model)
    odd = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "bos_token_id": 0, "eos_token_id": 1}
    (model / "generation_config.json").write_text(json.dumps(odd))
    save_model(load_base(ModelSpec(id=str(model), quantization="none")), tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text())["temperature"] == 0.9


def saved(model: Any, folder: Path) -> Path:
    with_adapter(model, folder, LLAMA_TARGETS)
    return folder


def test_an_adapter_of_another_model_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = saved(llama(tiny_model_dir), tmp_path)
    with pytest.raises(BadModel, match=r"must be A \(r, in\) and B \(out, r\) .* was trained on"):
        merge(gpt2(), folder)
    with_adapter(gpt2(), tmp_path / "gpt2", ["c_attn"], fan_in_fan_out=True)
    with pytest.raises(BadModel, match=r"got none for transformer\.h\.0\.attn\.c_attn .* was trained on"):
        merge(llama(tiny_model_dir), tmp_path / "gpt2")


def test_a_damaged_adapter_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = saved(llama(tiny_model_dir), tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"not an adapter")
    with pytest.raises(BadModel, match="weights must be readable"):
        merge(llama(tiny_model_dir), folder)


def test_a_quantised_base_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = saved(llama(tiny_model_dir), tmp_path)
    base = load_base(ModelSpec(id=str(tiny_model_dir), quantization="nf4", dtype="float32"))
    with pytest.raises(BadModel, match="unquantised linear layers, got Linear4bit"):
        merge(base.model, folder)


def test_what_is_no_plain_lora_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = saved(llama(tiny_model_dir), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 2}}))
    with pytest.raises(BadModel, match="one r and one alpha"):
        merge(llama(tiny_model_dir), folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        tensors | {"base_model.model.lm_head.bias": torch.zeros(3)}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(BadModel, match="LoRA weights alone"):
        merge(llama(tiny_model_dir), folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(BadModel, match=r"must have a LoRA config.*name the folder that a trial saved"):
        merge(llama(tiny_model_dir), folder)
