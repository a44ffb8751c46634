"""The training loop, flat and visible: an iterator of `Progress`."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sweeps.errors import Diverged, OutOfMemory
from sweeps.result import Progress
from sweeps.spec import OptimizerSpec, TrainSpec, TrialSpec
from sweeps.trial import batches
from sweeps.trial.batches import Weighting
from sweeps.trial.data import TokenData, TokenRow
from sweeps.trial.loss import Loss
from sweeps.trial.measure import Stopwatch
from sweeps.trial.optimizers import optimizer_state, restore_optimizer
from sweeps.trial.rng import TrialRng

OptimizerFactory = Callable[[Sequence[torch.nn.Parameter], OptimizerSpec], torch.optim.Optimizer]
State = tuple[dict[str, torch.Tensor], dict[str, Any]]


@dataclass
class Trained:
    """What the loop has done so far; the trial's owner reads it, also after an error."""

    step: int = 0
    tokens: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    token_budget: int = 0
    seconds_before: float = 0.0
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def seconds(self) -> float:
        """Of this attempt and of those before it, as far as its checkpoint knows them; `tokens` likewise."""
        return self.seconds_before + self.watch.seconds

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens else None


class Training:
    """Everything that changes while a trial trains: what it takes to go on after a step as if never cut.

    The learning rate and the rows of a step are functions of its number, so there is no more to it.
    `parameters` are what is trained, by names that are the same in every attempt.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        spec: TrialSpec,
        rng: TrialRng,
        make_optimizer: OptimizerFactory,
        trained: Trained,
    ) -> None:
        assert spec.train is not None
        self.named = parameters
        self.parameters = tuple(parameters.values())
        self.steps = spec.steps
        self.optimizer = make_optimizer(self.parameters, spec.optimizer)
        self.rng = rng
        self.trained = trained
        self.judge = _Divergence(spec.train.diverged_above, spec.train.diverged_steps)
        self.unread: list[torch.Tensor] = []  # the losses of the steps since the last report, on the device

    @property
    def is_done(self) -> bool:
        return self.trained.step == self.steps

    def state(self) -> State:
        """Tensors (not copies) and JSON values; of the optimiser nothing once its work is done."""
        tensors = {f"adapter.{name}": parameter.data for name, parameter in self.named.items()}
        memory, values = ({}, {}) if self.is_done else optimizer_state(self.optimizer, self.named)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in memory.items()}
        random_tensors, random_values = self.rng.state()
        tensors |= {f"rng.{name}": tensor for name, tensor in random_tensors.items()}
        if self.unread:
            tensors["unread"] = torch.stack(self.unread)
        trained = self.trained
        return tensors, {
            "step": trained.step,
            "tokens": trained.tokens,
            "train_loss": trained.train_loss,
            "eval_loss": trained.eval_loss,
            "token_budget": trained.token_budget,
            "seconds": trained.seconds,
            "judge": self.judge.state(),
            "rng": random_values,
            "optimizer": values,
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Be what `state` was taken of."""
        with torch.no_grad():
            for name, tensor in _under("adapter.", tensors).items():
                self.named[name].copy_(tensor)
        restore_optimizer(self.optimizer, self.named, (_under("optimizer.", tensors), values["optimizer"]))
        self.rng.restore(_under("rng.", tensors), values["rng"])
        self.judge.restore(values["judge"])
        if "unread" in tensors:
            self.unread = list(tensors["unread"].to(self.parameters[0].device).unbind())
        trained = self.trained
        trained.step, trained.tokens = values["step"], values["tokens"]
        trained.train_loss, trained.eval_loss = values["train_loss"], values["eval_loss"]
        trained.token_budget, trained.seconds_before = values["token_budget"], values["seconds"]


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class Keeps(Protocol):
    """Keeps a training, so that it can be taken up again."""

    def after_step(self, training: Training) -> None:
        """A step is done, and whoever reads the reports has heard of it. May raise `Interrupted`."""

    def now(self, training: Training) -> None:
        """The training ends here, before its time."""


class Unkept:
    """Keeps nothing of what it trains: a measurement."""

    def after_step(self, training: Training) -> None:
        """Nothing is kept."""

    def now(self, training: Training) -> None:
        """Nor when it ends early."""


def learning_rate(step: int, spec: TrialSpec) -> float:
    """The rate of the optimiser update that follows `step` updates.

    Linear from 0 over the warmup; then constant, or from the peak towards 0 in a line or in half a cosine
    (Loshchilov and Hutter, SGDR, without restarts).
    """
    peak, warmup = spec.optimizer.lr, spec.schedule.warmup_steps
    if step < warmup:
        return peak * step / warmup
    match spec.schedule.name:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - _decayed(step, spec))
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * _decayed(step, spec)))


def _decayed(step: int, spec: TrialSpec) -> float:
    """How much of its way from the peak to 0 a schedule has behind it, the warmup being over.

    The article's code set its cosine to the number of all steps, and moved it on from the second update at
    the peak: of 390 steps with 100 of warmup the last stands at 288 / 390.
    """
    taken = step - spec.schedule.warmup_steps
    if spec.schedule.t_max == "all_steps":
        return max(0, taken - 1) / spec.steps
    return taken / (spec.steps - spec.schedule.warmup_steps)


def finetune(
    model: torch.nn.Module,
    loss: Loss,
    training: Training,
    data: TokenData,
    spec: TrialSpec,
    keeper: Keeps,
) -> Generator[Progress, None, None]:
    """Train in place, from wherever `training` stands, and report every `train.log_every` steps.

    Nothing waits for the device but a report: a CUDA device works off its queue while the host prepares the
    micro-batches that follow.

    `trained.token_budget` is the most tokens in a micro-batch; a step that runs out of memory is redone
    under half of it. Raises `Diverged`, `OutOfMemory` when one row alone does not fit, and `Interrupted`
    where the keeper does.
    """
    assert spec.train is not None
    train, trained, parameters = spec.train, training.trained, training.parameters
    weighting = train.loss_weighting
    optimizer, judge, unread = training.optimizer, training.judge, training.unread
    order = batches.row_order(len(data.train), train, spec.steps)

    model.train()
    trained.watch.start()
    for step, picks in enumerate(order[trained.step :], start=trained.step):
        # forward and backward
        rows = [data.train[pick] for pick in picks]
        unread.append(_accumulate(loss, parameters, rows, weighting, training.rng, trained))

        # update
        lr = learning_rate(step, spec)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained.step = step + 1
        trained.tokens += sum(len(row) for row in rows)

        # report
        is_last = training.is_done
        measures_eval = is_last or (train.eval_every and trained.step % train.eval_every == 0)
        if is_last or measures_eval or trained.step % train.log_every == 0:
            losses = torch.stack(unread).tolist()  # the one synchronisation with the device
            judge.judge(trained.step - len(losses), losses)
            trained.train_loss = sum(losses) / len(losses)
            unread.clear()
            if measures_eval and data.held_out:
                held_out = data.held_out[: train.eval_rows]
                value = held_out_loss(model, loss, held_out, trained.token_budget)
                trained.eval_loss = _finite(value, trained.step)
            trained.watch.pause()
            try:
                yield Progress(
                    phase="training",
                    step=trained.step,
                    steps=spec.steps,
                    train_loss=trained.train_loss,
                    eval_loss=trained.eval_loss if measures_eval else None,
                    lr=lr,
                    tokens_per_second=trained.tokens_per_second,
                    seconds_left=trained.seconds / trained.step * (spec.steps - trained.step),
                )
            except GeneratorExit:
                keeper.now(training)
                raise
            trained.watch.start()

        # keep: after the report, so that whoever reads reports has heard of all that is in a checkpoint
        keeper.after_step(training)
    trained.watch.pause()


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise Diverged(f"the held-out loss must stay finite, got {loss} at step {step}; lower optimizer.lr")
    return loss


def held_out_loss(model: torch.nn.Module, loss: Loss, rows: Sequence[TokenRow], token_budget: int) -> float:
    """The mean of the rows' losses, without dropout; leaves the model in training mode.

    Rows weigh the same whatever `train.loss_weighting` says, so that trials of both kinds compare.
    """
    device = next(model.parameters()).device
    model.eval()
    try:
        total = torch.zeros((), device=device)
        for batch in batches.micro_batches(rows, token_budget, device=device.type):
            total += loss.value(batch.to(device))
    finally:
        model.train()
    return total.item()


def _accumulate(
    loss: Loss,
    parameters: Sequence[torch.nn.Parameter],
    rows: Sequence[TokenRow],
    weighting: Weighting,
    rng: TrialRng,
    trained: Trained,
) -> torch.Tensor:
    """Add the gradient of the step's mean loss to the parameters; the loss as a scalar on the device."""
    device = parameters[0].device
    while True:
        try:
            with rng.active():
                return _forward_backward(loss, rows, weighting, device, trained.token_budget)
        except torch.OutOfMemoryError as error:
            longest = max(len(row) for row in rows)
            if trained.token_budget <= longest:
                raise OutOfMemory(
                    f"one row of {longest} tokens must fit in memory and did not; lower data.max_length, "
                    "or set train.gradient_checkpointing"
                ) from error
        # Outside the handler, where the traceback no longer holds the failed step's tensors.
        for parameter in parameters:
            parameter.grad = None
        torch.cuda.empty_cache()
        trained.token_budget = max(longest, trained.token_budget // 2)


def _forward_backward(
    loss: Loss,
    rows: Sequence[TokenRow],
    weighting: Weighting,
    device: torch.device,
    token_budget: int,
) -> torch.Tensor:
    """The mean over the step's rows, or over its predicted tokens, in whichever micro-batch they are."""
    total = torch.zeros((), device=device)
    for batch in batches.micro_batches(rows, token_budget, weighting, device.type):
        total += loss.backward(batch.to(device))
    return total


def probe(
    model: torch.nn.Module, loss: Loss, training: Training, rows: Sequence[TokenRow], train: TrainSpec
) -> str:
    """Try the token budget once with the longest rows, before any step does; halve it while it is too much.

    Memory for the optimiser's state is held meanwhile, which no step has made yet. The training is then as it
    was, but for its budget; returns the sentence that tells it. Raises `OutOfMemory` as a step does.
    """
    trained, rng = training.trained, training.rng
    asked = trained.token_budget
    by_length = sorted(rows, key=len, reverse=True)
    longest = by_length[: max(1, min(asked // len(by_length[0]), train.batch_size))]
    before = rng.state()
    model.train()
    states = [torch.empty_like(parameter) for parameter in training.parameters for _ in range(2)]
    try:
        _accumulate(loss, training.parameters, longest, train.loss_weighting, rng, trained)
    finally:
        del states
        rng.restore(*before)
        for parameter in training.parameters:
            parameter.grad = None
    what = f"{len(longest)} rows of up to {len(longest[0])} tokens"
    if trained.token_budget < asked:
        return f"token budget {trained.token_budget}: a probe with {what} ran out of memory under {asked}"
    return f"token budget {asked}: a probe with {what} fits"


class _Divergence:
    """Ends a trial whose loss is not finite, or stays far above the loss of its first step.

    The first step's loss is the base model's own: an adapter starts as the identity.
    """

    def __init__(self, above: float, patience: int) -> None:
        self._above = above
        self._patience = patience
        self._start: float | None = None
        self._steps_above = 0

    def state(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {"start": self._start, "steps_above": self._steps_above}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._start, self._steps_above = state["start"], state["steps_above"]

    def judge(self, step: int, losses: Sequence[float]) -> None:
        """`losses` of the steps that followed `step` updates."""
        for number, loss in enumerate(losses, start=step + 1):
            if not math.isfinite(loss):
                raise Diverged(f"the loss must stay finite, got {loss} at step {number}; lower optimizer.lr")
            if self._start is None:
                self._start = loss
            limit = self._above * self._start
            self._steps_above = self._steps_above + 1 if loss > limit else 0
            if self._steps_above >= self._patience:
                raise Diverged(
                    f"the loss must not stay above {self._above:g} times its start ({self._start:.3f}), got "
                    f"{loss:.3f} at step {number} after {self._steps_above} steps above; lower optimizer.lr "
                    "or lora.alpha"
                )
