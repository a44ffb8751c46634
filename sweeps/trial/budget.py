"""How many tokens one micro-batch may hold, and whether activations are recomputed, where the file leaves it
to us: `choose`, for the trial itself and for a plan of it."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import psutil
import torch

from sweeps.spec import TrialSpec
from sweeps.trial.batches import CPU_CEILING
from sweeps.trial.memory import Widths, training_memory
from sweeps.trial.outline import Outline

_FLOOR = 256
_SHARE_OF_FREE = 0.9  # the rest is for what is not counted, and for fragments
_MOST = 1 << 20


@dataclass(frozen=True)
class Choice:
    """The most tokens of a micro-batch, padding included; whether the backward pass computes activations
    again; and the sentences that announce what was chosen."""

    token_budget: int
    recomputes: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Room:
    """What a step may take: bytes free beside the base and the adapter, on a CPU or on an accelerator."""

    free_bytes: float
    on_cpu: bool

    @classmethod
    def on(cls, device: torch.device) -> Room:
        """What is free now."""
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return cls(free + unused, on_cpu=False)
        return cls(psutil.virtual_memory().available, on_cpu=True)

    def __str__(self) -> str:
        return f"{self.free_bytes / 1e9:.1f} GB free on {'cpu' if self.on_cpu else 'cuda'}"


def choose(outline: Outline, spec: TrialSpec, width: Widths, longest: int, room: Room) -> Choice:
    """What `auto` makes of the free memory; `longest` is the longest row in tokens.

    Recomputing costs a third more time, so `auto` does it only where the longest row would not fit otherwise,
    or the token budget that was asked for. The budget is a power of two, so that a little more or less free
    memory does not change the micro-batches, and with them the last digits of a result.
    """
    assert spec.train is not None
    said: tuple[str, ...] = ()
    recomputes = spec.train.gradient_checkpointing
    if recomputes == "auto":
        needed = tokens_needed(spec, longest)
        fits = tokens_that_fit(outline, with_recomputing(spec, False), width, longest, room)
        recomputes = fits < needed
        what = "the longest row has" if needed == longest else "train.token_budget is"
        choice = "on" if recomputes else "off"
        said = (f"gradient checkpointing {choice}: without it {fits} tokens fit, {what} {needed}",)
    if spec.train.token_budget != "auto":
        budget = spec.train.token_budget
        return Choice(budget, recomputes, (*said, f"token budget {budget}: set by train.token_budget"))
    spec = with_recomputing(spec, recomputes)
    budget = _largest_power_of_two(outline, spec, width, longest, room)
    taken = step_bytes(outline, spec, width, budget, longest) / 1e9
    why = f"a step of it takes about {taken:.2f} GB, {room}"
    if room.on_cpu:
        why += f"; never above {CPU_CEILING} on a CPU, where more are no faster, and not probed"
    return Choice(budget, recomputes, (*said, f"token budget {budget}: {why}"))


def tokens_needed(spec: TrialSpec, longest: int) -> int:
    """What one micro-batch must hold at the least: the longest row, or the budget that was asked for."""
    assert spec.train is not None
    return longest if spec.train.token_budget == "auto" else max(longest, spec.train.token_budget)


def tokens_that_fit(outline: Outline, spec: TrialSpec, width: Widths, longest: int, room: Room) -> int:
    """How many tokens of a micro-batch leave a share of the free memory for what is not counted."""

    def needed(tokens: int) -> float:
        return step_bytes(outline, spec, width, tokens, longest)

    return bisect.bisect_right(range(1, _MOST + 1), _SHARE_OF_FREE * room.free_bytes, key=needed)


def _largest_power_of_two(outline: Outline, spec: TrialSpec, width: Widths, longest: int, room: Room) -> int:
    """The same among powers of two, from the floor up: a few looks, where thousands of trials are planned."""
    ceiling = CPU_CEILING if room.on_cpu else _MOST
    powers = [1 << bits for bits in range(_FLOOR.bit_length() - 1, ceiling.bit_length())]

    def needed(tokens: int) -> float:
        return step_bytes(outline, spec, width, tokens, longest)

    fitting = bisect.bisect_right(powers, _SHARE_OF_FREE * room.free_bytes, key=needed)
    return powers[max(0, fitting - 1)]


def step_bytes(outline: Outline, spec: TrialSpec, width: Widths, tokens: int, longest: int) -> float:
    """What a step takes at its peak beside the base and the adapter's weights: see `memory.py`."""
    memory = training_memory(outline, spec, width, tokens, longest)
    return memory.total - memory.base - memory.adapters


def with_recomputing(spec: TrialSpec, recomputes: bool) -> TrialSpec:
    """The spec with `gradient_checkpointing` decided."""
    assert spec.train is not None
    train = spec.train.model_copy(update={"gradient_checkpointing": recomputes})
    return spec.model_copy(update={"train": train})
