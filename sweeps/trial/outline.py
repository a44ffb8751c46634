"""What a model is made of, read from one that has shapes and no memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from sweeps.trial.targets import Layers, Targets, linear_layers, lora_params, match


@dataclass(frozen=True, eq=False)  # known by identity, so that what is counted of it can be cached
class Outline:
    """Shapes, and the few facts that tell what a forward pass keeps for its backward pass.

    `head` is the output head's full name, None where it is no linear layer; `is_tied` if it is the embedding
    too. `norm_values` are the values that the norms keep of each token: those of RMS norms, which work in
    float32, and those of torch's fused ones.
    `kv_width` is the width of the keys, and of the values, of one block.
    """

    layers: Layers
    params: int
    config: Any
    head: str | None
    is_tied: bool
    norm_values: tuple[int, int]
    kv_width: int
    has_sdpa: bool

    @property
    def blocks(self) -> int:
        """How many transformer blocks there are."""
        return int(self.config.num_hidden_layers)

    @functools.cached_property
    def linear_params(self) -> int:
        """Weights that every token is multiplied with, the head's included."""
        return sum(shape.in_features * shape.out_features for shape in self.layers.values())


def outline_of(model: Any) -> Outline:
    """Read a bare model, which may be on the meta device, or in 4 bits."""
    config = model.config.get_text_config()
    layers = linear_layers(model)
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Outline(
        layers=layers,
        params=sum(map(_numbers, model.parameters())),
        config=config,
        head=names[0] if names and names[0] in layers else None,
        is_tied=head is not None and head.weight is model.get_input_embeddings().weight,
        norm_values=_norm_values(model, layers),
        kv_width=(kv_heads or heads) * head_width,
        has_sdpa=bool(getattr(model, "_supports_sdpa", True)),
    )


@functools.lru_cache(maxsize=256)
def adapted_layers(outline: Outline, targets: Targets) -> Layers:
    """The layers that `lora.targets` puts an adapter on. Raises `BadModel` where a target matches none."""
    return match(outline.layers, targets)


@functools.lru_cache(maxsize=256)
def params_per_rank(outline: Outline, targets: Targets) -> int:
    """What LoRA of rank 1 on those trains."""
    return lora_params(adapted_layers(outline, targets), r=1)


def _numbers(parameter: torch.nn.Parameter) -> int:
    """How many a parameter holds: bitsandbytes packs two in a byte."""
    packed = getattr(parameter, "quant_state", None)
    return int(packed.shape.numel()) if packed is not None else parameter.numel()


def _norm_values(model: Any, layers: Layers) -> tuple[int, int]:
    """Values a token that the norms keep: (RMS norms, written out in float32; torch's fused norms)."""
    written_out = fused = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "Norm" not in type(module).__name__ or weight is None:
            continue
        if isinstance(module, torch.nn.LayerNorm):
            fused += weight.numel()
            continue
        # A norm over each head (`q_norm`) works on all of the projection's values.
        whole = layers.get(name.removesuffix("_norm") + "_proj")
        written_out += whole.out_features if name.endswith(("q_norm", "k_norm")) and whole else weight.numel()
    return written_out, fused
