from __future__ import annotations

import contextlib
import itertools
import json
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from sweeps.errors import BadModel
from sweeps.spec import LoraSpec, ModelSpec
from sweeps.trial import adapter as adapter_module
from sweeps.trial.adapter import Adapter, attach
from sweeps.trial.base import Base, load_base

IDS = torch.arange(3, 43).view(4, 10)
LORA = LoraSpec(r=4, alpha=8.0)
ALL_LAYERS = 2 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3) + (64 + 300)  # sum of in + out


def base_of(folder: Path, **fields: Any) -> Base:
    return load_base(ModelSpec.model_validate({"id": str(folder), "quantization": "none", **fields}))


# Attributes that transformers makes and nothing reads while checkpointing is off.
LEFT_BY_CHECKPOINTING = {
    "_gradient_checkpointing_func",
    "gradient_checkpointing",
    "_require_grads_hook",
    "_require_grads_hooks",
}


@pytest.fixture(scope="module")
def resident(tiny_model_dir: Path) -> Base:
    """A base that several tests use one after another, as trials do."""
    return base_of(tiny_model_dir)


@pytest.fixture
def base(resident: Base) -> Iterator[Base]:
    before = traces(resident.model)
    yield resident
    assert traces(resident.model) == before


def traces(model: Any) -> dict[str, Any]:
    """Everything that a model is made of, by identity: modules, attributes, parameters, hooks, modes."""
    found: dict[str, Any] = {
        "peft_config": hasattr(model, "peft_config"),
        "checkpointing": model.is_activation_checkpointing,
    }
    for name, module in model.named_modules():
        attributes = sorted(set(vars(module)) - LEFT_BY_CHECKPOINTING)
        found[name] = (id(module), type(module), module.training, attributes)
        found[f"{name} hooks"] = sum(
            len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name} tensor"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad is None)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(IDS).logits
    return output


def train(adapter: Adapter, steps: int = 3, seed: int = 5) -> list[torch.Tensor]:
    """A few steps with dropout from a seed; the weights that they lead to."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(steps):
            backward(adapter)
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in adapter.parameters()]


def backward(adapter: Adapter) -> torch.Tensor:
    predicted = adapter.model(input_ids=IDS, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def fail_while_training(base: Base) -> None:
    with contextlib.suppress(ZeroDivisionError), attach(base, LORA, 1) as adapter:
        backward(adapter)
        raise ZeroDivisionError


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def weights(adapter: Adapter) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in adapter.parameters()]


# --- put on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_target_carries_lora_and_the_count_is_the_formulas(
    tiny_model_dir: Path, tiny_tied_model_dir: Path, quantization: str, tied: bool
) -> None:
    base = base_of(tiny_tied_model_dir if tied else tiny_model_dir, quantization=quantization)
    with attach(base, LORA, 0) as adapter:
        carrying = {name for name, module in adapter.model.named_modules() if isinstance(module, LoraLayer)}
        assert carrying == set(adapter.targets)
        assert "lm_head" in carrying
        trainable = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
        assert {id(parameter) for parameter in trainable} == {id(mine) for mine in adapter.parameters()}
        assert sum(parameter.numel() for parameter in trainable) == adapter.trainable_params == 4 * ALL_LAYERS
        assert (base.model.lm_head.weight is base.model.model.embed_tokens.weight) is tied


def test_query_and_value_alone_are_adapted_when_the_targets_are_qv(base: Base) -> None:
    with attach(base, LoraSpec(r=2, targets="qv"), 0) as adapter:
        assert adapter.trainable_params == 2 * 2 * ((64 + 64) + (64 + 32))
        assert {name.split(".")[-1] for name in adapter.targets} == {"q_proj", "v_proj"}
        assert adapter.notes[0] == "adapter on 4 linear layers (q_proj, v_proj): lora.targets is qv"


def test_a_target_that_matches_nothing_is_refused_before_the_base_is_touched(base: Base) -> None:
    with pytest.raises(BadModel, match=r"'v_prj' \(did you mean 'v_proj'\?\)"):
        attach(base, LoraSpec(targets=("q_proj", "v_prj")), 0)


def test_a_target_that_peft_passes_over_is_refused(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    make = adapter_module._peft_config

    def forgetful(base: Base, lora: LoraSpec, layers: Any) -> Any:
        return make(base, lora, {name: shape for name, shape in layers.items() if name != "lm_head"})

    monkeypatch.setattr(adapter_module, "_peft_config", forgetful)
    with pytest.raises(BadModel, match=r"on its 15 targets .* got 14 layers .*differing: lm_head"):
        attach(base, LORA, 0)


def test_an_adapter_starts_as_the_identity(base: Base) -> None:
    before = logits(base.model)
    with attach(base, LORA, 0) as adapter:
        assert torch.equal(logits(adapter.model), before)
        train(adapter)
        adapter.model.eval()
        assert not torch.equal(logits(adapter.model), before)
    assert torch.equal(logits(base.model), before)


def test_the_weights_come_from_the_seed_alone(base: Base) -> None:
    with attach(base, LORA, 11) as adapter:
        first = weights(adapter)
    torch.rand(100)
    with attach(base, LORA, 11) as adapter:
        assert equal(weights(adapter), first)
    with attach(base, LORA, 12) as adapter:
        assert not equal(weights(adapter), first)


def test_the_processs_random_numbers_are_left_alone(base: Base) -> None:
    before = torch.get_rng_state()
    with attach(base, LORA, 11):
        assert torch.equal(torch.get_rng_state(), before)


def test_the_update_is_scaled_by_alpha_over_r(base: Base) -> None:
    layer = base.model.model.layers[0].self_attn.q_proj
    x = torch.rand(3, 64)
    with attach(base, LoraSpec(r=4, alpha=0.5, targets="qv"), 0) as adapter:
        a, b = adapter.parameters()[:2]
        with torch.no_grad():
            b.fill_(0.25)
        adapted = base.model.model.layers[0].self_attn.q_proj(x)
        torch.testing.assert_close(adapted, layer(x) + 0.5 / 4 * x @ a.T @ b.T)


def test_a_rank_above_the_smaller_side_of_a_layer_is_refused_before_the_base_is_touched(base: Base) -> None:
    with attach(base, LoraSpec(r=32), 0) as adapter:  # k_proj and v_proj are 64 x 32
        assert adapter.trainable_params == 32 * ALL_LAYERS
        assert torch.isfinite(backward(adapter))
    with pytest.raises(BadModel) as refused:
        attach(base, LoraSpec(r=33), 0)
    assert str(refused.value) == (
        "lora.r <= the smaller side of every layer in lora.targets must hold, got r=33 with 4 narrower "
        "layers, the narrowest model.layers.0.self_attn.k_proj (64 x 32); lower lora.r to 32, or list "
        "wider layers alone in lora.targets"
    )
    with attach(base, LoraSpec(r=33, targets=("q_proj", "down_proj")), 0) as adapter:
        assert torch.isfinite(backward(adapter))


def test_a_rank_stabilised_update_is_scaled_by_alpha_over_the_root_of_r(base: Base) -> None:
    layer = base.model.model.layers[0].self_attn.q_proj
    x = torch.rand(3, 64)
    with attach(base, LoraSpec(r=4, alpha=0.5, targets="qv", rslora=True), 0) as adapter:
        a, b = adapter.parameters()[:2]
        with torch.no_grad():
            b.fill_(0.25)
        adapted = base.model.model.layers[0].self_attn.q_proj(x)
        torch.testing.assert_close(adapted, layer(x) + 0.5 / 2 * x @ a.T @ b.T)


# --- DoRA -------------------------------------------------------------------------------------------

DORA = LoraSpec(r=4, alpha=8.0, dora=True)


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4"])
def test_dora_trains_a_length_for_each_output_besides(tiny_model_dir: Path, quantization: str) -> None:
    base = base_of(tiny_model_dir, quantization=quantization)
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64) + 300
    with attach(base, DORA, 0) as adapter:
        trainable = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in trainable)
        assert count == adapter.trainable_params == 4 * ALL_LAYERS + outputs
        lengths = {name: value for name, value in adapter.named_parameters().items() if "magnitude" in name}
        assert len(lengths) == 15
        assert not [name for name in lengths if "adapter0" in name]
        before = weights(adapter)
        adapter.model.train()
        first = backward(adapter)
        adapter.model.zero_grad()
        after = train(adapter, steps=8)
        assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert backward(adapter) < first


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ["auto", "bfloat16"])
def test_dora_starts_as_the_identity_in_every_dtype(
    tiny_model_dir: Path, quantization: str, dtype: str, wanted: Any
) -> None:
    base = base_of(tiny_model_dir, quantization=quantization, dtype=dtype)
    before = logits(base.model)
    with attach(base, LoraSpec(r=4, dora=True, dtype=wanted), 0) as adapter:
        assert torch.equal(logits(adapter.model), before)
        kinds = {name.split(".")[-2]: value.dtype for name, value in adapter.named_parameters().items()}
        assert kinds["lora_magnitude_vector"] == torch.float32
        assert kinds["lora_A"] == kinds["lora_B"] == adapter.dtype
        assert any(note.startswith("DoRA's lengths in float32") for note in adapter.notes) is (
            adapter.dtype == torch.bfloat16
        )


def test_dora_is_what_its_authors_say(base: Base) -> None:
    """m * (W + BA) / |W + BA|, row by row (Liu et al. 2024, eq. 5)."""
    layer = base.model.model.layers[0].self_attn.q_proj
    x = torch.rand(3, 64)
    with attach(base, LoraSpec(r=4, alpha=8.0, targets=("q_proj",), dropout=0.0, dora=True), 0) as adapter:
        named = {name: value for name, value in adapter.named_parameters().items() if "layers.0" in name}
        a, b, m = named.values()
        with torch.no_grad():
            b.normal_(generator=torch.Generator().manual_seed(0))
            m.mul_(1.5)
        moved = layer.weight + 2 * b @ a
        expected = x @ (m[:, None] * moved / moved.norm(dim=1, keepdim=True)).T
        torch.testing.assert_close(base.model.model.layers[0].self_attn.q_proj(x), expected)


def test_dora_leaves_no_trace_and_no_memory(base: Base) -> None:
    adapter = attach(base, DORA, 0)
    train(adapter)
    held = [weakref.ref(parameter) for parameter in adapter.parameters()]
    adapter.detach()
    assert len(held) == 45
    assert [reference() for reference in held] == [None] * 45


def test_dora_beside_other_adapters_keeps_its_own(base: Base) -> None:
    with attach(base, DORA, 3) as adapter:
        alone = train(adapter)
    first = attach(base, LORA, 1)
    second = attach(base, DORA, 3)
    assert equal(train(second), alone)
    third = attach(base, LORA, 2)
    third.detach()
    assert all(parameter.requires_grad for parameter in second.parameters())
    second.detach()
    first.detach()


@pytest.mark.parametrize("lora", [DORA, LoraSpec(r=4, alpha=8.0, rslora=True)], ids=["dora", "rslora"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_peft_reads_back_what_it_offers(
    tiny_model_dir: Path, tmp_path: Path, lora: LoraSpec, quantization: str
) -> None:
    base = base_of(tiny_model_dir, quantization=quantization)
    with attach(base, lora, 0) as adapter:
        train(adapter)
        adapter.save(tmp_path / "adapter")
        adapter.model.eval()
        expected = logits(adapter.model)
    fresh = base_of(tiny_model_dir, quantization=quantization)
    again = peft.PeftModel.from_pretrained(fresh.model, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize(
    ("quantization", "dtype", "wanted", "given"),
    [
        ("none", "float32", "auto", torch.float32),
        ("none", "bfloat16", "auto", torch.bfloat16),
        ("none", "bfloat16", "float32", torch.float32),
        ("none", "float16", "auto", torch.float32),
        ("nf4", "float32", "auto", torch.float32),
        ("nf4", "bfloat16", "auto", torch.bfloat16),
        ("nf4", "bfloat16", "float32", torch.float32),
        ("fp4", "float32", "bfloat16", torch.bfloat16),
    ],
)
def test_adapters_of_every_dtype_train_on_bases_of_every_dtype(
    tiny_model_dir: Path, quantization: str, dtype: str, wanted: Any, given: torch.dtype
) -> None:
    base = base_of(tiny_model_dir, quantization=quantization, dtype=dtype)
    with attach(base, LoraSpec(r=4, dtype=wanted), 0) as adapter:
        assert {parameter.dtype for parameter in adapter.parameters()} == {given}
        adapter.model.train()
        first = backward(adapter)
        assert all(parameter.grad.dtype == given for parameter in adapter.parameters())
        train(adapter, steps=5)
        assert backward(adapter) < first


def test_the_dtype_is_announced_with_its_reason(base: Base, tiny_model_dir: Path) -> None:
    with attach(base, LORA, 0) as adapter:
        assert adapter.notes[1] == "adapter dtype float32: the model's compute dtype"
    with attach(base, LoraSpec(dtype="bfloat16"), 0) as adapter:
        assert adapter.notes[1] == "adapter dtype bfloat16: set by lora.dtype"
    with attach(base_of(tiny_model_dir, dtype="float16"), LORA, 0) as adapter:
        assert adapter.notes[1] == "adapter dtype float32: a float16 adapter would not train"


# --- taken off (the fixture `base` looks for traces after each test) ---------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_trial_after_another_equals_it_on_a_fresh_base(tiny_model_dir: Path, quantization: str) -> None:
    with attach(base_of(tiny_model_dir, quantization=quantization), LORA, 3) as adapter:
        fresh = train(adapter)
    used = base_of(tiny_model_dir, quantization=quantization)
    with attach(used, LoraSpec(r=8, targets="qv", dropout=0.5), 9) as adapter:
        train(adapter, seed=1)
        adapter.model.eval()
        logits(adapter.model)
    fail_while_training(used)
    with attach(used, LORA, 3) as adapter:
        assert equal(train(adapter), fresh)


def test_an_adapter_that_could_not_be_put_on_leaves_no_trace(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, calls = LoraLayer.update_layer, []

    def fails_at_the_sixth(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        if len(calls) == 6:
            raise ValueError("no room")
        update(self, *args, **kwargs)

    base.spare.clear()
    monkeypatch.setattr(LoraLayer, "update_layer", fails_at_the_sixth)
    with pytest.raises(BadModel, match="must take LoRA: no room"):
        attach(base, LORA, 0)
    assert len(calls) == 6


def test_a_detached_adapter_holds_no_memory(base: Base) -> None:
    adapter = attach(base, LORA, 0)
    train(adapter)
    held = [weakref.ref(parameter) for parameter in adapter.parameters()]
    layers = [module for module in adapter.model.modules() if isinstance(module, LoraLayer)]
    adapter.detach()
    assert [reference() for reference in held] == [None] * 30
    left = [value for layer in layers for name, value in layer.named_parameters() if "lora_" in name]
    assert [value.numel() for value in left] == [0] * 30  # what is left for the next adapter has no weights
    assert adapter.parameters() == ()


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ({"quantization": "nf4"}, {}),
        ({"quantization": "nf4", "dtype": "bfloat16"}, {"dropout": 0.25}),
        ({"dtype": "bfloat16"}, {"dtype": "float32", "rslora": True, "alpha": 2.5}),
    ],
    ids=["nf4", "nf4 in bfloat16 with dropout", "bfloat16 under float32"],
)
def test_layers_that_are_used_again_are_what_new_ones_would_be(
    tiny_model_dir: Path, tmp_path: Path, model: dict[str, Any], lora: dict[str, Any]
) -> None:
    used, fresh = (base_of(tiny_model_dir, **model) for _ in range(2))
    first = attach(used, LoraSpec(r=2, alpha=3.0, dropout=0.1), 5)
    train(first)
    first.enable_gradient_checkpointing()
    first.detach()
    assert used.spare
    spec = LoraSpec(r=5, **{"alpha": 10.0, **lora})
    adapters = [attach(base, spec, 7) for base in (used, fresh)]
    assert not used.spare
    layers = [[layer for _, layer in adapter_module._lora_layers(a.model)] for a in adapters]
    for again, new in zip(*layers, strict=True):
        assert repr(again) == repr(new)
        ours = {name: value for name, value in vars(again).items() if not name.startswith("_")}
        assert ours == {name: value for name, value in vars(new).items() if not name.startswith("_")}
    for again, new in zip(*(a.named_parameters().items() for a in adapters), strict=True):
        assert (again[0], again[1].dtype, again[1].requires_grad) == (new[0], new[1].dtype, True)
        assert torch.equal(again[1], new[1])
    assert torch.equal(logits(used.model), logits(fresh.model))
    assert equal(*(train(adapter) for adapter in adapters))
    for adapter, name in zip(adapters, ("used", "fresh"), strict=True):
        adapter.save(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "used" / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()


def test_layers_are_used_again_only_for_the_same_targets_and_never_with_dora(base: Base) -> None:
    for before, after in (
        (LORA, LoraSpec(targets="qv")),
        (LORA, LoraSpec(dora=True)),
        (LoraSpec(dora=True), LORA),
    ):
        attach(base, before, 0).detach()
        left = [layer for spare in base.spare for _, layer in spare.carrying]
        with attach(base, after, 0) as adapter:
            assert not set(left) & set(adapter.model.modules())


def test_detaching_twice_is_detaching_once(base: Base) -> None:
    adapter = attach(base, LORA, 0)
    adapter.detach()
    adapter.detach()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradient_checkpointing_changes_no_gradient_and_ends_with_the_adapter(
    tiny_model_dir: Path, quantization: str
) -> None:
    base = base_of(tiny_model_dir, quantization=quantization)
    before = traces(base.model)
    gradients = []
    for checkpointing in (False, True, False):
        with attach(base, LORA, 0) as adapter:
            if checkpointing:
                adapter.enable_gradient_checkpointing()
            adapter.model.train()
            assert adapter.model.is_activation_checkpointing is checkpointing
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                backward(adapter)
            gradients.append([parameter.grad for parameter in adapter.parameters()])
        assert traces(base.model) == before
    assert equal(gradients[0], gradients[1])
    assert equal(gradients[0], gradients[2])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_adapters_on_one_base_do_not_touch_each_other(base: Base, order: tuple[int, ...]) -> None:
    specs = [LoraSpec(r=2, targets="qv"), LoraSpec(r=3, targets="all"), LoraSpec(r=2, targets="qv")]
    alone = []
    for seed, lora in enumerate(specs):
        with attach(base, lora, seed) as adapter:
            train(adapter)
            adapter.model.eval()
            alone.append(logits(base.model))
    adapters: dict[int, Adapter] = {}
    for seed, lora in enumerate(specs):
        adapters[seed] = attach(base, lora, seed)
        train(adapters[seed])
    base.model.eval()
    for number in order:
        assert torch.equal(logits(base.model), alone[max(adapters)])  # the one put on last is in use
        for adapter in adapters.values():
            assert sum(parameter.numel() for parameter in adapter.parameters()) == adapter.trainable_params
            assert all(parameter.requires_grad for parameter in adapter.parameters())
        adapters.pop(number).detach()
        carrying = {name for name, module in base.model.named_modules() if isinstance(module, LoraLayer)}
        assert carrying == {name for adapter in adapters.values() for name in adapter.targets}


# --- saved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_adapter_is_read_back_by_peft_with_the_same_results(
    tiny_model_dir: Path, tiny_tied_model_dir: Path, tmp_path: Path, tied: bool
) -> None:
    folder = tiny_tied_model_dir if tied else tiny_model_dir
    with attach(base_of(folder), LORA, 0) as adapter:
        train(adapter)
        adapter.save(tmp_path / "adapter")
        adapter.model.eval()
        expected = logits(adapter.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        again = peft.PeftModel.from_pretrained(base_of(folder).model, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


def test_a_saved_adapter_holds_its_own_weights_and_config_and_nothing_else(
    base: Base, tmp_path: Path
) -> None:
    with attach(base, LORA, 0) as adapter:
        adapter.save(tmp_path / "adapter")
        count = adapter.trainable_params
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == count
    assert not [name for name in tensors if "embed" in name or "base_layer" in name or "adapter0" in name]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, base.spec.id)
    assert config["target_modules"] == sorted(config["target_modules"])


def test_the_same_trial_saves_the_same_bytes(base: Base, tmp_path: Path) -> None:
    for name in ("one", "two"):
        with attach(base, LORA, 0) as adapter:
            adapter.save(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
