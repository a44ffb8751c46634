"""Every request is answered once, on its own branch, and what requests share is computed once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from sweeps.trial.prefixtree import Batch, Plan, Request, Row, make_plan

HUGE = 1 << 20


def text(*parts: tuple[int, int]) -> tuple[int, ...]:
    """Each part is a token and how often it stands there, counted up so that no two are alike."""
    return tuple(1000 * token + place for token, count in parts for place in range(count))


def random_requests(seed: int) -> list[Request]:
    """Texts of few different tokens, that grow out of one another: prefixes, repeats, one-token texts."""
    draw = random.Random(seed)
    stems: list[tuple[int, ...]] = [()]
    requests = []
    for _ in range(draw.randrange(1, 60)):
        tail = draw.choices(range(draw.choice([2, 3, 40])), k=draw.choice([1, 2, 5, 30]))
        whole = (*draw.choice(stems), *tail)
        stems.append(whole)
        if len(whole) > 1:
            requests.append(Request(whole, draw.randrange(1, len(whole))))
    return requests or [Request((1, 2), 1)]


def branch(row: Row, place: int) -> list[int]:
    """The places that the token at `place` sees, by the definition alone."""
    return [other for other in range(place + 1) if place < row.ends[other]]


def answered(plan: Plan) -> dict[int, list[tuple[tuple[int, ...], int]]]:
    """For each request what is predicted from what, by walking up from each prediction."""
    found: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for batch in plan.batches:
        for row in batch.rows:
            for place, target, number in zip(row.at, row.targets, row.requests, strict=True):
                seen = branch(row, int(place))
                assert row.depths[seen].tolist() == list(
                    range(len(batch.trunk), len(batch.trunk) + len(seen))
                )
                found.setdefault(int(number), []).append(
                    ((*batch.trunk, *row.tokens[seen].tolist()), int(target))
                )
    return found


def distinct_beginnings(requests: Sequence[Request]) -> int:
    """Tokens of the tree, counted by brute force."""
    return len({request.inputs[: end + 1] for request in requests for end in range(len(request.inputs))})


@pytest.mark.parametrize("seed", range(40))
def test_every_request_is_predicted_once_from_its_own_beginning(seed: int) -> None:
    requests = random_requests(seed)
    budget, pair_cost = random.Random(seed).choice([(7, 0.5), (64, 0.02), (200, 1e-3), (HUGE, 1e-9)])
    plan = make_plan(requests, budget, pair_cost)
    expected = {
        number: [
            (request.tokens[:end], request.tokens[end])
            for end in range(len(request.tokens) - request.scored, len(request.tokens))
        ]
        for number, request in enumerate(requests)
    }
    assert answered(plan) == expected


@pytest.mark.parametrize("seed", range(40))
def test_the_mask_shows_each_token_its_branch_and_no_other(seed: int) -> None:
    plan = make_plan(random_requests(seed), 64, 0.01)
    for batch in plan.batches:
        for row in batch.rows:
            by_hand = np.zeros((len(row), len(row)), dtype=bool)
            for place in range(len(row)):
                by_hand[place, branch(row, place)] = True
            assert (row.sees() == by_hand).all()
            assert row.is_chain == (by_hand == np.tri(len(row), dtype=bool)).all()


@pytest.mark.parametrize("seed", range(40))
def test_a_batch_keeps_to_its_budget_unless_it_is_one_request(seed: int) -> None:
    for batch in make_plan(random_requests(seed), 40, 0.01).batches:
        is_one = len(batch.rows) == 1 and len(set(batch.rows[0].requests.tolist())) == 1
        assert is_one or len(batch.rows) * batch.width <= 40


@pytest.mark.parametrize("seed", range(40))
def test_where_long_rows_cost_nothing_each_beginning_is_computed_once(seed: int) -> None:
    requests = random_requests(seed)
    plan = make_plan(requests, HUGE, 1e-12)
    computed = sum(len(row) for batch in plan.batches for row in batch.rows)
    assert computed == distinct_beginnings(requests)
    assert plan.plain_tokens == sum(len(request.inputs) for request in requests)


def few_shot(subject: int, shots: int, documents: int) -> list[Request]:
    """Questions of 20 tokens and two answers of 5 behind a common beginning."""
    return [
        Request(text((subject, shots), (100 + 50 * subject + number, 20), (answer, 5)), 5)
        for number in range(documents)
        for answer in (7, 8)
    ]


def trunks(plan: Plan) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(batch.trunk for batch in plan.batches))


def test_a_long_common_beginning_is_computed_once() -> None:
    requests = few_shot(1, 300, 40)
    plan = make_plan(requests, 512, 1e-3)
    assert trunks(plan) == [text((1, 300))]
    assert plan.tokens < 1.3 * distinct_beginnings(requests) < 0.2 * plan.plain_tokens


def test_each_subject_gets_its_own_trunk() -> None:
    plan = make_plan([*few_shot(1, 300, 30), *few_shot(2, 200, 30)], 512, 1e-3)
    assert sorted(trunks(plan)) == [text((1, 300)), text((2, 200))]


def test_a_deeper_trunk_is_taken_where_it_saves_and_the_others_stay_behind_the_shorter_one() -> None:
    opening = text((9, 200))
    requests = [
        Request((*opening, *request.tokens), request.scored)
        for request in [*few_shot(3, 2, 20), *few_shot(1, 400, 40), *few_shot(4, 2, 20)]
    ]
    plan = make_plan(requests, 512, 1e-3)
    assert sorted(trunks(plan), key=len) == [opening, (*opening, *text((1, 400)))]
    assert len(answered(plan)) == len(requests)


def test_what_few_share_is_no_trunk() -> None:
    assert trunks(make_plan(few_shot(1, 30, 2), 512, 1e-3)) == [()]


def test_a_trunk_ends_before_the_first_token_that_predicts() -> None:
    """Of one context and many answers, the context's last token predicts: it must be in the rows."""
    requests = [Request(text((1, 400), (10 + number, 40)), 40) for number in range(60)]
    assert trunks(make_plan(requests, 512, 1e-3)) == [text((1, 400))[:-1]]


def test_rows_that_share_nothing_stay_ordinary_rows_of_like_length() -> None:
    requests = [Request(text((number, 60 + number)), 3) for number in range(20)]
    plan = make_plan(requests, 400, 0.01)
    assert all(row.is_chain for batch in plan.batches for row in batch.rows)
    widths = [[len(row) for row in batch.rows] for batch in plan.batches]
    assert [length for lengths in widths for length in lengths] == list(range(78, 58, -1))
    assert all(len(lengths) * max(lengths) <= 400 for lengths in widths)


def test_a_batch_holds_ordinary_rows_or_branches_and_not_both() -> None:
    pairs = [Request(text((number, 30), (50 + side, 9)), 9) for number in range(9) for side in (0, 1)]
    singles = [Request(text((number, 38)), 1) for number in range(20, 29)]
    kinds = [
        {row.is_chain for row in batch.rows} for batch in make_plan([*pairs, *singles], 400, 0.02).batches
    ]
    assert {True} in kinds
    assert {False} in kinds
    assert {True, False} not in kinds


def test_many_rows_behind_a_long_trunk_do_not_copy_it_without_end() -> None:
    plan = make_plan(few_shot(1, 2000, 200), 1024, 0.05)
    assert trunks(plan) == [text((1, 2000))]
    assert max(len(batch.rows) * (2000 + batch.width) for batch in plan.batches) <= 4 * 2000


def test_equal_requests_give_equal_plans() -> None:
    def told(plan: Plan) -> list[tuple[Batch, ...]]:
        return [(batch.trunk, *(row.tokens.tolist() for row in batch.rows)) for batch in plan.batches]

    requests = random_requests(3)
    assert told(make_plan(requests, 64, 0.01)) == told(make_plan(requests, 64, 0.01))
