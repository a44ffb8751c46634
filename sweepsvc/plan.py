"""What a sweep would run, before it is paid for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.devices import Device, device_named, device_of_accelerator, device_reported, devices
from sweeps.space import Resolved
from sweeps.sweep import Sweep

if TYPE_CHECKING:  # torch and transformers behind it: seconds
    from sweeps.trial.predict import Prediction

MOST_LISTED = 10_000


@dataclass(frozen=True)
class PlannedTrial:
    """One distinct trial that the sweep may run, with what it will need; `search.first` may name it."""

    resolved: Resolved
    prediction: Prediction
    is_first: bool = False


@dataclass(frozen=True)
class Plan:
    """The distinct trials of a sweep, how many of them its budget runs, and what that takes.

    `baselines` are the predictions of the untouched bases. `device` is None where none is known, and
    `device_note` says why. `budget_hours` is what may be spent, None where nobody said.
    """

    sweep: Sweep
    trials: Sequence[PlannedTrial]
    runs: int
    baselines: Sequence[Prediction]
    note: str
    device: Device | None
    device_note: str
    budget_hours: float | None = None

    @property
    def gpu_hours(self) -> float | None:
        """Of all runs and baselines; None where a time is unknown.

        Trials that `search.first` names are run for certain; which of the others are is the sampler's choice,
        so that those count with their mean.
        """
        first = [trial.prediction.seconds for trial in self.trials if trial.is_first]
        others = [trial.prediction.seconds for trial in self.trials if not trial.is_first]
        known = [seconds for seconds in (*first, *others) if seconds is not None]
        if len(known) < len(self.trials) or not known:
            return None
        repeats = self.sweep.search.repeats
        certain = known[: len(first)][: self.runs // repeats]
        chosen = known[len(first) :] or certain
        seconds = sum(certain) * repeats
        seconds += (self.runs - len(certain) * repeats) * sum(chosen) / len(chosen)
        seconds += sum(baseline.seconds or 0.0 for baseline in self.baselines)
        return seconds * self.sweep.resources.gpus / 3600

    @property
    def within_budget(self) -> bool | None:
        """Whether the hours are no more than may be spent; None where either is not known."""
        hours = self.gpu_hours
        return None if hours is None or self.budget_hours is None else hours <= self.budget_hours

    @property
    def unfit(self) -> list[int]:
        """The numbers of the trials that do not fit on the device."""
        return [number for number, trial in enumerate(self.trials) if trial.prediction.fits is False]

    @property
    def notes(self) -> list[str]:
        """What the predictions assume, each once."""
        everything = [*(trial.prediction for trial in self.trials), *self.baselines]
        return list(dict.fromkeys(note for prediction in everything for note in prediction.notes))


def plan(sweep: Sweep, device_name: str | None = None, budget_hours: float | None = None) -> Plan:
    """Predict every distinct trial of a finite space; of an infinite one, examples that its sampler draws.

    Raises `CannotStart` for a device that is not in the table.
    """
    device, device_note = _device(sweep, device_name)

    from sweeps.trial.predict import predict

    on_cpu = device is None and sweep.resources.gpus == 0
    resolved, note = _distinct(sweep)
    first = {sweep.resolve(picks).spec.digest for picks in sweep.search.first}
    trials = [
        PlannedTrial(trial, predict(trial.spec, device, on_cpu), trial.spec.digest in first)
        for trial in resolved
    ]
    is_whole = sweep.search.space.size is not None and len(trials) < MOST_LISTED
    distinct = min(sweep.search.budget, len(trials)) if is_whole else sweep.search.budget
    return Plan(
        sweep=sweep,
        trials=trials,
        runs=distinct * sweep.search.repeats,
        baselines=[predict(spec, device, on_cpu) for spec in sweep.baselines()],
        note=note,
        device=device,
        device_note=device_note,
        budget_hours=budget_hours,
    )


def _device(sweep: Sweep, name: str | None) -> tuple[Device | None, str]:
    """The device that times are told for, and why it is this one."""
    if name is not None:
        device = device_named(name)
        return device, f"on {device.title}"
    remedy = f"--device NAME tells times and whether it fits: {', '.join(devices())}"
    if sweep.resources.gpus == 0:
        return None, f"on the CPU, no times; {remedy}"
    accelerator = sweep.resources.accelerator
    if accelerator is not None:
        found = device_of_accelerator(accelerator)
        if found is None:
            return None, f"resources.accelerator={accelerator} is not in the table of devices; {remedy}"
        return found, f"on {found.title}: resources.accelerator is {accelerator}; --device names another"

    import torch

    if not torch.cuda.is_available():
        return None, f"no device is named and no GPU is here; {remedy}"
    title = torch.cuda.get_device_name()
    here = device_reported(title)
    if here is None:
        return None, f"the GPU here, {title}, is not in the table of devices; {remedy}"
    return here, f"on {here.title}, which is here; --device names another"


def _distinct(sweep: Sweep) -> tuple[list[Resolved], str]:
    search = sweep.search
    if search.space.size is None:
        return _examples(sweep), f"examples: {search.sampler} draws from a space without an end"
    found: dict[str, Resolved] = {}
    for picks in itertools.chain(search.first, search.space.combinations()):
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
    """The stable form of `plan --json`. What cannot be predicted is null."""
    return {
        "sweep": made.sweep.name,
        "note": made.note,
        "device": made.device.name if made.device else None,
        "device_note": made.device_note,
        "notes": made.notes,
        "trials": [
            {
                "number": number,
                "params": {
                    **trial.resolved.params,
                    **{f"{path}_rule": text for path, text in trial.resolved.rules.items()},
                },
                "trainable_params": trial.prediction.trainable_params,
                "predicted": _predicted_json(trial.prediction),
            }
            for number, trial in enumerate(made.trials)
        ],
        "total": {
            "trials": made.runs,
            "baselines": len(made.baselines),
            "gpu_hours": made.gpu_hours,
            "budget_gpu_hours": made.budget_hours,
            "within_budget": made.within_budget,
        },
    }


def _predicted_json(prediction: Prediction) -> Mapping[str, Any]:
    return {
        "peak_memory_gb": prediction.peak_memory_gb,
        "memory_gb": {name: size / 1e9 for name, size in prediction.memory.parts().items()},
        "least_memory_gb": prediction.least_gb,
        "token_budget": prediction.token_budget,
        "train_seconds": prediction.train_seconds,
        "eval_seconds": prediction.eval_seconds,
        "fits": prediction.fits,
    }
