"""Whether activations are recomputed, and how many tokens a micro-batch may hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sweeps.spec import TrainSpec
from sweeps.trial import budget

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(hidden_size=64, num_hidden_layers=2, vocab_size=300)
COST = 2 * 17 * 4 * 64 + 300 * 16  # bytes a token in float32
CHEAP = 2 * 4 * 64 + 300 * 16  # with the activations recomputed


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let there be memory for so many tokens without checkpointing."""

    def make(tokens: int) -> None:
        monkeypatch.setattr(budget, "_free_bytes", lambda _: int(tokens * COST / 0.8) + 1)

    return make


def recomputes(longest: int, **fields: Any) -> tuple[bool, tuple[str, ...]]:
    train = TrainSpec.model_validate({"gradient_checkpointing": "auto", **fields})
    return budget.recomputes_activations(train, longest, CONFIG, torch.float32, CPU)


def test_auto_recomputes_activations_only_where_the_longest_row_would_not_fit(room: Any) -> None:
    room(1000)
    assert recomputes(1000) == (
        False,
        ("gradient checkpointing off: without it 1000 tokens fit, the longest row has 1000",),
    )
    assert recomputes(1001) == (
        True,
        ("gradient checkpointing on: without it 1000 tokens fit, the longest row has 1001",),
    )


def test_auto_recomputes_activations_where_the_budget_that_was_asked_for_would_not_fit(room: Any) -> None:
    room(1000)
    assert recomputes(900, token_budget=1000)[0] is False
    assert recomputes(900, token_budget=1001) == (
        True,
        ("gradient checkpointing on: without it 1000 tokens fit, train.token_budget is 1001",),
    )
    assert recomputes(1001, token_budget=10)[0] is True


@pytest.mark.parametrize("chosen", [True, False])
def test_what_the_sweep_file_chose_is_done_without_a_word(room: Any, chosen: bool) -> None:
    for tokens in (1, 1_000_000):
        room(tokens)
        assert recomputes(1000, gradient_checkpointing=chosen) == (chosen, ())


def test_recomputing_leaves_room_for_more_tokens(room: Any) -> None:
    room(1000)
    train = TrainSpec()
    assert budget.token_budget(train, False, CONFIG, torch.float32, CPU)[0] == 512
    more, said = budget.token_budget(train, True, CONFIG, torch.float32, CPU)
    assert more == 1 << (int(1000 * COST / CHEAP).bit_length() - 1) == 2048
    assert said == "token budget 2048: about 0.01 MB a token, 0.0 GB free on cpu"


def test_a_budget_that_was_asked_for_is_kept(room: Any) -> None:
    room(1000)
    train = TrainSpec(token_budget=77)
    assert budget.token_budget(train, False, CONFIG, torch.float32, CPU) == (
        77,
        "token budget 77: set by train.token_budget",
    )
