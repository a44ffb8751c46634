"""What one training step, or one batch of an evaluation, holds in memory at its peak, from first principles.

The activations are counted as in Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
Transformer Models", section 4.1: every tensor that a forward pass keeps for its backward pass, in bytes a
token. Their layer is GPT's with every weight trained; here only the adapters are, so that a frozen layer does
not keep its input, and each block is counted from its own linear layers. Nothing here is fitted: every number
is a property of the code that runs (transformers, peft, bitsandbytes, torch), named where it stands.
`docs/planning.md` has the derivation and how far it is from what was measured.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch

from sweeps.spec import OptimizerSpec, TrialSpec
from sweeps.trial.loss import chunk_rows
from sweeps.trial.outline import Outline, adapted_layers, params_per_rank
from sweeps.trial.scoring import LOGITS_AT_ONCE
from sweeps.trial.targets import Layers, Shape, Targets, magnitude_params

# A 4-bit weight, and its share of the float32 constant of its block of 64 (Dettmers et al. 2023, "QLoRA",
# section 3): those constants in 8 bits, with a float32 for each 256 of them, under double quantisation.
_FOUR_BIT = 0.5 + 4 / 64
_FOUR_BIT_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)

# bitsandbytes: smaller tensors keep an ordinary state on the accelerator, or one in 32 bits.
_SMALLEST_PAGED, _SMALLEST_8_BIT = 100_000, 4096

# The output of a linear layer, in multiples of its size, that what follows it keeps.
_OUTPUTS_KEPT: Mapping[str, float] = {
    "q_proj": 1,  # after the rotation, by the attention; so is k
    "k_proj": 1,
    "v_proj": 1,
    "gate_proj": 2,  # by the activation, and the activation's output by the product with `up`
    "up_proj": 1,
    "gate_up_proj": 1.5,  # both halves, and the activation's output
    "o_proj": 0,  # added to the residual stream, which keeps nothing; so is every layer below
    "dense": 0,
    "down_proj": 0,
    "fc2": 0,
    "dense_4h_to_h": 0,
}
_FUSED_QKV = ("qkv_proj", "query_key_value", "c_attn")
_ATTENTION_OUT = ("o_proj", "dense")  # whose input is the attention's output, which the attention keeps
_MLP_IN = ("fc1", "dense_h_to_4h", "c_fc")
# An activation keeps its input; `gelu_new`, written out in Python, three results on the way too.
_KEPT_BY_ACTIVATION: Mapping[str, int] = {"gelu_new": 4}
# Layers that are given one and the same tensor.
_SHARED_INPUT: Mapping[str, str] = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}

# The loss has, of a chunk's logits at once: themselves, and in float32 their softmax, which becomes their
# gradient; that in their own dtype, where it is another.
_SOFTMAX_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by what they are for.

    `workspace` holds a dequantised weight where the peak is within a block: behind the head none is there.
    """

    base: float = 0
    adapters: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    workspace: float = 0

    @property
    def total(self) -> float:
        """All of it at once."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Widths:
    """Bytes of one value: of the model, of the adapter, of the mask of torch's dropout (a byte on CUDA)."""

    model: int
    adapter: int
    mask: int
    on_cpu: bool


def widths(spec: TrialSpec, on_cpu: bool) -> Widths:
    """As `model.dtype` and `lora.dtype` resolve on a GPU that has bfloat16, or on the CPU."""
    named = {"float32": 4, "bfloat16": 2, "float16": 2}
    model = named.get(spec.model.dtype, 4 if on_cpu else 2)
    by_default = 4 if spec.model.dtype == "float16" else model
    adapter = named.get(spec.lora.dtype, by_default)
    return Widths(model, adapter, adapter if on_cpu else 1, on_cpu)


def widths_of(model: torch.dtype, adapter: torch.dtype, *, on_cpu: bool) -> Widths:
    """Those of a base and an adapter that are there."""
    return Widths(model.itemsize, adapter.itemsize, adapter.itemsize if on_cpu else 1, on_cpu)


def training_memory(outline: Outline, spec: TrialSpec, width: Widths, tokens: int, longest: int) -> Memory:
    """The peak of a step whose largest micro-batch has `tokens`, padding included, in rows of `longest`."""
    assert spec.train is not None
    adapted = adapted_layers(outline, spec.lora.targets)
    trained: float = spec.lora.r * params_per_rank(outline, spec.lora.targets) * width.adapter
    if spec.lora.dora:
        trained += magnitude_params(adapted) * width.adapter
    blocks = _kept_per_token(outline, spec, width, longest)
    recomputed = 0.0
    if spec.train.gradient_checkpointing:  # the blocks keep their inputs, and compute the rest again
        recomputed = blocks / outline.blocks
        blocks = float(outline.blocks * outline.config.hidden_size * width.model)
    # The peak is behind the head, with a chunk's logits, or in the last block's backward pass.
    logits = _head_bytes(outline, spec, width, tokens)
    in_block = tokens * (recomputed + _gradients_per_token(outline) * width.model)
    workspace = _workspace(outline, spec, width) + _dora_workspace(adapted, spec, width)
    if logits >= in_block + workspace:
        in_block = workspace = 0.0
    else:
        logits = 0.0
    return Memory(
        base=base_bytes(outline, spec, width),
        adapters=trained,
        gradients=trained,
        optimizer=_optimizer_bytes(outline, spec, width),
        activations=tokens * blocks + in_block,
        logits=logits,
        workspace=workspace,
    )


def scoring_memory(outline: Outline, spec: TrialSpec, width: Widths, tokens: int) -> Memory:
    """The peak of a batch of `tokens` that is scored: nothing is kept, logits are made in parts."""
    adapters = 0.0
    if spec.train is not None:
        adapters = float(spec.lora.r * params_per_rank(outline, spec.lora.targets) * width.adapter)
    # The peak is within a block or behind the head: what one holds is gone where the other is.
    in_block = float(tokens * _gradients_per_token(outline) * width.model)
    workspace = _workspace(outline, spec, width)
    vocabulary = outline.config.vocab_size
    logits = float(min(tokens, max(1, LOGITS_AT_ONCE // vocabulary)) * vocabulary * (width.model + 2 * 4))
    if logits >= in_block + workspace:
        in_block = workspace = 0.0
    else:
        logits = 0.0
    return Memory(
        base=base_bytes(outline, spec, width),
        adapters=adapters,
        activations=in_block,
        logits=logits,
        workspace=workspace,
    )


def base_bytes(outline: Outline, spec: TrialSpec, width: Widths) -> float:
    """The frozen weights; what stays unquantised (embeddings, norms, a tied head) is in the model's dtype."""
    packed = four_bit_params(outline, spec)
    each = _FOUR_BIT_DOUBLE if spec.model.double_quantization else _FOUR_BIT
    return packed * each + (outline.params - packed) * width.model


def four_bit_params(outline: Outline, spec: TrialSpec) -> int:
    """How many weights are kept in 4 bits."""
    return sum(_packed_sizes(outline, spec.model.quantize_lm_head)) if _is_quantised(spec) else 0


def _workspace(outline: Outline, spec: TrialSpec, width: Widths) -> float:
    """bitsandbytes dequantises a whole weight for each product with it."""
    if not _is_quantised(spec):
        return 0.0
    return float(max(_packed_sizes(outline, with_head=False)) * width.model)  # none of a block is the head


def _dora_workspace(adapted: Layers, spec: TrialSpec, width: Widths) -> float:
    """DoRA computes the whole adapted weight for its length: that, the update and their sum, at once."""
    sizes = (shape.in_features * shape.out_features for shape in adapted.values())
    return float(3 * max(sizes) * width.adapter) if spec.lora.dora else 0.0


def _is_quantised(spec: TrialSpec) -> bool:
    return spec.model.quantization != "none"


@functools.lru_cache(maxsize=64)
def _packed_sizes(outline: Outline, with_head: bool) -> tuple[int, ...]:
    """Of every layer that is quantised: all, but for a head that is tied or not to be."""
    out = None if with_head and not outline.is_tied else outline.head
    inside = (shape for name, shape in outline.layers.items() if name != out)
    return tuple(shape.in_features * shape.out_features for shape in inside)


@functools.lru_cache(maxsize=64)
def _gradients_per_token(outline: Outline) -> int:
    """Values in flight within a block: the gradients of the widest layer's three products, and of its input.

    A layer that is alone in its width, such as that of GPT's MLP, has fewer: an upper bound there.
    """
    widest = max(shape.out_features for name, shape in outline.layers.items() if name != outline.head)
    return int(3 * widest + 2 * outline.config.hidden_size)


# --- what is kept for the backward pass ---------------------------------------------------------------


def _kept_per_token(outline: Outline, spec: TrialSpec, width: Widths, longest: int) -> float:
    """Bytes a token that all blocks keep."""
    written_out, fused = outline.norm_values
    blocks = 4.0 * written_out + width.model * fused
    blocks += outline.blocks * _attention_scores(outline, spec, width, longest)
    for (kind, shape, is_head, is_adapted), count in _kinds(outline, spec.lora.targets).items():
        if not is_head:
            kept = _kept_by_adapter(kind, shape, spec, width) if is_adapted else 0.0
            kept += _kept_of(kind, shape, outline) * width.model
            blocks += count * (kept + _more_in_float32(kind, shape, outline, spec, width))
    return blocks


@functools.lru_cache(maxsize=256)
def _kinds(outline: Outline, targets: Targets) -> Counter[tuple[str, Shape, bool, bool]]:
    """All layers, those that are alike counted together: (kind, shape, is the head, carries an adapter)."""
    adapted = adapted_layers(outline, targets)
    return Counter(
        (name.rpartition(".")[2], shape, name == outline.head, name in adapted)
        for name, shape in outline.layers.items()
    )


def _kept_of(kind: str, shape: Shape, outline: Outline) -> float:
    """Values a token that are kept around a frozen layer, whatever is adapted."""
    if kind in _FUSED_QKV:  # v stays a part of the whole; q and k are copied when they are rotated
        return 2.0 * shape.out_features - outline.kv_width
    if kind in _MLP_IN:
        activation: str = getattr(outline.config, "hidden_act", getattr(outline.config, "activation", ""))
        return _KEPT_BY_ACTIVATION.get(activation, 1) * float(shape.out_features)
    attention = float(shape.in_features) if kind in _ATTENTION_OUT else 0.0
    return attention + _OUTPUTS_KEPT.get(kind, 1) * shape.out_features


def _more_in_float32(kind: str, shape: Shape, outline: Outline, spec: TrialSpec, width: Widths) -> float:
    """Bytes a token more where attention computes in float32 between layers of 16 bits (`attention.py`)."""
    assert spec.train is not None
    if _is_eager(outline, spec) or not width.on_cpu or width.model == 4 or spec.train.gradient_checkpointing:
        return 0.0
    kept = shape.out_features if kind in ("q_proj", "k_proj", "v_proj", *_FUSED_QKV) else 0
    return (4.0 - width.model) * (kept + (shape.in_features if kind in _ATTENTION_OUT else 0))


def _kept_by_adapter(kind: str, shape: Shape, spec: TrialSpec, width: Widths) -> float:
    """Bytes a token that LoRA on one layer keeps: A's input, for A's gradient, and B's, for B's."""
    middle = spec.lora.r * width.adapter
    if spec.lora.dora:
        return middle + _kept_by_dora(shape, spec, width)
    is_kept_already = kind in _ATTENTION_OUT or kind in _SHARED_INPUT
    mask = shape.in_features if spec.lora.dropout else 0  # a byte each; each layer drops for itself
    return middle + mask + (0 if is_kept_already else shape.in_features * width.model)


def _kept_by_dora(shape: Shape, spec: TrialSpec, width: Widths) -> float:
    """In peft's own pass: the base's result and the update's, for the gradient of the length, and the input,
    which each layer drops or casts for itself."""
    mask = width.mask if spec.lora.dropout else 0
    return 2.0 * shape.out_features * width.model + shape.in_features * (width.adapter + mask)


def _head_bytes(outline: Outline, spec: TrialSpec, width: Widths, tokens: int) -> float:
    """What the loss has at its peak, if every one of `tokens` is predicted: see `loss.ChunkedLoss`.

    The body's output, those rows of it that are picked, and their gradient; and of one chunk its logits, and
    what is made of them, or the head's dequantised weight where that is more than the softmax.
    """
    vocabulary = int(outline.config.vocab_size)
    rows = min(tokens, chunk_rows(vocabulary, on_cpu=width.on_cpu))
    around = 3.0 * tokens * outline.config.hidden_size * width.model
    logits = rows * vocabulary
    capped = width.model if getattr(outline.config, "final_logit_softcapping", None) else 0
    in_loss = logits * (width.model + _SOFTMAX_BYTES + (width.model if width.model != 4 else 0) + capped)
    in_head = 0.0
    if (
        outline.head is not None
        and _is_quantised(spec)
        and spec.model.quantize_lm_head
        and not outline.is_tied
    ):
        in_head = vocabulary * outline.config.hidden_size * width.model + 2 * logits * width.model
    adapted = adapted_layers(outline, spec.lora.targets)
    if outline.head and outline.head in adapted:
        shape = adapted[outline.head]
        around += rows * _kept_by_adapter("lm_head", shape, spec, width)
        if spec.lora.dora:  # its products with the lengths are in float32: their gradient, and that of one
            around += _dora_workspace({outline.head: shape}, spec, width) + 2 * 4 * logits
    return around + max(in_loss, in_head)


def _is_eager(outline: Outline, spec: TrialSpec) -> bool:
    return spec.model.attention == "eager" or not outline.has_sdpa


def _attention_scores(outline: Outline, spec: TrialSpec, width: Widths, longest: int) -> float:
    """Bytes a token that eager attention keeps in a block: the scores in float32, and cast; no other does."""
    if not _is_eager(outline, spec):
        return 0.0
    capped = width.model if getattr(outline.config, "attn_logit_softcapping", None) else 0
    return float(outline.config.num_attention_heads * longest * (4 + width.model + capped))


# --- the optimiser's state ----------------------------------------------------------------------------


def _optimizer_bytes(outline: Outline, spec: TrialSpec, width: Widths) -> float:
    """Of the state on the accelerator; what is paged lies in memory that PyTorch does not count."""
    state = _state_bytes(spec.optimizer)
    return sum(
        count
        * (
            state(spec.lora.r * shape.in_features, width.adapter)
            + state(spec.lora.r * shape.out_features, width.adapter)
        )
        for (_, shape, _, is_adapted), count in _kinds(outline, spec.lora.targets).items()
        if is_adapted
    )


def _state_bytes(spec: OptimizerSpec) -> Callable[[int, int], float]:
    """Bytes of state for a tensor of so many values of such a width."""
    if spec.name == "sgd" and not spec.momentum:
        return lambda count, width: 0.0
    states: dict[str, Callable[[int, int], float]] = {
        "sgd": lambda count, width: count * width,
        "adamw": lambda count, width: 2 * count * width,
        "paged_adamw": lambda count, width: 8 * count if count < _SMALLEST_PAGED else 0.0,
        "adamw_8bit": lambda count, width: 8 * count if count < _SMALLEST_8_BIT else count * (2 + 8 / 256),
    }
    return states[spec.name]
