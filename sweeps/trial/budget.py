"""How many tokens one micro-batch may hold, when the sweep file leaves it to us."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from sweeps.spec import TrainSpec

_FLOOR = 256
_CPU_CEILING = 2048  # more tokens at once are no faster on a CPU: they only leave its caches
_SHARE_OF_FREE = 0.8


def bytes_per_token(config: Any, dtype: torch.dtype, checkpointing: bool) -> int:
    """Activation bytes that one token costs in a training step.

    34 bytes x hidden size a layer at 16 bits, attention scores not stored (Korthikanti et al. 2022,
    "Reducing Activation Recomputation", eq. 2), or the layer's input alone under checkpointing; and the
    logits with their float32 copy, log-softmax and gradient.
    """
    width = dtype.itemsize
    per_layer = (width if checkpointing else 17 * width) * config.hidden_size
    return int(config.num_hidden_layers * per_layer + config.vocab_size * (width + 12))


def token_budget(train: TrainSpec, config: Any, dtype: torch.dtype, device: torch.device) -> tuple[int, str]:
    """The budget in tokens, padding included, and the sentence that announces it.

    A power of two, so that a little more or less free memory does not change the micro-batches, and
    with them the last digits of a result.
    """
    if train.token_budget != "auto":
        return train.token_budget, f"token budget {train.token_budget}: set by train.token_budget"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    cost = bytes_per_token(config, dtype, train.gradient_checkpointing)
    fits = max(_FLOOR, int(_SHARE_OF_FREE * free) // cost)
    if device.type == "cpu":
        fits = min(fits, _CPU_CEILING)
    budget = 1 << (fits.bit_length() - 1)
    reason = f"about {cost / 1e6:.2f} MB a token, {free / 1e9:.1f} GB free on {device.type}"
    return budget, f"token budget {budget}: {reason}"
