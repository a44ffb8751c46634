"""The small sweep that stands for a large one: every distinct trial for two steps, on the CPU.

Pure: it reads and writes no file. What lies on the disk in place of model, rows and benchmarks is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sweeps.spec import FIELDS, TrialSpec
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep_text

STEPS, BATCH, DOCUMENTS = 2, 4, 4
PARALLEL = 4

_NEEDS_CUDA = {"paged_adamw": "adamw"}


@dataclass(frozen=True)
class StandIns:
    """What one trial gets in a rehearsal: a small model, few rows, few documents of its benchmarks.

    `most_r` is the narrowest side of the small model's target layers, `targets` are their names there.
    """

    model: str
    rows: str | None
    tasks: tuple[str, ...]
    data_dir: str | None
    targets: str | tuple[str, ...]
    most_r: int


def shrunk(spec: TrialSpec, given: StandIns) -> tuple[TrialSpec, list[str]]:
    """The trial with the stand-ins, two steps long, as a CPU can run it; and what that changed.

    All else stays: quantisation, dtypes, targets, alpha, optimiser, schedule, weighting, clipping.
    """
    notes: list[str] = []
    model = {"id": given.model, "revision": None}
    if spec.model.attention == "flash_attention_2":
        notes.append("model.attention=flash_attention_2 needs CUDA: auto in its place")
        model["attention"] = "auto"
    evaluate = {
        "tasks": given.tasks,
        "data_dir": given.data_dir,
        "limit": min(spec.evaluate.limit or DOCUMENTS, DOCUMENTS),
    }
    if spec.train is None:
        return _with(spec, {"model": model, "evaluate": evaluate}), notes
    if spec.lora.r > given.most_r:
        notes.append(f"lora.r={spec.lora.r} is wider than the small model's layers: {given.most_r} there")
    if other := _NEEDS_CUDA.get(spec.optimizer.name):
        notes.append(f"optimizer.name={spec.optimizer.name} needs CUDA: {other} in its place")
    batch = min(spec.train.batch_size, BATCH)
    changes = {
        "model": model,
        "data": {"id": None, "path": given.rows, "split": FIELDS["data.split"].default},
        "lora": {"r": min(spec.lora.r, given.most_r), "targets": given.targets},
        "optimizer": {"name": other or spec.optimizer.name},
        "schedule": {"warmup_steps": min(spec.schedule.warmup_steps, STEPS - 1)},
        "train": {
            "batch_size": batch,
            "samples": STEPS * batch,
            "log_every": 1,
            "eval_every": min(spec.train.eval_every, 1),
            "eval_rows": min(spec.train.eval_rows, BATCH),
        },
        "evaluate": evaluate,
    }
    return _with(spec, changes), notes


def _with(spec: TrialSpec, changes: Mapping[str, Mapping[str, Any]]) -> TrialSpec:
    sections = spec.model_dump()
    for section, fields in changes.items():
        sections[section] |= fields
    return TrialSpec.model_validate(sections)


def sweep_of(sweep: Sweep, specs: Sequence[TrialSpec]) -> Sweep:
    """A sweep of exactly these trials, which differ, in their order; on the CPU, with nothing tried again.

    It is a sweep file like any other: what the trials share stands under `trial`, what they differ in under
    `search.space`, and `first` lists them.
    """
    every = [_fields(spec) for spec in specs]
    varied = [path for path, value in every[0].items() if any(one[path] != value for one in every)]
    trial: dict[str, Any] = {}
    for path, value in every[0].items():
        if path not in varied and value != _default(path):
            section, _, name = path.partition(".")
            trial.setdefault(section, {})[name] = value
    if specs[0].train is None:
        trial["train"] = "none"
    search: dict[str, Any] = {"sampler": "grid", "trials": len(specs)}
    if varied:
        search["space"] = {path: _distinct([one[path] for one in every]) for path in varied}
        search["first"] = [{path: one[path] for path in varied} for one in every]
    form = {
        "name": sweep.name,
        "trial": trial,
        "search": search,
        "baseline": sweep.baseline,
        "objective": {"minimize": "wall_seconds"},  # is measured whatever a trial has; a grid does not look
        "resources": {"gpus": 0, "cpus": 1, "parallel": PARALLEL},
        "faults": {
            "stop_after": 0,
            "retries": {"process_lost": 0, "evaluation_failed": 0, "download_failed": 0},
        },
    }
    head = f"# A rehearsal of {sweep.source}: each trial for {STEPS} steps on a small model.\n"
    text = head + yaml.dump(form, Dumper=_Plain, sort_keys=False, width=100)
    return load_sweep_text(text, sweep.source, (), sweep.base_dir)


def _fields(spec: TrialSpec) -> dict[str, Any]:
    """Every field of the trial by its path, as a sweep file has it."""
    sections = spec.model_dump(mode="json")
    values = {}
    for path in FIELDS:
        section, _, name = path.partition(".")
        if sections[section] is not None:
            values[path] = sections[section][name]
    if spec.data.path is not None:
        values["data.id"] = _default("data.id")  # a path takes its place by itself
    return values


def _default(path: str) -> Any:
    default = FIELDS[path].default
    return list(default) if isinstance(default, tuple) else default


def _distinct(values: Sequence[Any]) -> list[Any]:
    """Each value once; a list has no hash, and true is not 1."""
    return [value for number, value in enumerate(values) if value not in values[:number]]


class _Plain(yaml.SafeDumper):
    """Writes every value in full: a sweep file has no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
