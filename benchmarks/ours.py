"""Our side of a comparison: the same job through `run_trial`, or a sweep through the service.

python -m benchmarks.ours JOB.json OUTCOME.json
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.work import TARGETS, Job, Outcome, TrialRecord, alpha_of
from sweeps.result import TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial.paths import TrialFolder

SWEEP_ID = "compare-1"


def sections(job: Job) -> dict[str, Any]:
    """The trial as a sweep file has it, without what is searched over."""
    return {
        "model": {"id": job.model, "quantization": job.quantization, "dtype": job.dtype},
        "data": {"path": job.rows, "held_out": 0.0, "loss_on": job.loss_on},
        "lora": {"dropout": job.dropout, "targets": list(TARGETS)},
        "optimizer": {"name": "adamw", "lr": job.lr, "weight_decay": job.weight_decay},
        "schedule": {"name": "cosine", "warmup_steps": job.warmup_steps, "t_max": "after_warmup"},
        "train": {
            "batch_size": job.update,
            "samples": job.samples,
            "sampling": "epochs",
            "seed": job.seed,
            "loss_weighting": "token",  # as Trainer weighs
            "clip_norm": job.clip_norm,
            "log_every": job.steps,  # one report, as the other side has one
            "eval_every": 0,
        },
        "evaluate": {"tasks": list(job.tasks), "data_dir": job.documents},
    }


def spec_of(job: Job) -> TrialSpec:
    """The one trial of a job that is no sweep: trained and not scored, or scored and not trained."""
    r, rule = job.trials[0]
    parts = sections(job)
    if job.part == "evaluate":
        return TrialSpec.model_validate(
            {"model": parts["model"], "train": None, "evaluate": parts["evaluate"]}
        )
    parts["lora"] |= {"r": r, "alpha": float(alpha_of(r, rule))}
    return TrialSpec.model_validate({**parts, "evaluate": {"tasks": []}})


def sweep_text(job: Job) -> str:
    """The sweep file: the same trials in the same order, then none."""
    first = [{"lora.r": r, "lora.alpha": rule if rule != "1" else 1} for r, rule in job.trials]
    return yaml.safe_dump(
        {
            "name": "compare",
            "trial": sections(job),
            "search": {
                "sampler": "tpe",
                "trials": len(first),
                "space": {
                    "lora.r": sorted({r for r, _ in job.trials}),
                    "lora.alpha": list(dict.fromkeys(one["lora.alpha"] for one in first)),
                },
                "first": first,
            },
            "baseline": False,
            "objective": {"maximize": "score.mean"},
            "resources": {"gpus": 0, "cpus": job.threads},
        },
        sort_keys=False,
    )


def record_of(result: TrialResult, job: Job, r: int, rule: str, folder: TrialFolder) -> TrialRecord:
    """What a trial's result says, in the words of both sides."""
    if result.outcome != "completed":
        raise RuntimeError(f"a trial must complete to be measured, got {result.outcome}: {result.failure}")
    measured = result.measured
    return TrialRecord(
        r=r,
        rule=rule,
        load_seconds=measured.load_seconds,
        train_seconds=measured.train_seconds,
        evaluate_seconds=measured.eval_seconds,
        ended=folder.result.stat().st_mtime,
        rows=job.samples if result.steps else 0,
        tokens=measured.trained_tokens,
        trainable=result.trainable_params,
        train_loss=result.train_loss,
        scores={name: score.value for name, score in result.scores.items()},
        documents=sum(score.documents for score in result.scores.values()),
        adapter=str(folder.adapter) if result.steps else None,
    )


def dtype_in(notes: tuple[str, ...]) -> str:
    """What the trial computed in, as it announced it."""
    found = next((match for note in notes if (match := re.match(r"dtype (\w+):", note))), None)
    return found.group(1) if found else ""


def run_alone(job: Job) -> Outcome:
    import torch

    from sweeps.trial.base import Resident
    from sweeps.trial.run import run_trial

    torch.set_num_threads(job.threads)
    place = Path(job.place) / "trial"
    for _ in run_trial(spec_of(job), Resident(), place):
        pass
    return _outcome([_read(job, place, *job.trials[0])])


def run_sweep(job: Job) -> Outcome:
    place = Path(job.place)
    file, home = place / "compare.yaml", place / "home"
    file.write_text(sweep_text(job), "utf-8")
    # Nothing that an earlier sweep left in a cache helps this one.
    environment = {**os.environ, "SWEEPSVC_HOME": str(home), "SWEEPSVC_CACHE": str(place / "cache")}
    started = time.perf_counter()
    command = [sys.executable, "-m", "sweepsvc", "launch", str(file), "--id", SWEEP_ID]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    whole = time.perf_counter() - started
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise RuntimeError(f"launch ended with {done.returncode}:\n{said}")
    folders = [home / SWEEP_ID / "trials" / str(number) for number in range(len(job.trials))]
    read = [_read(job, folder, r, rule) for folder, (r, rule) in zip(folders, job.trials, strict=True)]
    return _outcome(read).model_copy(update={"whole_seconds": whole})


def _read(job: Job, place: Path, r: int, rule: str) -> tuple[TrialRecord, TrialResult]:
    folder = TrialFolder(place)
    result = folder.read_result()
    assert result is not None
    return record_of(result, job, r, rule, folder), result


def _outcome(read: list[tuple[TrialRecord, TrialResult]]) -> Outcome:
    notes = read[0][1].notes
    return Outcome(trials=tuple(record for record, _ in read), dtype=dtype_in(notes), notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    job = Job.model_validate_json(given.job.read_text("utf-8"))
    outcome = run_sweep(job) if job.part == "sweep" else run_alone(job)
    given.out.write_text(outcome.model_dump_json(), "utf-8")


if __name__ == "__main__":
    main()
