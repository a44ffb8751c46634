"""The optimisers of a trial, and what they remember from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sweeps.errors import BadModel
from sweeps.spec import OptimizerSpec
from sweeps.trial.base import import_bitsandbytes


def make_optimizer(parameters: Sequence[torch.nn.Parameter], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The optimiser of `spec` over `parameters`. Raises `BadModel` for a paged one without CUDA."""
    is_cuda = parameters[0].device.type == "cuda"
    betas = (spec.beta1, spec.beta2)
    match spec.name:
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
            )
        case "adamw":
            # Fused: the other kernels hold another copy of the weights for a moment, which at r=256 is 1 GB.
            return torch.optim.AdamW(
                parameters, lr=spec.lr, betas=betas, weight_decay=spec.weight_decay, fused=is_cuda
            )
        case "paged_adamw":
            if not is_cuda:  # bitsandbytes would quietly take a plain one
                raise BadModel(
                    "optimizer.name=paged_adamw needs CUDA for its pageable memory, got parameters on "
                    f"{parameters[0].device}; say adamw"
                )
            return import_bitsandbytes().optim.PagedAdamW32bit(
                parameters, lr=spec.lr, betas=betas, weight_decay=spec.weight_decay
            )
        case "adamw_8bit":
            return import_bitsandbytes().optim.AdamW8bit(
                parameters, lr=spec.lr, betas=betas, weight_decay=spec.weight_decay
            )


_TABLES = ("qmap1", "qmap2")  # bitsandbytes: what each of 256 codes stands for
OptimizerState = tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> OptimizerState:
    """What `optimizer` remembers: tensors by `<parameter>.<key>`, and other values by parameter and key.

    The tensors are its own, not copies. Its settings are not in it: they are the spec's. Nor are the tables
    of an 8-bit state, which all parameters share and a new optimiser has.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in _TABLES:
                continue
            if isinstance(value, torch.Tensor):
                tensors[f"{name}.{key}"] = value
            else:
                values.setdefault(name, {})[key] = value
    return tensors, values


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], state: OptimizerState
) -> None:
    """Put back what `optimizer_state` gave, bit for bit, into a new optimiser of the same spec.

    `parameters` are those that it was made over, in their order.
    """
    tensors, values = state
    by_name: dict[str, dict[str, Any]] = {name: dict(values.get(name, {})) for name in parameters}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition(".")
        by_name[name][key] = tensor
    if hasattr(optimizer, "init_state"):  # bitsandbytes
        _restore_in_place(optimizer, by_name.values())
        return
    # Its own reading puts each tensor where its kernel wants it; the dtypes are the parameters' already.
    states = {number: known for number, known in enumerate(by_name.values()) if known}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _restore_in_place(optimizer: Any, states: Iterable[Mapping[str, Any]]) -> None:
    """Into memory that bitsandbytes took: its `load_state_dict` would leave pageable memory for good."""
    (group,) = optimizer.param_groups
    for number, (parameter, known) in enumerate(zip(group["params"], states, strict=True)):
        if not known:
            continue
        optimizer.init_state(group, parameter, 0, number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # zeros that the device still writes must not overtake the copy
        for key, value in known.items():
            if isinstance(value, torch.Tensor):
                optimizer.state[parameter][key].copy_(value)
            else:
                optimizer.state[parameter][key] = value
