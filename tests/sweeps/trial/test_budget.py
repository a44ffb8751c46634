"""Whether activations are recomputed, and how many tokens a micro-batch may hold."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sweeps.devices import device_named
from sweeps.spec import TrialSpec
from sweeps.trial import budget
from sweeps.trial.budget import Choice, Room, choose, step_bytes, tokens_that_fit
from sweeps.trial.estimate import outline, trainable_params
from sweeps.trial.memory import base_bytes, training_memory, widths
from sweeps.trial.predict import predict

COST = 1000  # bytes a token; a tenth with the activations recomputed


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token costs the same however many there are."""

    def cost(_: Any, spec: TrialSpec, __: Any, tokens: int, ___: int) -> float:
        assert spec.train is not None
        return tokens * (COST / 10 if spec.train.gradient_checkpointing else COST)

    monkeypatch.setattr(budget, "step_bytes", cost)


def chosen(tokens: int, longest: int = 100, on_cpu: bool = False, **train: Any) -> Choice:
    """With memory for so many tokens without checkpointing."""
    spec = TrialSpec.model_validate({"train": train})
    room = Room(tokens * COST / 0.9 + 1, on_cpu)
    return choose(SimpleNamespace(), spec, SimpleNamespace(), longest, room)  # type: ignore[arg-type]


AUTO = {"gradient_checkpointing": "auto"}


@pytest.mark.usefixtures("flat")
def test_auto_recomputes_activations_only_where_the_longest_row_would_not_fit() -> None:
    fits, does_not = chosen(1000, 1000, **AUTO), chosen(1000, 1001, **AUTO)
    assert (fits.recomputes, does_not.recomputes) == (False, True)
    assert fits.notes[0] == "gradient checkpointing off: without it 1000 tokens fit, the longest row has 1000"
    assert (
        does_not.notes[0] == "gradient checkpointing on: without it 1000 tokens fit, the longest row has 1001"
    )


@pytest.mark.usefixtures("flat")
def test_auto_recomputes_activations_where_the_budget_that_was_asked_for_would_not_fit() -> None:
    assert chosen(1000, 900, token_budget=1000, **AUTO).recomputes is False
    more = chosen(1000, 900, token_budget=1001, **AUTO)
    assert more.recomputes is True
    assert (
        more.notes[0] == "gradient checkpointing on: without it 1000 tokens fit, train.token_budget is 1001"
    )
    assert chosen(1000, 1001, token_budget=10, **AUTO).recomputes is True


@pytest.mark.usefixtures("flat")
@pytest.mark.parametrize("asked", [True, False])
def test_what_the_sweep_file_chose_is_done_without_a_word(asked: bool) -> None:
    for tokens in (1, 1_000_000):
        choice = chosen(tokens, 1000, gradient_checkpointing=asked)
        assert choice.recomputes is asked
        assert len(choice.notes) == 1


@pytest.mark.usefixtures("flat")
def test_recomputing_leaves_room_for_more_tokens_and_the_budget_is_a_power_of_two() -> None:
    assert chosen(1000).token_budget == 512
    assert chosen(1000, gradient_checkpointing=True).token_budget == 8192
    assert chosen(1024).notes == ("token budget 1024: a step of it takes about 0.00 GB, 0.0 GB free on cuda",)


@pytest.mark.usefixtures("flat")
def test_a_cpu_has_a_ceiling_and_says_so() -> None:
    choice = chosen(100_000, on_cpu=True)
    assert choice.token_budget == 2048
    assert "never above 2048 on a CPU, where more are no faster, and not probed" in choice.notes[0]
    assert chosen(600, on_cpu=True).token_budget == 512


@pytest.mark.usefixtures("flat")
def test_a_budget_that_was_asked_for_is_kept() -> None:
    choice = chosen(1000, token_budget=77)
    assert choice == Choice(77, False, ("token budget 77: set by train.token_budget",))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_tokens_that_fit_are_the_most_of_which_a_step_does(checkpointing: bool) -> None:
    spec = TrialSpec.model_validate({"train": {"gradient_checkpointing": checkpointing}})
    shapes, width, room = outline(spec.model), widths(spec, on_cpu=False), Room(30e9, on_cpu=False)
    most = tokens_that_fit(shapes, spec, width, 1304, room)
    assert step_bytes(shapes, spec, width, most, 1304) <= 0.9 * 30e9
    assert step_bytes(shapes, spec, width, most + 1, 1304) > 0.9 * 30e9
    whole = training_memory(shapes, spec, width, most, 1304)
    adapters = trainable_params(spec) * 2
    assert step_bytes(shapes, spec, width, most, 1304) == pytest.approx(
        whole.total - base_bytes(shapes, spec, width) - adapters
    )


@pytest.mark.parametrize(("card", "recomputes"), [("l4", True), ("a100-40gb", False)])
def test_a_plan_and_the_trial_choose_alike(card: str, recomputes: bool) -> None:
    """LoRA on all layers of 13B in 4 bits, with its dropouts, does not fit on 24 GB without recomputing."""
    spec = TrialSpec.model_validate({"model": {"id": "meta-llama/Llama-2-13b-hf"}, "train": AUTO})
    device, shapes, width = device_named(card), outline(spec.model), widths(spec, on_cpu=False)
    free = device.usable_bytes - base_bytes(shapes, spec, width) - 2 * trainable_params(spec)
    choice = choose(shapes, spec, width, 1304, Room(free, on_cpu=False))
    assert choice.recomputes is recomputes
    assert predict(spec, device).token_budget == choice.token_budget


def test_what_is_free_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocator holds and nobody uses is free too."""
    answers: dict[str, Callable[[Any], Any]] = {
        "mem_get_info": lambda _: (7, 100),
        "memory_reserved": lambda _: 50,
        "memory_allocated": lambda _: 20,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    assert Room.on(torch.device("cuda")) == Room(37, on_cpu=False)
    here = Room.on(torch.device("cpu"))
    assert here.on_cpu
    assert here.free_bytes > 1e8
