"""liger-kernel is put on a base on CUDA alone, and never its loss. It runs on no CPU: a stand-in records."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sweeps.trial.kernels import use_liger

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LLAMA = SimpleNamespace(config=SimpleNamespace(model_type="llama"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What an installed liger-kernel was asked for."""
    calls: list[dict[str, Any]] = []
    module: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    module._apply_liger_kernel_to_instance = lambda **given: calls.append(given)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_it_is_used_on_cuda_for_everything_but_the_loss(asked: list[dict[str, Any]]) -> None:
    assert use_liger(LLAMA, CUDA) == ("liger-kernel for norms, rotation and gated MLP: it is installed",)
    (given,) = asked
    assert given.pop("model") is LLAMA
    assert {name for name, wanted in given.items() if wanted} == {"rms_norm", "rope", "swiglu", "geglu"}
    assert {name for name, wanted in given.items() if not wanted} == {
        "cross_entropy",
        "fused_linear_cross_entropy",
    }


def test_it_is_not_used_on_a_cpu(asked: list[dict[str, Any]]) -> None:
    assert use_liger(LLAMA, CPU) == ()
    assert asked == []


def test_a_model_that_it_does_not_know_is_said(asked: list[dict[str, Any]]) -> None:
    other = SimpleNamespace(config=SimpleNamespace(model_type="falcon"))
    assert use_liger(other, CUDA) == ("liger-kernel not used: it has nothing for falcon",)
    assert asked == []


def test_nothing_is_said_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert use_liger(LLAMA, CUDA) == ()
