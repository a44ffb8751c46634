"""Which linear layers an adapter goes on, and how many parameters that makes (law L5)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from sweeps.errors import BadModel
from sweeps.spec import LoraSpec

# The query and value projections, alone or fused with the key's; the first that a model has.
_QUERY_VALUE = (("q_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("c_attn",))


class Shape(NamedTuple):
    """A linear layer's width on both sides."""

    in_features: int
    out_features: int


Targets = Literal["qv", "all"] | tuple[str, ...]
Layers = Mapping[str, Shape]
"""Linear layers by their full name, in the order of the model."""


def linear_layers(model: Any) -> dict[str, Shape]:
    """Every linear layer of a bare model, the output head and 4-bit layers included.

    Layers that are no modules of their own (the fused experts of a mixture) are not seen.
    """
    return {
        name: _shape(module)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }


def match(layers: Layers, targets: Targets) -> dict[str, Shape]:
    """The layers that `LoraSpec.targets` names. Raises `BadModel` if a name matches none."""
    if targets == "all":
        return dict(layers)
    names = _query_value(layers) if isinstance(targets, str) else targets
    _refuse_unmatched(layers, names)
    return {layer: shape for layer, shape in layers.items() if any(_named(layer, name) for name in names)}


def lora_params(layers: Layers, r: int) -> int:
    """Trainable parameters of rank r on `layers`: A is (r, in), B is (out, r) (Hu et al. 2021, 4.1)."""
    return r * sum(shape.in_features + shape.out_features for shape in layers.values())


def magnitude_params(layers: Layers) -> int:
    """What DoRA trains besides: one length for each output of `layers` (Liu et al. 2024, eq. 5)."""
    return sum(shape.out_features for shape in layers.values())


def largest_rank(layers: Layers) -> int:
    """The smallest side among `layers`: a matrix of that side has no higher rank."""
    return min(min(shape) for shape in layers.values())


def refuse_rank(layers: Layers, r: int) -> None:
    """Raise `BadModel` where `r` is above a side of a layer."""
    most = largest_rank(layers)
    if r > most:
        name, shape = next((name, shape) for name, shape in layers.items() if min(shape) == most)
        count = sum(min(shape) < r for shape in layers.values())
        raise BadModel(
            f"lora.r <= the smaller side of every layer in lora.targets must hold, got r={r} with {count} "
            f"narrower layers, the narrowest {name} ({shape.in_features} x {shape.out_features}); lower "
            f"lora.r to {most}, or list wider layers alone in lora.targets"
        )


def announce(lora: LoraSpec, layers: Layers) -> str:
    """What the adapter was put on, and why."""
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    asked = lora.targets if isinstance(lora.targets, str) else "list"
    return f"adapter on {len(layers)} linear layers ({kinds}): lora.targets is {asked}"


def _shape(module: Any) -> Shape:
    if isinstance(module, Conv1D):  # GPT-2's linear layer, whose weight is (in, out)
        return Shape(*module.weight.shape)
    return Shape(module.in_features, module.out_features)


def _named(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def _kinds(layers: Layers) -> list[str]:
    """The layers' own names, without the blocks that they stand in."""
    return sorted({name.rpartition(".")[2] for name in layers})


def _query_value(layers: Layers) -> tuple[str, ...]:
    kinds = _kinds(layers)
    for names in _QUERY_VALUE:
        if set(names) <= set(kinds):
            return names
    raise BadModel(
        "lora.targets=qv needs query and value projections under a name that we know, and the model has the "
        f"linear layers {', '.join(kinds)}; list names among those"
    )


def _refuse_unmatched(layers: Layers, targets: tuple[str, ...]) -> None:
    kinds = _kinds(layers)
    unmatched = [target for target in targets if not any(_named(layer, target) for layer in layers)]
    if not unmatched:
        return
    faults = [f"{target!r}{_nearest(target, kinds)}" for target in unmatched]
    raise BadModel(
        f"every name in lora.targets must match a linear layer, got {', '.join(faults)}; the model has "
        f"{', '.join(kinds)}"
    )


def _nearest(target: str, kinds: list[str]) -> str:
    near = difflib.get_close_matches(target, kinds, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
