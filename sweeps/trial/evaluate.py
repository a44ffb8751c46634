"""Benchmark scores of the live model, in process: the one file that imports lm_eval.

lm-eval makes the prompts, sends the requests to a model class and judges the answers; what is here gives it
the model, the rows and the settings, keeps it quiet, and puts everything back that it changes.
Not for two threads at once: lm-eval seeds the process's random numbers, and some of its parts are replaced
while it works.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
import numpy as np
import torch
import tqdm  # type: ignore[import-untyped]
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sweeps.errors import DownloadFailed, EvaluationFailed, Interrupted, TrialError
from sweeps.result import Score
from sweeps.spec import EvaluateSpec
from sweeps.trial.causes import hub_not_reached
from sweeps.trial.keeping import never
from sweeps.trial.rng import TrialRng
from sweeps.trial.rows import fewshot_count, take_local_rows
from sweeps.trial.tasks import index_roots, task_names

__all__ = ["Evaluation", "evaluate", "make_lm", "task_names"]

_logger = logging.getLogger("lm_eval.sweeps")  # heard by the report, as lm-eval's own warnings are

_BLIMP = "nyu-mll/blimp"
_SEED, _PYTHON_SEED = 1234, 0  # those of lm_eval.simple_evaluate


@dataclass(frozen=True)
class Evaluation:
    """What the benchmarks said.

    `scores` has one score for each requested benchmark, and for each group that lm-eval gives a score to; a
    tag, or a group without a score of its own, gives those of its benchmarks instead. `report` is plain data:

        {"lm_eval": version, "harness": "current", "limit": ..., "warnings": [...],
         "tasks": {name: {"version", "fewshot", "documents",
                          "metrics": {"acc,none": {"value", "stderr"}},
                          "per_document": {"doc_hash": [...], "acc,none": [...], "loglikelihoods": [[...]]}}},
         "groups": {name: {"members": [...], "metrics": {...}}}}

    The lists under `per_document` are in the order of the documents, for paired tests. A metric's name is
    followed by the filter that the answers went through. A standard error is None where the metric is not a
    mean over documents.
    """

    scores: dict[str, Score]
    report: dict[str, Any]

    def to_json(self) -> str:
        """Scores and report as one JSON text."""
        scores = {name: score.model_dump(mode="json") for name, score in self.scores.items()}
        return json.dumps({"scores": scores, **self.report}, allow_nan=False) + "\n"


def evaluate(
    model: torch.nn.Module, tokenizer: Any, spec: EvaluateSpec, should_stop: Callable[[], bool] = never
) -> Evaluation:
    """Score a causal language model on every benchmark of `spec`.

    The model may carry an adapter and 4-bit weights; it is moved nowhere, and neither it, the tokenizer nor
    the random numbers of the process are changed. Raises `BadData` where a file of rows is missing or
    malformed, `DownloadFailed` where the hub was not reached, `EvaluationFailed` for whatever else a
    benchmark raises, and `Interrupted` once `should_stop`, asked before each batch, says yes.
    """
    needs = "a causal language model and a tokenizer of transformers are needed"
    with _quiet(), _failing_as("lm-eval must take the model", needs):  # its warnings of this are not kept
        lm = make_lm(model, tokenizer, spec, should_stop)
    with _quiet() as warnings, TrialRng(_SEED, lm.device).active(), _evaluating(model), torch.no_grad():
        random.seed(_PYTHON_SEED)
        loaded = {name: _load(name, spec) for name in spec.tasks}  # all, before the first is scored
        parts = [_score(name, benchmark, lm, spec) for name, benchmark in loaded.items()]
    return Evaluation(
        scores={name: score for part in parts for name, score in part.scores.items()},
        report={
            "lm_eval": lm_eval.__version__,
            "harness": spec.harness,
            "limit": spec.limit,
            "warnings": list(warnings.texts.values()),
            "tasks": {name: task for part in parts for name, task in part.report["tasks"].items()},
            "groups": {name: group for part in parts for name, group in part.report["groups"].items()},
        },
    )


def check(spec: EvaluateSpec) -> None:
    """Raise what `evaluate` would of a benchmark that does not load: before hours of training, not after."""
    with _quiet(), TrialRng(_SEED, torch.device("cpu")).active():
        for name in spec.tasks:
            _load(name, spec)


def make_lm(
    model: torch.nn.Module, tokenizer: Any, spec: EvaluateSpec, should_stop: Callable[[], bool] = never
) -> HFLM:
    """The model as lm-eval sees it. Another model class would be put in here."""
    # A copy of the tokenizer, which may get a pad token and has its padding and truncation set.
    live, own = _LiveModel(model, should_stop), copy.deepcopy(tokenizer)
    if spec.harness == "current":
        return HFLM(pretrained=live, tokenizer=own, batch_size=spec.batch_size)
    # In 2023 no text began with BOS, and what has no context came behind EOS.
    return HFLM(
        pretrained=live,
        tokenizer=own,
        batch_size=spec.batch_size,
        add_bos_token=False,
        prefix_token_id=own.eos_token_id,
    )


class _LiveModel:
    """The parts of a model that HFLM uses to score it.

    Given a torch module, HFLM ties its weights anew. That puts the embedding in place of a 4-bit output head,
    and fails where the head carries an adapter. Nor does scoring need the cache of keys and values.
    """

    def __init__(self, model: Any, should_stop: Callable[[], bool]) -> None:
        self._model = model
        self._should_stop = should_stop
        self.config = model.config
        self.device = next(model.parameters()).device

    def __call__(self, ids: torch.Tensor) -> Any:
        self._stop_if_asked()
        return self._model(input_ids=ids, use_cache=False)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._stop_if_asked()
        return self._model.generate(*args, **kwargs)

    def _stop_if_asked(self) -> None:
        if self._should_stop():
            raise Interrupted("asked to stop while a benchmark was scored")


@contextlib.contextmanager
def _failing_as(law: str, remedy: str) -> Iterator[None]:
    """Whatever the libraries raise inside the block becomes our error; they raise dozens of kinds."""
    try:
        yield
    except (TrialError, Interrupted):
        raise
    except Exception as error:
        if hub_not_reached(error):
            raise DownloadFailed(f"{law}, and the hub was not reached: {_reason(error)}; {remedy}") from error
        raise EvaluationFailed(f"{law}: {_reason(error)}; {remedy}") from error


def _reason(error: BaseException) -> str:
    """The error and what it was caused by, each in its first line."""
    said = []
    cause: BaseException | None = error
    while cause is not None:
        lines = str(cause).strip().splitlines()
        said.append(f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__)
        cause = cause.__cause__
    return ", caused by ".join(said)


# --- what lm-eval must not change -------------------------------------------------------------------


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each of its modules is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Warnings(logging.Handler):
    """Keeps the first warning from each place in lm-eval's code: the others differ in their numbers only."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: dict[tuple[str, int], str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.setdefault((record.pathname, record.lineno), " ".join(record.getMessage().split()))


@contextlib.contextmanager
def _quiet() -> Iterator[_Warnings]:
    """No progress bars and no log of lm-eval's inside the block; its warnings are kept for the report."""
    logger, warnings = logging.getLogger("lm_eval"), _Warnings()
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers
    bar = tqdm.std.tqdm
    shown = bar.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        shown(self, *args, **{**kwargs, "disable": True})

    logger.setLevel(logging.WARNING)
    logger.propagate, logger.handlers = False, [warnings]
    bar.__init__ = hidden
    try:
        yield warnings
    finally:
        bar.__init__ = shown
        logger.propagate, logger.handlers = propagate, handlers
        logger.setLevel(level)


# --- tasks and their rows ---------------------------------------------------------------------------


def _load(name: str, spec: EvaluateSpec) -> Any:
    """lm-eval's tasks (and groups) behind one requested name, with their rows."""
    roots = index_roots(name, spec.task_dir)
    if not roots:
        nearest = difflib.get_close_matches(name, task_names(spec.task_dir), n=1)
        raise EvaluationFailed(
            f"a benchmark must be known to lm-eval or defined in evaluate.task_dir, got {name}; "
            + (f"did you mean {nearest[0]}?" if nearest else "see `lm-eval ls tasks`")
        )
    remedy = f"where the hub is out of reach, its rows go into evaluate.data_dir as {name}.jsonl"
    with _failing_as(f"the benchmark {name} must load", remedy), _local_rows(spec):
        loaded = TaskManager(include_defaults=False, include_path=roots).load([name])
        for task in loaded["tasks"].values():
            _set_fewshot(task, spec.num_fewshot)
            if spec.harness == "2023" and task.config.dataset_path == _BLIMP:
                task.set_config("target_delimiter", "")  # its sentences follow nothing, not a space
    return loaded


def _set_fewshot(task: Any, wanted: int | None) -> None:
    """What `lm_eval.simple_evaluate` does before it evaluates."""
    count = fewshot_count(task.get_config("num_fewshot"), wanted)
    if wanted not in (None, count):
        _logger.warning(
            "%s allows no few-shot rows: num_fewshot=%s is not used for it", task.task_name, wanted
        )
    task.set_config("num_fewshot", count)
    task.set_fewshot_seed(seed=_SEED)


@contextlib.contextmanager
def _local_rows(spec: EvaluateSpec) -> Iterator[None]:
    """Tasks that load inside the block take their rows from local files where there are any.

    The members of a group cannot be told one by one where their rows are, so it is the method by which every
    task gets its rows that is replaced.
    """
    from_hub = ConfigurableTask.download

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not take_local_rows(task, spec):
            from_hub(task, dataset_kwargs, **kwargs)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = from_hub


# --- scores -----------------------------------------------------------------------------------------


def _score(name: str, benchmark: Any, lm: HFLM, spec: EvaluateSpec) -> Evaluation:
    """Score what is behind one requested name."""
    remedy = (
        f"see whether its rows in {spec.data_dir} have the hub's columns"
        if spec.data_dir
        else "see whether lm-eval alone can score it, or drop it from evaluate.tasks"
    )
    with _failing_as(f"the benchmark {name} must give a score", remedy):
        # Not simple_evaluate, which then spends a second on a description of the machine. No bootstrap: it
        # starts processes, and the standard error of a mean needs none.
        results = lm_eval.evaluate(lm=lm, task_dict=benchmark, limit=spec.limit, bootstrap_iters=0)
        return _read(name, benchmark, results)


def _read(name: str, benchmark: Any, results: Mapping[str, Any]) -> Evaluation:
    """The scores of one requested name, with the `tasks` and `groups` of the report."""
    columns = {
        member: _columns(task, results["samples"][member]) for member, task in benchmark["tasks"].items()
    }
    scores = {
        member: _task_scores(task, results["results"][member], columns[member])
        for member, task in benchmark["tasks"].items()
    }
    documents = {member: results["n-samples"][member]["effective"] for member in scores}
    groups = {label: _group_scores(group, scores, documents) for label, group in benchmark["groups"].items()}
    tasks_report = {
        member: {
            "version": _plain(results["versions"][member]),
            "fewshot": results["n-shot"][member],
            "documents": documents[member],
            "metrics": _metrics_report(scores[member]),
            "per_document": {key: _plain(column) for key, column in columns[member].items()},
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


def _task_scores(task: Any, results: Mapping[str, Any], columns: Mapping[str, _Column]) -> _Scores:
    """Every metric of one task, by lm-eval, with a standard error by us."""
    scores = {}
    for key, column in columns.items():
        metric, _, _ = key.partition(",")
        if key in results:
            values = [value for value in column if value is not None]
            aggregation = task.aggregation().get(metric, lm_eval_metrics.mean)
            stderr = _stderr_of_mean(values) if aggregation is lm_eval_metrics.mean else None
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
        key: {"value": _plain(score.value), "stderr": _plain(score.stderr)} for key, score in scores.items()
    }


def _plain(value: Any) -> Any:
    """As JSON has it; a number that is not finite becomes its name, as in our other files."""
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)
