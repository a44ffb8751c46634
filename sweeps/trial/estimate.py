"""What a trial will need, told without its weights and without a network."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

from sweeps.spec import ModelSpec, TrialSpec
from sweeps.trial.source import FolderModel, GgufModel, HubModel, locate, read_config, unloadable
from sweeps.trial.targets import Layers, Targets, linear_layers, lora_params, match


def trainable_params(spec: TrialSpec) -> int:
    """The parameters that the trial trains (law L5); 0 for a base that is only scored.

    Raises `BadModel` if the model's architecture cannot be known here, or a target matches none of its
    linear layers.
    """
    if spec.train is None:
        return 0
    return spec.lora.r * _params_per_rank(_architecture(spec.model), spec.lora.targets)


def frozen_params(model: ModelSpec) -> int:
    """The parameters of the base, shared ones counted once. Raises `BadModel` as `trainable_params` does."""
    return _outline(_architecture(model))[1]


def _architecture(model: ModelSpec) -> ModelSpec:
    """What of a model tells its shapes, so that all trials on it share one look."""
    return ModelSpec(id=model.id, revision=model.revision, trust_remote_code=model.trust_remote_code)


@functools.lru_cache(maxsize=256)
def _params_per_rank(architecture: ModelSpec, targets: Targets) -> int:
    layers, _ = _outline(architecture)
    return lora_params(match(layers, targets), r=1)


@functools.lru_cache(maxsize=64)
def _outline(architecture: ModelSpec) -> tuple[Layers, int]:
    """The linear layers and the number of parameters, from a model that has shapes and no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(architecture)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=architecture.trust_remote_code)
    except Exception as error:
        raise unloadable(architecture, error) from error
    return linear_layers(model), sum(parameter.numel() for parameter in model.parameters())


def _config(architecture: ModelSpec) -> Any:
    source = locate(architecture)
    match source:
        case HubModel(name) if (facts := _shipped(name)) is not None:
            from transformers import AutoConfig

            return AutoConfig.for_model(**facts)
        case GgufModel(path):
            from sweeps.trial.gguf import cached_folder

            folder = cached_folder(path)  # reads in no time what the file itself takes seconds to tell
            return read_config(FolderModel(folder) if folder.exists() else source, architecture)
    return read_config(source, architecture)


def _shipped(name: str) -> dict[str, Any] | None:
    """The architecture of a well-known hub model, so that planning on it needs no network."""
    file = importlib.resources.files("sweeps") / "models" / f"{name.replace('/', '__')}.json"
    facts: dict[str, Any] | None = json.loads(file.read_text("utf-8")) if file.is_file() else None
    return facts
