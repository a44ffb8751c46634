"""The forward and backward pass of LoRA on one layer, written out: the same mathematics as peft's, less work.

    y = base(x) + scaling * drop(x) A^T B^T        (Hu et al. 2021, section 4.1)

peft computes it with operations that each pass over a wide tensor, and autograd keeps what each of them
needs. Here the factors are multiplied into the narrow middle, the sum is one product that adds, and what is
kept is the layer's own input, which its neighbours keep too, with one byte for each number that says whether
it was dropped. On a CPU, where random numbers come one after another, a draw of 64 bits serves for four of
them. Each layer still drops for itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

_DRAWS_A_WORD = 4  # of 16 bits in 64
_LEVELS = 1 << 16


def make_lean(layer: Any) -> None:
    """Let peft's LoRA layer compute its pass here, wherever one plain adapter is in force."""
    kind: Any = type(layer)
    layer.__class__ = _lean(kind)


@functools.cache
def _lean(kind: Any) -> Any:
    """A class of peft's with our forward pass; the class itself where it has it already."""
    return kind if issubclass(kind, _Lean) else type(f"Lean{kind.__name__}", (_Lean, kind), {})


class _Lean:
    """Mixed into a LoRA layer of peft's."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = self.active_adapters
        is_plain = len(names) == 1 and names[0] in self.lora_A and names[0] not in self.lora_variant
        if args or kwargs or self.disable_adapters or self.merged or not is_plain:
            # A mixin: its next class, which mypy cannot see, is peft's.
            result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        (name,) = names
        dropout = self.lora_dropout[name]
        dropped = float(dropout.p) if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        updated: torch.Tensor = _Update.apply(self.base_layer(x), x, a, b, float(self.scaling[name]), dropped)
        return updated


class _Update(torch.autograd.Function):
    """base (..., out), x (..., in), a (r, in), b (out, r) -> base + scaling * drop(x) a^T b^T."""

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(a.dtype)  # (N, in)
        kept, share = kept_mask(rows.shape, dropout, rows.device) if dropout else (None, 1.0)
        factor = scaling / share
        middle = (_masked(rows, kept) @ a.T).mul_(factor)  # (N, r)
        ctx.save_for_backward(x, a, b, middle, kept)
        ctx.factor = factor
        wide = base.reshape(-1, base.shape[-1])  # (N, out)
        if a.dtype == base.dtype:
            return torch.addmm(wide, middle, b.T).view_as(base)
        return (wide + (middle @ b.T).to(base.dtype)).view_as(base)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, middle, kept = ctx.saved_tensors
        wide = gradient.reshape(-1, gradient.shape[-1]).to(a.dtype)  # (N, out)
        of_middle = (wide @ b).mul_(ctx.factor)  # (N, r)
        rows = x.reshape(-1, x.shape[-1]).to(a.dtype)
        of_a = of_middle.T @ _masked(rows, kept)
        of_b = wide.T @ middle
        of_x = None
        if ctx.needs_input_grad[1]:
            of_rows = of_middle @ a  # (N, in)
            of_x = (of_rows if kept is None else of_rows.mul_(kept)).to(x.dtype).view_as(x)
        return gradient, of_x, of_a, of_b, None, None


def _masked(rows: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    return rows if kept is None else rows * kept


def kept_mask(shape: torch.Size, dropout: float, device: torch.device) -> tuple[torch.Tensor, float]:
    """1 where a number is kept and 0 where it is dropped, a byte each; and the share that is kept.

    Drawn from torch's generator of the device. On a CPU the share is a multiple of 1/65536, the nearest to
    what was asked for, and it is that one by which to divide.
    """
    if device.type != "cpu":
        kept = torch.empty(shape, dtype=torch.uint8, device=device).bernoulli_(1 - dropout)
        return kept, 1 - dropout
    dropped = min(round(dropout * _LEVELS), _LEVELS - 1)
    kept = torch.empty(shape, dtype=torch.uint8)
    # To a compiler the draw is one operation: so it makes the very draws that are made without it.
    (_fill_compiled if torch.compiler.is_compiling() else _fill)(kept, dropped)
    return kept, 1 - dropped / _LEVELS


def _fill(kept: torch.Tensor, dropped: int) -> None:
    """With 0 at a chance of `dropped` in 65536, else with 1."""
    count = kept.numel()
    words = torch.empty(-(-count // _DRAWS_A_WORD), dtype=torch.int64).random_(-(2**63), None)
    draws = words.view(torch.int16)[:count]  # each of 65,536 values is as likely
    torch.ge(draws, dropped - _LEVELS // 2, out=kept.view(-1))


# It writes into what it is given: of two operations that return the same of the same, a compiler makes one.
_fill_compiled = torch.library.custom_op("sweeps::fill_kept", _fill, mutates_args=("kept",))
