"""Answers of an exported folder: greedy, to the prompt of the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sweeps.errors import BadModel
from sweeps.prompts import read_prompt
from sweeps.spec import TrialSpec
from sweeps.trial.adapter import attach
from sweeps.trial.base import load_base
from sweeps.trial.generate import generate
from sweeps.trial.merge import merge, save_model
from tests.tiny import tiny_spec

TEXT = "Which river flows through Brask?"
PROMPT = read_prompt("alpaca").render({"instruction": TEXT, "input": ""})


@pytest.fixture(scope="module")
def spec(tiny_tied_model_dir: Path, alpaca_rows_file: Path) -> TrialSpec:
    return tiny_spec(tiny_tied_model_dir, alpaca_rows_file, **{"model.quantization": "nf4"})


@pytest.fixture(scope="module")
def folders(spec: TrialSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter that changes what the model says, as it is exported, alone and merged."""
    made = {kind: tmp_path_factory.mktemp(kind) / "out" for kind in ("adapter", "merged")}
    with attach(load_base(spec.model), spec.lora, 0) as adapter:
        for parameter in adapter.parameters():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(parameter))
                parameter.data.normal_(std=0.3)
        adapter.save(made["adapter"])
    base = load_base(spec.model.unquantised())
    merge(base.model, made["adapter"])
    save_model(base, made["merged"])
    for folder in made.values():
        (folder / "spec.json").write_text(spec.model_dump_json())
    return made


def greedy(model: Any, tokenizer: Any, max_tokens: int) -> str:
    """One token after the other, each the likeliest, until the end of text."""
    ids = [tokenizer.bos_token_id, *tokenizer(PROMPT).input_ids[1:]]
    begin = len(ids)
    with torch.no_grad():
        while len(ids) < begin + max_tokens and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[begin:], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_answer_is_the_likeliest_token_after_the_other_to_the_training_prompt(
    kind: str, folders: dict[str, Path], spec: TrialSpec
) -> None:
    base = load_base(spec.model if kind == "adapter" else spec.model.unquantised())
    untouched = greedy(base.model, base.tokenizer, 12)
    if kind == "merged":
        merge(base.model, folders["adapter"])
        expected = greedy(base.model, base.tokenizer, 12)
    else:
        with attach(base, spec.lora, 0) as adapter:
            saved = load_file(folders[kind] / "adapter_model.safetensors")
            named = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
            set_peft_model_state_dict(base.model, named, adapter_name=adapter._name)
            expected = greedy(base.model, base.tokenizer, 12)
    answer = generate(folders[kind], TEXT, 12)
    assert answer == expected
    assert answer
    assert answer != untouched


def test_it_ends_after_the_tokens_that_were_asked_for(folders: dict[str, Path]) -> None:
    one, four = (generate(folders["merged"], TEXT, count) for count in (1, 4))
    assert len(one) < len(four)
    assert four.startswith(one)


def test_a_merged_model_answers_where_its_base_is_gone(
    folders: dict[str, Path], spec: TrialSpec, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folders["merged"], moved)
    fields = json.loads((moved / "spec.json").read_text())
    fields["model"] |= {"id": "/gone", "revision": None}
    (moved / "spec.json").write_text(json.dumps(fields))
    assert generate(moved, TEXT, 4) == generate(folders["merged"], TEXT, 4)


def test_sampling_in_a_models_generation_config_is_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    sampling = tmp_path / "sampling"
    shutil.copytree(folders["merged"], sampling)
    config = json.loads((sampling / "generation_config.json").read_text())
    (sampling / "generation_config.json").write_text(
        json.dumps(config | {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5})
    )
    assert generate(sampling, TEXT, 8) == generate(folders["merged"], TEXT, 8)


def test_a_folder_without_a_spec_or_with_a_bad_one_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadModel, match=r"`export` made is needed, got .*: No such file or directory"):
        generate(tmp_path, TEXT, 4)
    (tmp_path / "spec.json").write_text('{"lora": {"rank": 3}}')
    with pytest.raises(BadModel, match=r"whose spec\.json cannot be read: ValidationError"):
        generate(tmp_path, TEXT, 4)


def test_an_adapter_that_does_not_fit_its_base_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["adapter"], broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(BadModel, match="must fit its base"):
        generate(broken, TEXT, 4)


def test_an_adapter_answers_in_the_dtype_that_it_was_trained_in(
    folders: dict[str, Path], spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = tmp_path / "narrow"
    shutil.copytree(folders["adapter"], narrow)
    tensors = load_file(narrow / "adapter_model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, narrow / "adapter_model.safetensors"
    )
    fields = json.loads((narrow / "spec.json").read_text())
    fields["model"]["dtype"] = "bfloat16"
    (narrow / "spec.json").write_text(json.dumps(fields))
    seen: set[torch.dtype] = set()

    def look(model: Any, *_: Any) -> str:
        seen.update(weight.dtype for name, weight in model.named_parameters() if "lora_" in name)
        return ""

    monkeypatch.setattr("sweeps.trial.generate._answer", look)
    generate(narrow, TEXT, 1)
    assert seen == {torch.bfloat16}


def test_a_text_stands_in_the_one_field_of_the_trials_own_prompt_and_cannot_stand_in_two(
    folders: dict[str, Path], spec: TrialSpec, tmp_path: Path
) -> None:
    shutil.copytree(folders["merged"], tmp_path, dirs_exist_ok=True)

    def ask(prompt: str) -> str:
        data = spec.data.model_copy(update={"prompt": prompt})
        (tmp_path / "spec.json").write_text(spec.model_copy(update={"data": data}).model_dump_json())
        return generate(tmp_path, TEXT, 12)

    assert ask(PROMPT.replace(TEXT, "{question}")) == generate(folders["merged"], TEXT, 12)
    with pytest.raises(BadModel, match="the prompt of this trial needs 2: question, hint"):
        ask("{question} {hint}")
