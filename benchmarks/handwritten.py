"""The yardstick: the script that a competent person writes without us.

A Ray Tune function that loads a base, trains it with transformers' Trainer and scores it with lm-eval's
HFLM; OptunaSearch proposes, Ray's MLflow callback records. Two dresses:

    plain   batches of 8, bf16, padded to the longest row of each; all else at its default
    tuned   rows grouped by length, the fastest batch size, HFLM's fastest batch size, lm-eval's index of
            tasks read once a process and without the tasks that are not asked for

Started by `benchmarks.compare`, one process for each job:

    python -m benchmarks.handwritten JOB.json OUTCOME.json
    python -m benchmarks.handwritten --find JOB.json FOUND.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.work import TARGETS, Found, Job, Outcome, TrialRecord, alpha_of

TEMPLATE = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{given}### Response:"
)
PAIRED = ", paired with an input that provides further context"

# Where each benchmark is among lm-eval's files, and the split that it is scored on.
TASK_FILES = {
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", "validation"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "validation"),
    "arithmetic_2ds": ("arithmetic/arithmetic_2ds.yaml", "validation"),
    "arithmetic_4ds": ("arithmetic/arithmetic_4ds.yaml", "validation"),
    "blimp_causative": ("blimp/causative.yaml", "train"),
    "mmlu_global_facts": ("mmlu/default/mmlu_global_facts.yaml", "test"),
}
_OURS = "local_"  # before the name of a task whose rows are local


# --- one trial --------------------------------------------------------------------------------------


def load(job: Job) -> tuple[Any, Any]:
    """The base in 4 bits, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        job.model,
        quantization_config=packing if job.quantization == "nf4" else None,
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    keep_weights_unpacked(model)
    return model, tokenizer


def keep_weights_unpacked(model: Any) -> None:
    """The guard without which the losses would mean nothing.

    On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit weight at the first forward pass in evaluation
    mode; every later backward pass then gives wrong gradients without an error. Scoring is faster for it too
    (docs/benchmarks.md): it takes nothing from this side.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dataset(job: Job, tokenizer: Any, file: str) -> list[dict[str, list[int]]]:
    """The rows as token ids with their labels, BOS and EOS as far as the tokenizer has them."""
    return [_encoded(row, job, tokenizer) for row in json.loads(Path(file).read_text("utf-8"))]


def _encoded(row: dict[str, str], job: Job, tokenizer: Any) -> dict[str, list[int]]:
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    prompt = TEMPLATE.format(paired=PAIRED if given else "", instruction=row["instruction"], given=given)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = [*bos, *tokenizer(prompt + row["output"], add_special_tokens=False)["input_ids"], *eos]
    labels = list(ids)
    if job.loss_on == "response":
        asked = len(bos) + len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        labels[:asked] = [-100] * asked
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def with_lora(model: Any, job: Job, r: int, alpha: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=job.dropout, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def trainer_of(model: Any, tokenizer: Any, rows: Sequence[Any], job: Job, folder: Path) -> Any:
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    on_cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=job.update // job.batch,
        num_train_epochs=1,
        learning_rate=job.lr,
        lr_scheduler_type="cosine",
        warmup_steps=job.warmup_steps,
        weight_decay=job.weight_decay,
        max_grad_norm=job.clip_norm,
        bf16=True,
        train_sampling_strategy="group_by_length" if job.grouped else "random",
        dataloader_pin_memory=not on_cpu,
        use_cpu=on_cpu,
        seed=job.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)  # to the longest row of each batch
    return Trainer(model=model, args=arguments, train_dataset=list(rows), data_collator=collator)


def score(model: Any, tokenizer: Any, job: Job, tasks: Any) -> dict[str, float]:
    """lm-eval's own scores; `tasks` is its TaskManager."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=job.eval_batch)
    results = simple_evaluate(
        model=lm,
        tasks=[_OURS + name for name in job.tasks],
        task_manager=tasks,
        **({"bootstrap_iters": 0, "log_samples": False} if job.tuned else {}),
    )
    scores = {}
    for name in job.tasks:
        found = results["results"][_OURS + name]
        scores[name] = float(next(value for key, value in found.items() if key.startswith("acc,")))
    return scores


def task_manager(job: Job) -> Any:
    """lm-eval's index of tasks, with ours: the shipped ones, whose rows are taken from local files."""
    import yaml
    from lm_eval import tasks

    shipped, folder = Path(tasks.__file__).parent, Path(job.place) / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    for name in job.tasks:
        file, split = TASK_FILES[name]
        rows = {split: f"{job.documents}/{name}.jsonl"}
        dev = Path(job.documents) / f"{name}_dev.jsonl"
        if dev.exists():
            rows["dev"] = str(dev)
        elif name == "mmlu_global_facts":  # its template names the split, though nothing is drawn from it
            rows["dev"] = rows[split]
        task = {
            "include": str(shipped / file),
            "task": _OURS + name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": rows},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), "utf-8")
    return tasks.TaskManager(include_path=str(folder), include_defaults=not job.tuned)


_known_tasks: list[Any] = []


def tasks_of(job: Job) -> Any:
    """The index: read anew for each trial in the plain dress, once a process in the tuned one."""
    if not (job.tuned and _known_tasks):
        _known_tasks[:] = [task_manager(job)]
    return _known_tasks[0]


@dataclasses.dataclass
class Laps:
    """Seconds between one call and the next."""

    last: float = dataclasses.field(default_factory=time.perf_counter)

    def lap(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def run_one(job: Job, r: int, rule: str, folder: Path, *, trains: bool, scores: bool) -> TrialRecord:
    """Load, train, score: what the Ray function does for one trial."""
    laps = Laps()
    model, tokenizer = load(job)
    tasks = tasks_of(job) if scores else None
    values: dict[str, Any] = {"r": r, "rule": rule}
    if trains:
        rows = dataset(job, tokenizer, job.rows)
        model = with_lora(model, job, r, alpha_of(r, rule))
        trainer = trainer_of(model, tokenizer, rows, job, folder)
        values["load_seconds"] = laps.lap()
        values["train_loss"] = trainer.train().training_loss
        values["train_seconds"] = laps.lap()
        model.save_pretrained(folder / "adapter")
        values |= {
            "rows": len(rows),
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "trainable": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            "adapter": str(folder / "adapter"),
        }
    else:
        values["load_seconds"] = laps.lap()
    if scores:
        laps.lap()
        values["scores"] = score(model, tokenizer, job, tasks)
        values["evaluate_seconds"] = laps.lap()
    return TrialRecord(**values, ended=time.time())


# --- a sweep ----------------------------------------------------------------------------------------


def ray_trial(config: dict[str, Any], job_json: str) -> None:
    """The Ray function."""
    from ray import tune

    job = Job.model_validate_json(job_json)
    folder = Path(job.place) / f"trial-{tune.get_context().get_trial_id()}"
    folder.mkdir(parents=True)
    record = run_one(job, config["r"], config["alpha"], folder, trains=True, scores=True)
    (folder / "record.json").write_text(record.model_dump_json(), "utf-8")
    named = {f"score.{task}": value for task, value in record.scores.items()}
    mean = sum(record.scores.values()) / len(record.scores)
    tune.report({**named, "score": mean, "train_loss": record.train_loss})


def sweep(job: Job) -> list[TrialRecord]:
    """All trials, one at a time, on all cores."""
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.search.optuna import OptunaSearch

    place = Path(job.place)
    ray.init(
        num_cpus=job.threads,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    ranks, rules = ([*dict.fromkeys(column)] for column in zip(*job.trials, strict=True))
    points = [{"r": r, "alpha": rule} for r, rule in job.trials]  # the same trials as the other side's
    recorder = MLflowLoggerCallback(
        tracking_uri=f"sqlite:///{place}/mlflow.db", experiment_name="handwritten", save_artifact=False
    )
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(ray_trial, job_json=job.model_dump_json()), {"cpu": job.threads}
        ),
        param_space={"r": tune.choice(ranks), "alpha": tune.choice(rules)},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=OptunaSearch(points_to_evaluate=points),
            num_samples=len(points),
            max_concurrent_trials=1,
        ),
        run_config=tune.RunConfig(storage_path=str(place / "ray"), callbacks=[recorder], verbose=0),
    )
    results = tuner.fit()
    if results.errors:
        raise results.errors[0]
    ray.shutdown()
    files = place.glob("trial-*/record.json")
    records = [TrialRecord.model_validate_json(file.read_text("utf-8")) for file in files]
    return sorted(records, key=lambda record: record.ended)


# --- the best batch sizes ---------------------------------------------------------------------------

_TRAIN_BATCHES = (4, 8, 16, 32, 64)
_EVAL_BATCHES = (8, 16, 32, 64)


def find(job: Job) -> Found:
    """Seconds of the same rows and documents at each batch size that a person would try."""
    model, tokenizer = load(job)
    found = Found()
    if job.part != "train":
        tasks = task_manager(job)
        score(model, tokenizer, job, tasks)  # what only the first costs
        found = Found(evaluate_seconds=dict(_scored(model, tokenizer, job, tasks)))
    if job.part != "evaluate":
        rows = dataset(job, tokenizer, job.rows)
        model = with_lora(model, job, *_first(job))
        _trained(model, tokenizer, rows, job.model_copy(update={"batch": _batches(job)[0]}))
        seconds = {
            size: _trained(model, tokenizer, rows, job.model_copy(update={"batch": size}))
            for size in _batches(job)
        }
        found = found.model_copy(update={"train_seconds": seconds})
    return found


def _first(job: Job) -> tuple[int, int]:
    r, rule = job.trials[0]
    return r, alpha_of(r, rule)


def _batches(job: Job) -> list[int]:
    return [size for size in _TRAIN_BATCHES if job.update % size == 0] or [job.update]


def _scored(model: Any, tokenizer: Any, job: Job, tasks: Any) -> Iterator[tuple[int, float]]:
    for size in _EVAL_BATCHES:
        laps = Laps()
        score(model, tokenizer, job.model_copy(update={"eval_batch": size}), tasks)
        yield size, laps.lap()


def _trained(model: Any, tokenizer: Any, rows: Sequence[Any], job: Job) -> float:
    trainer = trainer_of(model, tokenizer, rows, job, Path(job.place))
    laps = Laps()
    trainer.train()
    return laps.lap()


# --- processes --------------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    trains, scores = job.part != "evaluate", job.part != "train"
    notes = (
        *(["bf16 autocast with float32 adapters, as Trainer and peft have it"] if trains else []),
        *([f"HFLM in batches of {job.eval_batch}"] if scores else []),
        "4-bit weights kept unpacked, without which bitsandbytes may give wrong gradients on this processor",
    )
    if job.part == "sweep":
        from benchmarks import handwritten  # not __main__, so that Ray's workers import it by its name

        return Outcome(trials=tuple(handwritten.sweep(job)), dtype="bfloat16", notes=notes)
    r, rule = job.trials[0]
    record = run_one(job, r, rule, Path(job.place), trains=trains, scores=scores)
    return Outcome(trials=(record,), dtype="bfloat16", notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--find", action="store_true", help="find the best batch sizes instead")
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    job = Job.model_validate_json(given.job.read_text("utf-8"))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import torch

    torch.set_num_threads(job.threads)
    said: Found | Outcome = find(job) if given.find else run(job)
    given.out.write_text(said.model_dump_json(), "utf-8")


if __name__ == "__main__":
    main()
