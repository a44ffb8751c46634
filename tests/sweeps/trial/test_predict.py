"""What a trial is predicted to need: on this device or that, or on none."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sweeps.devices import device_named
from sweeps.spec import TrialSpec
from sweeps.trial.predict import predict

A100 = device_named("a100-40gb")


def spec_of(**sections: Any) -> TrialSpec:
    return TrialSpec.model_validate(sections)


def test_a_trial_on_an_a100_is_predicted_in_full() -> None:
    told = predict(spec_of(), A100)
    assert told.fits is True
    assert told.trainable_params == 20_277_248
    assert told.least_gb < told.peak_memory_gb < A100.usable_bytes / 1e9
    assert told.token_budget in (2048, 4096)
    assert told.train_seconds is not None
    assert told.eval_seconds is not None
    assert told.seconds == told.train_seconds + told.eval_seconds
    assert told.notes == ()


def test_without_a_device_memory_is_told_for_one_row_at_a_time_and_nothing_else_is() -> None:
    told = predict(spec_of(), None)
    assert (told.fits, told.train_seconds, told.eval_seconds, told.seconds) == (None, None, None, None)
    assert told.peak_memory_gb == told.least_gb == predict(spec_of(), A100).least_gb
    assert told.token_budget == 1304
    assert "micro-batches of one row" in told.notes[0]


def test_a_model_that_is_too_large_for_the_device_does_not_fit() -> None:
    large = spec_of(model={"id": "meta-llama/Llama-2-70b-hf"})
    assert predict(large, A100).fits is False
    assert predict(large, device_named("a100-80gb")).fits is False
    recomputed = spec_of(model={"id": "meta-llama/Llama-2-70b-hf"}, train={"gradient_checkpointing": True})
    assert predict(recomputed, device_named("a100-80gb")).fits is True


def test_a_24_gb_card_fits_qlora_on_7b_and_lora_of_a_small_rank_alone() -> None:
    card = device_named("rtx4090")
    assert predict(spec_of(), card).fits is True
    assert predict(spec_of(model={"quantization": "none"}, lora={"targets": "qv"}), card).fits is True
    assert predict(spec_of(model={"quantization": "none"}, lora={"r": 256}), card).fits is False


def test_a_budget_that_would_run_out_of_memory_is_halved_as_the_loop_does() -> None:
    told = predict(spec_of(train={"token_budget": 65536}), A100)
    assert told.token_budget is not None
    assert told.token_budget < 65536
    assert told.peak_memory_gb <= A100.usable_bytes / 1e9


def test_shorter_rows_and_checkpointing_take_less_memory_and_checkpointing_more_time() -> None:
    told = predict(spec_of(train={"token_budget": 2048}), A100)
    shorter = predict(spec_of(data={"max_length": 256}, train={"token_budget": 2048}), A100)
    again = predict(spec_of(train={"token_budget": 2048, "gradient_checkpointing": True}), A100)
    assert shorter.least_gb < told.least_gb
    assert again.peak_memory_gb < told.peak_memory_gb
    assert told.train_seconds is not None
    assert again.train_seconds is not None
    assert again.train_seconds > 1.2 * told.train_seconds


@pytest.mark.parametrize(("model", "decided"), [("Llama-2-7b-hf", False), ("Llama-2-70b-hf", True)])
def test_checkpointing_is_decided_as_the_trial_does(model: str, decided: bool) -> None:
    device = device_named("l40s")
    memory = {
        flag: predict(
            spec_of(model={"id": f"meta-llama/{model}"}, train={"gradient_checkpointing": flag}), device
        ).memory
        for flag in (False, True, "auto")
    }
    assert memory["auto"] == memory[decided] != memory[not decided]


def test_a_tied_head_stays_out_of_4_bits_and_another_one_does_not() -> None:
    kept = {
        (model, flag): predict(spec_of(model={"id": model, "quantize_lm_head": flag}), None).memory.base
        for model in ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-3B")
        for flag in (True, False)
    }
    assert kept["Qwen/Qwen2.5-7B", False] - kept["Qwen/Qwen2.5-7B", True] == 152064 * 3584 * (2 - 0.5625)
    assert kept["Qwen/Qwen2.5-3B", False] == kept["Qwen/Qwen2.5-3B", True]


def test_eight_bit_adamw_keeps_a_quarter_of_the_state_of_32_bits() -> None:
    told = predict(spec_of(optimizer={"name": "adamw_8bit"}, lora={"r": 64}), A100)
    assert told.memory.optimizer == pytest.approx(told.trainable_params * (2 + 8 / 256))


def test_a_base_that_is_only_scored_needs_its_weights_and_the_logits() -> None:
    told = predict(spec_of(model={"quantization": "none"}, train="none"), A100)
    assert (told.trainable_params, told.train_seconds, told.token_budget) == (0, None, None)
    assert told.memory.gradients == told.memory.optimizer == 0
    assert 13.4 < told.peak_memory_gb < 16


def test_a_benchmark_of_ones_own_has_no_time_and_the_training_has() -> None:
    told = predict(spec_of(evaluate={"tasks": ["facts"]}), A100)
    assert told.eval_seconds is None
    assert told.seconds == told.train_seconds
    assert told.notes == ("no time of evaluation: nobody counted the rows of facts",)


def test_float32_has_no_times_because_the_table_has_none() -> None:
    told = predict(spec_of(model={"dtype": "float32", "id": "Qwen/Qwen2.5-0.5B"}), A100)
    assert (told.train_seconds, told.eval_seconds) == (None, None)
    assert told.fits is True
    assert "no times for float32" in told.notes[0]


def test_a_faster_device_takes_less_time() -> None:
    hours = [
        predict(spec_of(), device_named(name)).seconds for name in ("h100", "a100-40gb", "rtx4090", "l4")
    ]
    known = [one for one in hours if one is not None]
    assert len(known) == 4
    assert known == sorted(known)


def test_a_cpu_computes_in_float32_under_its_own_ceiling() -> None:
    small = spec_of(model={"id": "Qwen/Qwen2.5-0.5B"})
    told, on_gpu = predict(small, None, on_cpu=True), predict(small, None)
    assert told.token_budget == 2048
    assert told.memory.adapters == 2 * on_gpu.memory.adapters
    assert told.notes == ("on a CPU the process's own memory comes on top",)


@pytest.mark.parametrize("model", ["tiiuae/falcon-40b", "microsoft/phi-1_5", "google/gemma-2-9b"])
def test_every_family_is_predicted(model: str) -> None:
    told = predict(spec_of(model={"id": model}), device_named("h200"))
    assert told.fits is True
    assert all(size >= 0 for size in told.memory.parts().values())
    assert told.memory.activations > 0


def test_thousands_of_trials_are_predicted_in_seconds() -> None:
    predict(spec_of(), A100)
    specs = [spec_of(lora={"r": r}) for r in (8, 16, 32, 64)]
    start = time.process_time()
    for number in range(1000):
        predict(specs[number % 4], A100)
    assert time.process_time() - start < 4


def test_a_merged_copy_must_fit_beside_the_base_and_is_no_part_of_the_peak() -> None:
    model = {"id": "meta-llama/Llama-2-13b-hf"}
    card = device_named("rtx4090")
    train = {"gradient_checkpointing": True}
    trained = predict(spec_of(model=model, train=train), card)
    merged = predict(spec_of(model=model, train=train, evaluate={"weights": "merged"}), card)
    assert (trained.fits, merged.fits) == (True, False)
    assert merged.peak_memory_gb == trained.peak_memory_gb
    assert merged.least_gb > 26 + 6
    assert "scored in an unquantised copy, which takes 2" in merged.notes[-1]
    assert predict(spec_of(model=model, evaluate={"weights": "merged"}), A100).fits is True
