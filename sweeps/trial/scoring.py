"""Log-likelihoods by a plan of `prefixtree`: on a live model, with its adapter, 4-bit weights and head.

A token that stands on a branch must see its own branch alone. A four-dimensional mask says so, and positions
counted along the branch; both are understood by the attention kernels `sdpa` and `eager`. Not every model
understands them, and one that does not would give other numbers without a word: so what is asked of each kind
of batch is also asked in the plain way, one request of each, before anything else is scored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from sweeps.spec import EvaluateSpec
from sweeps.trial.batches import CPU_CEILING
from sweeps.trial.prefixtree import Batch, Plan, Request, Row

_KERNELS = ("sdpa", "eager")  # these take a mask of four dimensions
# What a masked pair of tokens costs beside the same floating-point operations in a linear layer: the kernel
# reads a mask, and computes what it hides.
_PAIR_FACTOR = 3.0
_TOKENS_PER_ROW = 512  # of the plain way's rows
LOGITS_AT_ONCE = 1 << 24  # 64 MB in float32
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# How far the two ways may be apart: for any request, and besides as a share of its log-likelihood.
_TOLERANCE = {torch.float32: (1e-3, 1e-4)}
_TOLERANCE_16_BITS = (0.5, 0.02)


class Answer(NamedTuple):
    """The log-likelihood of a request's scored tokens, and whether each of them was the likeliest."""

    loglikelihood: float
    is_greedy: bool


class CannotShare(Exception):
    """Why requests of this model must be scored one by one; the text is for people."""


def token_budget(spec: EvaluateSpec, on_cpu: bool) -> int:
    """Tokens of one batch, padding included.

    The same whatever memory is free: other batches, other last digits. A batch that memory is too small for
    is halved.
    """
    budget = _TOKENS_PER_ROW * spec.batch_size
    return min(budget, CPU_CEILING) if on_cpu else budget


def pair_cost(model: Any) -> float:
    """What `prefixtree.make_plan` wants: what a pair of tokens costs in attention, as a share of what a token
    costs in the linear layers of the blocks."""
    config = _text_config(model)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    weights = sum(
        module.in_features * module.out_features
        for name, module in _causal(model).get_decoder().named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name
    )
    # A pair costs 4 operations for each value of a head, a token 2 for each weight.
    weights = weights or 12 * config.num_hidden_layers * config.hidden_size**2
    return _PAIR_FACTOR * 4 * width * float(config.num_hidden_layers) / (2 * weights)


def obstacle(model: Any) -> str:
    """Why the model cannot score branches, as far as its configuration says; empty if it may."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return "the model is not a causal one of transformers"
    causal = _causal(model)
    if not hasattr(causal, "get_decoder") or causal.get_decoder() is causal:
        return "its blocks cannot be called without its head"
    config = _text_config(model)
    if not getattr(config, "num_attention_heads", None):
        return "it has no attention heads that could be told what to see"
    if getattr(config, "alibi", False):
        return "its attention weighs distances in the row (ALiBi), not positions"
    return ""


def length_obstacle(model: Any, longest: int) -> str:
    """The same for requests of up to `longest` tokens."""
    config = _text_config(model)
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and longest > window:
        return f"its attention sees {window} tokens back, and the longest request has {longest}"
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and longest > chunk:
        return f"its attention works in chunks of {chunk}, and the longest request has {longest}"
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if kind.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            trained = kind.get("original_max_position_embeddings") or config.max_position_embeddings
            if longest > trained:
                return f"beyond {trained} tokens its positions depend on the longest row of a batch"
    return ""


def score(model: Any, plan: Plan, before_batch: Callable[[], None]) -> list[Answer]:
    """Answer every request of the plan, in its order. The model is in evaluation mode, without gradients.

    Raises `CannotShare` where the model does not give, or would not, what it gives to each request alone,
    and whatever `before_batch` does.
    """
    if reason := length_obstacle(model, max(len(request.tokens) - 1 for request in plan.requests)):
        raise CannotShare(reason)
    totals: np.ndarray = np.zeros(len(plan.requests))
    greedy: np.ndarray = np.ones(len(plan.requests), dtype=bool)
    probes = _probes(plan)
    before_batch()
    expected = {number: _alone(model, plan.requests[number]) for number in probes.values()}
    with _kernel_for_masks(model):
        runner = _Runner(model)
        for batch in [*probes, *(batch for batch in plan.batches if batch not in probes)]:
            before_batch()
            with _as_obstacle() if batch in probes else contextlib.nullcontext():
                owners, values, hits = runner(batch)
            np.add.at(totals, owners, values)
            np.logical_and.at(greedy, owners, hits)
            if (number := probes.get(batch)) is not None:
                _compare(float(totals[number]), expected[number], runner.dtype)
    return [Answer(float(total), bool(hit)) for total, hit in zip(totals, greedy, strict=True)]


# --- the model, and whether it understands ------------------------------------------------------------


def _causal(model: Any) -> Any:
    """The model of transformers itself, where one of peft is around it: its layers carry the adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _text_config(model: Any) -> Any:
    return _causal(model).config.get_text_config(decoder=True)


@contextlib.contextmanager
def _kernel_for_masks(model: Any) -> Iterator[None]:
    """Attention by a kernel that takes a mask, inside the block. FlashAttention takes none."""
    causal = _causal(model)
    configs = {id(config): config for config in (causal.config, _text_config(model))}.values()
    before = [config._attn_implementation for config in configs]
    instead = "sdpa" if getattr(causal, "_supports_sdpa", False) else "eager"
    try:
        for config, kernel in zip(configs, before, strict=True):
            config._attn_implementation = kernel if kernel in _KERNELS else instead
        yield
    finally:
        for config, kernel in zip(configs, before, strict=True):
            config._attn_implementation = kernel


def _probes(plan: Plan) -> Mapping[Batch, int]:
    """A batch of each kind, and the number of the last request of its longest row: most stands before it."""
    kinds: dict[tuple[bool, bool], Batch] = {}
    for batch in plan.batches:
        kinds.setdefault((bool(batch.trunk), batch.needs_mask), batch)
    return {batch: int(batch.rows[0].requests[-1]) for batch in kinds.values()}


def _alone(model: Any, request: Request) -> float:
    """The log-likelihood in the plain way: the request is the only row, from its first token on."""
    device = next(model.parameters()).device
    ids = torch.tensor([request.tokens], device=device)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, -request.scored :]
    found = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    return float(found.gather(1, ids[0, -request.scored :, None]).double().sum())


@contextlib.contextmanager
def _as_obstacle() -> Iterator[None]:
    """A model that refuses what it is given has its own words for it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CannotShare(f"it takes no mask, positions or cached trunk: {first}") from error


def _compare(found: float, expected: float, dtype: torch.dtype) -> None:
    if not np.isfinite(expected):
        return  # a model that computes no numbers is refused when its scores are read
    least, share = _TOLERANCE.get(dtype, _TOLERANCE_16_BITS)
    if not abs(found - expected) <= least + share * abs(expected):
        raise CannotShare(f"a request gets {found:.4f} on a branch, and {expected:.4f} alone")


# --- batches ------------------------------------------------------------------------------------------


class _Trunk(DynamicCache):
    """Keys and values of a trunk, which each layer puts before those of a batch. They are not kept with them:
    the next batch stands behind the same trunk."""

    def __init__(self, kept: DynamicCache) -> None:
        super().__init__()
        self._kept = [(layer.keys, layer.values) for layer in kept.layers]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._kept[layer_idx]
        rows = key_states.shape[0]
        return (
            torch.cat([keys.expand(rows, -1, -1, -1), key_states], dim=2),
            torch.cat([values.expand(rows, -1, -1, -1), value_states], dim=2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self._kept[layer_idx][0].shape[2])


_Found = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # of each prediction: the request, log p, was it the likeliest


class _Runner:
    """Runs one batch after another, and keeps the trunk that they stand behind."""

    def __init__(self, model: Any) -> None:
        self._causal = _causal(model)
        self._decoder = self._causal.get_decoder()
        self._device = next(model.parameters()).device
        self._trunk: tuple[tuple[int, ...], _Trunk | None] = ((), None)
        self.dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())

    def __call__(self, batch: Batch) -> _Found:
        cache = self._behind(batch.trunk)
        try:
            return self._run(batch, cache)
        except torch.OutOfMemoryError:
            if len(batch.rows) == 1:
                raise
        # Not within the handler: the error holds on to what was computed.
        torch.cuda.empty_cache()
        middle = len(batch.rows) // 2
        halves = [self(Batch(batch.trunk, rows)) for rows in (batch.rows[:middle], batch.rows[middle:])]
        return tuple(np.concatenate(columns) for columns in zip(*halves, strict=True))

    def _behind(self, trunk: tuple[int, ...]) -> _Trunk | None:
        if trunk != self._trunk[0]:
            self._trunk = ((), None)  # gone before the next is computed
            kept = DynamicCache()
            ids = torch.tensor([trunk], device=self._device)
            if trunk:
                self._decoder(input_ids=ids, cache=kept, use_cache=True)
                self._trunk = (trunk, _Trunk(kept))
        return self._trunk[1]

    def _run(self, batch: Batch, cache: _Trunk | None) -> _Found:
        width, rows = batch.width, batch.rows
        ids = torch.from_numpy(np.stack([_padded(row.tokens, width) for row in rows])).to(self._device)
        given: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            given["cache"] = cache
        if batch.needs_mask:
            positions = np.stack([_padded(row.depths, width) for row in rows])
            given["position_ids"] = torch.from_numpy(positions).to(self._device)
            given["attention_mask"] = self._mask(rows, width, len(batch.trunk))
        output = self._decoder(input_ids=ids, **given)
        hidden, answer = output.last_hidden_state, type(output)  # (B, T, H)
        at = np.concatenate([row.at + number * width for number, row in enumerate(rows)])
        places, owners = np.unique(at, return_inverse=True)
        hidden = hidden.flatten(0, 1)[torch.from_numpy(places).to(self._device)]
        del output
        targets = np.concatenate([row.targets for row in rows])
        values, hits = self._predict(hidden, owners, targets, answer)
        return np.concatenate([row.requests for row in rows]), values, hits

    def _mask(self, rows: tuple[Row, ...], width: int, trunk: int) -> torch.Tensor:
        """(B, 1, T, trunk + T), added to the scores: 0 where a token sees another, else the least number.

        Padding sees itself and the trunk, since what sees nothing becomes no number.
        """
        sees: np.ndarray = np.zeros((len(rows), width, trunk + width), dtype=bool)
        sees[:, :, :trunk] = True
        for number, row in enumerate(rows):
            sees[number, : len(row), trunk : trunk + len(row)] = row.sees()
            padding = np.arange(len(row), width)
            sees[number, padding, trunk + padding] = True
        hidden = torch.from_numpy(~sees).to(self._device)[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self._device)
        return mask.masked_fill_(hidden, torch.finfo(self.dtype).min)

    def _predict(
        self, hidden: torch.Tensor, owners: np.ndarray, targets: np.ndarray, answer: Callable[..., Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of each target, the log-probability behind its owner among the `hidden` (N, H), and whether it is
        the likeliest. A few are taken at a time: logits are many times wider than what they come from."""
        values: np.ndarray = np.empty(len(targets))
        hits: np.ndarray = np.empty(len(targets), dtype=bool)
        order = np.argsort(owners, kind="stable")
        step = max(1, LOGITS_AT_ONCE // _text_config(self._causal).vocab_size)
        for begin in range(0, len(hidden), step):
            low = np.searchsorted(owners, begin, sorter=order)
            asked = order[low : np.searchsorted(owners, begin + step, sorter=order)]
            logits = self._logits(answer(last_hidden_state=hidden[None, begin : begin + step]))
            found = torch.log_softmax(logits, dim=-1, dtype=torch.float32)  # (n, V)
            own = torch.from_numpy(owners[asked] - begin).to(self._device)
            target = torch.from_numpy(targets[asked]).to(self._device)
            values[asked] = found[own, target].double().cpu().numpy()
            hits[asked] = (found.argmax(dim=-1)[own] == target).cpu().numpy()
        return values, hits

    def _logits(self, answer: Any) -> torch.Tensor:
        """(N, V) of what the blocks have computed, as the model itself makes them: some scale or cap them
        behind the head. So it is the model that is called, and its blocks that answer at once."""
        before = self._decoder.__dict__.get("forward")
        self._decoder.forward = lambda *_, **__: answer
        try:
            ids = torch.zeros(answer.last_hidden_state.shape[:2], dtype=torch.long, device=self._device)
            return self._causal(input_ids=ids, use_cache=False).logits[0]
        finally:
            del self._decoder.forward
            if before is not None:
                self._decoder.forward = before


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values, (0, width - len(values)))
