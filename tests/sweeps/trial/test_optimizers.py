"""The optimisers are as the spec has them, and go on after a restore as if never cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file

from sweeps.errors import BadModel
from sweeps.spec import OptimizerSpec
from sweeps.trial.optimizers import make_optimizer, optimizer_state, restore_optimizer


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def test_adamw_has_the_settings_of_the_spec() -> None:
    spec = OptimizerSpec(name="adamw", lr=0.1, weight_decay=0.2, beta1=0.3, beta2=0.4)
    optimizer = make_optimizer(parameters(), spec)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {key: optimizer.defaults[key] for key in ("lr", "weight_decay", "betas")} == {
        "lr": 0.1,
        "weight_decay": 0.2,
        "betas": (0.3, 0.4),
    }


def test_sgd_has_the_settings_of_the_spec() -> None:
    optimizer = make_optimizer(
        parameters(), OptimizerSpec(name="sgd", lr=0.1, weight_decay=0.2, momentum=0.5)
    )
    assert isinstance(optimizer, torch.optim.SGD)
    assert [optimizer.defaults[key] for key in ("lr", "weight_decay", "momentum")] == [0.1, 0.2, 0.5]


def test_a_paged_optimiser_without_cuda_is_refused_not_replaced() -> None:
    with pytest.raises(BadModel, match=r"paged_adamw needs CUDA .* got parameters on cpu; say adamw"):
        make_optimizer(parameters(), OptimizerSpec(name="paged_adamw"))


def test_adamw_in_8_bits_has_the_settings_of_the_spec_and_trains_on_the_cpu() -> None:
    spec = OptimizerSpec(name="adamw_8bit", lr=0.1, weight_decay=0.2, beta1=0.3, beta2=0.4)
    large = [torch.nn.Parameter(torch.ones(64, 64))]
    optimizer = make_optimizer(large, spec)
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    assert [optimizer.defaults[key] for key in ("lr", "weight_decay", "betas")] == [0.1, 0.2, (0.3, 0.4)]
    for _ in range(5):
        optimizer.zero_grad()
        large[0].square().sum().backward()
        optimizer.step()
    assert large[0].abs().max() < 0.7
    assert optimizer.state[large[0]]["state1"].dtype == torch.uint8


# --- what an optimiser remembers --------------------------------------------------------------------


def parameters_like(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def step(optimizer: Any, parameters: dict[str, torch.nn.Parameter], number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    for name, parameter in parameters.items():
        if name != "unused":
            parameter.grad = torch.randn(parameter.shape, generator=draw)
    optimizer.step()


def paged(parameters: Any) -> Any:
    return bitsandbytes.optim.PagedAdamW32bit(parameters, lr=0.1)


OPTIMIZERS = {
    "adamw": lambda parameters: make_optimizer(parameters, OptimizerSpec(name="adamw", lr=0.1)),
    "sgd": lambda parameters: make_optimizer(parameters, OptimizerSpec(name="sgd", lr=0.1)),
    "plain_sgd": lambda parameters: make_optimizer(
        parameters, OptimizerSpec(name="sgd", lr=0.1, momentum=0.0)
    ),
    "paged_adamw": paged,
    "adamw_8bit": lambda parameters: make_optimizer(parameters, OptimizerSpec(name="adamw_8bit", lr=0.1)),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_is_restored_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    shapes = {
        "a.weight": (3, 5),
        "b.weight": (400, 300),
        "c": (64, 64),
        "unused": (2, 2),
    }  # the middle one is pageable
    first, second = parameters_like(shapes), parameters_like(shapes)
    one = OPTIMIZERS[name](list(first.values()))
    step(one, first, 1)
    step(one, first, 2)
    tensors, values = optimizer_state(one, first)
    if tensors:
        save_file(tensors, tmp_path / "state.safetensors")
        tensors = load_file(tmp_path / "state.safetensors")
    values = json.loads(json.dumps(values))

    other = OPTIMIZERS[name](list(second.values()))
    with torch.no_grad():
        for key in shapes:
            second[key].copy_(first[key])
    restore_optimizer(other, second, (tensors, values))
    step(one, first, 3)
    step(other, second, 3)
    assert all(torch.equal(first[key], second[key]) for key in shapes)


def test_the_memory_that_bitsandbytes_took_for_a_state_stays_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CUDA it is pageable memory, which no tensor that is put in its place would be."""
    taken = []

    def buffer(self: Any, parameter: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        taken.append(torch.zeros_like(parameter, dtype=dtype))
        return taken[-1]

    monkeypatch.setattr(bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer", buffer)
    parameters = parameters_like({"a": (3, 5)})
    one = paged(parameters.values())
    step(one, parameters, 1)
    state = optimizer_state(one, parameters)
    taken.clear()
    other = paged(parameters.values())
    restore_optimizer(other, parameters, state)
    known = other.state[parameters["a"]]
    assert known["step"] == 1
    assert known["state1"] is taken[0]
    assert known["state2"] is taken[1]
    assert torch.equal(known["state1"], state[0]["a.state1"])
    assert taken[0].abs().sum() > 0
