"""What lm-eval found, as scores with standard errors and as a report of plain data. Imports no lm-eval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sweeps.errors import EvaluationFailed
from sweeps.result import Score


@dataclass(frozen=True)
class Evaluation:
    """What the benchmarks said.

    `scores` has one score for each requested benchmark, and for each group that lm-eval gives a score to; a
    tag, or a group without a score of its own, gives those of its benchmarks instead. `report` is plain data:

        {"lm_eval": version, "harness": "current", "limit": ..., "warnings": [...],
         "scoring": {"way": "tree", "requests", "tokens", "plain_tokens", "token_budget"},
         "tasks": {name: {"version", "fewshot", "documents",
                          "metrics": {"acc,none": {"value", "stderr"}},
                          "per_document": {"doc_hash": [...], "acc,none": [...], "loglikelihoods": [[...]]}}},
         "groups": {name: {"members": [...], "metrics": {...}}}}

    The lists under `per_document` are in the order of the documents, for paired tests. A metric's name is
    followed by the filter that the answers went through. A standard error is None where the metric is not a
    mean over documents. Where `way` is "rows" the requests were scored one by one for a "reason", which
    `notes` have too: they are choices made for the user.
    """

    scores: dict[str, Score]
    report: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Scores and report as one JSON text."""
        scores = {name: score.model_dump(mode="json") for name, score in self.scores.items()}
        return json.dumps({"scores": scores, **self.report}, allow_nan=False) + "\n"


def read(name: str, benchmark: Any, results: Mapping[str, Any], mean: Callable[..., float]) -> Evaluation:
    """The scores of one requested name, with the `tasks` and `groups` of the report.

    `mean` is lm-eval's own function: a metric that it aggregates has a standard error.
    """
    columns = {
        member: _columns(task, results["samples"][member]) for member, task in benchmark["tasks"].items()
    }
    scores = {
        member: _task_scores(task, results["results"][member], columns[member], mean)
        for member, task in benchmark["tasks"].items()
    }
    documents = {member: results["n-samples"][member]["effective"] for member in scores}
    groups = {label: _group_scores(group, scores, documents) for label, group in benchmark["groups"].items()}
    tasks_report = {
        member: {
            "version": plain(results["versions"][member]),
            "fewshot": results["n-shot"][member],
            "documents": documents[member],
            "metrics": _metrics_report(scores[member]),
            "per_document": {key: plain(column) for key, column in columns[member].items()},
        }
        for member in scores
    }
    groups_report = {
        label: {"members": group.child_names, "metrics": _metrics_report(groups[label])}
        for label, group in benchmark["groups"].items()
    }
    own = {name: groups[name]} if groups.get(name) else scores
    return Evaluation(
        scores={label: _main(metrics) for label, metrics in own.items()},
        report={"tasks": tasks_report, "groups": groups_report},
    )


_Column = list[Any]
_Scores = dict[str, Score]  # by metric and filter: "acc,none"


def _columns(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, _Column]:
    """Each document's hash, values and log-likelihoods, in the order of the documents."""
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    first = next(iter(by_filter.values()))
    columns: dict[str, _Column] = {"doc_hash": [sample["doc_hash"] for sample in first]}
    for name, rows in by_filter.items():
        for metric in dict.fromkeys(metric for row in rows for metric in row["metrics"]):
            columns[f"{metric},{name}"] = [row[metric] if metric in row["metrics"] else None for row in rows]
    if task.OUTPUT_TYPE != "generate_until":
        columns["loglikelihoods"] = [_loglikelihoods(task, sample) for sample in first]
    return columns


def _loglikelihoods(task: Any, sample: Mapping[str, Any]) -> list[float]:
    """One for each choice of a document; `EvaluationFailed` if one is not finite.

    Of choices that are not numbers lm-eval takes the first, which in BLiMP and MC1 is always the right one: a
    model that diverged would get a perfect score.
    """
    first_tries = [tries[0] for tries in sample["resps"]]
    values = [float(answer[0] if isinstance(answer, tuple) else answer) for answer in first_tries]
    if not all(map(math.isfinite, values)):
        raise EvaluationFailed(
            f"log-likelihoods must be finite, got {values} for document {sample['doc_id']} of "
            f"{task.task_name}: the model's weights or activations are not; lower optimizer.lr or lora.alpha"
        )
    return values


def _task_scores(
    task: Any, results: Mapping[str, Any], columns: Mapping[str, _Column], mean: Callable[..., float]
) -> _Scores:
    """Every metric of one task, by lm-eval, with a standard error by us."""
    scores = {}
    for key, column in columns.items():
        metric, _, _ = key.partition(",")
        if key in results:
            values = [value for value in column if value is not None]
            aggregation = task.aggregation().get(metric, mean)
            stderr = _stderr_of_mean(values) if aggregation is mean else None
            scores[key] = Score(value=results[key], stderr=stderr, metric=metric, documents=len(values))
    return scores


def _stderr_of_mean(values: Sequence[float]) -> float | None:
    """s / sqrt(n) with the sample's standard deviation s (n - 1); None for fewer than two documents."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _group_scores(group: Any, scores: Mapping[str, _Scores], documents: Mapping[str, int]) -> _Scores:
    """What lm-eval makes of the members' scores; empty for a group that has no score of its own."""
    rows = {name: _lm_eval_row(scores[name]) | {"sample_len": documents[name]} for name in scores}
    row = group.aggregate(rows)
    values = {key: value for key, value in row.items() if "," in key and "_stderr," not in key}
    return {
        key: Score(
            value=value,
            stderr=None if (stderr := row[_stderr_key(key)]) == "N/A" else stderr,
            metric=key.partition(",")[0],
            documents=row["sample_count"][key],
        )
        for key, value in values.items()
    }


def _lm_eval_row(scores: _Scores) -> dict[str, Any]:
    """A task's scores as lm-eval writes them."""
    values = {key: score.value for key, score in scores.items()}
    stderrs = {
        _stderr_key(key): "N/A" if score.stderr is None else score.stderr for key, score in scores.items()
    }
    return values | stderrs


def _stderr_key(key: str) -> str:
    metric, _, name = key.partition(",")
    return f"{metric}_stderr,{name}"


def _main(scores: _Scores) -> Score:
    """The task's accuracy, or else its first metric."""
    return next((score for score in scores.values() if score.metric == "acc"), next(iter(scores.values())))


def _metrics_report(scores: _Scores) -> dict[str, Any]:
    return {
        key: {"value": plain(score.value), "stderr": plain(score.stderr)} for key, score in scores.items()
    }


def plain(value: Any) -> Any:
    """As JSON has it; a number that is not finite becomes its name, as in our other files."""
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)
