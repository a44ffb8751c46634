"""Attention of a training step on a CPU in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class AttentionInFloat32(TorchFunctionMode):
    """Inside the block torch's fused attention computes in float32 what it is given in 16 bits.

    Its backward pass on a CPU takes two thirds longer in bfloat16 for rows like Alpaca's, and no less time
    for longer ones; the products are the same and no longer rounded on the way. A backward pass that computes
    activations again does so outside of any such mode: not to be used there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or kwargs.get("attn_mask") is not None or len(args) > 3:
            return func(*args, **kwargs)
        query, key, value = args
        return func(query.float(), key.float(), value.float(), **kwargs).to(query.dtype)


def is_slow_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's attention is better off in float32 there."""
    return device.type == "cpu" and dtype.itemsize < 4
