"""Faster kernels for a base on CUDA, where a package that has them is installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch

# What of it is put on: not its losses, since ours never makes all logits either (`loss.py`).
_LIGER = {
    "rms_norm": True,
    "rope": True,
    "swiglu": True,
    "geglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def use_liger(model: Any, device: torch.device) -> tuple[str, ...]:
    """Let the norms, the rotation and the gated MLP of `model` run as liger-kernel's fused ones.

    They are Triton code for CUDA. Returns the sentence that announces it, or says why a package that is
    installed was not used; nothing where there is none.
    """
    if device.type != "cuda":
        return ()
    try:
        liger = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError:
        return ()
    kind = model.config.model_type
    if kind not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return (f"liger-kernel not used: it has nothing for {kind}",)
    liger._apply_liger_kernel_to_instance(model=model, **_LIGER)
    return ("liger-kernel for norms, rotation and gated MLP: it is installed",)
