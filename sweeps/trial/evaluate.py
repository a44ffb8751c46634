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
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import torch
import tqdm  # type: ignore[import-untyped]  # has no stubs here; of lm-eval's own
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sweeps.errors import DownloadFailed, EvaluationFailed, Interrupted, TrialError
from sweeps.spec import EvaluateSpec
from sweeps.trial.causes import hub_not_reached
from sweeps.trial.judged import Evaluation, read
from sweeps.trial.keeping import never
from sweeps.trial.prefixtree import Plan, Request, make_plan
from sweeps.trial.rng import TrialRng
from sweeps.trial.rows import (
    NOT_A_FILE,
    contents,
    fewshot_count,
    local_files,
    take_local_rows,
    task_files,
)
from sweeps.trial.scoring import CannotShare, obstacle, pair_cost, score, token_budget
from sweeps.trial.tasks import index_roots, task_names
from sweeps.trial.tokencache import tokenizer_state

__all__ = ["Evaluation", "evaluate", "make_lm", "task_names"]

_logger = logging.getLogger("lm_eval.sweeps")  # heard by the report, as lm-eval's own warnings are

_BLIMP = "nyu-mll/blimp"
_KEPT_TOKENS = 4_000_000  # as Python's numbers some 150 MB; twice what the article's six benchmarks have
_SEED, _PYTHON_SEED = 1234, 0  # those of lm_eval.simple_evaluate


def evaluate(
    model: torch.nn.Module, tokenizer: Any, spec: EvaluateSpec, should_stop: Callable[[], bool] = never
) -> Evaluation:
    """Score a causal language model on every benchmark of `spec`.

    The model may carry an adapter and 4-bit weights; it is moved nowhere, and neither it, the tokenizer nor
    the random numbers of the process are changed. The benchmarks' prompts, and the plan by which they are
    scored, are kept for the next evaluation of an equal `spec`. Raises `BadData` where a file of rows is
    missing or malformed, `DownloadFailed` where the hub was not reached, `EvaluationFailed` for whatever else
    a benchmark raises, and `Interrupted` once `should_stop`, asked before each batch, says yes.
    """
    needs = "a causal language model and a tokenizer of transformers are needed"
    with _quiet(), _failing_as("lm-eval must take the model", needs):  # its warnings of this are not kept
        lm = make_lm(model, tokenizer, spec, should_stop)
    prepared = _prepared(spec)
    with _quiet() as warnings, TrialRng(_SEED, lm.device).active(), _evaluating(model), torch.no_grad():
        warnings.texts |= prepared.warnings
        if isinstance(lm, TreeLM):
            lm.expect(prepared)
        parts = [_score(name, benchmark, lm, spec) for name, benchmark in prepared.take().items()]
    ours = isinstance(lm, TreeLM)
    return Evaluation(
        scores={name: score for part in parts for name, score in part.scores.items()},
        report={
            "lm_eval": lm_eval.__version__,
            "harness": spec.harness,
            "limit": spec.limit,
            "warnings": list(warnings.texts.values()),
            "scoring": lm.facts if ours else {},
            "tasks": {name: task for part in parts for name, task in part.report["tasks"].items()},
            "groups": {name: group for part in parts for name, group in part.report["groups"].items()},
        },
        notes=tuple(lm.notes) if ours else (),
    )


def check(spec: EvaluateSpec) -> None:
    """Raise what `evaluate` would of a benchmark that does not load: before hours of training, not after."""
    if spec.tasks:
        _prepared(spec)


def make_lm(
    model: torch.nn.Module, tokenizer: Any, spec: EvaluateSpec, should_stop: Callable[[], bool] = never
) -> HFLM:
    """The model as lm-eval sees it. Another model class would be put in here."""
    # A copy of the tokenizer, which may get a pad token and has its padding and truncation set.
    live, own = _LiveModel(model, should_stop), copy.deepcopy(tokenizer)
    if spec.harness == "current":
        return TreeLM(live, own, spec)
    # In 2023 no text began with BOS, and what has no context came behind EOS.
    return TreeLM(live, own, spec, add_bos_token=False, prefix_token_id=own.eos_token_id)


class TreeLM(HFLM):
    """HFLM, which makes tokens of texts and generates; what all benchmarks ask is scored at once, as a tree.

    Each distinct pair of context and continuation is scored once, and what several begin with is computed
    once. A model that cannot do so is scored by HFLM itself, row by row, and `notes` and lm-eval's warnings
    say why. `facts` is for the report.
    """

    def __init__(self, live: _LiveModel, tokenizer: Any, spec: EvaluateSpec, **settings: Any) -> None:
        super().__init__(pretrained=live, tokenizer=tokenizer, batch_size=spec.batch_size, **settings)
        self._live = live
        self._budget = token_budget(spec, on_cpu=live.device.type == "cpu")
        self._prepared: _Prepared | None = None
        self._answers: dict[_Pair, tuple[float, bool]] = {}
        self._known: dict[str, list[int]] | None = None
        self._reason = obstacle(live.whole)
        self.notes: list[str] = []
        self.facts: dict[str, Any] = {}

    def expect(self, prepared: _Prepared) -> None:
        """These requests are coming: the first that is asked has all of them scored."""
        self._prepared = prepared

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if any(request.args not in self._answers for request in requests):
            expected = self._prepared.asked if self._prepared else ()
            distinct = {request.args: request for request in (*expected, *requests)}
            answers = self._scored(distinct, disable_tqdm)
            self._answers |= zip(distinct, answers, strict=True)
        return [self._answers[request.args] for request in requests]

    def _scored(self, distinct: Mapping[_Pair, Any], disable_tqdm: bool) -> list[tuple[float, bool]]:
        planned = self._prepared.planned if self._prepared else None
        if planned is not None and not self._reason and planned.fits(self._plan_key(), distinct):
            return self._by(planned)
        self._known = {}
        try:
            # It makes tokens of the texts, and gives them to the method below.
            return list(super().loglikelihood(list(distinct.values()), disable_tqdm=disable_tqdm))
        finally:
            self._known = None

    def _loglikelihood_tokens(
        self, requests: list[_Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if override_bs is not None:  # windows of long texts, which share nothing
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, override_bs))
        if self._reason:
            return self._row_by_row(requests)
        planned = self._plan(requests)
        if self._prepared is not None and planned.plan.plain_tokens <= _KEPT_TOKENS:
            self._prepared.planned = planned
        return self._by(planned)

    def _by(self, planned: _Planned) -> list[tuple[float, bool]]:
        if planned.warning:
            _logger.warning("%s", planned.warning)
        answers = []
        try:
            answers = score(self._live.whole, planned.plan, self._live._stop_if_asked)
        except CannotShare as reason:
            self._reason = str(reason)
        if self._reason:  # not within the handler, which holds on to what was computed
            return self._row_by_row(planned.encoded)
        self.facts = {
            "way": "tree",
            "requests": len(planned.plan.requests),
            "tokens": planned.plan.tokens,
            "plain_tokens": planned.plan.plain_tokens,
            "token_budget": self._budget,
        }
        return [(answers[number].loglikelihood, answers[number].is_greedy) for number in planned.numbers]

    def _row_by_row(self, requests: list[_Encoded]) -> list[tuple[float, bool]]:
        note = f"benchmarks scored row by row, which takes longer: {self._reason}"
        self.notes.append(note)
        self.facts = {"way": "rows", "reason": self._reason}
        _logger.warning("%s", note)
        # Of one text split in two ways it reads the shorter continuation at the places of the longer one.
        texts = {(tuple(before + after[:-1]), len(after)) for _, before, after in requests}
        if len({text for text, _ in texts}) < len(texts):
            self.logits_cache = False
        return list(super()._loglikelihood_tokens(requests, disable_tqdm=True))

    def _plan(self, requests: list[_Encoded]) -> _Planned:
        numbers: dict[Request, int] = {}
        places, cut = [], 0
        for (context, continuation), before, after in requests:
            if not before or not 0 < len(after) <= self.max_length:
                raise ValueError(
                    f"a continuation must have 1 to {self.max_length} tokens behind at least one, got "
                    f"{len(before)} and {len(after)} of {context[-40:]!r} and {continuation[:40]!r}"
                )
            tokens = before + after
            cut += len(tokens) > self.max_length + 1
            request = Request(tuple(tokens[-(self.max_length + 1) :]), len(after))
            places.append(numbers.setdefault(request, len(numbers)))
        cost = pair_cost(self._live.whole)
        warning = cut and (
            f"{cut} requests have a context and continuation whose combined length exceeds model's maximum "
            f"length ({self.max_length}): cut from the left"
        )
        plan = make_plan(tuple(numbers), self._budget, cost)
        return _Planned(self._plan_key(), requests, places, plan, warning or "")

    def _plan_key(self) -> tuple[Any, ...] | None:
        """All that the tokens and the plan follow from, beside the texts; None if that cannot be told."""
        state = tokenizer_state(self.tokenizer)
        settings = self.add_bos_token, self.prefix_token_id, self.max_length
        return None if state is None else (state, *settings, self._budget, pair_cost(self._live.whole))

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """A context is asked for with each of its continuations."""
        if self._known is None or args or kwargs:
            return list(super().tok_encode(string, *args, **kwargs))
        if string not in self._known:
            self._known[string] = super().tok_encode(string)
        return self._known[string]


class _LiveModel:
    """The parts of a model that HFLM uses to score it.

    Given a torch module, HFLM ties its weights anew. That puts the embedding in place of a 4-bit output head,
    and fails where the head carries an adapter. Nor does scoring need the cache of keys and values.
    """

    def __init__(self, model: Any, should_stop: Callable[[], bool]) -> None:
        self.whole = self._model = model
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

_Pair = tuple[str, str]
_Encoded = tuple[_Pair, list[int], list[int]]


@dataclass(frozen=True, eq=False)
class _Planned:
    """Requests as tokens, the number in the plan of each, and the plan, made under `key`."""

    key: tuple[Any, ...] | None
    encoded: list[_Encoded]
    numbers: list[int]
    plan: Plan
    warning: str

    def fits(self, key: tuple[Any, ...] | None, asked: Iterable[_Pair]) -> bool:
        """Whether the plan is for these texts, and would be made again."""
        return key is not None and key == self.key and [pair for pair, _, _ in self.encoded] == list(asked)


@dataclass(eq=False)
class _Prepared:
    """Benchmarks with their rows and prompts, made from a spec and the content of files; then also a plan."""

    settings: str
    files: Mapping[Path, str | None]
    benchmarks: dict[str, Any]
    warnings: dict[tuple[str, int], str]
    planned: _Planned | None = None

    @property
    def instances(self) -> Iterator[Any]:
        """Every request of lm-eval's, in its order."""
        for benchmark in self.benchmarks.values():
            for task in benchmark["tasks"].values():
                yield from task.instances

    @property
    def asked(self) -> list[Any]:
        """Those that want a log-likelihood."""
        return [instance for instance in self.instances if instance.request_type == "loglikelihood"]

    def holds(self, spec: EvaluateSpec) -> bool:
        """Whether every file holds what it held when it was read."""
        return contents(self.files) == self.files and task_files(spec) <= set(self.files)

    def take(self) -> dict[str, Any]:
        """The benchmarks, without what an evaluation before this one has answered."""
        for instance in self.instances:
            instance.resps, instance.filtered_resps = [], {}
        return self.benchmarks


_kept: list[_Prepared] = []  # at most one: what the next trial in this process asks, as a rule


def _prepared(spec: EvaluateSpec) -> _Prepared:
    """The benchmarks of `spec`, all loaded and asked for their prompts before the first is scored.

    Those kept from before are taken if the spec is equal in what decides of prompts, and every local file
    holds what it held.
    """
    settings = spec.model_dump_json(exclude={"weights", "batch_size"})
    if _kept and _kept[0].settings == settings and _kept[0].holds(spec):
        return _kept[0]
    _kept.clear()  # gone before the next is loaded
    with _quiet() as warnings, TrialRng(_SEED, torch.device("cpu")).active():
        random.seed(_PYTHON_SEED)
        files = dict(contents(task_files(spec)))
        benchmarks = {name: _load(name, spec, files) for name in spec.tasks}
        for name, benchmark in benchmarks.items():
            with _failing_as(f"the benchmark {name} must give a score", _remedy(spec)):
                for task in benchmark["tasks"].values():
                    task.build_all_requests(limit=spec.limit, rank=0, world_size=1)
                    task.build_all_requests = _built
    prepared = _Prepared(settings, files, benchmarks, dict(warnings.texts))
    if NOT_A_FILE not in files.values():
        _kept.append(prepared)
    return prepared


def _built(**_: Any) -> None:
    """In the place of a task's `build_all_requests`: lm-eval asks for prompts again, which are there."""


def _load(name: str, spec: EvaluateSpec, files: dict[Path, str | None]) -> Any:
    """lm-eval's tasks (and groups) behind one requested name, with their rows; adds the files of these."""
    roots = index_roots(name, spec.task_dir)
    if not roots:
        nearest = difflib.get_close_matches(name, task_names(spec.task_dir), n=1)
        raise EvaluationFailed(
            f"a benchmark must be known to lm-eval or defined in evaluate.task_dir, got {name}; "
            + (f"did you mean {nearest[0]}?" if nearest else "see `lm-eval ls tasks`")
        )
    remedy = f"where the hub is out of reach, its rows go into evaluate.data_dir as {name}.jsonl"
    with _failing_as(f"the benchmark {name} must load", remedy), _local_rows(spec, files):
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
def _local_rows(spec: EvaluateSpec, files: dict[Path, str | None]) -> Iterator[None]:
    """Tasks that load inside the block take their rows from local files where there are any.

    The members of a group cannot be told one by one where their rows are, so it is the method by which every
    task gets its rows that is replaced.
    """
    from_hub = ConfigurableTask.download

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        files.update(contents(local_files(task, spec)))  # before they are read: who edits them later is seen
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
    with _failing_as(f"the benchmark {name} must give a score", _remedy(spec)):
        # Not simple_evaluate, which then spends a second on a description of the machine. No bootstrap: it
        # starts processes, and the standard error of a mean needs none.
        results = lm_eval.evaluate(lm=lm, task_dict=benchmark, limit=spec.limit, bootstrap_iters=0)
        return read(name, benchmark, results, lm_eval_metrics.mean)


def _remedy(spec: EvaluateSpec) -> str:
    if spec.data_dir:
        return f"see whether its rows in {spec.data_dir} have the hub's columns"
    return "see whether lm-eval alone can score it, or drop it from evaluate.tasks"
