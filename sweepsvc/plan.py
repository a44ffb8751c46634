"""What a sweep would run, before it is paid for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.space import Resolved
from sweeps.sweep import Sweep

MOST_LISTED = 10_000


@dataclass(frozen=True)
class PlannedTrial:
    """One distinct trial that the sweep may run, with its trainable parameters."""

    resolved: Resolved
    trainable_params: int


@dataclass(frozen=True)
class Plan:
    """The distinct trials of a sweep, and how many of them its budget runs."""

    sweep: Sweep
    trials: Sequence[PlannedTrial]
    runs: int
    baselines: int
    note: str


def plan(sweep: Sweep) -> Plan:
    """Count every distinct trial of a finite space; of an infinite one, examples that its sampler draws."""
    from sweeps.trial.estimate import trainable_params  # torch and transformers: seconds

    resolved, note = _distinct(sweep)
    trials = [PlannedTrial(trial, trainable_params(trial.spec)) for trial in resolved]
    is_whole = sweep.search.space.size is not None and len(trials) < MOST_LISTED
    distinct = min(sweep.search.budget, len(trials)) if is_whole else sweep.search.budget
    return Plan(sweep, trials, distinct * sweep.search.repeats, len(sweep.baselines()), note)


def _distinct(sweep: Sweep) -> tuple[list[Resolved], str]:
    search = sweep.search
    if search.space.size is None:
        return _examples(sweep), f"examples: {search.sampler} draws from a space without an end"
    found: dict[str, Resolved] = {}
    for picks in search.space.combinations():
        trial = sweep.resolve(picks)
        found.setdefault(trial.spec.digest, trial)
        if len(found) == MOST_LISTED:
            return list(found.values()), f"the first {MOST_LISTED} of up to {search.space.size} trials"
    if search.budget < len(found):
        return list(found.values()), f"{search.sampler} runs {search.budget} of these {len(found)} trials"
    return list(found.values()), f"every one of these {len(found)} trials is run"


def _examples(sweep: Sweep) -> list[Resolved]:
    from sweepsvc.study import scratch_study

    study = scratch_study(sweep)
    most = sweep.search.budget * sweep.search.repeats
    proposals = itertools.takewhile(bool, (study.ask() for _ in range(most)))
    return [
        Resolved(spec=proposal.spec, params=dict(proposal.params), rules=dict(proposal.rules))
        for proposal in proposals
        if proposal is not None and proposal.repeat == 0
    ]


def plan_json(made: Plan) -> Mapping[str, Any]:
    """The stable form of `plan --json`. What is not predicted yet is null."""
    return {
        "sweep": made.sweep.name,
        "note": made.note,
        "trials": [
            {
                "number": number,
                "params": {
                    **trial.resolved.params,
                    **{f"{path}_rule": text for path, text in trial.resolved.rules.items()},
                },
                "trainable_params": trial.trainable_params,
                "predicted": {"peak_memory_gb": None, "train_seconds": None, "fits": None},
            }
            for number, trial in enumerate(made.trials)
        ],
        "total": {"trials": made.runs, "baselines": made.baselines, "gpu_hours": None},
    }
