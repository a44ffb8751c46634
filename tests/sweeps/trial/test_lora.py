"""LoRA's pass written out, against peft's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from sweeps.trial import lora
from sweeps.trial.lora import kept_mask, make_lean

CPU = torch.device("cpu")
IN, OUT = 24, 40


def layers(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Any, Any]:
    """The same layer twice, as peft makes it and lean, with weights of the adapter in `dtype`."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    settings = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["0"], **config)
    inject_adapter_in_model(settings, model, "one")
    (layer,) = model
    layer.requires_grad_(False)
    for weights in (layer.lora_A, layer.lora_B):
        weights["one"].weight.data.normal_()
        weights["one"].to(dtype).requires_grad_(True)
    other = copy.deepcopy(layer)
    make_lean(other)
    assert type(layer) is not type(other)
    return layer, other


def passed(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input, of A and of B."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, OUT)).sum().backward()
    gradients = [x.grad, layer.lora_A["one"].weight.grad, layer.lora_B["one"].weight.grad]
    return [y.detach(), *(gradient for gradient in gradients if gradient is not None)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], within: float = 1e-6) -> None:
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= within * other.norm()


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN)])
def test_a_pass_equals_pefts(shape: tuple[int, ...]) -> None:
    plain, lean = layers()
    x = torch.randn(shape)
    assert_close(passed(lean, x), passed(plain, x))


def test_a_pass_with_dropout_is_pefts_with_the_numbers_that_were_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, lean = layers(dropout=0.25)
    x = torch.randn(7, IN)
    kept, share = kept_mask(x.shape, 0.25, CPU)
    monkeypatch.setattr(lora, "kept_mask", lambda *_: (kept, share))

    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * kept / share

    plain.lora_dropout["one"] = Fixed()
    expected = passed(plain, x)
    assert_close(passed(lean, x), expected)
    lean.eval()
    assert not torch.equal(lean(x), expected[0])
    assert torch.allclose(lean(x), layers()[0](x), rtol=1e-5, atol=1e-5)


def test_an_adapter_in_float32_on_a_16_bit_layer_computes_in_float32() -> None:
    plain, lean = layers()
    for layer in (plain, lean):
        layer.base_layer.to(torch.bfloat16)
    x = torch.randn(7, IN, dtype=torch.bfloat16)
    assert_close(passed(lean, x), passed(plain, x), 4e-3)


def test_what_a_layer_keeps_is_its_input_and_a_byte_for_each_number_of_it() -> None:
    _, lean = layers(dropout=0.5)
    x = torch.randn(7, IN, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):  # type: ignore[func-returns-value]
        lean(x)
    new = {tensor.data_ptr(): tensor.nbytes for tensor in kept if tensor is not None}
    for tensor in (x, *lean.parameters()):
        new.pop(tensor.data_ptr(), None)
    assert sum(new.values()) == 7 * IN + 7 * 4 * 4


def test_another_adapter_or_none_is_pefts_business() -> None:
    plain, lean = layers()
    x = torch.randn(7, IN)
    lean.enable_adapters(False)
    assert torch.equal(lean(x), lean.base_layer(x))
    lean.enable_adapters(True)
    lean.merge()
    assert torch.allclose(lean(x), plain(x), rtol=1e-4, atol=1e-5)
    lean.unmerge()
    assert torch.allclose(lean(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.5])
def test_the_share_that_is_dropped_is_the_one_asked_for(dropout: float) -> None:
    torch.manual_seed(0)
    kept, share = kept_mask(torch.Size([501, 999]), dropout, CPU)
    assert kept.shape == (501, 999)
    assert set(kept.unique().tolist()) == {0, 1}
    assert share == pytest.approx(1 - dropout, abs=1 / 65536)
    deviation = (dropout * (1 - dropout) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - share) < 4 * deviation
    for axis in (0, 1):  # no row and no column has a pattern
        means = kept.double().mean(axis)
        assert (means - share).abs().max() < 6 * (dropout * (1 - dropout) / kept.shape[axis]) ** 0.5
    neighbours = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
    assert neighbours == pytest.approx(share**2, abs=0.005)


def test_the_mean_stays_what_it_was() -> None:
    """What is kept is scaled up by what is dropped."""
    _, lean = layers(dropout=0.4)
    x = torch.randn(1, IN).repeat(20_000, 1)
    torch.manual_seed(1)
    with torch.no_grad():
        mean = lean(x).mean(0)
        lean.eval()
        assert (mean - lean(x[0])).norm() < 0.01 * lean(x[0]).norm()


def test_the_same_state_of_the_generator_drops_the_same() -> None:
    state = torch.get_rng_state()
    one = kept_mask(torch.Size([30, 7]), 0.5, CPU)[0]
    between = torch.get_rng_state()
    other = kept_mask(torch.Size([30, 7]), 0.5, CPU)[0]
    torch.set_rng_state(state)
    assert torch.equal(kept_mask(torch.Size([30, 7]), 0.5, CPU)[0], one)
    assert torch.equal(torch.get_rng_state(), between)
    assert not torch.equal(one, other)


def test_no_share_above_what_can_be_drawn_divides_by_zero() -> None:
    kept, share = kept_mask(torch.Size([1000]), 0.999_999_9, CPU)
    assert share == 1 / 65536
    assert kept.sum() <= 1
