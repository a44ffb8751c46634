"""Put LoRA on a base, count it, save it, and take it off without a trace."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from sweeps.errors import BadModel
from sweeps.spec import LoraSpec
from sweeps.trial.base import Base
from sweeps.trial.lora import make_lean
from sweeps.trial.paths import whole_folder
from sweeps.trial.targets import Layers, announce, lora_params, magnitude_params, match, refuse_rank

# peft's names in an adapter file carry the path of its own wrapper, which we do without.
_FILE_PREFIX = "base_model.model."
_WEIGHTS_FILE = "adapter_model.safetensors"
_MAGNITUDE = "lora_magnitude_vector"  # of DoRA


def attach(base: Base, lora: LoraSpec, seed: int) -> Adapter:
    """Put a new adapter on `base`. It starts as the identity, and depends on nothing but `lora` and `seed`.

    The model is then in evaluation mode, and the process's random numbers are as they were. Raises
    `BadModel` if a target matches no linear layer, is narrower than `lora.r` or does not take LoRA; the base
    is then as it was.
    """
    layers = match(base.layers, lora.targets)
    refuse_rank(layers, lora.r)
    adapter = Adapter(base, lora, layers)
    try:
        adapter._inject(seed)
        adapter._check()
    except BaseException:  # also where the person stops it: nothing may stay on the base
        adapter.detach()
        raise
    return adapter


class Adapter:
    """The LoRA weights of one trial on a base that is not its own.

    A base may carry several; the one put on last is the one that its forward pass uses.
    """

    def __init__(self, base: Base, lora: LoraSpec, layers: Layers) -> None:
        self.base = base
        self.lora = lora
        self.dtype = _adapter_dtype(base, lora)
        self._layers = layers
        self._name = _free_name(base.model)
        self._config: Any = None
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._checkpoints = False

    @property
    def model(self) -> Any:
        """The base's model with the adapter in it."""
        return self.base.model

    @property
    def targets(self) -> tuple[str, ...]:
        """The full names of the layers that carry it."""
        return tuple(self._layers)

    @property
    def trainable_params(self) -> int:
        """How many numbers it trains."""
        magnitudes = magnitude_params(self._layers) if self.lora.dora else 0
        return lora_params(self._layers, self.lora.r) + magnitudes

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made for the user, each with its reason."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.lora.dtype != "auto":
            why = "set by lora.dtype"
        elif self.dtype == self.base.dtype:
            why = "the model's compute dtype"
        else:
            why = "a float16 adapter would not train"
        notes = (announce(self.lora, self._layers), f"adapter dtype {dtype}: {why}")
        if not self.lora.dora or self.dtype == torch.float32:
            return notes
        return (*notes, f"DoRA's lengths in float32: {dtype} is too coarse for their steps")

    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """The trainable parameters, in the order of the model; none once detached."""
        return tuple(self._parameters.values())

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The same by name; the name that the adapter has on this base is not in it."""
        return {name.replace(f".{self._name}.", "."): value for name, value in self._parameters.items()}

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, until the adapter is detached."""
        self._checkpoints = True
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        # transformers makes the embeddings' output require a gradient, which this kind does not need, and
        # would leave that on when checkpointing goes off again.
        self.model.disable_input_require_grads()

    def save(self, folder: Path) -> None:
        """Write the weights (safetensors) and peft's config into `folder`, which appears whole.

        `PeftModel.from_pretrained` reads it. The base's own weights are not in it.
        """
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        tensors = get_peft_model_state_dict(
            self.model,
            state_dict=self._parameters,
            adapter_name=self._name,
            save_embedding_layers=False,
        )
        named = {_FILE_PREFIX + name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        with whole_folder(folder) as draft:
            save_file(named, draft / _WEIGHTS_FILE, metadata={"format": "pt"})
            self._config.save_pretrained(draft)
            # safetensors lets its owner alone read a file; as readable as the other one is
            shutil.copymode(draft / "adapter_config.json", draft / _WEIGHTS_FILE)

    def detach(self) -> None:
        """Take the adapter off: the base has its own modules again, in evaluation mode. Idempotent.

        Its layers, without their weights, are left to the next adapter of the base.
        """
        if self._checkpoints:
            self.model.activation_checkpointing_disable()
        spared = self._leave_spare()
        for name, layer in list(_lora_layers(self.model)):
            if not spared:
                _remove(self._name, layer)
            if spared or not layer.lora_A:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer.get_base_layer())
        configs = getattr(self.model, "peft_config", {})
        configs.pop(self._name, None)
        if not configs and hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self._parameters = {}
        self._checkpoints = False
        self.model.eval()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _inject(self, seed: int) -> None:
        """Put peft's layers in the model, drawn from `seed` alone."""
        from peft import inject_adapter_in_model

        if self._take_spare(seed):
            return
        self._config = _peft_config(self.base, self.lora, self._layers)
        with torch.random.fork_rng(devices=[]), _expected_warnings():
            torch.default_generator.manual_seed(seed)
            try:
                inject_adapter_in_model(self._config, self.model, self._name)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise BadModel(f"the model {self.base.spec.id} must take LoRA: {error}") from error
        self._config.target_modules = sorted(self._config.target_modules)  # a set, in no order, until now
        self._config.inference_mode = True  # what peft writes, so that a reader gets frozen weights
        self._parameters = _named_parameters(self.model, self._name)
        for name, parameter in self._parameters.items():
            if _MAGNITUDE not in name:
                parameter.data = parameter.data.to(self.dtype)
        if self.lora.dora:
            self._set_lengths()
        else:
            for name, layer in _lora_layers(self.model):
                if name in self._layers:
                    make_lean(layer)
        self.model.eval()  # new layers are born in training mode

    def _leave_spare(self) -> bool:
        """Leave peft's layers to the next adapter; not DoRA's with their lengths, nor those of several."""
        carrying = list(_lora_layers(self.model))
        alone = all(list(layer.lora_A) == [self._name] for _, layer in carrying)
        whole = {name for name, _ in carrying} == set(self._layers)
        if not self._parameters or self.lora.dora or not alone or not whole:
            return False
        for _, layer in carrying:
            for weights in (layer.lora_A, layer.lora_B):
                # Another parameter, since a caller may still hold this one.
                weights[self._name].weight = torch.nn.Parameter(torch.empty(0))
            layer.lora_dropout[self._name] = torch.nn.Identity()
        self.base.spare[:] = [_Spare(self._name, self._layers, carrying, self._config)]
        return True

    def _take_spare(self, seed: int) -> bool:
        """Put the layers of the adapter before on again, with weights as new ones have; False if none fit.

        peft looks through the whole model many times for a new adapter, 0.35 s of SmolLM2.
        """
        spare: _Spare | None = self.base.spare.pop() if self.base.spare else None
        if spare is None or self.lora.dora or (spare.name, spare.layers) != (self._name, self._layers):
            return False
        self._config = _with_settings(spare.config, self.lora)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for path, layer in spare.carrying:
                _renew(layer, self._name, self._config, self.dtype)
                parent, _, child = path.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer)
        self.model.peft_config = {self._name: self._config}
        self._parameters = _named_parameters(self.model, self._name)
        self.model.eval()
        return True

    def _set_lengths(self) -> None:
        """Let DoRA's lengths be what its own forward pass finds, to the last digit, in float32.

        peft takes them in another dtype than the pass does, and in 16 bits the adapter would not start as the
        identity. Nor would it train them: near 1 bfloat16 goes by 0.008, an optimiser's step is below 0.001.
        """
        from peft.utils.integrations import dequantize_module_weight

        for name, layer in _lora_layers(self.model):
            if name in self._layers:
                magnitude = layer.lora_magnitude_vector[self._name]
                weight = dequantize_module_weight(layer.get_base_layer()).to(self.dtype)
                no_update = torch.zeros((), dtype=self.dtype, device=weight.device)
                lengths = magnitude.get_weight_norm(weight, no_update, scaling=1.0)
                magnitude.weight.data = lengths.detach().float()

    def _check(self) -> None:
        """peft drops a name that it does not match without a word (law L5)."""
        carrying = {name for name, layer in _lora_layers(self.model) if self._name in layer.lora_A}
        count = sum(parameter.numel() for parameter in self._parameters.values())
        if carrying != set(self._layers) or count != self.trainable_params:
            odd = sorted(carrying.symmetric_difference(self._layers))
            raise BadModel(
                f"the adapter must be on its {len(self._layers)} targets ({self.trainable_params} "
                f"parameters), got {len(carrying)} layers ({count} parameters; differing: "
                f"{', '.join(odd[:5]) or 'none'}); list other names in lora.targets"
            )


@dataclass(frozen=True)
class _Spare:
    """peft's layers that an adapter has left, by their places in the model, in the model's order."""

    name: str
    layers: Layers
    carrying: Sequence[tuple[str, Any]]
    config: Any


def _with_settings(config: Any, lora: LoraSpec) -> Any:
    """The peft config of the adapter before, which peft has completed, with the settings of this one."""
    new = copy.deepcopy(config)
    new.r, new.lora_alpha = lora.r, _alpha(lora)
    new.lora_dropout, new.use_rslora = lora.dropout, lora.rslora
    return new


def _renew(layer: Any, name: str, config: Any, dtype: torch.dtype) -> None:
    """Make of a layer that was used what peft makes of a new one: the same draws in the same order."""
    r, weight = config.r, layer.get_base_layer().weight
    layer.r[name], layer.lora_alpha[name] = r, config.lora_alpha
    layer.use_rslora[name] = config.use_rslora
    layer.scaling[name] = config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)
    dropout = torch.nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else torch.nn.Identity()
    layer.lora_dropout[name] = dropout
    one, other = layer.lora_A[name], layer.lora_B[name]
    one.out_features = other.in_features = r
    new = torch.empty(r, one.in_features)
    # Of three draws, two are of linear layers when they are born: peft draws A anew, and sets B to 0.
    torch.nn.init.kaiming_uniform_(new, a=math.sqrt(5))
    torch.nn.init.kaiming_uniform_(torch.empty(other.out_features, r), a=math.sqrt(5))
    torch.nn.init.kaiming_uniform_(new, a=math.sqrt(5))
    if weight.is_floating_point():  # peft takes the base's dtype on the way, which may round
        new = new.to(weight.dtype)
    zeros = torch.zeros(other.out_features, r)
    one.weight = torch.nn.Parameter(new.to(weight.device, dtype))
    other.weight = torch.nn.Parameter(zeros.to(weight.device, dtype))


def _adapter_dtype(base: Base, lora: LoraSpec) -> torch.dtype:
    if lora.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[lora.dtype]
    return torch.float32 if base.dtype == torch.float16 else base.dtype


def _free_name(model: Any) -> str:
    """A name that no adapter of this model has; it appears in no file."""
    taken = getattr(model, "peft_config", {})
    return next(name for number in itertools.count() if (name := f"adapter{number}") not in taken)


def _alpha(lora: LoraSpec) -> int | float:
    return int(lora.alpha) if lora.alpha.is_integer() else lora.alpha


def _peft_config(base: Base, lora: LoraSpec, layers: Layers) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=_alpha(lora),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=list(layers),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.spec.id,
        revision=base.spec.revision,
    )


@contextlib.contextmanager
def _expected_warnings() -> Iterator[None]:
    """Hide what peft says about choices that are ours."""
    with warnings.catch_warnings():
        for message in (
            "Model has `tie_word_embeddings=True`",  # the head's adapter is its own; the embedding keeps none
            "Already found a `peft_config` attribute",  # several adapters on one base are allowed
            "fan_in_fan_out is set to",  # peft then sets it as the layer needs it
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer that carries an adapter of anyone, by its name."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _named_parameters(model: Any, adapter: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter by their full name, in the order of the model."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(f".{kind}.{adapter}." in name for kind in ("lora_A", "lora_B", _MAGNITUDE))
    }


def _remove(adapter: str, layer: Any) -> None:
    """Drop one adapter from a layer; the latest of the others, if there are any, is then in use."""
    others = [name for name in layer.lora_A if name != adapter]
    if others and adapter in layer.active_adapters:
        layer.set_adapter(others[-1])
        for weights in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            weights.requires_grad_(True)  # set_adapter freezes those not in use
    layer.delete_adapter(adapter)
