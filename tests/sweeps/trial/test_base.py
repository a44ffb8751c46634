from __future__ import annotations

import json
import shutil
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from sweeps.errors import BadModel
from sweeps.spec import LoraSpec, ModelSpec
from sweeps.trial import base as base_module
from sweeps.trial.adapter import Adapter, attach
from sweeps.trial.base import (
    Base,
    Resident,
    load_base,
)

IDS = torch.arange(3, 23).view(2, 10)


def base_of(folder: Path, **fields: Any) -> Base:
    return load_base(ModelSpec.model_validate({"id": str(folder), "quantization": "none", **fields}))


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model in a folder that a test may spoil."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def gradient(adapter: Adapter) -> torch.Tensor:
    """Of a training step without dropout, all parameters in a row."""
    adapter.model.train()
    for parameter in adapter.parameters():
        parameter.grad = None
    logits = adapter.model(IDS).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()])


def evaluate(adapter: Adapter) -> None:
    adapter.model.eval()
    with torch.no_grad():
        adapter.model(IDS)


# --- the base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4"])
def test_a_base_is_frozen_in_evaluation_mode_and_keeps_no_cache(
    tiny_model_dir: Path, quantization: str
) -> None:
    base = base_of(tiny_model_dir, quantization=quantization)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert base.model(IDS).past_key_values is None
    assert base.load_seconds > 0


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_linear_layers_and_the_head_are_in_the_4_bit_format_that_was_asked_for(
    tiny_model_dir: Path, quantization: str, double: bool
) -> None:
    base = base_of(tiny_model_dir, quantization=quantization, double_quantization=double)
    layers = {name: base.model.get_submodule(name) for name in base.layers}
    packed = {name for name, layer in layers.items() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    assert packed == set(layers)
    for name in ("model.layers.0.self_attn.q_proj", "lm_head"):
        state = layers[name].weight.quant_state
        assert (state.quant_type, state.nested) == (quantization, double)
    assert f"quantization {quantization}: 15 linear layers in 4 bits; left out: none" in base.notes


def test_an_output_head_that_is_not_to_be_quantised_stays_as_it_is(tiny_model_dir: Path) -> None:
    base = base_of(tiny_model_dir, quantization="nf4", quantize_lm_head=False)
    assert type(base.model.lm_head) is torch.nn.Linear
    assert torch.equal(base.model.lm_head.weight, base_of(tiny_model_dir).model.lm_head.weight)
    assert base.notes[-1] == (
        "quantization nf4: 14 linear layers in 4 bits; left out: lm_head (model.quantize_lm_head is false)"
    )


def test_an_output_head_that_is_tied_is_never_quantised(tiny_tied_model_dir: Path) -> None:
    base = base_of(tiny_tied_model_dir, quantization="nf4")
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert base.model.lm_head.weight.dtype == torch.float32
    assert base.notes[-1] == (
        "quantization nf4: 14 linear layers in 4 bits; left out: lm_head (it is tied to the embedding)"
    )


def test_layers_are_known_by_their_shapes_in_4_bits_too(tiny_model_dir: Path) -> None:
    plain = base_of(tiny_model_dir)
    assert base_of(tiny_model_dir, quantization="nf4").layers == plain.layers
    assert plain.layers["model.layers.0.self_attn.k_proj"] == (64, 32)
    assert len(plain.layers) == 15


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_an_evaluation_leaves_the_gradient_of_4_bit_training_as_it_was(
    tiny_model_dir: Path, quantization: str
) -> None:
    with attach(base_of(tiny_model_dir, quantization=quantization), LoraSpec(r=4, dropout=0.0), 0) as adapter:
        before = gradient(adapter)
        evaluate(adapter)
        assert torch.equal(gradient(adapter), before)


def test_the_guard_of_4_bit_training_is_needed_where_the_cpu_has_avx512_bf16(tiny_model_dir: Path) -> None:
    # Unguarded, bitsandbytes cannot even take a head of 300 tokens: it wants a multiple of 32.
    base = base_of(tiny_model_dir, quantization="nf4", quantize_lm_head=False)
    for module in base.model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = has_avx512bf16()  # as bitsandbytes makes it
    with attach(base, LoraSpec(r=4, dropout=0.0), 0) as adapter, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="bitsandbytes::gemv_4bit: an autograd kernel was not registered"
        )
        before = gradient(adapter)
        evaluate(adapter)
        assert torch.equal(gradient(adapter), before) is not has_avx512bf16()


def test_choices_are_announced_with_their_reasons(tiny_model_dir: Path) -> None:
    chosen = base_of(tiny_model_dir)
    assert chosen.dtype == torch.float32
    assert [note for note in chosen.notes if not note.startswith("device")] == [
        "dtype float32: auto on a CPU",
        "attention sdpa: not flash_attention_2, the device is cpu",
        "quantization none: set by model.quantization",
    ]
    assert chosen.notes[0].startswith(f"device cpu ({chosen.device_name})")
    given = base_of(tiny_model_dir, dtype="bfloat16", attention="eager")
    assert given.model.dtype == given.dtype == torch.bfloat16
    assert "dtype bfloat16: set by model.dtype" in given.notes
    assert "attention eager: set by model.attention" in given.notes


def test_flash_attention_where_it_cannot_be_is_refused_not_replaced(tiny_model_dir: Path) -> None:
    with pytest.raises(BadModel, match="flash_attention_2 cannot be: the device is cpu; say auto or sdpa"):
        base_of(tiny_model_dir, attention="flash_attention_2")


def test_a_tokenizer_without_a_padding_token_gets_the_end_of_text(copy: Path) -> None:
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    assert base_of(copy).tokenizer.pad_token == "</s>"


def test_loading_shows_no_progress_bar_and_leaves_the_setting_alone(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transformers_logging.is_progress_bar_enabled()
    base_of(tiny_model_dir)
    assert transformers_logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == ""


# --- what is refused --------------------------------------------------------------------------------


def test_weights_that_would_have_to_be_unpickled_are_refused(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(BadModel, match="must be safetensors, so that nothing is unpickled"):
        base_of(copy)


def test_weights_that_lack_a_part_of_the_model_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModel, match=r"every weight of LlamaForCausalLM, and lack 1: lm_head\.weight"):
        base_of(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    change_config(copy, intermediate_size=96)
    with pytest.raises(BadModel, match="the shapes of its weights must be those"):
        base_of(copy)


def test_a_model_that_brings_an_adapter_along_is_refused(copy: Path) -> None:
    with attach(base_of(copy), LoraSpec(r=4), 0) as adapter:
        adapter.save(copy.parent / "adapter")
    for file in (copy.parent / "adapter").iterdir():
        shutil.copy(file, copy)
    with pytest.raises(BadModel, match=r"a base must carry no adapter, .* holds an adapter_config\.json"):
        base_of(copy)


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(copy: Path) -> None:
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<new>"})
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(BadModel, match="got 300 for 301 tokens"):
        base_of(copy)


def test_an_architecture_that_is_unknown_is_a_bad_model(copy: Path) -> None:
    change_config(copy, model_type="no_such_architecture", architectures=None)
    with pytest.raises(BadModel, match="must load"):
        base_of(copy)


# --- the resident -----------------------------------------------------------------------------------


def test_an_equal_spec_gets_the_same_base_and_loads_nothing(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = Resident()
    first = resident.get(ModelSpec(id=str(tiny_model_dir), quantization="none"))
    monkeypatch.setattr(base_module, "load_base", lambda *_: pytest.fail("loaded again"))
    assert resident.get(ModelSpec(id=str(tiny_model_dir), quantization="none")) is first


def test_the_old_base_is_gone_before_another_is_loaded(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = Resident()
    old = weakref.ref(resident.get(ModelSpec(id=str(tiny_model_dir), quantization="none")).model)

    def load(spec: ModelSpec, device: torch.device | None) -> Base:
        assert old() is None
        return load_base(spec, device)

    monkeypatch.setattr(base_module, "load_base", load)
    other = resident.get(ModelSpec(id=str(tiny_model_dir), quantization="none", dtype="bfloat16"))
    assert other.dtype == torch.bfloat16


def test_a_load_that_fails_leaves_no_base_and_the_next_one_loads(tiny_model_dir: Path) -> None:
    resident = Resident()
    spec = ModelSpec(id=str(tiny_model_dir), quantization="none")
    first = resident.get(spec)
    with pytest.raises(BadModel):
        resident.get(ModelSpec(id="./nowhere"))
    assert resident.get(spec) is not first


def test_a_dropped_base_holds_no_memory(tiny_model_dir: Path) -> None:
    resident = Resident()
    model = weakref.ref(resident.get(ModelSpec(id=str(tiny_model_dir), quantization="nf4")).model)
    resident.drop()
    assert model() is None


def test_importing_bitsandbytes_cannot_fetch_code_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Finder:
        """Sees the import of bitsandbytes begin, and ends it."""

        def find_spec(self, name: str, *_: Any) -> None:
            if name == "bitsandbytes":
                seen.append(sys.modules["kernels"])
                raise ImportError("seen enough")

    installed = object()
    monkeypatch.setitem(sys.modules, "kernels", installed)
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ImportError, match="seen enough"):
        base_module.import_bitsandbytes()
    assert seen == [None]  # which makes any `import kernels` fail
    assert sys.modules["kernels"] is installed
