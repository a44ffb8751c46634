"""Log-likelihoods on branches equal those of each request alone, or the model is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    T5Config,
)

from sweeps.spec import EvaluateSpec
from sweeps.trial import scoring
from sweeps.trial.prefixtree import Plan, Request, make_plan
from sweeps.trial.scoring import CannotShare, obstacle, pair_cost, score, token_budget
from tests.sweeps.trial.test_prefixtree import random_requests, text

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def tiny(config: PreTrainedConfig, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config, **settings).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny(LlamaConfig(**SIZES))


def small(requests: Sequence[Request]) -> list[Request]:
    """The same tree with tokens of a small vocabulary."""
    return [
        Request(tuple((token // 1000 * 7 + token) % 50 for token in request.tokens), request.scored)
        for request in requests
    ]


def with_trunk() -> Plan:
    """Twelve questions with two answers each, all behind one beginning of 90 tokens, and some without it."""
    questions = [
        Request(text((1, 90), (2 + number, 7), (20 + side, 3)), 3)
        for number in range(12)
        for side in range(2)
    ]
    plan = make_plan(small([*questions, *random_requests(5)]), 40, 0.05)
    assert {bool(batch.trunk) for batch in plan.batches} == {True, False}
    return plan


def alone(model: Any, request: Request) -> tuple[float, bool]:
    ids = torch.tensor([request.tokens])
    logits = model(ids[:, :-1]).logits[0, -request.scored :].log_softmax(-1)
    target = ids[0, -request.scored :]
    found = logits.gather(1, target[:, None]).sum()
    return float(found), bool((logits.argmax(-1) == target).all())


def nothing() -> None:
    pass


MODELS = {
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3),
    "gpt_neox": GPTNeoXConfig(**{**SIZES, "num_key_value_heads": 4}),
    "granite, which scales its logits": GraniteConfig(**SIZES, logits_scaling=8.0, embedding_multiplier=3.0),
    "gemma2, which caps its logits": Gemma2Config(
        **SIZES, final_logit_softcapping=3.0, query_pre_attn_scalar=8, sliding_window=256
    ),
}


@pytest.mark.parametrize(
    ("name", "kernel"), [("llama", "sdpa"), ("gpt2", "sdpa"), *((name, "eager") for name in MODELS)]
)
def test_a_request_on_its_branch_gets_what_it_gets_alone(name: str, kernel: str) -> None:
    model, plan = tiny(MODELS[name], attn_implementation=kernel), with_trunk()
    answers = score(model, plan, nothing)
    expected = [alone(model, request) for request in plan.requests]
    assert [answer.loglikelihood for answer in answers] == pytest.approx(
        [value for value, _ in expected], abs=1e-4
    )
    assert [answer.is_greedy for answer in answers] == [hit for _, hit in expected]
    assert len({round(value, 3) for value, _ in expected}) > 30


def test_a_likeliest_continuation_is_told(llama: Any) -> None:
    begun = (3, 4, 5)
    for _ in range(3):
        begun = (*begun, int(llama(torch.tensor([begun])).logits[0, -1].argmax()))
    other = (*begun[:-1], (begun[-1] + 1) % 50)
    plan = make_plan([Request(begun, 3), Request(other, 3)], 64, 0.01)
    assert [answer.is_greedy for answer in score(llama, plan, nothing)] == [True, False]


def test_few_logits_at_once_give_the_same(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = with_trunk()
    at_once = score(llama, plan, nothing)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 150)
    few = score(llama, plan, nothing)
    assert [answer.loglikelihood for answer in few] == pytest.approx(
        [answer.loglikelihood for answer in at_once], abs=1e-5
    )


def test_the_same_plan_gives_the_same_bits(llama: Any) -> None:
    assert score(llama, with_trunk(), nothing) == score(llama, with_trunk(), nothing)


def test_a_log_probability_of_a_16_bit_model_has_the_digits_of_float32() -> None:
    plan = make_plan([Request((1, 2, 3), 1)], 64, 0.01)
    (answer,) = score(tiny(LlamaConfig(**SIZES), dtype=torch.bfloat16), plan, nothing)
    rounded = torch.tensor(answer.loglikelihood, dtype=torch.bfloat16).item()
    assert answer.loglikelihood != rounded == pytest.approx(answer.loglikelihood, rel=0.01)


def test_no_logit_is_computed_where_nothing_is_scored(llama: Any) -> None:
    plan, rows = with_trunk(), []
    hook = llama.lm_head.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[1]))
    score(llama, plan, nothing)
    hook.remove()
    of_probes = sum(len(plan.requests[number].inputs) for number in scoring._probes(plan).values())
    places = {(id(row), place) for batch in plan.batches for row in batch.rows for place in row.at.tolist()}
    assert sum(rows) == of_probes + len(places) < of_probes + plan.tokens


def test_a_batch_too_large_for_the_memory_is_halved(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, sizes, run = with_trunk(), [], scoring._Runner._run
    expected = score(llama, plan, nothing)

    def scarce(runner: Any, batch: Any, cache: Any) -> Any:
        sizes.append(len(batch.rows))
        if len(batch.rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(runner, batch, cache)

    monkeypatch.setattr(scoring._Runner, "_run", scarce)
    halved = score(llama, plan, nothing)
    assert max(sizes) > 1
    assert [answer.loglikelihood for answer in halved] == pytest.approx(
        [answer.loglikelihood for answer in expected], abs=1e-5
    )
    monkeypatch.setattr(
        scoring._Runner, "_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        score(llama, plan, nothing)


def test_it_is_asked_to_stop_before_each_batch(llama: Any) -> None:
    plan, asked = with_trunk(), []
    score(llama, plan, lambda: asked.append(1))
    assert len(asked) == len(plan.batches) + 1  # and before the requests that are scored alone


def test_the_kernel_without_masks_is_replaced_and_put_back(llama: Any) -> None:
    llama.config._attn_implementation = "flash_attention_2"
    try:
        with scoring._kernel_for_masks(llama):
            assert llama.model.layers[0].self_attn.config._attn_implementation == "sdpa"
        assert llama.config._attn_implementation == "flash_attention_2"
    finally:
        llama.config._attn_implementation = "sdpa"


# --- models that cannot -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            FalconConfig(
                vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True
            ),
            "ALiBi",
        ),
        (T5Config(vocab_size=50, d_model=32, d_ff=32, num_layers=1, num_heads=2), "not a causal one"),
    ],
)
def test_what_a_configuration_tells_is_an_obstacle(config: Any, reason: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config

        def get_decoder(self) -> None:
            return None

    assert reason in obstacle(Model())


def test_a_model_whose_blocks_stand_alone_has_no_obstacle(llama: Any) -> None:
    assert not obstacle(llama)
    assert "without its head" in obstacle(llama.model)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**SIZES, sliding_window=60), "sees 60 tokens back, and the longest request has 99"),
        (
            LlamaConfig(
                **{**SIZES, "max_position_embeddings": 64},
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            ),
            "beyond 64 tokens",
        ),
    ],
)
def test_a_request_longer_than_what_the_model_sees_is_refused(config: Any, reason: str) -> None:
    with pytest.raises(CannotShare, match=reason):
        score(tiny(config), with_trunk(), nothing)


def test_a_model_that_takes_no_positions_is_refused_in_its_own_words() -> None:
    model = tiny(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(CannotShare, match="takes no mask, positions or cached trunk"):
        score(model, with_trunk(), nothing)


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_what_it_is_given_is_found_out(ignored: str) -> None:
    model = tiny(LlamaConfig(**SIZES))
    forward = model.model.forward
    model.model.forward = lambda **given: forward(**{name: given[name] for name in given if name != ignored})
    with pytest.raises(CannotShare, match=r"on a branch, and .* alone"):
        score(
            model,
            make_plan(small([Request(text((1, 20), (2 + n, 9)), 9) for n in range(3)]), 64, 1e-3),
            nothing,
        )


# --- sizes --------------------------------------------------------------------------------------------


def test_a_pair_of_tokens_is_weighed_against_the_weights_of_a_block(llama: Any) -> None:
    block = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48
    assert pair_cost(llama) == pytest.approx(3 * 4 * 32 / (2 * block))
    # GPT-2's layers are of a class of its own: the usual 12 squares of its width.
    assert pair_cost(tiny(MODELS["gpt2"])) == pytest.approx(3 * 4 * 32 / (2 * 12 * 32**2))


@pytest.mark.parametrize(
    ("rows", "on_cpu", "expected"),
    [(16, False, 8192), (4, False, 2048), (16, True, 2048), (2, True, 1024)],
)
def test_a_batch_has_512_tokens_for_each_row_and_on_a_cpu_2048_at_the_most(
    rows: int, on_cpu: bool, expected: int
) -> None:
    assert token_budget(EvaluateSpec(batch_size=rows), on_cpu) == expected
