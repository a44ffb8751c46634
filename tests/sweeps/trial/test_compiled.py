"""Compiled blocks give the gradients of those that are not, and the laws hold of them.

With the compiler that makes no code (`aot_eager`), which takes graphs apart and puts them together as the
real one does; that one is slow.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_layers import GradientCheckpointingLayer

from sweeps.result import TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial import compiled as compiling
from sweeps.trial.adapter import Adapter, attach
from sweeps.trial.base import Resident, load_base
from sweeps.trial.batches import MicroBatch, micro_batches
from sweeps.trial.compiled import CompiledLoss, compiled
from sweeps.trial.data import TokenRow
from sweeps.trial.keeping import Keeping
from sweeps.trial.lora import _Update
from sweeps.trial.loss import Loss, loss_of
from sweeps.trial.paths import TrialFolder
from sweeps.trial.run import run_trial
from tests.tiny import changed, tiny_spec

SHAPES = ((2, 30), (1, 40), (4, 77))
EVERY_STEP = Keeping(checkpoint_minutes=0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setattr(
        logging.getLogger("torch.__trace"), "propagate", False
    )  # megabytes, for pytest to keep
    yield
    torch.compiler.reset()


@pytest.fixture
def spec(tiny_model_dir: Path, alpaca_rows_file: Path) -> TrialSpec:
    return tiny_spec(tiny_model_dir, alpaca_rows_file, **{"train.compile": True, "lora.dropout": 0.3})


def batch(rows: int, length: int) -> MicroBatch:
    made = [TokenRow(array("i", range(row, row + length)), 1) for row in range(rows)]
    return next(micro_batches(made, rows * length))


def backward(adapter: Adapter | Toy, loss: Loss, of: MicroBatch) -> tuple[float, torch.Tensor]:
    """The loss and all gradients in one, with the same dropout each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        value = loss.backward(of)
    found = torch.cat(
        [parameter.grad.flatten() for parameter in adapter.parameters() if parameter.grad is not None]
    )
    for parameter in adapter.parameters():
        parameter.grad = None
    return float(value), found


def set_off(adapter: Adapter) -> None:
    """An adapter that is the identity has no gradient for A."""
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.copy_(
                torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter) / (1 + number % 3)
            )


def assert_compiled_as_plain(spec: TrialSpec, tolerance: float) -> CompiledLoss:
    base = load_base(spec.model, torch.device("cpu"))
    with attach(base, spec.lora, 7) as adapter:
        set_off(adapter)
        plain = loss_of(adapter.model)
        state = torch.get_rng_state()
        loss, said = compiled(plain, adapter.model, adapter.parameters())
        assert isinstance(loss, CompiledLoss), said
        assert torch.equal(torch.get_rng_state(), state)
        assert not adapter.model.training
        assert all(parameter.grad is None for parameter in adapter.parameters())
        adapter.model.train()
        graphs = loss.graphs
        for shape in SHAPES:
            value, expected = backward(adapter, plain, batch(*shape))
            again, found = backward(adapter, loss, batch(*shape))
            assert again == pytest.approx(value, rel=tolerance)
            assert expected.abs().max() > 0
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        assert (loss.graphs, loss.uncompiled) == (graphs, 0)
        assert f": {graphs} graphs" in said
        return loss


class Block(GradientCheckpointingLayer):  # type: ignore[misc]  # transformers has no types
    """A narrow layer with an adapter's pass in it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.eye(6))
        self.a = torch.nn.Parameter(torch.linspace(-1, 1, 2 * 6).view(2, 6))
        self.b = torch.nn.Parameter(torch.linspace(1, -1, 6 * 2).view(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = _Update.apply(x @ self.w, x, self.a, self.b, 0.5, 0.3)
        other = _Update.apply(x @ self.w, x, self.a, self.b, 0.5, 0.3)
        return torch.tanh(one) * other


class Toy(torch.nn.Module):
    """Two blocks between an embedding and a sum: compiled in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(300, 6)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        torch.nn.init.normal_(self.embedding.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


class ToyLoss:
    note = "of a toy"
    remarks = ()

    def __init__(self, model: Toy) -> None:
        self._model = model

    def backward(self, batch: MicroBatch) -> torch.Tensor:
        value: torch.Tensor = self._model(batch.ids).square().sum()
        value.backward()
        return value.detach()

    def value(self, batch: MicroBatch) -> torch.Tensor:
        with torch.no_grad():
            return torch.as_tensor(self._model(batch.ids).square().sum())


def test_a_compiled_step_is_the_plain_one_with_its_draws_and_no_shape_makes_a_graph() -> None:
    """Two layers that drop from the same numbers would be made one by a compiler that thinks them alike."""
    model = Toy()
    plain, state = ToyLoss(model), torch.get_rng_state()
    model.eval()
    loss, said = compiled(plain, model, list(model.parameters()))
    assert isinstance(loss, CompiledLoss), said
    assert said.startswith("training compiled by aot_eager: 2 graphs, in ")
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()
    for shape in SHAPES:
        value, expected = backward(model, plain, batch(*shape))
        again, found = backward(model, loss, batch(*shape))
        assert again == pytest.approx(value, rel=1e-6)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (loss.graphs, loss.uncompiled, loss.passes, loss.remarks) == (2, 0, 2 * len(SHAPES), ())
    assert loss.value(batch(1, 9)) == pytest.approx(float(plain.value(batch(1, 9))), rel=0.9)
    assert loss.passes == 2 * len(SHAPES)  # a value without gradients runs uncompiled
    assert not any(block._compiled_call_impl for block in model.blocks)


def test_what_fits_no_graph_runs_as_it_is_and_is_counted() -> None:
    model = Toy()
    plain = ToyLoss(model)
    made = CompiledLoss(plain, compiling._blocks(model), "eager")
    made.make_graphs(batch(2, 30))
    backward(model, plain, batch(1, 9))
    graphs = made.graphs
    assert backward(model, made, batch(1, 9))[0] == backward(model, plain, batch(1, 9))[0]
    assert made.graphs == graphs
    assert made.remarks == ("compiled: no graph fitted 2 of 4 passes through a block",)


def test_a_compiler_that_fails_leaves_the_loss_as_it_was_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> Any:
        raise OSError("No working C++ compiler found\nin any of the places")

    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda _: fails)
    model = Toy()
    plain = ToyLoss(model)
    loss, said = compiled(plain, model, list(model.parameters()))
    assert loss is plain
    assert said.startswith("training not compiled, though train.compile says so: ")
    assert "No working C++ compiler found" in said
    assert not any(block._compiled_call_impl for block in model.blocks)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_blocks_is_not_compiled() -> None:
    model = torch.nn.Linear(2, 2)
    loss: Any = object()
    same, said = compiled(loss, model, list(model.parameters()))
    assert same is loss
    assert "Linear has no blocks" in said


# --- models ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_and_dropout_are_those_of_plain_blocks_and_no_shape_makes_a_graph(spec: TrialSpec) -> None:
    loss = assert_compiled_as_plain(spec, 1e-5)
    assert 4 <= loss.graphs <= 8  # one row and more, a gradient for the input and none
    assert loss.passes == 2 * len(SHAPES)
    assert loss.remarks == ()


@pytest.mark.slow
def test_so_they_are_with_4_bit_weights_in_bfloat16(spec: TrialSpec) -> None:
    assert_compiled_as_plain(changed(spec, model__quantization="nf4", model__dtype="bfloat16"), 0.02)


# --- trials ------------------------------------------------------------------------------------------


def test_the_field_is_in_the_digest_only_where_it_is_set(spec: TrialSpec) -> None:
    assert TrialSpec().digest == "ea48a60cce992e4a"
    plain = changed(spec, train__compile=False)
    without = plain.model_dump(mode="json")
    del without["train"]["compile"]
    assert TrialSpec.model_validate(without).digest == plain.digest != spec.digest


def ran(spec: TrialSpec, resident: Resident, folder: Path, keeping: Keeping = EVERY_STEP) -> TrialResult:
    list(run_trial(spec, resident, folder, keeping))
    result = TrialFolder(folder).read_result()
    assert result is not None
    return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def cut_after(steps: int) -> Callable[[], bool]:
    """Asked before the training, and after every step."""
    asked = iter([False] * (steps + 2))
    return lambda: next(asked, True)


@pytest.mark.slow
def test_the_laws_of_resuming_and_of_reuse_hold_of_compiled_trials(spec: TrialSpec, tmp_path: Path) -> None:
    """L2 and L3: a trial equals itself cut, and on a base that others have used, compiled or not.

    With `BACKEND = "inductor"` it holds as well, and takes three minutes.
    """
    plain = changed(spec, train__compile=False)
    fresh = ran(spec, Resident(), tmp_path / "fresh")
    assert fresh.outcome == "completed", fresh.failure
    told = r"training compiled by aot_eager: \d+ graphs, in "
    assert any(re.match(told, note) for note in fresh.notes), fresh.notes
    assert not any("no graph fitted" in note for note in fresh.notes)
    used = Resident()
    uncompiled = ran(plain, used, tmp_path / "plain")
    again = ran(spec, used, tmp_path / "again")
    assert_same(tmp_path / "fresh", tmp_path / "again")
    assert (again.train_loss, again.eval_loss) == (fresh.train_loss, fresh.eval_loss)
    assert uncompiled.train_loss == pytest.approx(fresh.train_loss, rel=1e-4)
    ran(plain, used, tmp_path / "plain_again")
    assert_same(tmp_path / "plain", tmp_path / "plain_again")
    cut = Keeping(checkpoint_minutes=0, should_stop=cut_after(2))
    assert ran(spec, used, tmp_path / "cut", cut).outcome == "interrupted"
    resumed = ran(spec, Resident(), tmp_path / "cut")
    assert any("resumed at step" in note for note in resumed.notes)
    assert_same(tmp_path / "fresh", tmp_path / "cut")


def test_a_trial_that_recomputes_activations_is_not_compiled_and_says_so(
    spec: TrialSpec, tmp_path: Path
) -> None:
    result = ran(changed(spec, train__gradient_checkpointing=True), Resident(), tmp_path / "trial")
    assert result.outcome == "completed", result.failure
    assert any("activations are recomputed to save memory" in note for note in result.notes)
    ran(
        changed(spec, train__gradient_checkpointing=True, train__compile=False),
        Resident(),
        tmp_path / "plain",
    )
    assert_same(tmp_path / "plain", tmp_path / "trial")


def test_a_trial_whose_compiler_failed_goes_on_without_one(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does its next attempt, though a compiler is there by then: its numbers are the first one's."""
    resident = Resident()
    ran(changed(spec, train__compile=False), resident, tmp_path / "plain")
    calls: list[Loss] = []

    def fails(loss: Loss, *_: Any) -> tuple[Loss, str]:
        calls.append(loss)
        return loss, "training not compiled, though train.compile says so: no g++"

    monkeypatch.setattr(compiling, "compiled", fails)
    cut = Keeping(checkpoint_minutes=0, should_stop=cut_after(2))
    assert ran(spec, resident, tmp_path / "cut", cut).outcome == "interrupted"
    result = ran(spec, resident, tmp_path / "cut")
    assert result.outcome == "completed", result.failure
    assert len(calls) == 1
    assert any("though train.compile says so: no g++" in note for note in result.notes)
    assert_same(tmp_path / "plain", tmp_path / "cut")
