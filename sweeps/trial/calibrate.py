"""A few real steps and a scored batch, measured beside what is predicted of the very same work.

The loop is a trial's own, with the trial's model, adapter, optimiser and token budget. Its rows are made up,
as long as those of the plan. So may the weights be, where the model's are not on this machine, since neither
seconds nor bytes depend on their values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import random
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sweeps.devices import Device
from sweeps.errors import BadModel, CannotStart, OutOfMemory
from sweeps.spec import EvaluateSpec, ModelSpec, TrialSpec
from sweeps.trial.adapter import Adapter, attach
from sweeps.trial.base import Base, Resident, without_progress_bars
from sweeps.trial.batches import CALL_TOKENS, rectangles, row_order
from sweeps.trial.begin import begin, choose_here
from sweeps.trial.budget import Choice
from sweeps.trial.calibration import Calibration, cpu_title
from sweeps.trial.data import TokenData, TokenRow
from sweeps.trial.duration import Pace, Work, backward_seconds, forward_seconds, training_operations
from sweeps.trial.estimate import config_of, frozen_params, outline, trainable_params
from sweeps.trial.finetune import Trained, Unkept, finetune
from sweeps.trial.lengths import RowLengths, row_lengths, scoring
from sweeps.trial.measure import MemoryMeter
from sweeps.trial.memory import training_memory, widths
from sweeps.trial.miniature import make_tokenizer
from sweeps.trial.prefixtree import Request, make_plan
from sweeps.trial.scoring import CannotShare, obstacle, pair_cost, score, token_budget
from sweeps.trial.source import FolderModel, HubModel, locate

_WARMING, _MOST_STEPS = 1, 3
_ENOUGH_SECONDS = 20.0  # after which no further step is begun: on a CPU one may take minutes
_SCORED_LENGTH = 128  # of a row to score, where nobody counted the benchmarks' rows


@dataclass(frozen=True)
class _Steps:
    """What was measured of a few steps, and the work that it was. `peak_bytes` is None on a CPU."""

    spec: TrialSpec
    work: Work
    seconds: float
    largest: tuple[int, int]  # micro-batch: tokens, and the length of its rows
    peak_bytes: float | None


@dataclass(frozen=True)
class _Scored:
    work: Work
    seconds: float


def calibrate(spec: TrialSpec, device: Device | None, threads: int | None = None) -> Calibration:
    """Measure the trial's work on the GPU that is here, a `device` of the table, or on the CPU for None.

    `threads` are those of a trial on the CPU. Raises `CannotStart` or `TrialError` where nothing can be
    measured.
    """
    if spec.train is None:
        raise CannotStart(
            "a calibration measures training steps, got a trial without any; name one that trains"
        )
    at = torch.device("cpu") if device is None else torch.device("cuda", torch.cuda.current_device())
    resident = Resident(at)
    try:
        with tempfile.TemporaryDirectory(prefix="sweeps-calibration-") as folder, _threads(threads):
            base = resident.get(_at_hand(spec.model, Path(folder)))
            steps, scored = _measure(spec, base)
            return _compared(steps, scored, device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the base must fit on {at} to be measured, and did not "
            f"({str(error).splitlines()[0][:200]}); end what else runs there"
        ) from error
    finally:
        resident.drop()


def _compared(steps: _Steps, scored: _Scored, device: Device | None) -> Calibration:
    """The measured beside the predicted."""
    spec, on_cpu = steps.spec, device is None
    shapes, trainable = outline(spec.model), trainable_params(spec)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    if device is None:
        rate = training_operations(shapes, spec, trainable, steps.work) / steps.seconds
        going = forward_seconds(shapes, spec, trainable, Pace.measured(rate), scored.work)
        return Calibration(
            device=cpu_title(torch.get_num_threads()),
            measured_on=today,
            eval_time_factor=scored.seconds / going,
            operations_per_second=rate,
        )
    pace = Pace.of(device)
    predicted = training_memory(shapes, spec, widths(spec, on_cpu), *steps.largest).total
    assert steps.peak_bytes is not None
    return Calibration(
        device=torch.cuda.get_device_name(),
        measured_on=today,
        time_factor=steps.seconds / backward_seconds(shapes, spec, trainable, pace, steps.work),
        eval_time_factor=scored.seconds / forward_seconds(shapes, spec, trainable, pace, scored.work),
        memory_factor=steps.peak_bytes / predicted,
    )


# --- measuring --------------------------------------------------------------------------------------


def _measure(spec: TrialSpec, base: Base) -> tuple[_Steps, _Scored]:
    assert spec.train is not None
    rows, shapes = row_lengths(spec.data), outline(spec.model)
    with attach(base, spec.lora, spec.train.seed) as adapter:
        choice = choose_here(shapes, adapter, spec, rows.longest)
        while True:
            some = _some_steps(spec, rows, choice)
            steps, first, last = _train(adapter, some, rows, choice)
            if last == first:
                return steps, _score(adapter.model, base, some)
            # Memory ran out, and the loop went on with less at once: again, so that the peak is that of the
            # budget which the steps had.
            choice = dataclasses.replace(choice, token_budget=last)


def _some_steps(spec: TrialSpec, rows: RowLengths, choice: Choice) -> TrialSpec:
    """The trial with a few steps, each of no more rows than fill two micro-batches: the next are alike.

    They learn next to nothing, so that made-up rows cannot make them diverge.
    """
    assert spec.train is not None
    enough = max(1, math.ceil(2 * choice.token_budget / rows.mean))
    batch_size = min(spec.train.batch_size, enough)
    train = spec.train.model_copy(
        update={
            "batch_size": batch_size,
            "samples": batch_size * (_WARMING + _MOST_STEPS),
            "gradient_checkpointing": choice.recomputes,
            "log_every": 1,
            "eval_every": 0,
            "diverged_above": 1e9,
        }
    )
    schedule = spec.schedule.model_copy(update={"warmup_steps": 0})
    optimizer = spec.optimizer.model_copy(update={"lr": 1e-8})
    return spec.model_copy(update={"train": train, "schedule": schedule, "optimizer": optimizer})


def _train(adapter: Adapter, spec: TrialSpec, rows: RowLengths, choice: Choice) -> tuple[_Steps, int, int]:
    """Run the trial's own loop; what was measured, and the token budgets that it began and ended with."""
    assert spec.train is not None
    base = adapter.base
    made = _made_up(rows, spec, base.model.config.get_text_config().vocab_size)
    data = TokenData(train=made, held_out=(), truncated=0, digest="")
    trained = Trained()
    begun = begin(adapter, made, spec, trained, choice)
    budget = begun.first_budget
    meter = MemoryMeter(base.device)
    seconds: list[float] = []  # up to the end of each step
    try:
        steps_of = finetune(adapter.model, begun.loss, begun.training, data, spec, Unkept())
        with contextlib.closing(steps_of) as reports:
            for _ in reports:
                seconds.append(trained.seconds)
                if len(seconds) > _WARMING and seconds[-1] - seconds[_WARMING - 1] > _ENOUGH_SECONDS:
                    break
        peak = meter.allocated_gb
    finally:
        meter.close()
    order = row_order(len(made), spec.train, spec.steps)[: len(seconds)]
    call = CALL_TOKENS[base.device.type]
    cuts = [rectangles([len(made[pick]) for pick in picks], budget, call) for picks in order]
    shapes = [
        (len(group) * len(made[picks[group[0]]]), len(made[picks[group[0]]]))
        for picks, groups in zip(order, cuts, strict=True)
        for group in groups
    ]
    warm = len(cuts[0])
    measured = shapes[warm:]
    work = Work(len(measured), sum(tokens for tokens, _ in measured))
    steps = _Steps(
        spec=spec,
        work=work,
        seconds=seconds[-1] - seconds[_WARMING - 1],
        largest=max(shapes),
        peak_bytes=None if peak is None else peak * 1e9,
    )
    return steps, budget, trained.token_budget


def _made_up(rows: RowLengths, spec: TrialSpec, vocabulary: int) -> list[TokenRow]:
    """Rows of made-up tokens, for as many steps as there are, and as long as those of the plan.

    Where the loss is over responses alone, half of each row is taken for one.
    """
    assert spec.train is not None
    draw = random.Random(0)
    lengths = draw.choices(rows.tokens, k=spec.train.samples)
    made = (array("i", (draw.randrange(vocabulary) for _ in range(max(2, length)))) for length in lengths)
    by_half = spec.data.loss_on == "response"
    return [TokenRow(ids, max(1, len(ids) // 2) if by_half else 1) for ids in made]


def _score(model: torch.nn.Module, base: Base, spec: TrialSpec) -> _Scored:
    """Made-up requests as a trial scores its own, or row by row for a model that is scored so."""
    budget = token_budget(spec.evaluate, on_cpu=base.device.type == "cpu")
    requests = _requests(spec.evaluate, budget, base.model.config.get_text_config().vocab_size)
    model.eval()
    with torch.no_grad(), contextlib.suppress(CannotShare):
        if not obstacle(model):
            plan = make_plan(requests, budget, pair_cost(model))

            def answer() -> None:
                score(model, plan, lambda: None)

            answer()
            count, seconds = _timed(answer, base.device)
            return _Scored(Work(count * len(plan.batches), count * plan.tokens), seconds)
    return _score_rows(model, base, spec)


def _requests(spec: EvaluateSpec, budget: int, vocabulary: int) -> list[Request]:
    """For two batches; as long in the mean as those of the benchmarks, and with as much in common.

    All of that is their beginning, as it is of the longest benchmarks of the article.
    """
    asked, _ = scoring(spec)
    whole = own = _SCORED_LENGTH
    if asked.requests:
        whole, own = round(asked.tokens / asked.requests), max(2, round(asked.computed / asked.requests))
    draw, known = random.Random(0), range(vocabulary)
    beginning = draw.choices(known, k=max(0, whole - own))
    return [
        Request((*beginning, *draw.choices(known, k=own)), own // 2)
        for _ in range(math.ceil(2 * budget / own))
    ]


def _score_rows(model: torch.nn.Module, base: Base, spec: TrialSpec) -> _Scored:
    """Batches as a benchmark's: forward, and the log-probabilities of every token."""
    asked, _ = scoring(spec.evaluate)
    length = round(asked.tokens / asked.requests) if asked.requests else _SCORED_LENGTH
    shape = spec.evaluate.batch_size, length
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, shape, generator=generator).to(base.device)  # (B, T)

    def batch() -> None:
        logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
        torch.log_softmax(logits, dim=-1)

    model.eval()
    with torch.no_grad():
        batch()
        count, seconds = _timed(batch, base.device)
    return _Scored(Work(count, count * shape[0] * shape[1]), seconds)


def _timed(batch: Callable[[], None], device: torch.device) -> tuple[int, float]:
    """How often it was called, and for how long."""
    _wait_for(device)
    count, seconds, started = 0, 0.0, time.perf_counter()
    while count < _MOST_STEPS and seconds <= _ENOUGH_SECONDS:
        batch()
        _wait_for(device)
        count, seconds = count + 1, time.perf_counter() - started
    return count, seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch computes with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the model --------------------------------------------------------------------------------------


def _at_hand(model: ModelSpec, folder: Path) -> ModelSpec:
    """The model where its weights are on this machine, else one of its shapes with random ones in `folder`.

    Nothing is downloaded. Raises `BadModel`, and `CannotStart` where there is no room to make one.
    """
    local = _local(model)
    if local is not None:
        return local
    _save_random(model, folder)
    return model.model_copy(update={"id": str(folder), "revision": None})


def _local(model: ModelSpec) -> ModelSpec | None:
    """The model as it can be loaded without a network; None if it cannot."""
    try:
        source = locate(model)
    except BadModel:  # a packaged model that is not installed: its shapes are known all the same
        return None
    if not isinstance(source, HubModel):
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(source.name, revision=source.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    if not _is_whole(found):
        return None
    return model.model_copy(update={"id": str(FolderModel(found).path), "revision": None})


def _is_whole(folder: Path) -> bool:
    """Whether weights and tokenizer are there; of a model that was fetched in part some are not."""
    if not (folder / "config.json").exists() or not (folder / "tokenizer_config.json").exists():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return (folder / "model.safetensors").exists()
    return all((folder / name).exists() for name in json.loads(index.read_bytes())["weight_map"].values())


def _save_random(model: ModelSpec, folder: Path) -> None:
    """Random weights, not zeros: a GPU multiplies zeros with less power, and so faster."""
    from transformers import AutoModelForCausalLM

    config, size = config_of(model), 2 * frozen_params(model)
    free = {"memory": psutil.virtual_memory().available, f"disk at {folder}": shutil.disk_usage(folder).free}
    for what, there in free.items():
        if there < 1.1 * size:
            raise CannotStart(
                f"{model.id} is not on this machine, and a model of its shapes with random weights takes "
                f"{size / 1e9:.1f} GB, got {there / 1e9:.1f} GB free of {what}; fetch the model, or "
                f"free some{' (TMPDIR names another disk)' if 'disk' in what else ''}"
            )
    with without_progress_bars():
        network = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=model.trust_remote_code
        )
        network.save_pretrained(folder)
        make_tokenizer(["It is here, and is never read."]).save_pretrained(folder)
