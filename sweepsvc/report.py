"""A sweep as a report, from what the study knows of it and what lies beside the study.

Pure: `report_files.py` reads the files. Only a completed trial has scores here: of one that failed, was cut
off or stopped early its state is shown, and it is in no mean, no picture and no ranking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sweeps.result import Score, TrialResult
from sweeps.space import field_value
from sweeps.spec import FIELDS
from sweeps.sweep import LOSSES, MEAN_SCORE, SCORE, Sweep
from sweepsvc.protocols import SweepRecord, TrialRecord
from sweepsvc.report_documents import NO_FILE, Outcome, compare, compare_means
from sweepsvc.report_stats import Paired, Spread, front
from sweepsvc.report_words import Cell, Evidence, Repeats, Row, SweepReport, inverted, said
from sweepsvc.view import best_trial, with_rule


def build(record: SweepRecord, sweep: Sweep, evidence: Evidence) -> SweepReport:
    """What the study knows of a sweep, with what lies beside it."""
    everything = (*record.baselines, *record.trials)
    results = [trial.result for trial in everything if trial.state == "completed" and trial.result]
    tasks = tuple(dict.fromkeys(task for result in results for task in result.scores))
    metric = record.objective_metric
    headline = metric if metric.startswith(SCORE) or metric in LOSSES else MEAN_SCORE
    paths = shown_paths(record.trials)
    rows = [_row(trial, paths, headline) for trial in everything]
    rows = _with_differences(rows, everything, evidence.documents)
    best = best_trial(record)
    rows = [replace(row, is_best=best is not None and row.key == best.proposal.key) for row in rows]
    rows = _with_front(rows, up=record.maximize if headline == metric else True)
    return SweepReport(
        sweep_id=record.sweep_id,
        name=sweep.name,
        state=record.state,
        sampler=sweep.search.sampler,
        source=sweep.source,
        text=sweep.text,
        overrides=sweep.overrides,
        file_digest=sweep.file_digest,
        objective_metric=metric,
        maximize=record.maximize,
        headline=headline,
        paths=paths,
        tasks=tasks,
        rows=tuple(rows),
        near_best=_near_best(rows, tasks, metric, evidence.documents),
        repeats=_repeats(record.trials, {row.key: row for row in rows}, tasks),
        facts={name: fact for name, fact in record.facts.items() if name != "owner"},
        environment=_environment(everything),
        notes=inverted(
            (note, trial.proposal.key) for trial in everything if trial.result for note in trial.result.notes
        ),
        evidence=evidence,
    )


def shown_paths(trials: Sequence[TrialRecord]) -> tuple[str, ...]:
    """Whatever the space varies, and r and alpha wherever something is trained."""
    varied = dict.fromkeys(path for trial in trials for path in trial.proposal.params)
    is_trained = any(trial.proposal.spec.train is not None for trial in trials)
    return tuple(dict.fromkeys([*(["lora.r", "lora.alpha"] if is_trained else []), *varied]))


def of_a_baseline(path: str) -> bool:
    """Whether a field says something of a trial that trains nothing."""
    return path.startswith(("model.", "evaluate."))


def _row(trial: TrialRecord, paths: Sequence[str], headline: str) -> Row:
    proposal, spec = trial.proposal, trial.proposal.spec
    trained = spec.train is not None
    shown = [path for path in paths if trained or of_a_baseline(path)]
    settings = {
        path: with_rule(proposal.params.get(path, field_value(spec, path)), proposal.rules.get(path))
        for path in shown
    }
    row = Row(
        key=proposal.key,
        state=trial.state,
        is_baseline=proposal.is_baseline,
        repeat=proposal.repeat,
        attempts=trial.attempts,
        setbacks=tuple(trial.setbacks),
        settings=settings,
        fields={path: field_value(spec, path) for path in FIELDS if trained or of_a_baseline(path)},
        r=spec.lora.r if trained else None,
        alpha=spec.lora.alpha if trained else None,
        alpha_written=proposal.rules.get("lora.alpha", said(spec.lora.alpha)) if trained else "",
        failure=trial.result.failure if trial.result else None,
    )
    if trial.state != "completed" or trial.result is None:
        return row
    return _with_result(row, trial.result, trial.value, headline)


def _with_result(row: Row, result: TrialResult, value: float | None, headline: str) -> Row:
    cells = {
        task: Cell(score.value, _finite(score.stderr), score.metric, score.documents)
        for task, score in result.scores.items()
        if math.isfinite(score.value)
    }
    measured = result.measured
    return replace(
        row,
        trainable_params=result.trainable_params,
        cells=cells,
        mean=_finite(result.mean_score),
        headline=_finite(result.metrics().get(headline)),
        headline_stderr=_finite(_stderr_of(headline, result.scores)),
        objective=value,
        peak_memory_gb=_finite(measured.peak_memory_gb),
        train_seconds=_finite(measured.train_seconds),
        eval_seconds=_finite(measured.eval_seconds),
        wall_seconds=_finite(measured.wall_seconds),
    )


def _stderr_of(headline: str, scores: Mapping[str, Score]) -> float | None:
    """A mean over several benchmarks has none: they may share documents."""
    if headline == MEAN_SCORE and len(scores) == 1:
        return next(iter(scores.values())).stderr
    score = scores.get(headline.removeprefix(SCORE))
    return score.stderr if score else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _with_differences(
    rows: Sequence[Row], records: Sequence[TrialRecord], documents: Mapping[str, Mapping[str, Outcome]]
) -> list[Row]:
    """Each completed trial against the untouched base with the same model and benchmarks."""
    bases = {
        record.proposal.spec.digest: row
        for row, record in zip(rows, records, strict=True)
        if row.is_baseline and row.completed
    }
    made = []
    for row, record in zip(rows, records, strict=True):
        base = None if row.is_baseline else bases.get(record.proposal.spec.untrained().digest)
        made.append(row if base is None or not row.completed else _against(row, base, documents))
    return made


def _against(row: Row, base: Row, documents: Mapping[str, Mapping[str, Outcome]]) -> Row:
    cells = {
        task: against(
            cell, base.cells.get(task), *(_outcome(documents, one.key, task) for one in (base, row))
        )
        for task, cell in row.cells.items()
    }
    both = row.mean is not None and base.mean is not None and row.cells.keys() == base.cells.keys()
    difference = row.mean - base.mean if both and row.mean is not None and base.mean is not None else None
    tested = None
    if difference is not None and len(cells) > 1:
        tested = _tested(documents, base, row, list(cells))
    return replace(
        row,
        cells=cells,
        mean_difference=difference,
        mean_paired=tested if isinstance(tested, Paired) else None,
        mean_untested=tested if isinstance(tested, str) else "",
        baseline=base.key,
    )


def against(cell: Cell, base: Cell | None, of_base: Outcome, of_cell: Outcome) -> Cell:
    """The cell with its difference to `base`, and a test of it where the documents are known and the same."""
    if base is None or base.metric != cell.metric:
        return replace(cell, untested="there is no such score to compare it with")
    tested = compare(of_base, of_cell)
    return replace(
        cell,
        difference=cell.value - base.value,
        paired=tested if isinstance(tested, Paired) else None,
        untested=tested if isinstance(tested, str) else "",
    )


def _outcome(documents: Mapping[str, Mapping[str, Outcome]], key: str, task: str) -> Outcome:
    return documents.get(key, {}).get(task, NO_FILE)


def _near_best(
    rows: Sequence[Row], tasks: Sequence[str], metric: str, documents: Mapping[str, Mapping[str, Outcome]]
) -> tuple[str, ...]:
    best = next((row for row in rows if row.is_best), None)
    if best is None:
        return ()
    wanted = set(best.cells) if metric == MEAN_SCORE else {metric.removeprefix(SCORE)} & set(best.cells)
    if not wanted:
        return ()
    tested = {
        row.key: _tested(documents, best, row, [task for task in tasks if task in wanted])
        for row in rows
        if wanted <= set(row.cells) and not row.is_baseline and row is not best
    }
    return tuple(key for key, one in tested.items() if isinstance(one, Paired) and one.within_noise)


def _tested(
    documents: Mapping[str, Mapping[str, Outcome]], base: Row, row: Row, tasks: Sequence[str]
) -> Paired | str:
    """One benchmark's scores, or the means of several."""
    pairs = [(_outcome(documents, base.key, task), _outcome(documents, row.key, task)) for task in tasks]
    return compare(*pairs[0]) if len(pairs) == 1 else compare_means(pairs)


def _with_front(rows: Sequence[Row], up: bool) -> list[Row]:
    """Marks trials of which no other is as good in score, memory and time, and better in one."""
    points = {
        row.key: (row.headline if up else -row.headline, -row.peak_memory_gb, -row.seconds)
        for row in rows
        if not row.is_baseline
        and row.headline is not None
        and row.peak_memory_gb is not None
        and row.seconds is not None
    }
    on_front = {key for key, is_in in zip(points, front(list(points.values())), strict=True) if is_in}
    return [replace(row, on_front=row.key in on_front) for row in rows]


def _repeats(
    records: Sequence[TrialRecord], rows: Mapping[str, Row], tasks: Sequence[str]
) -> tuple[Repeats, ...]:
    """Groups of trials with the same picks; none where the sweep repeats nothing."""
    if not any(record.proposal.repeat for record in records):
        return ()
    groups: dict[str, list[Row]] = {}
    for record in records:
        picks = repr(sorted(record.proposal.params.items()))
        groups.setdefault(picks, []).append(rows[record.proposal.key])
    return tuple(_spread(group, tasks) for group in groups.values())


def _spread(group: Sequence[Row], tasks: Sequence[str]) -> Repeats:
    done = [row for row in group if row.completed]
    columns = {task: [row.cells[task].value for row in done if task in row.cells] for task in tasks}
    if len(tasks) > 1:
        columns[MEAN_SCORE] = [row.mean for row in done if row.mean is not None]
    spreads = {name: Spread.of(values) for name, values in columns.items()}
    return Repeats(
        settings=group[0].settings,
        keys=tuple(row.key for row in done),
        left_out=tuple(f"{row.key} {row.state}" for row in group if not row.completed),
        spreads={name: spread for name, spread in spreads.items() if spread},
    )


def _environment(records: Sequence[TrialRecord]) -> dict[str, Mapping[str, tuple[str, ...]]]:
    """For each fact of a trial's environment its values, each with the trials that had it."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        for name, value in (record.result.environment if record.result else {}).items():
            pairs.setdefault(name, []).append((value, record.proposal.key))
    return {name: inverted(values) for name, values in pairs.items()}
