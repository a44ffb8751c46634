"""The training loop on a tiny model: law L1, the schedule, divergence, memory that runs out."""

import math
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sweeps.errors import Diverged, OutOfMemory
from sweeps.result import Progress
from sweeps.spec import TrialSpec
from sweeps.trial import finetune as loop
from sweeps.trial.batches import MicroBatch, Weighting
from sweeps.trial.data import TokenData, TokenRow
from sweeps.trial.loss import Loss, loss_of
from sweeps.trial.rng import TrialRng

CPU = torch.device("cpu")
ROWS = [TokenRow(array("i", [1, *Random(n).choices(range(3, 290), k=3 + 7 * (n % 5)), 2])) for n in range(24)]
DATA = TokenData(train=ROWS[:20], held_out=ROWS[20:], truncated=0, digest="")


@pytest.fixture
def model(tiny_model_dir: Path) -> torch.nn.Module:
    """The tiny model with its attention projections and its head to be trained."""
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_("_proj" in name or "lm_head" in name)
    return loaded


def spec_of(**overrides: Any) -> TrialSpec:
    sections: dict[str, dict[str, Any]] = {
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "train": {"batch_size": 4, "samples": 40, "log_every": 3, "eval_every": 0},
    }
    for path, value in overrides.items():
        section, name = path.split("__")
        sections[section][name] = value
    return TrialSpec.model_validate(sections)


def sgd(parameters: Any, spec: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=spec.lr)


def named(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return list(named(model).values())


def train(
    model: torch.nn.Module,
    spec: TrialSpec,
    budget: int = 64,
    data: TokenData = DATA,
    loss: Loss | None = None,
) -> tuple[loop.Trained, list[Progress]]:
    trained = loop.Trained(token_budget=budget)
    training = loop.Training(named(model), spec, TrialRng(1, CPU), sgd, trained)
    return trained, list(loop.finetune(model, loss or loss_of(model), training, data, spec, loop.Unkept()))


def gradients(
    model: torch.nn.Module,
    budget: int,
    weighting: Weighting = "sample",
    rows: Sequence[TokenRow] = ROWS[:9],
) -> torch.Tensor:
    trained = loop.Trained(token_budget=budget)
    loop._accumulate(loss_of(model), trainable(model), rows, weighting, TrialRng(1, CPU), trained)
    flat = torch.cat([parameter.grad.flatten() for parameter in trainable(model)])  # type: ignore[union-attr]
    model.zero_grad()
    return flat


@pytest.mark.parametrize("budget", [10, 33, 64, 100, 10_000])
def test_law_l1_any_token_budget_gives_the_gradients_of_one_row_at_a_time(
    model: torch.nn.Module, budget: int
) -> None:
    plain = torch.zeros(())
    for row in ROWS[:9]:
        ids = torch.tensor([list(row.ids)])
        plain = (
            plain + model(input_ids=ids, labels=ids).loss / 9
        )  # transformers' own mean over the row's tokens
    plain.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in trainable(model)])  # type: ignore[union-attr]
    model.zero_grad()
    assert (gradients(model, budget) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("budget", [10, 33, 64, 100, 10_000])
def test_law_l1_holds_too_where_every_predicted_token_weighs_the_same(
    model: torch.nn.Module, budget: int
) -> None:
    rows = [TokenRow(row.ids, given=1 + number % 3) for number, row in enumerate(ROWS[:9])]
    plain = torch.zeros(())
    for row in rows:
        ids = torch.tensor([list(row.ids)])
        answers = torch.nn.functional.log_softmax(model(input_ids=ids).logits[0], -1)
        for place in range(row.given, len(row)):
            plain = plain - answers[place - 1, row.ids[place]]
    (plain / sum(len(row) - row.given for row in rows)).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in trainable(model)])  # type: ignore[union-attr]
    model.zero_grad()
    assert (gradients(model, budget, "token", rows) - expected).norm() <= 1e-5 * expected.norm()
    assert (gradients(model, budget, "sample", rows) - expected).norm() > 1e-2 * expected.norm()


def test_the_weighting_of_the_spec_is_the_one_that_trains(model: torch.nn.Module) -> None:
    """The first step's loss is that of the untouched model, and its rows are the same."""
    losses = {}
    for weighting in ("sample", "token"):
        _, reports = train(model, spec_of(train__loss_weighting=weighting, train__log_every=1))
        losses[weighting] = reports[0].train_loss
        for parameter, kept in zip(model.parameters(), _fresh(model).parameters(), strict=True):
            parameter.data.copy_(kept)
    rows = [DATA.train[pick] for pick in picks(spec_of())[:4]]
    means = [loop.held_out_loss(model, loss_of(model), [row], 1000) for row in rows]
    assert losses["sample"] == pytest.approx(sum(means) / 4, rel=1e-5)
    tokens = sum(row.predicted for row in rows)
    by_token = sum(mean * row.predicted for mean, row in zip(means, rows, strict=True)) / tokens
    assert losses["token"] == pytest.approx(by_token, rel=1e-5)
    assert losses["token"] != pytest.approx(losses["sample"], rel=1e-4)


def _fresh(model: Any) -> torch.nn.Module:
    fresh: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    return fresh


def test_every_row_weighs_the_same_however_long_it_is(model: torch.nn.Module) -> None:
    loss = loss_of(model)
    together = loop.held_out_loss(model, loss, [ROWS[0], ROWS[4]], 1000)
    alone = [loop.held_out_loss(model, loss, [row], 1000) for row in (ROWS[4], ROWS[0])]
    assert together == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_reports_come_at_log_points_and_at_the_end_with_exact_losses(model: torch.nn.Module) -> None:
    every, each = train(model, spec_of(train__log_every=1))
    assert [report.step for report in each] == list(range(1, 11))
    model_again = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    for parameter, old in zip(model_again.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(old.requires_grad)
    _, reports = train(model_again, spec_of())
    assert [report.step for report in reports] == [3, 6, 9, 10]
    losses = [report.train_loss for report in each]
    assert reports[0].train_loss == pytest.approx(sum(losses[:3]) / 3, rel=1e-6)  # type: ignore[arg-type]
    assert every.tokens == sum(len(ROWS[pick]) for pick in picks(spec_of()))


def picks(spec: TrialSpec) -> list[int]:
    from sweeps.trial.batches import row_order

    assert spec.train is not None
    return [pick for step in row_order(len(DATA.train), spec.train, spec.steps) for pick in step]


def test_the_loss_goes_down_and_the_held_out_loss_is_reported(model: torch.nn.Module) -> None:
    before = loop.held_out_loss(model, loss_of(model), DATA.held_out, 64)
    spec = spec_of(optimizer__lr=0.5, train__samples=160, train__sampling="epochs", train__eval_every=20)
    trained, reports = train(model, spec)
    assert reports[-1].train_loss < reports[0].train_loss - 0.3  # type: ignore[operator]
    assert [report.step for report in reports if report.eval_loss is not None] == [20, 40]
    assert trained.eval_loss == reports[-1].eval_loss != before


def test_the_held_out_loss_is_without_dropout_and_leaves_training_mode_on(model: torch.nn.Module) -> None:
    model.train()
    values = {loop.held_out_loss(model, loss_of(model), DATA.held_out, budget) for budget in (64, 64)}
    assert len(values) == 1
    assert model.training
    assert loop.held_out_loss(model, loss_of(model), DATA.held_out, 1) == pytest.approx(
        values.pop(), rel=1e-5
    )


def test_the_rate_warms_up_from_zero_then_follows_half_a_cosine() -> None:
    spec = spec_of(schedule__warmup_steps=4, schedule__t_max="after_warmup", optimizer__lr=1.0)
    rates = [loop.learning_rate(step, spec) for step in range(10)]
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 5 / 6)))


def test_the_articles_cosine_ends_above_zero() -> None:
    """390 steps, 100 of warmup, a peak of 3e-4: the last update has a rate of 4.78e-5."""
    rates = [loop.learning_rate(step, TrialSpec()) for step in range(390)]
    assert rates[-1] == pytest.approx(4.78e-5, abs=0.005e-5)
    assert rates[50] == pytest.approx(1.5e-4)
    assert rates[100] == rates[101] == max(rates) == 3e-4
    assert rates == sorted(rates[:101]) + sorted(rates[101:], reverse=True)


def test_a_cosine_after_the_warmup_ends_next_to_zero() -> None:
    spec = TrialSpec.model_validate({"schedule": {"t_max": "after_warmup"}})
    assert loop.learning_rate(389, spec) == pytest.approx(3e-4 * math.sin(math.pi / 2 / 290) ** 2)


def test_a_linear_rate_falls_by_the_same_amount_each_step() -> None:
    def rates(t_max: str) -> list[float]:
        schedule = {"schedule__name": "linear", "schedule__t_max": t_max, "schedule__warmup_steps": 2}
        return [loop.learning_rate(step, spec_of(**schedule, optimizer__lr=1.0)) for step in range(10)]

    assert rates("after_warmup") == pytest.approx([0, 0.5, *(1 - step / 8 for step in range(8))])
    assert rates("all_steps") == pytest.approx([0, 0.5, 1, *(1 - step / 10 for step in range(7))])


def test_a_constant_rate_stays_at_its_peak_after_the_warmup() -> None:
    spec = spec_of(schedule__warmup_steps=2, schedule__name="constant", optimizer__lr=1.0)
    assert [loop.learning_rate(step, spec) for step in range(5)] == [0.0, 0.5, 1.0, 1.0, 1.0]


def test_clipping_bounds_the_update(model: torch.nn.Module) -> None:
    before = [parameter.detach().clone() for parameter in trainable(model)]
    spec = spec_of(train__clip_norm=1e-3, train__samples=4, schedule__warmup_steps=0, optimizer__lr=1.0)
    train(model, spec)
    moved = torch.cat([(a - b).flatten() for a, b in zip(trainable(model), before, strict=True)]).detach()
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


class Bent:
    """A loss to which something else happens first, or is added."""

    note = ""

    def __init__(self, model: torch.nn.Module, change: Callable[[MicroBatch], float]) -> None:
        self._real = loss_of(model)
        self._change = change

    def backward(self, batch: MicroBatch) -> torch.Tensor:
        added = self._change(batch)
        return self._real.backward(batch) + added

    def value(self, batch: MicroBatch) -> torch.Tensor:
        return self._real.value(batch)


def poisoned(model: torch.nn.Module, at_step: int, value: float) -> Bent:
    """`value` is added from the forward of that step on (one micro-batch a step)."""
    calls = [0]

    def change(_: MicroBatch) -> float:
        calls[0] += 1
        return value if calls[0] >= at_step else 0.0

    return Bent(model, change)


def test_a_loss_that_is_not_finite_ends_the_trial_and_names_the_step(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = poisoned(model, 5, float("nan"))
    with pytest.raises(Diverged, match="the loss must stay finite, got nan at step 5"):
        train(model, spec_of(), budget=10_000, loss=loss)


def test_a_held_out_loss_that_is_not_finite_ends_the_trial_too(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "held_out_loss", lambda *_: float("nan"))
    with pytest.raises(Diverged, match="the held-out loss must stay finite, got nan at step 10"):
        train(model, spec_of())


def test_a_loss_that_stays_far_above_its_start_ends_the_trial(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = poisoned(model, 3, 20.0)
    spec = spec_of(train__diverged_above=2.0, train__diverged_steps=4)
    with pytest.raises(Diverged, match=r"2 times its start \(5\.\d+\), got 2\d\.\d+ at step 6 after 4 steps"):
        train(model, spec, budget=10_000, loss=loss)


def test_a_short_spike_is_not_a_divergence(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = loop._Divergence(above=2.0, patience=3)
    judge.judge(0, [1.0, 5.0, 5.0, 1.0, 5.0, 5.0, 1.0])
    with pytest.raises(Diverged):
        judge.judge(7, [5.0, 5.0, 5.0])


def out_of_memory_above(model: torch.nn.Module, tokens: int) -> Bent:
    def change(batch: MicroBatch) -> float:
        if batch.ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return 0.0

    return Bent(model, change)


def test_memory_that_runs_out_halves_the_budget_and_redoes_the_step(model: torch.nn.Module) -> None:
    expected = gradients(model, 33)  # the longest row: a budget below it would not cut more
    trained = loop.Trained(token_budget=128)
    short = out_of_memory_above(model, 40)
    loop._accumulate(short, trainable(model), ROWS[:9], "sample", TrialRng(1, CPU), trained)
    assert trained.token_budget == 33
    flat = torch.cat([parameter.grad.flatten() for parameter in trainable(model)])  # type: ignore[union-attr]
    assert torch.equal(flat, expected)


def test_one_row_that_does_not_fit_ends_the_trial_as_out_of_memory(model: torch.nn.Module) -> None:
    with pytest.raises(
        OutOfMemory, match=r"one row of \d+ tokens must fit in memory and did not; lower data.max"
    ):
        train(model, spec_of(), budget=64, loss=out_of_memory_above(model, 10))


def probed(model: torch.nn.Module, budget: int, loss: Loss) -> tuple[loop.Training, str]:
    trained = loop.Trained(token_budget=budget)
    training = loop.Training(named(model), spec_of(), TrialRng(1, CPU), sgd, trained)
    train_spec = spec_of().train
    assert train_spec is not None
    return training, loop.probe(model, loss, training, ROWS, train_spec)


def test_a_probe_takes_the_longest_rows_that_the_budget_holds_and_leaves_no_trace(
    model: torch.nn.Module,
) -> None:
    seen: list[tuple[int, ...]] = []
    watched = Bent(model, lambda batch: seen.append(tuple(batch.ids.shape)) or torch.rand(()).item())  # type: ignore[func-returns-value]
    before = TrialRng(1, CPU).state()[0]["torch"]
    training, said = probed(model, 100, watched)
    assert seen == [(3, 33)]
    assert said == "token budget 100: a probe with 3 rows of up to 33 tokens fits"
    assert torch.equal(training.rng.state()[0]["torch"], before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (training.trained.step, training.trained.tokens) == (0, 0)
    assert model.training


def test_a_probe_that_runs_out_of_memory_halves_the_budget_and_says_so(model: torch.nn.Module) -> None:
    training, said = probed(model, 128, out_of_memory_above(model, 70))
    assert training.trained.token_budget == 64
    assert said == "token budget 64: a probe with 3 rows of up to 33 tokens ran out of memory under 128"
    with pytest.raises(OutOfMemory, match="one row of 33 tokens must fit"):
        probed(model, 128, out_of_memory_above(model, 10))


def test_a_golden_loss(model: torch.nn.Module) -> None:
    """The loop's mathematics, down to the seed: a change of this number is a change of every result."""
    trained, _ = train(model, spec_of(optimizer__lr=0.1, schedule__t_max="after_warmup"))
    assert trained.train_loss == pytest.approx(GOLDEN_LOSS, rel=1e-4)


GOLDEN_LOSS = 5.53793
