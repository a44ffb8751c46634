"""`Sweep`: a sweep file, validated and frozen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sweeps.space import Label, Picks, Resolved, Rule, Space
from sweeps.spec import CountFloat, CountInt, Part, PositiveInt, Text, TrialSpec

Sampler = Literal["grid", "random", "tpe", "gp", "cmaes", "qmc"]

COSTS = ("peak_memory_gb", "wall_seconds", "train_seconds")
LOSSES = ("eval.loss", "train.loss")
CHECKPOINT_MINUTES = 5.0
SCORE = "score."
MEAN_SCORE = "score.mean"


@dataclass(frozen=True)
class Search:
    """How trials are chosen.

    `trials` is the number of distinct trials to propose, each of them `repeats` times with other seeds;
    None is every combination of the grid. `first` is tried before the sampler starts.
    """

    sampler: Sampler = "grid"
    trials: int | None = None
    space: Space = field(default_factory=Space)
    first: tuple[Mapping[str, Label], ...] = ()
    repeats: int = 1
    seed: int = 0

    @property
    def budget(self) -> int:
        """Most distinct picks that can be proposed: `trials`, or as many as the space holds."""
        bounds = [bound for bound in (self.trials, self.space.size) if bound is not None]
        return min(bounds)


class Objective(Part):
    """What the sampler looks for: a final metric of a trial, and whether more of it is better."""

    metric: Text = MEAN_SCORE
    maximize: bool = True


class Resources(Part):
    """What one trial occupies, and how many may run at once."""

    gpus: CountFloat = Field(1.0, description="GPUs of one trial; below 1, trials share one.")
    accelerator: Text | None = Field(None, description="Ray's accelerator type, such as A100.")
    cpus: PositiveInt | None = Field(
        None, description="CPU cores of one trial; the scheduler's choice if unset."
    )
    parallel: PositiveInt | None = Field(None, description="Most trials at once; as many as fit if unset.")


class Retries(Part):
    """How often one trial is tried again, by class of failure. What is not named here never is: the same
    trial would fail in the same way."""

    process_lost: CountInt = Field(3, description="Killed, node gone, preempted: from the last checkpoint.")
    evaluation_failed: CountInt = Field(
        1, description="A benchmark raised: the evaluation again, not the training."
    )
    download_failed: CountInt = Field(
        5, description="The hub did not answer: after a pause, doubled each time."
    )


class Faults(Part):
    """What is done against faults; nothing in it changes a result."""

    checkpoint_minutes: CountFloat = Field(
        CHECKPOINT_MINUTES, description="Minutes between two checkpoints of a trial; 0 is after every step."
    )
    retries: Retries = Field(Retries(), description="How often a failed trial is tried again, by class.")
    backoff_seconds: CountFloat = Field(30.0, description="The first pause before a download is tried again.")
    stop_after: CountInt = Field(
        5, description="Trials that fail in a row for the same reason stop the sweep; 0 is never."
    )


@dataclass(frozen=True)
class Sweep:
    """One sweep. `load_sweep_text(text, source, overrides, base_dir)` gives it again."""

    name: str
    source: str
    text: str
    overrides: tuple[str, ...]
    base_dir: Path
    template: Mapping[str, Any]
    search: Search
    baseline: bool
    objective: Objective
    resources: Resources
    faults: Faults = field(default_factory=Faults)

    @property
    def file_digest(self) -> str:
        """Of the file's text with its overrides: 16 hexadecimal digits."""
        whole = json.dumps([self.text, *self.overrides])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def with_more(self, trials: int) -> Sweep:
        """The same with as many distinct trials more in its budget."""
        if not trials or self.search.trials is None:
            return self
        return replace(self, search=replace(self.search, trials=self.search.trials + trials))

    def resolve(self, picks: Picks) -> Resolved:
        """The trial that `picks`, one for each path of the space, stand for. Raises `InvalidTrial`."""
        return self.search.space.resolve(self.template, picks)

    def baselines(self) -> tuple[TrialSpec, ...]:
        """Each distinct untouched base with its benchmarks, in the order of the space.

        There is none if the file wants none, if no benchmark would score it, or if nothing is trained, since
        every trial is an untouched base then.
        """
        if not self.baseline or self.template.get("train", ...) is None:
            return ()
        space = self.search.space
        varied = space.only(_paths_of_a_baseline(self.template, space))
        resolved = (self.resolve({**space.first(), **picks}).spec for picks in varied.combinations())
        untrained = {spec.digest: spec for spec in (spec.untrained() for spec in resolved)}
        return tuple(spec for spec in untrained.values() if spec.evaluate.tasks)

    def repeated(self, spec: TrialSpec, k: int) -> TrialSpec:
        """Repeat `k` of a resolved trial: the same one with the seed `k` higher."""
        if spec.train is None or k == 0:
            return spec
        return spec.model_copy(update={"train": spec.train.model_copy(update={"seed": spec.train.seed + k})})


def _paths_of_a_baseline(template: Mapping[str, Any], space: Space) -> set[str]:
    """The varied fields that tell baselines apart, with what their rules are computed from."""
    paths = {path for path in (*template, *space) if path.startswith(("model.", "evaluate."))}
    paths = paths.union(*(dependencies(path, template, space) for path in paths))
    return {path for path in paths if path in space and space[path].size is not None}


def dependencies(path: str, template: Mapping[str, Any], space: Space) -> set[str]:
    """Every field that a rule at `path` is computed from, directly or through other rules."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        for rule in rules_at(waiting.pop(), template, space):
            new = set(rule.needs) - found
            found |= new
            waiting.extend(new)
    return found


def rules_at(path: str, template: Mapping[str, Any], space: Space) -> list[Rule]:
    """The rules that may give the field at `path` its value."""
    if path in space:
        return list(space[path].rules)
    value = template.get(path)
    return [value] if isinstance(value, Rule) else []
