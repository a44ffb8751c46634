"""A small model with random weights in place of a large one, of the same architecture: what is wrong with a
trial's settings shows on a CPU in seconds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sweeps.errors import BadModel
from sweeps.spec import ModelSpec
from sweeps.trial import gguf
from sweeps.trial.base import without_progress_bars
from sweeps.trial.estimate import config_of
from sweeps.trial.paths import whole_folder
from sweeps.trial.source import FolderModel, GgufModel, locate, unloadable
from sweeps.trial.targets import Layers, linear_layers

_LAYERS = 2
_WIDTHS = {
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "intermediate_size": 256,
    "ffn_hidden_size": 256,
    "ffn_dim": 256,
    "n_inner": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "head_dim": 32,
}
_AT_MOST = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_VOCABULARY = 4096


@dataclass(frozen=True)
class Miniature:
    """A saved small model. `layers` are its linear layers; `note` says what it is, and what it is not."""

    folder: Path
    layers: Layers
    tokenizer: Any
    note: str


def save_miniature(model: ModelSpec, folder: Path, texts: Iterable[str]) -> Miniature:
    """Save a miniature of `model` with its tokenizer into `folder`; equal every time.

    Its tokenizer is the model's own if that is on this machine, else one made from `texts`. Raises `BadModel`
    or `DownloadFailed` where the architecture cannot be known here or cannot be made small.
    """
    config = config_of(model)
    tokenizer = _own_tokenizer(model)
    whose = "its own tokenizer"
    if tokenizer is None:
        tokenizer = make_tokenizer(texts)
        whose = "a tokenizer made on the spot, since its own is not on this machine: lengths are rough"
    small = shrunk(config, tokenizer)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = AutoModelForCausalLM.from_config(small, trust_remote_code=model.trust_remote_code)
        with without_progress_bars(), whole_folder(folder) as draft:
            network.to(torch.float32).save_pretrained(draft)
            tokenizer.save_pretrained(draft)
    except OSError:
        raise
    except Exception as error:  # a config that its kind cannot be made from raises whatever its code does
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BadModel(
            f"a rehearsal makes a small model of the kind of {model.id} ({config.model_type}), and this kind "
            f"does not shrink: {found}; launch it without a rehearsal, with --set train.samples=... at first"
        ) from error
    note = (
        f"{model.id} is played by a {config.model_type} of {_LAYERS} layers with random weights and {whose}"
    )
    return Miniature(folder, linear_layers(network), tokenizer, note)


def shrunk(config: Any, tokenizer: Any) -> Any:
    """The same architecture with few layers, narrow ones, and a vocabulary for `tokenizer`."""
    small = copy.deepcopy(config)
    layers = config.num_hidden_layers
    heads = config.num_attention_heads
    for name, width in _WIDTHS.items():
        _set(small, name, width)
    for name, most in _AT_MOST.items():
        if isinstance(given := _get(small, name), int):
            _set(small, name, min(given, most))
    for name in _KEY_VALUE_HEADS:
        given = _get(config, name)
        _set(small, name, 4 if given == heads else 1 if given == 1 else 2)
    for name, value in list(vars(small).items()):
        if isinstance(value, list | tuple) and len(value) == layers > _LAYERS:  # one entry a layer
            setattr(small, name, [value[0], *value[1 - _LAYERS :]])
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            setattr(small, name, _short_factors(value, small))
    small.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, getattr(tokenizer, name))
    return small


def _get(config: Any, name: str) -> Any:
    return vars(config).get(config.attribute_map.get(name, name))


def _set(config: Any, name: str, value: int) -> None:
    """Only what the architecture has, and does not derive by itself."""
    if _get(config, name) is not None:
        setattr(config, name, value)


def _short_factors(rope: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Factors for each frequency of a rotary embedding, as many as a narrow head has."""
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    count = int(_WIDTHS["head_dim"] * share) // 2
    return {key: value[:count] if isinstance(value, list) else value for key, value in rope.items()}


def _own_tokenizer(model: ModelSpec) -> Any:
    """The model's own tokenizer where that takes no network and no conversion; else None."""
    source = locate(model)
    place = source.place
    if isinstance(source, GgufModel):
        folder = gguf.cached_folder(source.path)
        if not folder.exists():
            return None
        place = FolderModel(folder).place
    try:
        found = AutoTokenizer.from_pretrained(
            **place, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises a dozen kinds, all of which mean: no tokenizer here
        if isinstance(source, FolderModel):
            raise unloadable(model, error) from error
        return None
    if found.pad_token is None:
        found.pad_token = found.eos_token or found.unk_token
    return found


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from `texts`, with `<s>`, `</s>` and `<pad>`: a common word is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
