"""A trial's random numbers are its own."""

import contextlib
import json
import random

import numpy as np
import torch

from sweeps.trial.rng import TrialRng

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_numbers_come_from_the_seed_whatever_the_process_drew() -> None:
    first = TrialRng(5, CPU)
    with first.active():
        expected = [draw(), draw()]
    draw()
    second = TrialRng(5, CPU)
    with second.active():
        a = draw()
    draw()
    with second.active():
        b = draw()
    assert [a, b] == expected


def test_the_process_s_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = draw()
    rng = TrialRng(9, CPU)
    with rng.active():
        draw()
    assert [first, draw()] == expected


def test_a_block_that_raises_is_repeated_with_the_same_numbers() -> None:
    rng = TrialRng(5, CPU)
    seen = []
    with contextlib.suppress(ZeroDivisionError), rng.active():
        seen.append(draw())
        raise ZeroDivisionError
    with rng.active():
        seen.append(draw())
    assert seen[0] == seen[1]


def test_a_state_that_went_through_json_gives_the_same_numbers() -> None:
    rng = TrialRng(5, CPU)
    with rng.active():
        random.gauss(0, 1), np.random.normal(), torch.randn(3)  # each keeps half of a pair
    tensors, values = rng.state()
    values = json.loads(json.dumps(values))
    with rng.active():
        expected = [draw(), (random.gauss(0, 1), np.random.normal(), float(torch.randn(())))]
    other = TrialRng(6, CPU)
    other.restore(tensors, values)
    with other.active():
        assert [draw(), (random.gauss(0, 1), np.random.normal(), float(torch.randn(())))] == expected
