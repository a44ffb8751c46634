"""The blocks of a training step as `torch.compile` makes them: the same mathematics, fewer passes over data.

Each block is compiled by itself, and all that are alike share one graph, for any number and length of rows.
Graphs are made once, before the first step, of a batch that is the same for every trial, and none is made
later: so they are the same in a new process and in a used one (law L3), and in an attempt that goes on (law
L2). What fits none of them runs as it is, and is counted.

The blocks are compiled within `backward` alone. Whatever else is done with the model finds it as it was.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

from sweeps.trial.batches import MicroBatch, micro_batches
from sweeps.trial.data import TokenRow
from sweeps.trial.loss import Loss
from sweeps.trial.rng import TrialRng

BACKEND = "inductor"

# Of the batch that graphs are made of. A compiler takes sizes that are equal for the same one, and 1 for a
# constant: neither of the two is a size of any model, and one row is made a graph of its own.
_ROWS, _LENGTH = 3, 251
# Of one function: those for one row and for more, each with and without a gradient for its input, and that
# for every kind of block (Gemma has two).
_MOST_GRAPHS = 16


class CompiledLoss:
    """A loss with the blocks of its model compiled in `backward`, and as they are in `value`."""

    def __init__(self, loss: Loss, blocks: Sequence[Any], backend: str) -> None:
        self.note = loss.note
        self.passes = 0
        """Through a block, forward."""
        self.uncompiled = 0
        """Of these, those that no graph fitted."""
        self.graphs = 0
        self._loss = loss
        self._blocks = blocks
        self._run = torch.compile(self._runner(), dynamic=True, backend=self._counting(backend))

    def backward(self, batch: MicroBatch) -> torch.Tensor:
        with torch.compiler.set_stance("eager_on_recompile"), self._compiled_blocks():
            return self._loss.backward(batch)

    def value(self, batch: MicroBatch) -> torch.Tensor:
        return self._loss.value(batch)

    @property
    def remarks(self) -> tuple[str, ...]:
        if not self.uncompiled:
            return ()
        return (f"compiled: no graph fitted {self.uncompiled} of {self.passes} passes through a block",)

    def make_graphs(self, batch: MicroBatch) -> None:
        """As `backward`, but that what no graph fits makes one."""
        limit = dynamo_config.patch(recompile_limit=_MOST_GRAPHS)
        with warnings.catch_warnings(), limit, self._compiled_blocks():
            warnings.simplefilter("ignore")  # torch's own, of how it looks at tensors
            self._loss.backward(batch)

    @contextlib.contextmanager
    def _compiled_blocks(self) -> Iterator[None]:
        try:
            for (
                block
            ) in self._blocks:  # where torch's own `Module.compile` puts it: checkpointing stays around it
                block._compiled_call_impl = functools.partial(self._pass, block)
            yield
        finally:
            for block in self._blocks:
                block._compiled_call_impl = None

    def _pass(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        return self._run(block, *args, **kwargs)

    def _runner(self) -> Callable[..., Any]:
        def run(block: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.uncompiled += 1
            return block.forward(*args, **kwargs)

        return run

    def _counting(self, backend: str) -> Callable[..., Any]:
        compiler = torch._dynamo.lookup_backend(backend)

        def compile_graph(graph: Any, inputs: Any) -> Any:
            self.graphs += 1
            return compiler(graph, inputs)

        return compile_graph


def compiled(
    loss: Loss,
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    backend: str | None = None,
) -> tuple[Loss, str]:
    """The loss with its blocks compiled, and a sentence of it; `loss` itself where that cannot be, and why.

    Nothing else changes: no random number of anybody is drawn, no gradient is left, the mode stays.
    """
    blocks = _blocks(model)
    if not blocks:
        return loss, _not_compiled(f"{type(model).__name__} has no blocks that could be told apart")
    torch.compiler.reset()  # what trials before this one have made of other shapes
    backend = backend or BACKEND
    made = CompiledLoss(loss, blocks, backend)
    device = parameters[0].device
    started, breaks, why = time.perf_counter(), _graph_breaks(), ""
    was_training = model.training
    model.train()
    try:
        with TrialRng(0, device).active():
            for rows in (_ROWS, 1):
                made.make_graphs(_batch(rows).to(device))
    # Whatever a compiler fails with, a C++ compiler that is missing or memory: the blocks run without it.
    except Exception as error:
        why = _in_short(error)
    finally:
        for parameter in parameters:
            parameter.grad = None
        model.train(was_training)
    if not why and made.uncompiled:
        why = f"torch made no graph for {made.uncompiled} of {made.passes} passes through a block"
    if why:
        torch.compiler.reset()
        torch.cuda.empty_cache()  # does nothing where CUDA was never used
        return loss, _not_compiled(why)
    breaks = _graph_breaks() - breaks
    parts = f", which fall apart at {breaks} places" if breaks else ""
    seconds = time.perf_counter() - started
    made.passes = 0
    return made, f"training compiled by {backend}: {made.graphs} graphs{parts}, in {seconds:.1f} s"


def _not_compiled(why: str) -> str:
    return f"training not compiled, though train.compile says so: {why}"


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200] or 'no message'}"


def _graph_breaks() -> int:
    return sum(counters["graph_break"].values())


def _blocks(model: Any) -> list[Any]:
    """The modules that transformers itself treats as one: it computes activations again by them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _batch(rows: int) -> MicroBatch:
    row = TokenRow(array("i", [1] * _LENGTH), 1)
    return next(micro_batches([row] * rows, rows * _LENGTH))
