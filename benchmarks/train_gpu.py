"""Training a 7B model in 4 bits on a GPU: one row at a time, HF Trainer, and us.

    python -m benchmarks.train_gpu                             # the shape of Llama-2-7B, on CUDA
    python -m benchmarks.train_gpu --targets all --json FILE
    python -m benchmarks.train_gpu --ways ours --compile       # ours with and without `train.compile`
    python -m benchmarks.train_gpu --shape tiny --rows 8       # on a CPU, in seconds: to see that it runs

Random weights, made and quantised on the device layer by layer; random tokens in rows as long as Alpaca's.
Updates of 128 rows, nf4, r=8: the article's. What is measured is seconds, memory and a share of the peak:
none of them depends on what the weights say.

Needs torch, transformers, peft, bitsandbytes with what they install, and pydantic: no Ray, no MLflow, no
lm-eval.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import random
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import facts, facts_line, table
from sweeps.devices import device_reported
from sweeps.spec import DataSpec, ModelSpec, TrialSpec
from sweeps.trial.base import Base
from sweeps.trial.data import TokenData, TokenRow
from sweeps.trial.lengths import row_lengths

ARTICLE_ROWS = 50_000

# Hidden size, intermediate size, blocks, heads, key-value heads, vocabulary.
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32_000),  # Llama-2-7B
    "1b": (2048, 8192, 16, 32, 8, 32_000),  # Llama-3.2-1B with Llama 2's vocabulary
    "tiny": (64, 128, 2, 4, 2, 512),
}
_FIRST_TOKEN = 3  # those before it mean something


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One way of training, or the batch that it failed at."""

    way: str
    seconds: float | None = None
    rows: int = 0
    tokens: int = 0
    peak_gb: float | None = None
    operations: float = 0.0
    peak_tflops: float | None = None
    loss: float | None = None
    note: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def share_of_peak(self) -> float | None:
        """Of the device's peak arithmetic in bfloat16, over the tokens of the rows, padding left out."""
        if not self.seconds or self.peak_tflops is None:
            return None
        return self.operations / (self.seconds * self.peak_tflops * 1e12)

    def seconds_for(self, rows: int) -> float | None:
        """Extrapolated: as many rows at the same pace."""
        return self.seconds / self.rows * rows if self.seconds else None


def operations(tokens: int, frozen: int, trainable: int) -> float:
    """Of a forward and a backward pass, as `sweeps.trial.duration` counts them.

    A frozen weight costs 2 a token forward and 2 for its input's gradient, a trained one 2 more.
    """
    return tokens * (4.0 * frozen + 6.0 * trainable)


# --- the model and the rows -------------------------------------------------------------------------


def make_base(shape: str, device: torch.device) -> Base:
    """A Llama with random weights, its linear layers in nf4, as `load_base` would have it.

    Built without memory, then filled layer by layer: the largest thing that is ever whole is one layer.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    from sweeps.trial.targets import linear_layers

    started = time.perf_counter()
    hidden, intermediate, blocks, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _fill(model, config, device)
    model.requires_grad_(False)
    model.eval()
    model.is_loaded_in_4bit = True  # peft asks before it looks at the layers
    spec = ModelSpec(id=f"random-llama-{shape}", quantization="nf4", dtype="bfloat16")
    layers = linear_layers(model)
    seconds = time.perf_counter() - started
    return Base(model, None, spec, device, torch.bfloat16, layers, (), seconds)


def _fill(model: Any, config: Any, device: torch.device) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for name, module in [*model.named_modules()]:
        parent, _, child = name.rpartition(".")
        if isinstance(module, torch.nn.Linear):
            setattr(model.get_submodule(parent), child, _four_bit(module, device))
        elif isinstance(module, LlamaRotaryEmbedding):  # its frequencies are computed when it is made
            setattr(model.get_submodule(parent), child, LlamaRotaryEmbedding(config).to(device))
        elif isinstance(module, torch.nn.Embedding):
            module.weight = torch.nn.Parameter(_random(module.weight.shape, device))
        elif "norm" in child:
            ones = torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device)
            module.weight = torch.nn.Parameter(ones)


def _random(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=torch.bfloat16, device=device).normal_(0, 0.02)


def _four_bit(layer: torch.nn.Linear, device: torch.device) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    packed = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    packed.weight = Params4bit(
        _random(layer.weight.shape, device),
        requires_grad=False,
        compress_statistics=False,
        quant_type="nf4",
        module=packed,
    ).to(device)
    packed.support_avx512bf16_for_cpu = False  # else a CPU repacks it, and its gradients are wrong
    return packed


def make_rows(count: int, vocabulary: int, seed: int = 0) -> list[TokenRow]:
    """Random tokens in rows of Alpaca's lengths, evenly taken, the shortest and the longest among them."""
    draw = random.Random(seed)
    known = sorted(row_lengths(DataSpec()).tokens)
    lengths = [known[round(place * (len(known) - 1) / max(1, count - 1))] for place in range(count)]
    draw.shuffle(lengths)
    return [
        TokenRow(array("i", (draw.randrange(_FIRST_TOKEN, vocabulary) for _ in range(length))))
        for length in lengths
    ]


def make_spec(
    given: argparse.Namespace, budget: int | str, device: torch.device, compiles: bool = False
) -> TrialSpec:
    """The article's QLoRA for as many steps as are measured, and one before them."""
    return TrialSpec.model_validate(
        {
            "model": {"id": "random", "quantization": "nf4", "dtype": "bfloat16"},
            "lora": {"r": 8, "alpha": 16.0, "targets": given.targets},
            "optimizer": {"name": "paged_adamw" if device.type == "cuda" else "adamw", "lr": 3e-4},
            "schedule": {"name": "constant", "warmup_steps": 0},
            "train": {
                "batch_size": given.rows,
                "samples": given.rows * (given.steps + 1),
                "sampling": "epochs",
                "token_budget": budget,
                "gradient_checkpointing": "auto",
                "compile": compiles,
                "log_every": 1,  # each step ends with a look at the device
                "eval_every": 0,
            },
            "evaluate": {"tasks": []},
        }
    )


# --- three ways -------------------------------------------------------------------------------------


def ours(
    base: Base,
    rows: Sequence[TokenRow],
    given: argparse.Namespace,
    budget: int | str,
    compiles: bool = False,
) -> Measurement:
    """Our loop; a budget of 1 token is one row at a time, as the article trained."""
    from sweeps.trial.adapter import attach
    from sweeps.trial.begin import begin, choose_here
    from sweeps.trial.finetune import Trained, Unkept, finetune
    from sweeps.trial.measure import MemoryMeter
    from sweeps.trial.outline import outline_of

    spec = make_spec(given, budget, base.device, compiles)
    assert spec.train is not None
    data = TokenData(rows, (), 0, "random")
    outline = outline_of(base.model)  # while it is bare
    meter = MemoryMeter(base.device)
    with attach(base, spec.lora, spec.train.seed) as adapter:
        chosen = choose_here(outline, adapter, spec, max(map(len, rows)))
        trained = Trained()
        begun = begin(adapter, rows, spec, trained, chosen)
        note, size = begun.notes[-1], begun.first_budget
        reports = finetune(adapter.model, begun.loss, begun.training, data, spec, Unkept())
        next(reports)  # the first step also compiles and allocates
        seconds, tokens = trained.watch.seconds, trained.tokens
        loss = None
        for report in reports:
            loss = report.train_loss
        way = "one row at a time" if budget == 1 else "ours, compiled" if compiles else "ours"
        note += "".join(f"; {said}" for said in (*begun.notes, *begun.loss.remarks) if "compiled" in said)
        note += ", activations recomputed" if begun.recomputes else ""
        if trained.token_budget < size:
            note += f", halved to {trained.token_budget} when memory ran out"
        measured = Measurement(
            way=way,
            seconds=trained.watch.seconds - seconds,
            rows=given.rows * given.steps,
            tokens=trained.tokens - tokens,
            loss=loss,
            note=note,
        )
        done = _with_cost(measured, base, adapter.trainable_params, meter.peak_gb)
        reports.close()
        del begun, reports
    meter.close()
    return done


def trainer(base: Base, rows: Sequence[TokenRow], given: argparse.Namespace, batch: int) -> Measurement:
    """HF Trainer with rows grouped by length; raises torch's own error where a batch does not fit."""
    from peft import get_peft_model

    from sweeps.trial.measure import MemoryMeter

    meter = MemoryMeter(base.device)
    model = get_peft_model(base.model, _lora(given, base))
    clock = _clock()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            made = _trainer(model, rows, given, batch, Path(folder), base.device, clock)
            made.train()
        measured = Measurement(
            way=f"HF Trainer, batch {batch}",
            seconds=clock.ends[-1] - clock.ends[0],
            rows=given.rows * given.steps,
            tokens=given.steps * sum(map(len, rows)),  # each step trains on all of them, as ours does
            loss=made.state.log_history[-1].get("train_loss"),
        )
        count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        return _with_cost(measured, base, count, meter.peak_gb)
    finally:
        meter.close()
        _undress(model, base)


def _lora(given: argparse.Namespace, base: Base) -> Any:
    from peft import LoraConfig

    from sweeps.spec import LoraSpec
    from sweeps.trial.targets import match

    targets = [*match(base.layers, LoraSpec(targets=given.targets).targets)]
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")


def _undress(model: Any, base: Base) -> None:
    model.unload()
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        with contextlib.suppress(AttributeError):
            delattr(base.model, leftover)
    base.model.requires_grad_(False)
    base.model.eval()


def _clock() -> Any:
    """A callback that notes when each step has ended on the device."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        ends: list[float]

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    made = Clock()
    made.ends = []
    return made


def _trainer(
    model: Any,
    rows: Sequence[TokenRow],
    given: argparse.Namespace,
    batch: int,
    folder: Path,
    device: torch.device,
    clock: Any,
) -> Any:
    from transformers import Trainer, TrainingArguments

    on_cpu = device.type != "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=given.rows // batch,
        max_steps=given.steps + 1,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=0.0,
        optim="adamw_torch" if on_cpu else "paged_adamw_32bit",
        bf16=True,
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=not on_cpu,
        use_cpu=on_cpu,
        seed=1337,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = [{"input_ids": list(row.ids)} for row in rows]
    return Trainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=_collate, callbacks=[clock]
    )


def _collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right to the longest, with a mask: what transformers' own collator makes."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)  # (B, T)
    labels = torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"])
        ids[place, : len(tokens)] = tokens
        labels[place, : len(tokens)] = tokens
    return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}


def _with_cost(measured: Measurement, base: Base, trainable: int, peak_gb: float) -> Measurement:
    frozen = sum(math.prod(shape) for shape in base.layers.values())
    device = device_reported(base.device_name)
    return dataclasses.replace(
        measured,
        peak_gb=peak_gb,
        operations=operations(measured.tokens, frozen, trainable),
        peak_tflops=device.bf16_tflops if device else None,
    )


def best_that_fits(
    measure: Callable[[int], Measurement], sizes: Sequence[int], say: Callable[[str], None]
) -> list[Measurement]:
    """Every batch size up to the first that runs out of memory, which is kept as a row without figures."""
    found = []
    for size in sizes:
        failed = False
        try:
            found.append(measure(size))
        except torch.OutOfMemoryError:
            failed = True
        # Outside the handler, where the traceback no longer holds the failed step's tensors.
        forget()
        if failed:
            found.append(Measurement(way=f"HF Trainer, batch {size}", note="out of memory"))
            say(f"HF Trainer, batch {size}: out of memory")
            break
        say(_line(found[-1]))
    return found


def forget() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was never used


def _line(measured: Measurement) -> str:
    return f"{measured.way}: {measured.seconds:.2f} s for {measured.rows} rows"


# --- what is printed --------------------------------------------------------------------------------


def report(done: Sequence[Measurement], given: argparse.Namespace) -> str:
    """The table, and what the article's rows would take at the same pace."""
    head = ["way", f"s for {given.rows} rows", "tokens/s", "peak GB", "share of peak", "loss", "note"]
    rows = [
        [
            one.way,
            one.seconds_for(given.rows),
            one.tokens_per_second,
            one.peak_gb,
            None if one.share_of_peak is None else f"{100 * one.share_of_peak:.1f} %",
            one.loss,
            one.note,
        ]
        for one in done
    ]
    hours = [
        [one.way, seconds, seconds / 3600]
        for one in done
        if (seconds := one.seconds_for(ARTICLE_ROWS)) is not None
    ]
    title = f"Extrapolated, not measured: {ARTICLE_ROWS:,} rows at this pace"
    return "\n\n".join([table(head, rows), title + ":", table(["way", "seconds", "hours"], hours)])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--shape", choices=tuple(SHAPES), default="7b")
    made.add_argument("--targets", choices=("qv", "all"), default="qv", help="qv is what the article timed")
    made.add_argument("--rows", type=int, default=128, help="of one update")
    made.add_argument("--steps", type=int, default=1, help="updates that are measured, after one that is not")
    made.add_argument("--batches", default="1,2,4,8,16,32", help="of HF Trainer, up to what fits")
    made.add_argument("--ways", default="single,trainer,ours", help="which are measured")
    made.add_argument("--compile", action="store_true", help="measure ours with train.compile too")
    made.add_argument("--json", type=Path, help="write every figure to this file")
    return made


WAYS = ("single", "trainer", "ours")


def faults(given: argparse.Namespace, device: torch.device) -> list[str]:
    """What of the arguments cannot be, all of it."""
    found = []
    if given.shape != "tiny" and device.type != "cuda":
        found.append(f"--shape {given.shape} needs CUDA, and none is visible; say --shape tiny")
    if torch.cuda.device_count() > 1:  # Trainer would share each batch out among all of them
        found.append(f"one GPU must be visible, got {torch.cuda.device_count()}; set CUDA_VISIBLE_DEVICES=0")
    if given.rows < 1 or given.steps < 1:
        found.append(f"--rows and --steps must be positive, got {given.rows} and {given.steps}")
    if wrong := [size for size in sizes_of(given) if size < 1 or given.rows % size]:
        found.append(f"--batches must divide --rows {given.rows}, got {', '.join(map(str, wrong))}")
    if wrong_ways := set(given.ways.split(",")) - {*WAYS}:
        found.append(f"--ways must be of {', '.join(WAYS)}, got {', '.join(sorted(wrong_ways))}")
    return found


def sizes_of(given: argparse.Namespace) -> list[int]:
    return [int(size) for size in given.batches.split(",")]


def measure(given: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> list[Measurement]:
    """All ways on one base, one after the other."""
    torch.manual_seed(0)
    base = make_base(given.shape, device)
    rows = make_rows(given.rows, SHAPES[given.shape][-1])
    say(f"base made in {base.load_seconds:.1f} s; {given.rows} rows of {sum(map(len, rows))} tokens")
    done, ways = [], given.ways.split(",")
    if "single" in ways:
        done.append(ours(base, rows, given, 1))
        forget()
        say(_line(done[-1]))
    if "trainer" in ways:
        done += best_that_fits(lambda size: trainer(base, rows, given, size), sizes_of(given), say)
    if "ours" in ways:
        for compiles in (False, True) if given.compile else (False,):
            done.append(ours(base, rows, given, "auto", compiles))
            forget()
            say(_line(done[-1]))
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    commands = parser()
    given = commands.parse_args(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if found := faults(given, device):
        commands.error("; ".join(found))
    done = measure(given, device, lambda text: print(text, file=sys.stderr, flush=True))
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    known = facts()
    print(
        f"{given.shape}, targets {given.targets}, on {title}\n\n{report(done, given)}\n\n{facts_line(known)}"
    )
    if given.json:
        kept = {
            "facts": {**known, "device": title},
            "arguments": {name: value for name, value in vars(given).items() if name != "json"},
            "measurements": [
                {
                    **dataclasses.asdict(one),
                    "tokens_per_second": one.tokens_per_second,
                    "share_of_peak": one.share_of_peak,
                    "extrapolated_seconds_50k_rows": one.seconds_for(ARTICLE_ROWS),
                }
                for one in done
            ],
        }
        given.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
