from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from sweeps.errors import BadModel
from sweeps.spec import LoraSpec, ModelSpec, TrialSpec
from sweeps.trial import estimate
from sweeps.trial.adapter import attach
from sweeps.trial.base import load_base
from sweeps.trial.estimate import frozen_params, trainable_params

LLAMA_2_7B = "meta-llama/Llama-2-7b-hf"


def spec_of(model: str | Path = LLAMA_2_7B, **lora: Any) -> TrialSpec:
    return TrialSpec(model=ModelSpec(id=str(model)), lora=LoraSpec.model_validate(lora))


@pytest.mark.parametrize(
    ("lora", "count"),
    [
        ({"r": 8}, 20_277_248),
        ({"r": 16}, 40_554_496),
        ({"r": 256}, 648_871_936),
        ({"r": 8, "targets": "qv"}, 4_194_304),
    ],
)
def test_llama_2_7b_has_the_articles_counts(lora: dict[str, Any], count: int) -> None:
    assert trainable_params(spec_of(**lora)) == count


# Frozen totals as published; trainable ones are r * the sum of both sides, written out by hand.
@pytest.mark.parametrize(
    ("model", "frozen", "per_rank"),
    [
        (LLAMA_2_7B, 6_738_415_616, 32 * (8 * 4096 + 3 * (4096 + 11008)) + 4096 + 32000),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320, 40 * (8 * 5120 + 3 * (5120 + 13824)) + 5120 + 32000),
        (
            "mistralai/Mistral-7B-v0.1",
            7_241_732_096,
            32 * (4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336)) + 4096 + 32000,
        ),
        ("microsoft/phi-1_5", 1_418_270_720, 24 * (8 * 2048 + 2 * (2048 + 8192)) + 2048 + 51200),
        (
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            134_515_008,
            30 * (4 * 576 + 2 * (576 + 192) + 3 * (576 + 1536)) + 576 + 49152,
        ),
    ],
)
def test_the_shipped_architectures_have_their_published_sizes(model: str, frozen: int, per_rank: int) -> None:
    assert frozen_params(ModelSpec(id=model)) == frozen
    assert trainable_params(spec_of(model, r=3)) == 3 * per_rank


# As the hub counts the safetensors of each, tied heads once.
PUBLISHED = {
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "tiiuae/falcon-40b": 41_303_293_952,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b-pt": 999_885_952,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
}


def test_the_common_models_have_their_published_sizes() -> None:
    counted = {model: frozen_params(ModelSpec(id=model)) for model in PUBLISHED}
    assert counted == PUBLISHED


def test_a_chat_version_has_the_shapes_of_its_model() -> None:
    assert trainable_params(spec_of("meta-llama/Llama-2-7b-chat-hf")) == trainable_params(spec_of())
    folder = resources.files("sweeps") / "models"
    same = [json.loads(file.read_text()).get("same_as") for file in folder.iterdir()]
    of = [name for name in same if name]
    assert len(of) >= 20
    assert all((folder / f"{name.replace('/', '__')}.json").is_file() for name in of)


def test_the_packaged_model_is_known_without_its_package() -> None:
    packaged, hub = next(iter(estimate._PACKAGED.items()))
    assert frozen_params(ModelSpec(id=packaged)) == frozen_params(ModelSpec(id=hub))


def test_falcon_counts_its_fused_attention() -> None:
    attention = 8192 + (128 + 2 * 8) * 64
    assert trainable_params(spec_of("tiiuae/falcon-40b", r=1, targets="qv")) == 60 * attention
    per_block = attention + 2 * 8192 + 2 * (8192 + 4 * 8192)
    assert trainable_params(spec_of("tiiuae/falcon-40b", r=1)) == 60 * per_block + 8192 + 65024


def test_every_shipped_architecture_is_known_by_its_hub_id() -> None:
    files = list((resources.files("sweeps") / "models").iterdir())
    own = [file.name for file in files if "same_as" not in json.loads(file.read_text())]
    names = [name.removesuffix(".json").replace("__", "/") for name in own if name.endswith(".json")]
    assert len(names) == len(own) >= 30
    for name in names:
        assert frozen_params(ModelSpec(id=name)) > 1e8


@pytest.mark.parametrize("targets", ["all", "qv", ["down_proj", "lm_head"]])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_plan_is_what_the_adapter_then_has(tiny_model_dir: Path, targets: Any, quantization: str) -> None:
    spec = spec_of(tiny_model_dir, r=5, targets=targets)
    base = load_base(ModelSpec.model_validate({"id": str(tiny_model_dir), "quantization": quantization}))
    with attach(base, spec.lora, 0) as adapter:
        assert sum(parameter.numel() for parameter in adapter.parameters()) == trainable_params(spec)


def test_dora_counts_a_length_for_each_output() -> None:
    per_block = 4 * 4096 + 2 * 11008 + 4096
    assert trainable_params(spec_of(r=8, dora=True)) == 20_277_248 + 32 * per_block + 32000
    assert trainable_params(spec_of(r=8, rslora=True)) == 20_277_248


@pytest.mark.parametrize("targets", ["all", "qv"])
def test_the_plan_of_dora_is_what_the_adapter_then_has(tiny_model_dir: Path, targets: Any) -> None:
    spec = spec_of(tiny_model_dir, r=5, targets=targets, dora=True)
    with attach(load_base(ModelSpec(id=str(tiny_model_dir))), spec.lora, 0) as adapter:
        assert sum(parameter.numel() for parameter in adapter.parameters()) == trainable_params(spec)


def test_a_gguf_file_tells_its_architecture_before_and_after_it_was_converted(
    tiny_gguf: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPSVC_CACHE", str(tmp_path))
    expected = trainable_params(spec_of(tiny_model_dir))
    for _ in range(2):
        estimate._outline.cache_clear()
        assert trainable_params(spec_of(tiny_gguf)) == expected
        load_base(ModelSpec(id=str(tiny_gguf), quantization="none"))


def test_shared_weights_are_counted_once(tiny_model_dir: Path, tiny_tied_model_dir: Path) -> None:
    apart, shared = (frozen_params(ModelSpec(id=str(d))) for d in (tiny_model_dir, tiny_tied_model_dir))
    assert apart - shared == 300 * 64


def test_a_base_that_is_only_scored_trains_nothing() -> None:
    assert trainable_params(spec_of("nobody/nothing").untrained()) == 0


def test_an_architecture_that_cannot_be_known_is_a_bad_model_with_the_remedy() -> None:
    with pytest.raises(BadModel, match="the hub was not reached and its cache lacks it"):
        trainable_params(spec_of("nobody/nothing"))


def test_a_target_that_matches_nothing_is_known_when_planning() -> None:
    with pytest.raises(BadModel, match=r"'q_prj' \(did you mean 'q_proj'\?\)"):
        trainable_params(spec_of(targets=["q_prj"]))


def test_an_architecture_that_is_no_causal_language_model_is_known_when_planning(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(BadModel, match="it must be a causal language model"):
        trainable_params(spec_of(tmp_path))


def test_ten_thousand_trials_are_planned_in_a_moment() -> None:
    trainable_params(spec_of())
    specs = [spec_of(r=r) for r in (8, 16, 32, 64)]
    start = time.perf_counter()
    for number in range(10_000):
        trainable_params(specs[number % 4])
    assert time.perf_counter() - start < 2


NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = refuse
from sweeps.spec import TrialSpec
from sweeps.trial.estimate import trainable_params
print(trainable_params(TrialSpec()))
import sys
print(sorted({"peft", "bitsandbytes"} & set(sys.modules)))
"""


def test_planning_asks_no_network_and_needs_no_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK],
        env={"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(estimate.__file__).parents[2]), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["20277248", "[]"], done.stderr
