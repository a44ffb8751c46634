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


def recomputes_activations(
    train: TrainSpec, longest: int, config: Any, dtype: torch.dtype, device: torch.device
) -> tuple[bool, tuple[str, ...]]:
    """Whether the backward pass recomputes activations; announced where the choice is ours.

    It costs a third more time, so `auto` does it only where the longest row, of `longest` tokens, would not
    fit otherwise, or the token budget that was asked for.
    """
    if train.gradient_checkpointing != "auto":
        return train.gradient_checkpointing, ()
    needed = tokens_needed(train, longest)
    what = "the longest row has" if needed == longest else "train.token_budget is"
    fits = tokens_that_fit(bytes_per_token(config, dtype, checkpointing=False), _free_bytes(device))
    choice = "on" if fits < needed else "off"
    return fits < needed, (f"gradient checkpointing {choice}: without it {fits} tokens fit, {what} {needed}",)


def tokens_needed(train: TrainSpec, longest: int) -> int:
    """What one micro-batch must hold at the least: the longest row, or the budget that was asked for."""
    return longest if train.token_budget == "auto" else max(longest, train.token_budget)


def token_budget(
    train: TrainSpec, recomputes: bool, config: Any, dtype: torch.dtype, device: torch.device
) -> tuple[int, str]:
    """The budget in tokens, padding included, and the sentence that announces it.

    A power of two, so that a little more or less free memory does not change the micro-batches, and
    with them the last digits of a result.
    """
    if train.token_budget != "auto":
        return train.token_budget, f"token budget {train.token_budget}: set by train.token_budget"
    cost, free = bytes_per_token(config, dtype, recomputes), _free_bytes(device)
    budget = budget_in(free, cost, on_cpu=device.type == "cpu")
    reason = f"about {cost / 1e6:.2f} MB a token, {free / 1e9:.1f} GB free on {device.type}"
    return budget, f"token budget {budget}: {reason}"


def budget_in(free_bytes: float, cost: int, *, on_cpu: bool) -> int:
    """The budget that `auto` takes where a token costs `cost` of so many bytes."""
    fits = max(_FLOOR, tokens_that_fit(cost, free_bytes))
    if on_cpu:
        fits = min(fits, _CPU_CEILING)
    return 1 << (fits.bit_length() - 1)


def tokens_that_fit(cost: int, free_bytes: float) -> int:
    """How many tokens leave a share of the free memory for what is not counted."""
    return int(_SHARE_OF_FREE * free_bytes) // cost


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
