"""What a person sees of a sweep: a live table on a terminal, else a line an event; a table at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from sweeps.result import Progress, Score, TrialResult
from sweeps.space import field_value
from sweepsvc.plan import Plan
from sweepsvc.protocols import Proposal, SweepRecord, TrialRecord

_LONGEST_VALUE = 60


def terminal() -> Console:
    """Where results are printed: a pipe or a file gets whole rows, however many columns a table has."""
    return Console() if sys.stdout.isatty() else Console(width=240)


class View(Protocol):
    """Hears of everything that happens in a sweep."""

    def note(self, text: str) -> None: ...

    def started(self, proposal: Proposal) -> None: ...

    def reported(self, proposal: Proposal, progress: Progress) -> None: ...

    def again(self, proposal: Proposal, why: str) -> None:
        """The attempt came to nothing, another one will follow."""

    def ended(self, proposal: Proposal, result: TrialResult) -> None: ...


class LineView:
    """One line an event, for files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()

    def note(self, text: str) -> None:
        self._line(text)

    def started(self, proposal: Proposal) -> None:
        self._line(f"{title(proposal)} started")

    def reported(self, proposal: Proposal, progress: Progress) -> None:
        self._line(f"{title(proposal)} {progress_text(progress)}")

    def again(self, proposal: Proposal, why: str) -> None:
        self._line(f"{title(proposal)} {why}")

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        self._line(f"{title(proposal)} {outcome_text(result)}")

    def _line(self, text: str) -> None:
        elapsed = time.monotonic() - self._start
        self._console.print(f"[{elapsed:7.1f}s] {text}", markup=False, highlight=False, soft_wrap=True)


class LiveView:
    """A bar for each running trial, updated in place; what ended scrolls above.

    `before` are trials that had ended when it began: they are counted.
    """

    def __init__(
        self, console: Console, objective: str, maximize: bool, before: Sequence[TrialRecord] = ()
    ) -> None:
        self._console = console
        self._objective = objective
        self._maximize = maximize
        self._best: tuple[float, str] | None = None
        self._done = 0
        self._failed = 0
        self._tasks: dict[str, TaskID] = {}
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[report]}"),
            console=console,
        )
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
        for trial in before:
            if trial.result is not None:
                self._count(trial.proposal, trial.result)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def started(self, proposal: Proposal) -> None:
        self._tasks[proposal.key] = self._bars.add_task(title(proposal), total=None, report="starting")

    def reported(self, proposal: Proposal, progress: Progress) -> None:
        self._bars.update(
            self._tasks[proposal.key],
            total=progress.steps or None,
            completed=progress.step,
            report=progress_text(progress),
        )

    def again(self, proposal: Proposal, why: str) -> None:
        self._remove(proposal)
        self.note(f"{title(proposal)} {why}")

    def _remove(self, proposal: Proposal) -> None:
        task = self._tasks.pop(proposal.key, None)
        if task is not None:
            self._bars.remove_task(task)

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        self._remove(proposal)
        self._count(proposal, result)
        self.note(f"{title(proposal)} {outcome_text(result)}")

    def _count(self, proposal: Proposal, result: TrialResult) -> None:
        self._done += 1
        self._failed += result.outcome == "failed"
        value = result.metrics().get(self._objective)
        if value is not None and result.outcome == "completed" and not proposal.is_baseline:
            sign = 1 if self._maximize else -1
            if self._best is None or sign * value > sign * self._best[0]:
                self._best = (value, title(proposal))

    def _render(self) -> Group:
        best = f"best so far {self._objective} {self._best[0]:.4g} ({self._best[1]})" if self._best else ""
        return Group(Text(f"{self._done} ended, {self._failed} failed  {best}"), self._bars)


def title(proposal: Proposal) -> str:
    """`trial 3 (lora.r=32, lora.alpha=2*r)`, or `baseline`."""
    if proposal.is_baseline:
        return proposal.key
    picks = [
        f"{path}={_on_a_line(proposal.rules.get(path, value))}" for path, value in proposal.params.items()
    ]
    if proposal.repeat:
        picks.append(f"repeat {proposal.repeat}")
    return f"trial {proposal.number} ({', '.join(picks)})" if picks else f"trial {proposal.number}"


def progress_text(progress: Progress) -> str:
    """`training step 20/54  loss 2.31  812 tokens/s  41 s left`."""
    parts: list[str] = [progress.phase]
    if progress.phase == "training" and progress.steps:
        parts[0] += f" step {progress.step}/{progress.steps}"
    if progress.train_loss is not None:
        parts.append(f"loss {progress.train_loss:.4f}")
    if progress.eval_loss is not None:
        parts.append(f"held-out {progress.eval_loss:.4f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.seconds_left:
        parts.append(f"{progress.seconds_left:,.0f} s left")
    return "  ".join(parts)


def outcome_text(result: TrialResult) -> str:
    """`completed: facts 0.611 ± 0.058, 31 s`, or why it failed."""
    if result.failure is not None:
        return f"{result.outcome}: {result.failure.kind}: {result.failure.message}"
    scores = ", ".join(f"{task} {score_text(score)}" for task, score in result.scores.items())
    return f"{result.outcome}: {scores}{', ' if scores else ''}{result.measured.wall_seconds:.0f} s"


def score_text(score: Score | None) -> str:
    """`0.611 ± 0.058`: never a score without its standard error, where there is one."""
    if score is None:
        return ""
    return f"{score.value:.3f}" if score.stderr is None else f"{score.value:.3f} ± {score.stderr:.3f}"


def best_trial(record: SweepRecord) -> TrialRecord | None:
    """The completed trial with the best objective, the first of them at a tie."""
    valued = [(trial.value, trial) for trial in record.trials if trial.value is not None]
    if not valued:
        return None
    pick = max if record.maximize else min
    return pick(valued, key=lambda pair: pair[0])[1]


def result_table(record: SweepRecord) -> Table:
    """Baselines on top, then every trial in order; the best is marked."""
    everything = [*record.baselines, *record.trials]
    tasks = list(dict.fromkeys(task for trial in everything if trial.result for task in trial.result.scores))
    paths = _shown_paths(record.trials)
    table = Table(title=f"{record.sweep_id}: {record.state}", title_justify="left")
    table.add_column("trial", no_wrap=True)
    for path in paths:
        table.add_column(_short(path), justify="right", no_wrap=True)
    table.add_column("trainable", justify="right", no_wrap=True)
    for task in tasks:
        table.add_column(task, justify="right")
    if len(tasks) > 1:
        table.add_column("mean", justify="right")
    table.add_column("peak GB", justify="right")
    table.add_column("seconds", justify="right")
    best = best_trial(record)
    for trial in everything:
        cells = _cells(trial, paths, tasks, trial is best)
        table.add_row(*cells, style="bold" if trial is best else "dim" if trial.proposal.is_baseline else "")
    return table


def results(record: SweepRecord, console: Console) -> RenderableType:
    """The result table; where the terminal is too narrow for its numbers, a few lines a trial."""
    table = result_table(record)
    needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    return table if needed <= console.width else Text("\n".join(_result_lines(record)))


def _result_lines(record: SweepRecord) -> list[str]:
    lines = [f"{record.sweep_id}: {record.state}"]
    best = best_trial(record)
    for trial in [*record.baselines, *record.trials]:
        lines.append(f"{title(trial.proposal)}{' *' if trial is best else ''} {trial.state}")
        result = trial.result
        if result is None:
            continue
        if result.failure is not None:
            lines.append(f"    {result.failure.kind}: {result.failure.message}")
            continue
        lines += [f"    {task} {score_text(score)}" for task, score in result.scores.items()]
        peak = result.measured.peak_memory_gb
        costs = [f"{result.trainable_params:,} trainable", f"{result.measured.wall_seconds:.1f} s"]
        lines.append("    " + ", ".join([*costs, *([f"{peak:.2f} GB"] if peak is not None else [])]))
    return lines


def _shown_paths(trials: Sequence[TrialRecord]) -> list[str]:
    """r and alpha always, and whatever else the space varies."""
    varied = dict.fromkeys(path for trial in trials for path in trial.proposal.params)
    return list(dict.fromkeys(["lora.r", "lora.alpha", *varied]))


def _short(path: str) -> str:
    return path.removeprefix("lora.")


def _cells(trial: TrialRecord, paths: Sequence[str], tasks: Sequence[str], is_best: bool) -> list[str]:
    proposal, result = trial.proposal, trial.result
    name = proposal.key if proposal.is_baseline else f"{proposal.number}"
    if is_best:
        name += " *"
    if trial.state != "completed":
        reason = f": {result.failure.kind}" if result and result.failure else ""
        name += f" {trial.state}{reason}"
    cells = [name, *("" if proposal.is_baseline else _value_text(proposal, path) for path in paths)]
    done = result if result and trial.state in ("completed", "pruned") else None
    cells.append(f"{done.trainable_params:,}" if done else "")
    cells += [score_text(done.scores.get(task)) if done else "" for task in tasks]
    if len(tasks) > 1:
        cells.append(f"{done.mean_score:.3f}" if done and done.mean_score is not None else "")
    peak = done.measured.peak_memory_gb if done else None
    cells.append(f"{peak:.2f}" if peak is not None else "")
    cells.append(f"{done.measured.wall_seconds:.1f}" if done else "")
    return cells


def with_rule(value: Any, rule: str | None) -> str:
    """`64 (2*r)`: a value, and how it was written where that is not the same."""
    text = f"{value:g}" if isinstance(value, float) else _on_a_line(value)
    return text if rule in (None, text) else f"{text} ({rule})"


def _on_a_line(value: Any) -> str:
    """A value as text, cut where it is long: a prompt has many lines."""
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _value_text(proposal: Proposal, path: str) -> str:
    value = proposal.params.get(path, field_value(proposal.spec, path))
    return with_rule(value, proposal.rules.get(path))


def plan_table(made: Plan) -> Table:
    """Every distinct trial with its trainable parameters, its memory with one row at a time and at its token
    budget; on a device, its hours, and on a CPU that was measured its minutes."""
    title = f"{made.sweep.name}: {made.runs} trials, {len(made.baselines)} baselines"
    table = Table(title=title, title_justify="left")
    paths = list(made.sweep.search.space)
    is_timed = made.device is not None or made.hours is not None
    unit, seconds_in = ("h", 3600) if made.device else ("min", 60)
    costs = ["least GB", "peak GB", *(["fits"] if made.device else [])]
    costs += [f"train {unit}", f"eval {unit}"] if is_timed else []
    for name in ("trial", *paths, "trainable parameters", *costs):
        table.add_column(name, justify="right")
    for number, trial in enumerate(made.trials):
        resolved, predicted = trial.resolved, trial.prediction
        values = [with_rule(resolved.params[path], resolved.rules.get(path)) for path in paths]
        cells = [f"{predicted.least_gb:.2f}", f"{predicted.peak_memory_gb:.2f}"]
        if made.device:
            cells.append("yes" if predicted.fits else "no")
        if is_timed:
            times = predicted.train_seconds, predicted.eval_seconds
            cells += ["" if seconds is None else f"{seconds / seconds_in:.2f}" for seconds in times]
        name = f"{number} first" if trial.is_first else f"{number}"
        table.add_row(name, *values, f"{predicted.trainable_params:,}", *cells)
    return table


def plan_lines(made: Plan) -> list[str]:
    """What stands below the table: how the trials were chosen, the device, the largest trial, the sum."""
    lines = [made.note, made.device_note, *made.calibration_notes]
    if made.trials:
        number, largest = max(enumerate(made.trials), key=lambda pair: pair[1].prediction.memory.total)
        memory = largest.prediction.memory
        parts = [f"{name} {size / 1e9:.2f}" for name, size in memory.parts().items() if size >= 5e6]
        lines.append(f"peak of trial {number}: {memory.total / 1e9:.2f} GB = {' + '.join(parts)}")
    lines += made.notes
    if made.device and made.unfit:
        lines.append(
            f"{len(made.unfit)} of {len(made.trials)} trials do not fit: lower data.max_length, set "
            "train.gradient_checkpointing, or take a larger device"
        )
    if (hours := made.gpu_hours) is not None:
        if any(trial.calibration is None for trial in made.trials):
            lines.append(
                "times take the device to reach half of its peak speed: docs/planning.md has how good that is"
            )
        verdict = {None: "", True: ", within", False: ", OVER"}[made.within_budget]
        budget = f"{verdict} the budget of {made.budget_hours:g}" if verdict else ""
        lines.append(f"{hours:.1f} GPU hours in all{budget}")
    elif made.hours is not None:
        lines.append(f"{made.hours:.1f} hours on the CPU in all, one trial at a time")
    if made.gpu_hours is None and made.budget_hours is not None:
        lines.append(f"the budget of {made.budget_hours:g} GPU hours cannot be checked without times")
    return lines


def status_json(record: SweepRecord) -> Mapping[str, Any]:
    """The stable form of `status --json`."""
    return {
        "sweep": record.sweep_id,
        "state": record.state,
        "objective": {"metric": record.objective_metric, "maximize": record.maximize},
        "baselines": [_trial_json(trial) for trial in record.baselines],
        "trials": [_trial_json(trial) for trial in record.trials],
    }


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _trial_json(trial: TrialRecord) -> Mapping[str, Any]:
    proposal, result = trial.proposal, trial.result
    scores = result.scores if result else {}
    measured = result.measured if result else None
    return {
        "number": proposal.number,
        "state": trial.state,
        "params": {**proposal.params, **{f"{path}_rule": text for path, text in proposal.rules.items()}},
        "score": _finite(result.mean_score) if result else None,
        "scores": {task: _finite(score.value) for task, score in scores.items()},
        "score_stderrs": {task: _finite(score.stderr) for task, score in scores.items()},
        "objective": trial.value,
        "trainable_params": result.trainable_params if result else None,
        "peak_memory_gb": measured.peak_memory_gb if measured else None,
        "wall_seconds": measured.wall_seconds if measured else None,
        "train_seconds": measured.train_seconds if measured else None,
        "eval_seconds": measured.eval_seconds if measured else None,
        "attempts": trial.attempts,
        "repeat": proposal.repeat,
        "mlflow_run_id": trial.mlflow_run_id,
        "error": f"{result.failure.kind}: {result.failure.message}" if result and result.failure else None,
    }
