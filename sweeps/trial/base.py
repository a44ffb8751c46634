"""The frozen base model: loaded, quantised, kept in a process. The one file that imports bitsandbytes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import logging
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from sweeps.collecting import without_collecting
from sweeps.errors import BadModel
from sweeps.spec import ModelSpec
from sweeps.trial import gguf
from sweeps.trial.basecache import KeptBase, kept_base
from sweeps.trial.kernels import use_liger
from sweeps.trial.source import (
    FolderModel,
    GgufModel,
    Source,
    locate,
    read_config,
    read_tokenizer,
    unloadable,
)
from sweeps.trial.targets import Shape, linear_layers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen causal language model, resident in this process from trial to trial.

    Between trials the model is in evaluation mode, no parameter requires a gradient and no adapter is on.
    `dtype` is what it computes in, whatever its weights are stored in. `layers` are its linear layers as
    they were before any adapter. `notes` are the choices made for the user, each with its reason.
    """

    model: Any
    tokenizer: Any
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    layers: Mapping[str, Shape]
    notes: tuple[str, ...]
    load_seconds: float
    spare: list[Any] = field(default_factory=list, repr=False)
    """What the last adapter has left for the next one; only `adapter.py` knows what it is."""

    @property
    def device_name(self) -> str:
        """The device as people know it."""
        return _device_name(self.device)


class Resident:
    """Holds one base for the life of a process, and another only when another is asked for."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._base: Base | None = None

    def get(self, spec: ModelSpec) -> Base:
        """The base of `spec`: the one that is here if it is equal, else loaded, after the old one is gone."""
        if self._base is None or self._base.spec != spec:
            self.drop()
            self._base = load_base(spec, self._device)
        return self._base

    def drop(self) -> None:
        """Let the base go, and its memory with it."""
        self._base = None
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where CUDA was never used


def load_base(spec: ModelSpec, device: torch.device | None = None) -> Base:
    """Load, quantise and freeze the model of `spec`, on `device` or else the best one that is visible.

    Nothing is unpickled: weights are safetensors, or a GGUF file that becomes such. Raises `BadModel`.
    """
    started = time.perf_counter()
    import_bitsandbytes()
    device = device or _best_device()
    dtype = _dtype(spec, device)
    source = locate(spec)
    with without_progress_bars():
        if isinstance(source, GgufModel):
            source = FolderModel(_converted(source, spec))
        config = read_config(source, spec)
        attention, why = _attention(spec, config, device, dtype)
        wanted = _Wanted(source, config, spec, device, dtype, attention)
        with _of_the_class_linear(config, spec):
            model, kept = _load_once_quantised(wanted)
        tokenizer = _load_tokenizer(source, model, spec)
    _freeze(model)
    layers = linear_layers(model)
    _check_quantized(model, spec)
    notes = (
        f"device {device} ({_device_name(device)}){_why_no_cuda(device)}",
        f"dtype {_name(dtype)}: {_why_dtype(spec, device)}",
        f"attention {model.config._attn_implementation}: {why}",
        _quantization_note(model, spec, layers),
        *use_liger(model, device),
        *kept,
    )
    return Base(model, tokenizer, spec, device, dtype, layers, notes, time.perf_counter() - started)


def import_bitsandbytes() -> Any:
    """bitsandbytes, imported without reaching for the hub.

    On a CPU with AVX512-BF16 its import fetches native code from the hub, where the package `kernels` is
    installed, and warns where it is not. The code would serve the packed 4-bit layout that we keep out.
    """
    complaints = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, kernels = complaints.level, sys.modules.get("kernels")
    complaints.setLevel(logging.ERROR)
    # None makes an import fail, which typeshed leaves out of the type of what is imported.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        with without_collecting():
            import bitsandbytes
    finally:
        complaints.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
    return bitsandbytes


# --- choices ----------------------------------------------------------------------------------------


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return platform.processor() or platform.machine()


def _why_no_cuda(device: torch.device) -> str:
    return "" if device.type == "cuda" or torch.cuda.is_available() else ": no CUDA device is visible"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator does; a CPU that does is no faster for it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    if spec.dtype != "auto":
        return _DTYPES[spec.dtype]
    return torch.bfloat16 if _computes_in_bfloat16(device) else torch.float32


def _why_dtype(spec: ModelSpec, device: torch.device) -> str:
    if spec.dtype != "auto":
        return "set by model.dtype"
    if _computes_in_bfloat16(device):
        return "the device computes in it"
    return "the device has no bfloat16" if device.type == "cuda" else "auto on a CPU"


def _attention(
    spec: ModelSpec, config: Any, device: torch.device, dtype: torch.dtype
) -> tuple[str | None, str]:
    """The kernel, None for the model's own choice (sdpa, eager where it has none), and the reason."""
    obstacle = _no_flash(device, dtype)
    if spec.attention == "flash_attention_2" and obstacle:
        # transformers would fetch a kernel from the hub in its place
        raise BadModel(f"model.attention=flash_attention_2 cannot be: {obstacle}; say auto or sdpa")
    if spec.attention != "auto":
        return spec.attention, "set by model.attention"
    obstacle = obstacle or _model_has_no_flash(config)
    if obstacle:
        return None, f"not flash_attention_2, {obstacle}"
    return "flash_attention_2", "flash-attn is installed"


def _no_flash(device: torch.device, dtype: torch.dtype) -> str:
    """Why the device cannot use FlashAttention, empty if it can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype == torch.float32:
        return "it needs a 16-bit dtype"
    return "" if is_flash_attn_2_available() else "flash-attn is not installed"


def _model_has_no_flash(config: Any) -> str:
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return "" if getattr(kind, "_supports_flash_attn", False) else "the model has no code for it"


def _quantization_note(model: Any, spec: ModelSpec, layers: Mapping[str, Shape]) -> str:
    if spec.quantization == "none":
        return "quantization none: set by model.quantization"
    packed = {name for name, _ in _four_bit_layers(model)}
    head = model.get_output_embeddings()
    why = "it is tied to the embedding" if spec.quantize_lm_head else "model.quantize_lm_head is false"
    rest = [
        f"{name} ({why})" if model.get_submodule(name) is head else name
        for name in layers
        if name not in packed
    ]
    left_out = ", ".join(rest) or "none"
    return f"quantization {spec.quantization}: {len(packed)} linear layers in 4 bits; left out: {left_out}"


# --- loading ----------------------------------------------------------------------------------------


def _converted(source: GgufModel, spec: ModelSpec) -> Any:
    try:
        return gguf.converted(source.path)
    except BadModel:
        raise
    except Exception as error:  # the readers of GGUF raise a dozen kinds, all of which mean: no model
        raise unloadable(spec, error) from error


@dataclass(frozen=True)
class _Wanted:
    """What is to be loaded, and how; `attention` None is the model's own choice."""

    source: Source
    config: Any
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    attention: str | None


def _load_once_quantised(wanted: _Wanted) -> tuple[Any, tuple[str, ...]]:
    """The model, quantised now or by a process before this one, bit for bit the same; and notes of that.

    Of several processes that need one that nobody has kept, one quantises and the others wait: eight at once
    would read the whole weights eight times.
    """

    def quantise() -> Any:
        return _load_model(wanted, _quantization_config(wanted))

    kept = kept_base(wanted.spec, wanted.source, wanted.config, wanted.device.type, _name(wanted.dtype))
    if kept is None:
        return quantise(), ()
    model, trouble = _load_kept(kept, wanted)
    if model is not None:
        return model, trouble
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(kept.making())
        except OSError as error:
            where = f"{kept.folder.parent} cannot be written ({error.strerror or error})"
            return quantise(), (*trouble, f"base: not kept, {where}")
        model, said = _load_kept(kept, wanted)  # made while we waited
        if model is not None:
            return model, (*trouble, *said)
        model = quantise()
        size = int(model.get_memory_footprint())
        return model, (*trouble, *kept.keep(lambda folder: _save_packed(model, folder), size))


def _save_packed(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="2GB")  # as much at a time goes through the host's memory
    for file in folder.glob("*.safetensors"):  # which its owner alone may read; as readable as the others are
        shutil.copymode(folder / "config.json", file)


def _load_kept(kept: KeptBase, wanted: _Wanted) -> tuple[Any, tuple[str, ...]]:
    """The model that is kept, or None; a damaged one is removed, and a note says so."""
    started = time.perf_counter()
    if not kept.is_there():
        return None, ()
    try:
        kept.check()
        packed = copy.deepcopy(wanted.config)
        packed.quantization_config = kept.quantization_config()
        there = dataclasses.replace(wanted, source=FolderModel(kept.folder), config=packed)
        model = _load_model(there, None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever is wrong with it, the model's own files are right
        kept.remove()
        found = " ".join(str(error).split())[:200]
        return None, (f"base: {kept.folder} was damaged, and is made anew ({found})",)
    model.name_or_path = model.config.name_or_path = wanted.config.name_or_path
    seconds = time.perf_counter() - started
    return model, (f"base: loaded from the cache in 4 bits in {seconds:.1f} s, not quantised again",)


def _load_model(wanted: _Wanted, quantization: BitsAndBytesConfig | None) -> Any:
    spec = wanted.spec
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            **wanted.source.place,
            config=wanted.config,
            dtype=wanted.dtype,
            quantization_config=quantization,
            device_map={"": "cpu" if wanted.device.type == "cpu" else wanted.device},
            attn_implementation=wanted.attention,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises a dozen kinds, all of which mean: no model
        raise unloadable(spec, error) from error
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:  # transformers fills them with random numbers, and only warns
        raise BadModel(
            f"the files of {spec.id} must hold every weight of {type(model).__name__}, and lack "
            f"{len(missing)}: {', '.join(missing[:3])}; name a causal language model's own files"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BadModel(f"a base must carry no adapter, and {spec.id} holds an adapter_config.json; remove it")
    return model


def _quantization_config(wanted: _Wanted) -> BitsAndBytesConfig | None:
    spec = wanted.spec
    if spec.quantization == "none":
        return None
    return BitsAndBytesConfig(
        llm_int8_skip_modules=_left_out(wanted.config, spec),
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=spec.double_quantization,
        bnb_4bit_compute_dtype=wanted.dtype,
    )


def _left_out(config: Any, spec: ModelSpec) -> list[str] | None:
    """What is not to be quantised: whatever shares its weights, as the model's own class tells it.

    None is what transformers leaves out by itself: the output head too.
    """
    if not spec.quantize_lm_head:
        return None
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=spec.trust_remote_code
        )
    tied = {name.removesuffix(".weight") for pair in outline.all_tied_weights_keys.items() for name in pair}
    head = outline.get_output_embeddings()
    is_tied = any(module is head for name, module in outline.named_modules() if name in tied)
    return None if is_tied else sorted(tied)


def _load_tokenizer(source: Source, model: Any, spec: ModelSpec) -> Any:
    tokenizer = read_tokenizer(source, spec)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise BadModel(
            f"the model must have an embedding for every token of its tokenizer, got {rows} for "
            f"{len(tokenizer)} tokens in {spec.id}; use the tokenizer that it was trained with"
        )
    if tokenizer.pad_token is None:  # never a label of ours: rows are padded by number, with labels ignored
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


@contextlib.contextmanager
def _of_the_class_linear(config: Any, spec: ModelSpec) -> Iterator[None]:
    """transformers packs layers of the very class Linear alone, and leaves Falcon's own class, which computes
    the same, as it is: with a warning, a 40B model would stay at 84 GB."""
    if config.model_type != "falcon" or spec.quantization == "none":
        yield
        return
    from transformers.models.falcon import modeling_falcon

    own = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = torch.nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = own


def _check_quantized(model: Any, spec: ModelSpec) -> None:
    if spec.quantization != "none" and not any(_four_bit_layers(model)):
        raise BadModel(
            f"model.quantization={spec.quantization} must put linear layers of {spec.id} in 4 bits, and its "
            f"{type(model).__name__} has none that can be; say none"
        )


def _freeze(model: Any) -> None:
    model.requires_grad_(False)  # it is in evaluation mode already, as transformers loads it
    model.config.use_cache = False  # neither training nor scoring reads a row twice
    for _, layer in _four_bit_layers(model):
        # On a CPU with AVX512-BF16 an evaluation without gradients repacks the weights in place, after which
        # every backward pass gives wrong gradients without an error.
        layer.support_avx512bf16_for_cpu = False


def _four_bit_layers(model: Any) -> Iterator[tuple[str, Any]]:
    kind = import_bitsandbytes().nn.Linear4bit
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws none inside the block: they are no use in a worker's log, or for a small file."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()
