from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, LlamaConfig

from sweeps.errors import BadModel
from sweeps.spec import LoraSpec
from sweeps.trial.targets import Shape, announce, largest_rank, linear_layers, lora_params, match, refuse_rank

LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
FALCON = FalconConfig(
    vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, new_decoder_architecture=True
)
GPT2 = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4)


def layers_of(config: object) -> dict[str, Shape]:
    with torch.device("meta"):
        return linear_layers(AutoModelForCausalLM.from_config(config))


def test_all_is_every_linear_layer_and_the_output_head() -> None:
    matched = match(layers_of(LLAMA), "all")
    assert len(matched) == 2 * 7 + 1
    assert matched["lm_head"] == Shape(64, 300)
    assert matched["model.layers.1.mlp.down_proj"] == Shape(128, 64)


def test_qv_is_the_query_and_value_projections_of_every_block() -> None:
    assert list(match(layers_of(LLAMA), "qv")) == [
        f"model.layers.{block}.self_attn.{name}" for block in (0, 1) for name in ("q_proj", "v_proj")
    ]


def test_qv_takes_the_fused_projection_of_a_model_that_has_no_other() -> None:
    assert {name.split(".")[-1] for name in match(layers_of(FALCON), "qv")} == {"query_key_value"}


def test_qv_on_a_model_with_unknown_names_lists_its_linear_layers() -> None:
    layers = {"block.wq": Shape(8, 8), "block.wv": Shape(8, 8), "head": Shape(8, 30)}
    with pytest.raises(BadModel, match=r"has the linear layers head, wq, wv; list names"):
        match(layers, "qv")


def test_gpt2s_own_kind_of_linear_layer_counts_with_its_sides_the_right_way_round() -> None:
    layers = layers_of(GPT2)
    assert layers["transformer.h.0.attn.c_attn"] == Shape(64, 192)
    assert len(match(layers, "all")) == 2 * 4 + 1


def test_listed_names_match_whole_names_only() -> None:
    layers = layers_of(LLAMA)
    assert list(match(layers, ("lm_head",))) == ["lm_head"]
    assert len(match(layers, ("self_attn.q_proj", "model.layers.0.mlp.up_proj"))) == 3
    with pytest.raises(BadModel):
        match(layers, ("proj",))


def test_every_name_that_matches_nothing_is_told_with_its_nearest() -> None:
    with pytest.raises(BadModel) as caught:
        match(layers_of(LLAMA), ("q_proj", "v_prj", "q_proj,v_proj", "embed_tokens"))
    fault = str(caught.value)
    assert "'v_prj' (did you mean 'v_proj'?)" in fault
    assert "'q_proj,v_proj'" in fault
    assert "'embed_tokens'" in fault  # an embedding is no linear layer
    assert "the model has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in fault


def test_the_count_is_rank_times_both_sides() -> None:
    assert lora_params({"a": Shape(3, 5), "b": Shape(7, 11)}, r=2) == 2 * (3 + 5 + 7 + 11)


def test_the_largest_rank_is_the_smallest_side_and_one_more_is_refused() -> None:
    layers = {"a": Shape(9, 5), "b": Shape(7, 6)}
    assert largest_rank(layers) == 5
    refuse_rank(layers, 5)
    with pytest.raises(BadModel, match=r"got r=6 with 1 narrower layers, the narrowest a \(9 x 5\); lower"):
        refuse_rank(layers, 6)


def test_what_was_adapted_is_announced_with_the_reason() -> None:
    layers = layers_of(FALCON)
    assert announce(LoraSpec(targets="qv"), match(layers, "qv")) == (
        "adapter on 2 linear layers (query_key_value): lora.targets is qv"
    )
