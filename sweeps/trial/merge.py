"""A saved adapter merged into an unquantised base: each weight in float32, rounded once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from sweeps.errors import BadModel
from sweeps.trial.base import Base

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"

SHARD_SIZE = "5GB"
"""Most bytes of one file of a saved model."""


@dataclass(frozen=True)
class _Scaling:
    """What `adapter_config.json` says of how an update is put together."""

    alpha: float
    rank_stabilised: bool

    def factor(self, r: int) -> float:
        """alpha / r (Hu et al. 2021, 4.1), or alpha / sqrt(r) (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(r) if self.rank_stabilised else r)


def merge(model: Any, folder: Path) -> None:
    """Merge the adapter that a trial saved in `folder` into the weights of `model`, for good.

    W becomes W + scale * B @ A, with DoRA each row of that at its trained length (Liu et al. 2024, 4.1);
    reckoned in float32, then cast to the dtype of W. Each merged weight is a new tensor, so that what
    was tied to the old one keeps it: an output head that was tied to the embedding no longer is. Raises
    `BadModel` where the adapter does not belong to the model, which is then of no use.
    """
    from safetensors import SafetensorError, safe_open

    scaling = _read_scaling(folder)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file, torch.no_grad():
            for name, tensors in _by_layer(file.keys(), folder).items():
                layer = _layer(model, name, folder)
                parts = {part: file.get_tensor(key) for part, key in tensors.items()}
                merged = _merged(layer, parts, scaling, f"{name} in {folder}")
                layer.weight = torch.nn.Parameter(merged, requires_grad=False)
    except (OSError, SafetensorError) as error:
        raise BadModel(f"an adapter's weights must be readable, got {folder}: {error}") from error
    _say_whether_tied(model)


def save_model(base: Base, folder: Path) -> None:
    """Write model and tokenizer into `folder` as transformers reads them: safetensors, in shards."""
    base.model.config.use_cache = True  # which we turned off for ourselves
    try:
        base.model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    finally:
        base.model.config.use_cache = False
    base.tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors lets its owner alone read a file
        shutil.copymode(folder / "config.json", file)


def _read_scaling(folder: Path) -> _Scaling:
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        scaling = _Scaling(float(config["lora_alpha"]), config["use_rslora"])
        patterns = config["rank_pattern"] or config["alpha_pattern"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadModel(
            f"an adapter must have a LoRA config, got {file}: {type(error).__name__}: {error}; name the "
            "folder that a trial saved"
        ) from error
    if patterns:
        raise BadModel(
            f"an adapter must have one r and one alpha to be merged here, got {patterns} in {file}"
        )
    return scaling


def _by_layer(keys: Iterable[str], folder: Path) -> Mapping[str, dict[str, str]]:
    """The keys of an adapter's file by the layer that they belong to, and by what they are of its update."""
    layers: dict[str, dict[str, str]] = {}
    for key in keys:
        name, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if part not in (_A, _B, _MAGNITUDE):
            raise BadModel(f"an adapter must hold LoRA weights alone to be merged, got {key} in {folder}")
        layers.setdefault(name, {})[part] = key
    return layers


def _layer(model: Any, name: str, folder: Path) -> Any:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    # 4-bit layers are Linear too, and their packed weights no numbers to add to.
    if not isinstance(layer, (torch.nn.Linear, Conv1D)) or not layer.weight.is_floating_point():
        found = "none" if layer is None else type(layer).__name__
        raise BadModel(
            f"an adapter is merged into unquantised linear layers, got {found} for {name} of {folder}; name "
            "the model that it was trained on"
        )
    return layer


def _merged(layer: Any, parts: Mapping[str, torch.Tensor], scaling: _Scaling, where: str) -> torch.Tensor:
    """The layer's weight with the update in it, in its own dtype and on its own device."""
    weight: torch.Tensor = layer.weight
    is_transposed = isinstance(layer, Conv1D)  # whose weight is (in, out)
    in_and_out = weight.shape if is_transposed else weight.shape[::-1]
    a, b = (parts[part].to(weight.device, torch.float32) if part in parts else None for part in (_A, _B))
    if a is None or b is None or (a.shape[1], b.shape[0]) != tuple(in_and_out) or a.shape[0] != b.shape[1]:
        got = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        raise BadModel(
            f"an update must be A (r, in) and B (out, r) for a layer of (in, out) {tuple(in_and_out)}, got "
            f"{got} for {where}; name the model that it was trained on"
        )
    delta = scaling.factor(a.shape[0]) * (b @ a)  # (out, in)
    merged = weight.float() + (delta.T if is_transposed else delta)
    if _MAGNITUDE in parts:
        axis = 0 if is_transposed else 1  # the input's
        length = parts[_MAGNITUDE].to(weight.device, torch.float32)  # (out,)
        merged *= (length / merged.norm(dim=axis)).unsqueeze(axis)
    return merged.to(weight.dtype).contiguous()


def _say_whether_tied(model: Any) -> None:
    """Have the config say so where the output head has a weight of its own by now."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
