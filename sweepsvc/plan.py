"""What a sweep would run, before it is paid for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.devices import Device, device_named, device_of_accelerator, device_reported, devices
from sweeps.errors import CannotStart, TrialError
from sweeps.space import Resolved
from sweeps.spec import ModelSpec, TrialSpec
from sweeps.sweep import Sweep

if TYPE_CHECKING:  # torch and transformers behind it: seconds
    from sweeps.trial.calibration import Calibration, Key
    from sweeps.trial.predict import Prediction

MOST_LISTED = 10_000


@dataclass(frozen=True)
class PlannedTrial:
    """One distinct trial that the sweep may run, with what it will need; `search.first` may name it.

    `calibration` is what its prediction was corrected by.
    """

    resolved: Resolved
    prediction: Prediction
    is_first: bool = False
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Plan:
    """The distinct trials of a sweep, how many of them its budget runs, and what that takes.

    `baselines` are the predictions of the untouched bases. `device` is None where none is known, and
    `device_note` says why. `budget_hours` is what may be spent, None where nobody said. `calibration_notes`
    say why predictions are not corrected though that was asked for.
    """

    sweep: Sweep
    trials: Sequence[PlannedTrial]
    runs: int
    baselines: Sequence[Prediction]
    note: str
    device: Device | None
    device_note: str
    budget_hours: float | None = None
    calibration_notes: Sequence[str] = ()

    @property
    def gpu_hours(self) -> float | None:
        """Of all runs and baselines on all their GPUs; None where a time is unknown, and on a CPU."""
        hours = self.hours
        return None if hours is None or self.device is None else hours * self.sweep.resources.gpus

    @property
    def hours(self) -> float | None:
        """Of all runs and baselines, one after another; None where a time is unknown.

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
        return seconds / 3600

    @property
    def calibration(self) -> Calibration | None:
        """The one by which every trial is corrected; None where some are not, or by another."""
        found = {trial.calibration for trial in self.trials}
        return next(iter(found)) if len(found) == 1 else None

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


def plan(
    sweep: Sweep,
    device_name: str | None = None,
    budget_hours: float | None = None,
    calibrating: bool = False,
) -> Plan:
    """Predict every distinct trial of a finite space; of an infinite one, examples that its sampler draws.

    What was measured of the device with a trial's model corrects its prediction; `calibrating` measures it
    first. Raises `CannotStart` for a device that is not in the table.
    """
    device, device_note = _device(sweep, device_name)
    resolved, note = _distinct(sweep)
    baselines = sweep.baselines()
    told = _Told(sweep, device)
    if calibrating:
        told.calibrate([trial.spec for trial in resolved])
    first = {sweep.resolve(picks).spec.digest for picks in sweep.search.first}
    trials = [
        PlannedTrial(
            trial, told.of(trial.spec), trial.spec.digest in first, told.calibration_of(trial.spec.model)
        )
        for trial in resolved
    ]
    is_whole = sweep.search.space.size is not None and len(trials) < MOST_LISTED
    distinct = min(sweep.search.budget, len(trials)) if is_whole else sweep.search.budget
    return Plan(
        sweep=sweep,
        trials=trials,
        runs=distinct * sweep.search.repeats,
        baselines=[told.of(spec) for spec in baselines],
        note=note,
        device=device,
        device_note=told.with_remedy(device_note, {trial.spec.model for trial in resolved}),
        budget_hours=budget_hours,
        calibration_notes=told.trouble,
    )


class _Told:
    """Predicts the trials of a sweep for a device, by whatever was measured of it."""

    def __init__(self, sweep: Sweep, device: Device | None) -> None:
        from sweeps.trial.calibration import cpu_title, kept

        self.trouble: list[str] = []
        self._device = device
        self._on_cpu = device is None and sweep.resources.gpus == 0
        self._threads = sweep.resources.cpus or os.cpu_count() or 1
        if device is not None:
            self._titles: tuple[str, ...] = device.reports
        else:
            self._titles = (cpu_title(self._threads),) if self._on_cpu else ()
        try:
            self._kept = kept() if self._titles else {}
        except CannotStart as error:
            self._kept = {}
            self.trouble.append(f"not calibrated: {error}")
        self._found: dict[ModelSpec, Calibration | None] = {}

    def of(self, spec: TrialSpec) -> Prediction:
        """What the trial will need."""
        from sweeps.trial.predict import predict

        return predict(spec, self._device, self._on_cpu, self.calibration_of(spec.model))

    def calibration_of(self, model: ModelSpec) -> Calibration | None:
        """What was measured with the model; None if nothing was."""
        if not self._kept:
            return None
        if model not in self._found:
            known = (self._kept.get(str(key)) for key in self._keys(model))
            self._found[model] = next((one for one in known if one is not None), None)
        return self._found[model]

    def _keys(self, model: ModelSpec) -> list[Key]:
        from sweeps.trial.calibration import Key

        return [Key(title, model) for title in self._titles]

    def calibrate(self, specs: Iterable[TrialSpec]) -> None:
        """Measure and keep, for each model, the largest trial that fits. Where that cannot be, it is said."""
        if (why := self._why_not()) is not None:
            self.trouble.append(f"not calibrated: {why}")
            return
        models: dict[ModelSpec, list[TrialSpec]] = {}
        for spec in specs:
            models.setdefault(spec.model, []).append(spec)
        for model, its in models.items():
            try:
                self._calibrate(its)
            except (CannotStart, TrialError) as error:
                self.trouble.append(f"not calibrated with {model.id}: {error}")

    def _why_not(self) -> str | None:
        """Why nothing can be measured here."""
        if self._on_cpu:
            return None
        if self._device is None:
            return "a device must be known whose times are corrected"
        title = _gpu_here()
        if title is None:
            return f"no GPU is here, and {self._device.title} would have to be"
        if title not in self._device.reports:
            return f"the plan is for {self._device.title}, and the GPU here is {title}"
        return None

    def _calibrate(self, specs: Sequence[TrialSpec]) -> None:
        from sweeps.trial.calibrate import calibrate
        from sweeps.trial.calibration import Key, keep
        from sweeps.trial.predict import predict

        told = [(spec, predict(spec, self._device, self._on_cpu)) for spec in specs]
        fitting = [(spec, one) for spec, one in told if one.fits is not False]
        if not fitting:
            raise CannotStart("a trial must fit on the device to be measured, and none does")
        largest, _ = max(fitting, key=lambda pair: pair[1].memory.total)
        made = calibrate(largest, self._device, self._threads if self._on_cpu else None)
        key = Key(made.device, largest.model)
        keep(key, made)
        self._kept = {**self._kept, str(key): made}
        self._found.clear()

    def with_remedy(self, note: str, models: Iterable[ModelSpec]) -> str:
        """What is said of the device: with `--calibrate`, where that was not done and can be."""
        found = [self.calibration_of(model) is not None for model in models]
        if self._on_cpu and any(found):
            note = note.replace("on the CPU, no times", "on the CPU, as measured")
        if self._why_not() is not None or all(found):
            return note
        return f"{note}; --calibrate measures a few steps here, and the plan goes by them"


def _gpu_here() -> str | None:
    """What the driver calls it."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


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

    title = _gpu_here()
    if title is None:
        return None, f"no device is named and no GPU is here; {remedy}"
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
        "calibration": _calibration_json(made.calibration),
        "notes": [*made.calibration_notes, *made.notes],
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
            "hours": made.hours,
            "gpu_hours": made.gpu_hours,
            "budget_gpu_hours": made.budget_hours,
            "within_budget": made.within_budget,
        },
    }


def _calibration_json(calibration: Calibration | None) -> Mapping[str, Any] | None:
    """Of a CPU, whose times are measured and not corrected, two factors are null."""
    return None if calibration is None else calibration.model_dump(mode="json")


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
