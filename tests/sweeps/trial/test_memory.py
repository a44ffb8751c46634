"""Predicted memory against what is really allocated: tensor by tensor on small models."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from sweeps.spec import LoraSpec, ModelSpec, OptimizerSpec, TrainSpec, TrialSpec
from sweeps.trial.adapter import attach
from sweeps.trial.base import Base, load_base
from sweeps.trial.batches import micro_batches
from sweeps.trial.data import TokenRow
from sweeps.trial.loss import loss_of
from sweeps.trial.memory import base_bytes, scoring_memory, training_memory, widths
from sweeps.trial.optimizers import make_optimizer, optimizer_state
from sweeps.trial.outline import outline_of
from sweeps.trial.prefixtree import Request, make_plan
from sweeps.trial.scoring import pair_cost, score
from sweeps.trial.targets import linear_layers

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROWS, LONGEST = 2, 100


class Allocated(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, until it is gone."""

    def __init__(self, there_before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {self._key(tensor) for tensor in there_before}

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _track(self, tensor: torch.Tensor) -> None:
        key, size = self._key(tensor), tensor.untyped_storage().nbytes()
        if key in self._known:
            return

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor.untyped_storage(), gone)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf)
        return result


def random_base(model_type: str, dtype: str, **sizes: Any) -> Base:
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    config = AutoConfig.for_model(model_type, **{**SIZES, **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=kind)
    model.requires_grad_(False)
    model.eval()
    spec = ModelSpec(quantization="none", dtype=dtype)  # type: ignore[arg-type]
    return Base(model, None, spec, torch.device("cpu"), kind, linear_layers(model), (), 0.0)


def peak_of_a_step(base: Base, spec: TrialSpec, rows: int = ROWS, longest: int = LONGEST) -> int:
    """Bytes above the weights, the adapter and its gradients in a second micro-batch."""
    tokens = [TokenRow(array("i", Random(row).choices(range(1000), k=longest))) for row in range(rows)]
    (batch,) = micro_batches(tokens, rows * longest)
    with attach(base, spec.lora, 0) as adapter:
        if spec.train and spec.train.gradient_checkpointing:
            adapter.enable_gradient_checkpointing()
        base.model.train()
        loss = loss_of(base.model)
        loss.backward(batch)  # the gradients are there now
        gradients = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
        weights = [*base.model.parameters(), *base.model.buffers()]
        with Allocated(
            [*weights, *gradients, batch.ids, batch.places, batch.targets, batch.weights]
        ) as allocated:
            loss.backward(batch)
    return allocated.peak


def predicted_step(base: Base, spec: TrialSpec, rows: int = ROWS, longest: int = LONGEST) -> float:
    outline = outline_of(base.model)
    memory = training_memory(outline, spec, widths(spec, on_cpu=True), rows * longest, longest)
    return memory.activations + memory.logits + memory.workspace


def spec_of(base: Base, checkpointing: bool = False, **lora: Any) -> TrialSpec:
    return TrialSpec(
        model=base.spec,
        lora=LoraSpec.model_validate(lora),
        train=TrainSpec(gradient_checkpointing=checkpointing),
    )


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "sizes", "lora"),
    [
        ("bfloat16", False, {}, {"targets": "qv"}),
        ("bfloat16", False, {}, {"targets": "all"}),
        ("bfloat16", False, {}, {"targets": "all", "dropout": 0.0}),
        ("bfloat16", False, {}, {"targets": "all", "dtype": "float32"}),
        ("bfloat16", False, {}, {"targets": "all", "r": 64}),
        ("bfloat16", False, {}, {"targets": "all", "dora": True}),
        ("bfloat16", False, {"vocab_size": 20_000}, {}),
        ("bfloat16", False, {"num_key_value_heads": 4}, {}),
        ("bfloat16", True, {}, {}),
        ("bfloat16", True, {"vocab_size": 20_000}, {}),
        ("float32", False, {}, {}),
    ],
)
def test_a_step_allocates_what_was_predicted(
    dtype: str, checkpointing: bool, sizes: dict[str, int], lora: dict[str, Any]
) -> None:
    base = random_base("llama", dtype, **sizes)
    spec = spec_of(base, checkpointing, **lora)
    within = 0.1 if checkpointing or spec.lora.dora else 0.06
    assert predicted_step(base, spec) == pytest.approx(peak_of_a_step(base, spec), rel=within)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("gemma2", {"head_dim": 32}),
        ("gemma2", {"head_dim": 32, "vocab_size": 20_000}),
        ("gemma3_text", {"head_dim": 32}),
        ("phi", {"hidden_act": "gelu_new", "num_key_value_heads": 4}),
        ("phi3", {}),
    ],
)
def test_a_step_of_every_family_allocates_what_was_predicted(model_type: str, sizes: dict[str, Any]) -> None:
    base = random_base(model_type, "bfloat16", **sizes)
    spec = spec_of(base)
    assert predicted_step(base, spec) == pytest.approx(peak_of_a_step(base, spec), rel=0.06)


@pytest.mark.parametrize("vocabulary", [500, 60_000])  # the peak is within a block; behind the head
def test_a_batch_that_is_scored_allocates_no_more_than_was_predicted(vocabulary: int) -> None:
    base = random_base("llama", "bfloat16", vocab_size=vocabulary)
    spec = spec_of(base).untrained()
    draw = Random(0)
    texts = [tuple(draw.randrange(500) for _ in range(LONGEST + 1)) for _ in range(ROWS)]
    plan = make_plan([Request(text, LONGEST) for text in texts], ROWS * LONGEST, pair_cost(base.model))
    assert [len(batch.rows) for batch in plan.batches] == [ROWS]
    with torch.no_grad(), Allocated([*base.model.parameters(), *base.model.buffers()]) as allocated:
        score(base.model, plan, lambda: None)
    memory = scoring_memory(outline_of(base.model), spec, widths(spec, on_cpu=True), ROWS * LONGEST)
    assert 0.9 <= (memory.logits + memory.activations) / allocated.peak <= 1.3


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_base_takes_what_was_predicted(tiny_model_dir: Path, quantization: str, double: bool) -> None:
    model_spec = ModelSpec.model_validate(
        {"id": str(tiny_model_dir), "quantization": quantization, "double_quantization": double}
    )
    base = load_base(model_spec)
    held = sum(tensor.nbytes for tensor in base.model.parameters())
    for module in base.model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            held += state.absmax.nbytes
            held += state.state2.absmax.nbytes if state.nested else 0
    spec = TrialSpec(model=model_spec)
    outline = outline_of(load_base(ModelSpec(id=str(tiny_model_dir), quantization="none")).model)
    assert base.model.lm_head.weight.dtype is (torch.uint8 if quantization == "nf4" else torch.float32)
    assert base_bytes(outline, spec, widths(spec, on_cpu=True)) == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize(
    "optimizer",
    [OptimizerSpec(name="adamw"), OptimizerSpec(name="sgd"), OptimizerSpec(name="sgd", momentum=0.0)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_optimiser_keeps_what_was_predicted(optimizer: OptimizerSpec, dtype: str) -> None:
    base = random_base("llama", dtype, num_hidden_layers=1)
    spec = spec_of(base, r=16).model_copy(update={"optimizer": optimizer})
    with attach(base, spec.lora, 0) as adapter:
        for parameter in adapter.parameters():
            parameter.grad = torch.ones_like(parameter)
        made = make_optimizer(adapter.parameters(), optimizer)
        made.step()
        tensors, _ = optimizer_state(made, adapter.named_parameters())
        held = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith("step"))
    predicted = training_memory(outline_of(base.model), spec, widths(spec, on_cpu=True), 100, 100).optimizer
    assert predicted == held


def test_a_paged_state_is_not_on_the_accelerator_once_its_tensors_are_large() -> None:
    outline = outline_of(random_base("llama", "bfloat16").model)
    kept = {}
    for r in (8, 2048):
        spec = TrialSpec(lora=LoraSpec(r=r), optimizer=OptimizerSpec(name="paged_adamw"))
        kept[r] = training_memory(outline, spec, widths(spec, on_cpu=False), 100, 100)
    assert kept[8].optimizer == kept[8].adapters / 2 * 8  # two float32 values for each that is trained
    assert kept[2048].optimizer == 0


def test_eager_attention_keeps_its_scores_which_grow_with_the_row() -> None:
    base = random_base("llama", "bfloat16")
    spec = spec_of(base)
    eager = spec.model_copy(update={"model": spec.model.model_copy(update={"attention": "eager"})})
    one_row = {longest: predicted_step(base, eager, 1, longest) for longest in (100, 200)}
    blocks_and_heads = 4 * 4
    beside_what_grows_in_a_line = one_row[200] - 2 * one_row[100]
    assert beside_what_grows_in_a_line == blocks_and_heads * (200**2 - 2 * 100**2) * (4 + 2)
