"""Losses where there are labels, in chunks: no tensor of tokens x vocabulary is ever there.

A plain forward pass makes logits for every token, padding and prompt included, and cross entropy keeps them
three times over in float32: for a vocabulary of 128,000 that is 1.5 MB a token. Here the body of the model
gives hidden states (B, T, H), those that predict a label are picked (N, H), and a few hundred rows at a time
go through the head, the loss and back, before the next ones do. Gradients are a sum over tokens, so that no
cut changes the mathematics (law L1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.nn import functional

from sweeps.trial.attention import AttentionInFloat32, is_slow_in
from sweeps.trial.batches import MicroBatch

# Of a chunk's logits in float32. On a GPU larger chunks, since a 4-bit head is dequantised for each of them.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}


def chunk_rows(vocabulary: int, *, on_cpu: bool) -> int:
    """How many predicted tokens go through the head at once: the same whatever the token budget is."""
    return max(1, CHUNK_BYTES["cpu" if on_cpu else "cuda"] // (4 * vocabulary))


_CHECKED_TOKENS = 8
_TOLERANCE = 1e-2  # of the largest logit: bfloat16 rounds by 0.004, a factor that is missing is far above


class Loss(Protocol):
    """The loss of a model on micro-batches."""

    @property
    def note(self) -> str:
        """How it is computed, and why."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is to be said of it after the training."""

    def backward(self, batch: MicroBatch) -> torch.Tensor:
        """Add the gradient of the batch's weighted loss to the parameters; the loss in float32, detached."""

    def value(self, batch: MicroBatch) -> torch.Tensor:
        """The batch's weighted loss in float32, without gradients."""


class PlainLoss:
    """With the model's own logits of all tokens: what `ChunkedLoss` must equal."""

    remarks: tuple[str, ...] = ()

    def __init__(self, model: Any, why: str) -> None:
        self._model = model
        self.note = f"loss from the logits of all tokens: {why}"

    def backward(self, batch: MicroBatch) -> torch.Tensor:
        loss = self._loss(batch)
        loss.backward()
        return loss.detach()

    def value(self, batch: MicroBatch) -> torch.Tensor:
        with torch.no_grad():
            return self._loss(batch)

    def _loss(self, batch: MicroBatch) -> torch.Tensor:
        logits = self._model(input_ids=batch.ids, use_cache=False).logits  # (B, T, V)
        picked = logits.flatten(0, 1)[batch.places].float()  # (N, V)
        losses = functional.cross_entropy(picked, batch.targets, reduction="none")  # (N,)
        return (losses * batch.weights).sum()


class ChunkedLoss:
    """With logits where there are labels alone, a chunk at a time."""

    remarks: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        self._model = model
        self._body = model.base_model
        self.note = "loss in chunks: logits only where there are labels"
        self._is_slow = is_slow_in(model.dtype, model.device)
        if self._is_slow and model.config._attn_implementation == "sdpa":
            self.note += "; attention in float32, whose backward pass is faster on a CPU"
        device = next(model.parameters()).device
        vocabulary = model.config.get_text_config().vocab_size
        self._rows = chunk_rows(vocabulary, on_cpu=device.type == "cpu")

    def backward(self, batch: MicroBatch) -> torch.Tensor:
        if not self._is_slow or self._model.is_activation_checkpointing:
            return self._backward(batch)
        with AttentionInFloat32():
            return self._backward(batch)

    def _backward(self, batch: MicroBatch) -> torch.Tensor:
        picked = self._picked(batch)  # (N, H)
        gradient = torch.empty_like(picked) if picked.requires_grad else None
        total = torch.zeros((), device=picked.device)
        for rows in self._chunks(len(picked)):
            leaf = picked.detach()[rows].requires_grad_(gradient is not None)
            logits = self.logits(leaf)  # (chunk, V)
            losses, backward = _cross_entropy(logits.detach(), batch.targets[rows], batch.weights[rows])
            total += losses
            logits.backward(backward)
            if gradient is not None:
                gradient[rows] = leaf.grad
            del logits, backward
        if gradient is not None:
            picked.backward(gradient)
        return total

    def value(self, batch: MicroBatch) -> torch.Tensor:
        with torch.no_grad():
            picked = self._picked(batch)
            total = torch.zeros((), device=picked.device)
            for rows in self._chunks(len(picked)):
                logits = self.logits(picked[rows]).float()
                losses = functional.cross_entropy(logits, batch.targets[rows], reduction="none")
                total += (losses * batch.weights[rows]).sum()
            return total

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states behind the body's last norm: the head, and what the model's config does to it."""
        config = self._model.config.get_text_config()
        logits: torch.Tensor = self._model.get_output_embeddings()(hidden)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _picked(self, batch: MicroBatch) -> torch.Tensor:
        hidden = self._body(input_ids=batch.ids, use_cache=False).last_hidden_state  # (B, T, H)
        picked: torch.Tensor = hidden.flatten(0, 1).index_select(0, batch.places)
        return picked

    def _chunks(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self._rows) for start in range(0, count, self._rows))


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the losses, and its gradient by the logits (chunk, V): softmax less the targets.

    In float32 and in one tensor of that size, where autograd would keep three.
    """
    top = logits.amax(1, keepdim=True).float()  # (chunk, 1)
    is_wide = logits.dtype == torch.float32
    shares = torch.sub(logits, top).exp_() if is_wide else logits.float().sub_(top).exp_()
    sums = shares.sum(1, keepdim=True)
    chosen = logits.gather(1, targets[:, None]).float()
    losses = (sums.log() + top - chosen).squeeze(1)
    weights = weights[:, None]
    shares.mul_(weights / sums)
    shares.scatter_add_(1, targets[:, None], -weights)
    return (losses * weights.squeeze(1)).sum(), shares.to(logits.dtype)


def loss_of(model: Any) -> Loss:
    """In chunks, where the model's own logits show that its head and its body can be used apart.

    Draws no random numbers, and leaves the model in the mode that it is in.
    """
    obstacle = _why_plain(model)
    return PlainLoss(model, obstacle) if obstacle else ChunkedLoss(model)


def _why_plain(model: Any) -> str:
    name = type(model).__name__
    if not isinstance(model.get_output_embeddings(), torch.nn.Module) or model.base_model is model:
        return f"{name} has no output head and body of its own"
    device = next(model.parameters()).device
    ids = torch.arange(_CHECKED_TOKENS, device=device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits  # (1, T, V)
            hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
            if hidden is None:
                return f"the body of {name} gives no hidden states"
            found = ChunkedLoss(model).logits(hidden)
    finally:
        model.train(was_training)
    if found.shape != expected.shape:
        return f"the head of {name} is not all that makes its logits"
    largest, apart = expected.float().abs().max(), (found.float() - expected.float()).abs().max()
    if not bool(apart <= _TOLERANCE * largest):
        return f"{name} does more to its logits than its head does (they differ by {float(apart):.2g})"
    return ""
