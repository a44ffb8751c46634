"""The loss in chunks against the plain way: the same numbers, and never tokens x vocabulary at once."""

from __future__ import annotations

from array import array
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from sweeps.spec import LoraSpec, ModelSpec
from sweeps.trial import attention
from sweeps.trial import loss as losses
from sweeps.trial.adapter import Adapter, attach
from sweeps.trial.base import Base, load_base
from sweeps.trial.batches import Weighting, micro_batches
from sweeps.trial.data import TokenRow
from sweeps.trial.loss import ChunkedLoss, Loss, PlainLoss, loss_of
from sweeps.trial.targets import linear_layers

ROWS = [TokenRow(array("i", Random(n).choices(range(3, 290), k=4 + 5 * n)), given=1 + n) for n in range(5)]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "pad_token_id": 0,
}


def random_base(model_type: str, **sizes: Any) -> Base:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.requires_grad_(False)
    model.eval()
    spec = ModelSpec(quantization="none", dtype="float32")
    return Base(model, None, spec, torch.device("cpu"), torch.float32, linear_layers(model), (), 0.0)


def attached(base: Base, **lora: Any) -> Adapter:
    """An adapter that is not the identity any more."""
    adapter = attach(base, LoraSpec.model_validate({"r": 4, "dropout": 0.0, **lora}), 1)
    torch.manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.1)
    base.model.train()
    return adapter


def backward(adapter: Adapter, loss: Loss, weighting: Weighting = "sample") -> tuple[float, torch.Tensor]:
    """A step's loss, and its gradient as one vector."""
    total = sum(loss.backward(batch).item() for batch in micro_batches(ROWS, 60, weighting))
    gradients = [parameter.grad for parameter in adapter.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    assert len(gradients) == len([gradient for gradient in gradients if gradient is not None])
    for parameter in adapter.parameters():
        parameter.grad = None
    return total, flat


def assert_same(adapter: Adapter, weighting: Weighting = "sample") -> None:
    model = adapter.model
    chunked = loss_of(model)
    assert isinstance(chunked, ChunkedLoss)
    plain_loss, plain = backward(adapter, PlainLoss(model, ""), weighting)
    value, gradient = backward(adapter, chunked, weighting)
    assert value == pytest.approx(plain_loss, rel=1e-5)
    assert (gradient - plain).norm() <= 1e-5 * plain.norm()
    assert plain.norm() > 0
    without_gradients = sum(chunked.value(batch).item() for batch in micro_batches(ROWS, 60, weighting))
    assert without_gradients == pytest.approx(plain_loss, rel=1e-5)


@pytest.fixture
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows already make several chunks."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": 3 * 4 * 300})


@pytest.mark.usefixtures("chunks_of_three")
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("weighting", ["sample", "token"])
def test_gradients_are_those_of_the_plain_way(
    tiny_model_dir: Path, quantization: str, weighting: Weighting
) -> None:
    """With LoRA on the head too, which is in 4 bits under nf4; the rows begin with tokens that are given."""
    base = load_base(ModelSpec.model_validate({"id": str(tiny_model_dir), "quantization": quantization}))
    with attached(base) as adapter:
        assert any(name.startswith("lm_head") for name in adapter.targets)
        assert_same(adapter, weighting)


@pytest.mark.usefixtures("chunks_of_three")
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 3.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("phi", {"num_key_value_heads": 4}),  # its head has a bias
    ],
)
def test_gradients_are_those_of_the_plain_way_for_every_kind_of_head(
    model_type: str, sizes: dict[str, Any]
) -> None:
    with attached(random_base(model_type, **sizes)) as adapter:
        assert_same(adapter)


@pytest.mark.usefixtures("chunks_of_three")
@pytest.mark.parametrize("targets", ["qv", ("lm_head",)])
def test_gradients_are_those_of_the_plain_way_wherever_the_adapter_is(targets: Any) -> None:
    with attached(random_base("llama"), targets=targets) as adapter:
        assert_same(adapter)


@pytest.mark.usefixtures("chunks_of_three")
def test_gradients_are_those_of_the_plain_way_where_activations_are_recomputed() -> None:
    with attached(random_base("llama")) as adapter:
        expected = backward(adapter, loss_of(adapter.model))[1]
        adapter.enable_gradient_checkpointing()
        assert_same(adapter)
        assert torch.allclose(backward(adapter, loss_of(adapter.model))[1], expected, rtol=1e-5, atol=1e-8)


def test_attention_between_16_bit_layers_on_a_cpu_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But not where activations are recomputed, which would not be."""
    seen: list[tuple[torch.dtype, str]] = []

    class Watched(attention.AttentionInFloat32):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(func, types, args, kwargs)
            if func is torch.nn.functional.scaled_dot_product_attention:
                seen.append((result.dtype, result.grad_fn.name()))
            return result

    base = random_base("llama")
    with attached(base) as adapter:
        exact = backward(adapter, loss_of(adapter.model))[1]
    base.model.to(torch.bfloat16)
    with attached(base) as adapter:
        for parameter in adapter.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        loss = loss_of(adapter.model)
        assert "attention in float32" in loss.note
        monkeypatch.setattr(losses, "AttentionInFloat32", Watched)
        gradient = backward(adapter, loss)[1]
        calls = len(seen)
        adapter.enable_gradient_checkpointing()
        again = backward(adapter, loss)[1]
    assert calls == len(seen) > 0
    assert set(seen) == {(torch.bfloat16, "ToCopyBackward0")}  # from float32
    for found in (gradient, again):
        assert torch.nn.functional.cosine_similarity(found.float(), exact, dim=0) > 0.99


class Largest(TorchDispatchMode):
    """The most elements that a tensor has whose last dimension is the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[-1] == self.vocabulary:
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_tensor_is_as_large_as_tokens_times_vocabulary(
    monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """With LoRA on the head, and in a pass without gradients."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": 40 * 4 * 5000})  # the weights have 32 rows
    (batch,) = micro_batches([TokenRow(array("i", range(100)))] * 2, 200)
    with attached(random_base("llama", vocab_size=5000), r=2, dropout=dropout) as adapter:
        for loss, rows in ((loss_of(adapter.model), 40), (PlainLoss(adapter.model, ""), 200)):
            with Largest(5000) as largest:
                loss.backward(batch)
                loss.value(batch)
            assert largest.elements == rows * 5000


def test_a_head_that_does_more_than_is_known_takes_the_plain_way_and_says_so() -> None:
    base = random_base("llama")
    base.model.register_forward_hook(
        lambda module, given, output: setattr(output, "logits", output.logits * 2) or output
    )
    with attached(base) as adapter:
        loss = loss_of(adapter.model)
        assert isinstance(loss, PlainLoss)
        assert "LlamaForCausalLM does more to its logits than its head does" in loss.note
        assert adapter.model.training


def test_finding_the_way_draws_no_random_numbers_and_keeps_the_mode() -> None:
    with attached(random_base("llama"), dropout=0.5) as adapter:
        before = torch.get_rng_state()
        for training in (True, False):
            adapter.model.train(training)
            assert isinstance(loss_of(adapter.model), ChunkedLoss)
            assert adapter.model.training is training
        assert torch.equal(torch.get_rng_state(), before)
