"""Scores equal lm-eval's own (law L4), nothing of the caller's is changed, and every failure has a name."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import os
import random
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import peft
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweeps.errors import BadData, EvaluationFailed
from sweeps.spec import ARTICLE_TASKS, EvaluateSpec, LoraSpec, ModelSpec
from sweeps.trial import evaluate as evaluation
from sweeps.trial.adapter import attach
from sweeps.trial.base import Base, load_base
from sweeps.trial.evaluate import Evaluation, evaluate
from sweeps.trial.judged import plain as plain_data
from sweeps.trial.prefixtree import Plan, Request, make_plan
from tests.bench import ROWS, RecordingLM, write_jsonl, write_rows

PAIR = """
task: pair
dataset_path: json
dataset_kwargs: {data_files: {test: rows/pair.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 3}
"""
PAIR_ROWS = [
    {"question": "Sky?", "choices": ["blue", "green or yellow"], "answer": 0},
    {"question": "Grass?", "choices": ["red, I should say", "green"], "answer": 1},
    {"question": "Snow?", "choices": ["white as can be", "ash"], "answer": 0},
]


def _ending(activity: str, answer: int, *endings: str) -> dict[str, Any]:
    begun = {"ctx_a": f"{activity} begins [title] slowly.", "ctx_b": "then she"}
    return {"activity_label": activity, **begun, "endings": [*endings, "sleeps."], "label": str(answer)}


def _science(question: str, answer: str, *texts: str) -> dict[str, Any]:
    labels = ["A", "B", "C", "D"][: len(texts)]
    return {"question": question, "choices": {"text": [*texts], "label": labels}, "answerKey": answer}


# Three more of lm-eval's own, in the hub's columns; the last three rows of each are few-shot examples.
OTHERS = {
    "hellaswag": [
        _ending("Rowing", 0, "pulls the oars.", "eats [step] the boat.", "paints it blue."),
        _ending("Baking", 2, "throws dough at a wall.", "reads.", "warms the oven."),
        _ending("Knitting", 1, "burns wool.", "makes a loop.", "swims."),
        _ending("Mowing", 0, "cuts the grass.", "sings.", "sits."),
        _ending("Sewing", 1, "sings.", "threads a needle.", "sits."),
    ],
    "arc_easy": [
        _science("What melts?", "B", "Stone", "Ice left in the sun", "Sand"),
        _science("What flies?", "A", "A bird", "A fish", "A stone", "A tree"),
        _science("Which is hot?", "C", "Snow", "Ice", "Fire"),
        _science("What swims?", "A", "A fish", "A stone"),
        _science("What burns?", "B", "Water", "Wood"),
    ],
    "piqa": [
        {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Turn the jar and the lid.", "label": 0},
        {"goal": "Dry a cup.", "sol1": "Fill it.", "sol2": "Wipe it with a cloth.", "label": 1},
        {"goal": "Cool tea.", "sol1": "Wait.", "sol2": "Boil it once more.", "label": 0},
        {"goal": "Light a room.", "sol1": "Draw the curtain open.", "sol2": "Close it.", "label": 0},
        {"goal": "Sharpen a pencil.", "sol1": "Wet it.", "sol2": "Use a knife.", "label": 1},
    ],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_rows(tmp_path_factory.mktemp("data"))
    for name, rows in OTHERS.items():
        write_jsonl(folder / f"{name}.jsonl", rows[:-3])
        write_jsonl(folder / f"{name}_dev.jsonl", rows[-3:])
    return folder


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test prepares its benchmarks itself, as a new process does."""
    monkeypatch.setattr(evaluation, "_kept", [])


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("tasks"))


def write_task(folder: Path, text: str = PAIR, name: str = "pair") -> Path:
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)
    write_jsonl(folder / "rows" / "pair.jsonl", PAIR_ROWS)
    return folder


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> RecordingLM:
    """A model class in the place of HFLM; it does not look at the model."""
    lm = RecordingLM()
    lm.device = torch.device("cpu")
    monkeypatch.setattr(evaluation, "make_lm", lambda *_: lm)
    return lm


def base_of(model_dir: Path, quantization: str) -> Base:
    return load_base(ModelSpec.model_validate({"id": str(model_dir), "quantization": quantization}))


def stir(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Weights that matter, in the place of an adapter's first weights, which do nothing."""
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


@pytest.fixture
def model(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Iterator[Any]:
    """Each kind of model that a trial may score, in training mode and with dropout."""
    lora = LoraSpec(r=4, alpha=16.0, dropout=0.5)
    if request.param == "plain":
        yield AutoModelForCausalLM.from_pretrained(tiny_model_dir).train()
    elif request.param == "a peft model":
        config = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.5, target_modules=["q_proj", "lm_head"])
        wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
        stir([parameter for parameter in wrapped.parameters() if parameter.requires_grad])
        yield wrapped.train()
    else:
        quantization = "nf4" if "nf4" in request.param else "none"
        with attach(base_of(tiny_model_dir, quantization), lora, seed=0) as adapter:
            stir(adapter.parameters())
            yield adapter.model.train()


# --- law L4 -----------------------------------------------------------------------------------------

SPLITS = dict.fromkeys(ARTICLE_TASKS, "validation") | {
    "blimp_causative": "train",
    "mmlu_global_facts": "test",
    "hellaswag": "validation",
    "arc_easy": "test",
    "piqa": "validation",
}
FEW_SHOT_SPLITS = {"mmlu_global_facts": "dev"} | dict.fromkeys(OTHERS, "train")
FIXED_AT_ZERO_SHOT = {"truthfulqa_mc1", "truthfulqa_mc2", "blimp_causative"}


def by_hand(model: Any, tokenizer: Any, spec: EvaluateSpec, cache: Path) -> dict[str, Any]:
    """What lm-eval says itself of the same documents: `simple_evaluate` with `HFLM`, all tasks in one go."""
    data, tasks = Path(str(spec.data_dir)), Path(str(spec.task_dir))
    is_old = spec.harness == "2023"
    settings = {"add_bos_token": False, "prefix_token_id": tokenizer.eos_token_id} if is_old else {}

    def local(name: str) -> dict[str, Any]:
        files = {SPLITS[name]: str(data / f"{name}.jsonl")}
        if name in FEW_SHOT_SPLITS:
            files[FEW_SHOT_SPLITS[name]] = str(data / f"{name}_dev.jsonl")
        kwargs = {"data_files": files, "cache_dir": str(cache)}
        delimiter = {"target_delimiter": ""} if name == "blimp_causative" and is_old else {}
        rows = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": kwargs}
        return {"task": name, **rows, **delimiter}

    files = {"test": str(tasks / "rows" / "pair.jsonl")}
    pair = {"task": "pair", "dataset_kwargs": {"data_files": files, "cache_dir": str(cache)}}
    shipped = Path(lm_eval.__path__[0]) / "tasks"
    folders = ("truthfulqa", "arithmetic", "blimp", "mmlu/default", "hellaswag", "arc", "piqa")
    members = [pair if name == "pair" else local(name) for name in spec.tasks]
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, **settings),
        tasks=[{"group": "by_hand", "task": members}],
        num_fewshot=spec.num_fewshot,
        task_manager=TaskManager(
            include_defaults=False, include_path=[str(tasks), *(str(shipped / folder) for folder in folders)]
        ),
    )
    assert results is not None
    return dict(results)


SHORT = ("arithmetic_2ds", "blimp_causative", "mmlu_global_facts", "pair")  # TruthfulQA has long prompts


@pytest.mark.parametrize(
    ("model", "tasks", "harness"),
    [
        ("plain", (*SHORT, *OTHERS), "current"),
        ("lora", SHORT, "current"),
        ("a peft model", SHORT, "current"),
        ("nf4 and lora", (*ARTICLE_TASKS, "pair", *OTHERS), "current"),
        ("nf4 and lora", SHORT, "2023"),
    ],
    indirect=["model"],
)
def test_scores_and_loglikelihoods_equal_lm_evals_own(
    model: Any,
    tasks: tuple[str, ...],
    harness: Any,
    tokenizer: Any,
    data_dir: Path,
    task_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # a second of its time, no score
    spec = EvaluateSpec(
        tasks=tasks,
        data_dir=str(data_dir),
        task_dir=str(task_dir),
        num_fewshot=2,
        batch_size=3,
        harness=harness,
    )
    ours = evaluate(model, tokenizer, spec)
    theirs = by_hand(model, copy.deepcopy(tokenizer), spec, tmp_path)
    assert (ours.report["scoring"]["way"], ours.notes) == ("tree", ())
    assert list(ours.scores) == list(tasks)
    for name, score in ours.scores.items():
        row, samples, report = theirs["results"][name], theirs["samples"][name], ours.report["tasks"][name]
        assert score.metric == "acc"
        assert score.documents == len(samples) == report["documents"] > 1
        assert score.value == pytest.approx(row["acc,none"], abs=1e-5)
        assert score.stderr == pytest.approx(row["acc_stderr,none"], abs=1e-5)
        assert report["fewshot"] == theirs["n-shot"][name] == (0 if name in FIXED_AT_ZERO_SHOT else 2)
        documents = report["per_document"]
        assert documents["doc_hash"] == [sample["doc_hash"] for sample in samples]
        assert documents["acc,none"] == pytest.approx([sample["acc"] for sample in samples], abs=1e-4)
        for values, sample in zip(documents["loglikelihoods"], samples, strict=True):
            assert values == pytest.approx([tries[0][0] for tries in sample["resps"]], abs=1e-3)
    normed = ours.report["tasks"]["pair"]["metrics"]["acc_norm,none"]
    assert normed["value"] == theirs["results"]["pair"]["acc_norm,none"]
    assert normed["stderr"] == pytest.approx(theirs["results"]["pair"]["acc_norm_stderr,none"])


def loglikelihoods(found: Evaluation) -> list[float]:
    tasks = found.report["tasks"].values()
    return [value for task in tasks for row in task["per_document"]["loglikelihoods"] for value in row]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


@pytest.mark.usefixtures("logged")
def test_contexts_that_are_too_long_are_cut_as_lm_eval_cuts_them(
    plain: Any, tokenizer: Any, data_dir: Path, task_dir: Path, tmp_path: Path
) -> None:
    model = copy.deepcopy(plain)
    model.config.max_position_embeddings = 40
    tasks = ("mmlu_global_facts", "arithmetic_2ds")
    spec = EvaluateSpec(tasks=tasks, data_dir=str(data_dir), task_dir=str(task_dir), num_fewshot=2)
    ours, theirs = evaluate(model, tokenizer, spec), by_hand(model, copy.deepcopy(tokenizer), spec, tmp_path)
    expected = [tries[0][0] for name in tasks for row in theirs["samples"][name] for tries in row["resps"]]
    assert loglikelihoods(ours) == pytest.approx(expected, abs=1e-4)
    (warning,) = ours.report["warnings"]
    assert warning.startswith("15 requests have a context and continuation whose combined length exceeds")


def test_a_continuation_that_is_the_likeliest_is_told_so_and_the_same_one_is_scored_once(
    plain: Any, tokenizer: Any
) -> None:
    lm = evaluation.make_lm(plain, tokenizer, EvaluateSpec(tasks=()))
    asked = [
        ("Sky", " is blue"),
        ("Sky", " is"),
        ("", "Sky is blue"),
        ("Sky", " is blue"),
        ("Sky is", " blue"),
    ]
    ids, cut = lm.tok_encode("Sky is blue"), lm.tok_encode("Sky")
    likeliest = int(plain(torch.tensor([cut])).logits[0, -1].argmax())
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
    with torch.no_grad():
        answers = lm.loglikelihood(requests, disable_tqdm=True)
        theirs = HFLM(pretrained=plain, tokenizer=copy.deepcopy(tokenizer), logits_cache=False).loglikelihood(
            requests, True
        )
    assert [value for value, _ in answers] == pytest.approx([value for value, _ in theirs], abs=1e-5)
    assert [hit for _, hit in answers] == [hit for _, hit in theirs]
    assert lm.facts["requests"] == 4
    assert len(ids) > len(cut)
    numbers = [(("", ""), cut, [likeliest]), (("", ""), cut, [(likeliest + 1) % 300])]
    with torch.no_grad():
        assert [hit for _, hit in lm._loglikelihood_tokens(numbers)] == [True, False]


def test_row_by_row_too_a_text_that_is_split_in_two_ways_is_read_at_its_own_places(
    plain: Any, tokenizer: Any
) -> None:
    """HFLM keeps the logits of the longest continuation, and reads those of the others at its beginning."""
    asked = [("Sky", " is blue"), ("", "Sky is blue"), ("Sky is", " blue")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
    lm = evaluation.make_lm(plain, tokenizer, EvaluateSpec(tasks=()))
    rows = evaluation.make_lm(plain, tokenizer, EvaluateSpec(tasks=()))
    rows._reason = "it is odd"
    with torch.no_grad():
        ours, by_row = lm.loglikelihood(requests), rows.loglikelihood(requests)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in by_row], abs=1e-5)
    assert (lm.facts["way"], rows.facts["way"]) == ("tree", "rows")


def test_choices_that_benchmarks_share_are_scored_once(plain: Any, tokenizer: Any, data_dir: Path) -> None:
    """Both of TruthfulQA's ask the same questions, and MC2 has all the choices of MC1."""
    spec = EvaluateSpec(tasks=("truthfulqa_mc1", "truthfulqa_mc2"), data_dir=str(data_dir))
    found = evaluate(plain, tokenizer, spec)
    assert len(loglikelihoods(found)) == 2 + 3 + 3 + 3
    scoring = found.report["scoring"]
    assert (scoring["way"], scoring["requests"]) == ("tree", 3 + 3)
    assert scoring["tokens"] < scoring["plain_tokens"] / 4


def test_a_model_that_cannot_share_is_scored_row_by_row_and_the_reason_is_said(
    plain: Any, tokenizer: Any, data_dir: Path
) -> None:
    spec = EvaluateSpec(tasks=("blimp_causative", "mmlu_global_facts"), data_dir=str(data_dir), num_fewshot=0)
    model = copy.deepcopy(plain)
    expected = evaluate(model, tokenizer, spec)
    model.config.sliding_window = 5  # which its attention does not read: the numbers stay the same
    found = evaluate(model, tokenizer, spec)
    assert loglikelihoods(found) == pytest.approx(loglikelihoods(expected), abs=1e-4)
    assert found.report["scoring"]["way"] == "rows"
    (note,) = found.notes
    assert "row by row" in note
    assert "its attention sees 5 tokens back" in note
    assert note in found.report["warnings"]
    assert not expected.notes


def test_what_has_no_blocks_of_its_own_is_scored_row_by_row(
    plain: Any, tokenizer: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = copy.deepcopy(plain), []
    monkeypatch.setattr(evaluation, "obstacle", lambda _: "it is odd")
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    spec = EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir), limit=3, batch_size=2)
    assert evaluate(model, tokenizer, spec).report["scoring"] == {"way": "rows", "reason": "it is odd"}
    assert sizes == [2, 2, 2]


MIXED = """
task: mixed
dataset_path: json
dataset_kwargs: {data_files: {test: rows/pair.jsonl}}
test_split: test
output_type: %s
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: %s, aggregation: %s, higher_is_better: true}]
generation_kwargs: {until: ["."], max_gen_toks: 3}
"""


@pytest.mark.parametrize(
    ("kind", "metric", "aggregation"),
    [
        ("generate_until", "exact_match", "mean"),
        ("loglikelihood_rolling", "word_perplexity", "weighted_perplexity"),
    ],
)
@pytest.mark.usefixtures("logged")
def test_what_is_generated_or_rolled_is_left_to_hflm(
    kind: str,
    metric: str,
    aggregation: str,
    plain: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = MIXED % (kind, metric, aggregation)
    if kind == "loglikelihood_rolling":
        text = text.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""').replace(
            "{{choices[0]}}", "{{question}}"
        )
    folder = write_task(write_task(tmp_path), text, "mixed")
    found = evaluate(plain, tokenizer, EvaluateSpec(tasks=("mixed", "pair"), task_dir=str(folder)))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=plain, tokenizer=copy.deepcopy(tokenizer)), tasks=["mixed"], task_manager=manager
    )
    value = theirs["results"]["mixed"][f"{metric},none"]
    assert found.scores["mixed"].value == pytest.approx(value, rel=1e-5)
    assert found.report["scoring"]["way"] == "tree"


# --- what is kept for the next evaluation -------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of benchmarks as they are loaded, and `plan` whenever one is made."""
    seen: list[str] = []
    load, plan = evaluation._load, evaluation.make_plan

    def loading(name: str, *rest: Any) -> Any:
        seen.append(name)
        return load(name, *rest)

    def planning(*given: Any) -> Plan:
        seen.append("plan")
        return plan(*given)

    monkeypatch.setattr(evaluation, "_load", loading)
    monkeypatch.setattr(evaluation, "make_plan", planning)
    return seen


def test_the_next_evaluation_takes_prompts_and_plan_from_the_one_before_and_says_the_same(
    plain: Any, tokenizer: Any, data_dir: Path, task_dir: Path, loads: list[str]
) -> None:
    model = copy.deepcopy(plain)
    model.config.max_position_embeddings = 40
    tasks = ("mmlu_global_facts", "truthfulqa_mc1", "pair")
    spec = EvaluateSpec(tasks=tasks, data_dir=str(data_dir), task_dir=str(task_dir), num_fewshot=2)
    evaluation.check(spec)
    assert loads == list(tasks)
    first = evaluate(model, tokenizer, spec)
    second = evaluate(model, copy.deepcopy(tokenizer), spec.model_copy(update={"weights": "merged"}))
    assert loads == [*tasks, "plan"]
    assert first == second
    assert "not used for it" in first.report["warnings"][0]  # said while it was loaded
    assert "cut from the left" in first.report["warnings"][-1]  # and when it was planned
    evaluation._kept.clear()
    assert evaluate(model, tokenizer, spec) == first


def test_a_plan_that_would_fill_the_memory_is_made_anew(
    plain: Any, tokenizer: Any, data_dir: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_KEPT_TOKENS", 50)
    for limit, plans in ((1, ["plan"]), (None, ["plan", "plan"])):
        spec = EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir), limit=limit)
        assert evaluate(plain, tokenizer, spec) == evaluate(plain, tokenizer, spec)
        assert loads == ["blimp_causative", *plans]
        loads.clear()


def test_another_tokenizer_or_length_gets_a_plan_of_its_own(
    plain: Any, tokenizer: Any, data_dir: Path, loads: list[str]
) -> None:
    spec = EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir))
    evaluate(plain, tokenizer, spec)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["Ann"])
    model = copy.deepcopy(plain)
    model.resize_token_embeddings(len(other), mean_resizing=False)
    evaluate(model, other, spec)
    model.config.max_position_embeddings = 20
    evaluate(model, other, spec)
    assert loads == ["blimp_causative", "plan", "plan", "plan"]


def test_another_spec_is_prepared_anew_and_only_one_is_kept(
    recorder: RecordingLM, plain: Any, data_dir: Path, loads: list[str]
) -> None:
    for limit in (1, 2, 1):
        spec = EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir), limit=limit)
        evaluate(plain, None, spec)
        assert len(recorder.asked) == 2 * limit
        recorder.asked.clear()
    assert len(loads) == 3
    assert len(evaluation._kept) == 1


@pytest.mark.parametrize(
    "change", ["rows", "task file", "a new task file", "a dev file", "a file that is gone"]
)
def test_a_file_that_changed_between_two_evaluations_is_seen(
    change: str, recorder: RecordingLM, plain: Any, tmp_path: Path, loads: list[str]
) -> None:
    write_task(tmp_path)
    write_rows(tmp_path, "arithmetic_2ds", "mmlu_global_facts_dev")
    spec = EvaluateSpec(tasks=("pair", "arithmetic_2ds"), task_dir=str(tmp_path), data_dir=str(tmp_path))
    evaluate(plain, None, spec)
    evaluate(plain, None, spec)
    assert loads == ["pair", "arithmetic_2ds"]
    if change == "rows":
        write_jsonl(tmp_path / "rows" / "pair.jsonl", PAIR_ROWS[:2])
    elif change == "task file":
        (tmp_path / "pair.yaml").write_text(PAIR.replace("{{question}}", "Q: {{question}}"))
    elif change == "a new task file":
        (tmp_path / "deeper").mkdir()
        (tmp_path / "deeper" / "one.yaml").write_text(PAIR.replace("task: pair", "task: one"))
    elif change == "a dev file":
        write_jsonl(tmp_path / "arithmetic_2ds_dev.jsonl", ROWS["arithmetic_4ds"])
    else:
        (tmp_path / "arithmetic_2ds.jsonl").unlink()
        with pytest.raises(BadData, match=r"arithmetic_2ds\.jsonl"):
            evaluate(plain, None, spec)
        return
    evaluate(plain, None, spec)
    assert loads == ["pair", "arithmetic_2ds"] * 2


def test_a_pattern_of_files_is_read_each_time(
    recorder: RecordingLM, plain: Any, tmp_path: Path, loads: list[str]
) -> None:
    write_task(tmp_path, PAIR.replace("rows/pair.jsonl", "rows/*.jsonl"))
    spec = EvaluateSpec(tasks=("pair",), task_dir=str(tmp_path))
    assert evaluate(plain, None, spec).scores["pair"].documents == 3
    write_jsonl(tmp_path / "rows" / "more.jsonl", PAIR_ROWS)
    assert evaluate(plain, None, spec).scores["pair"].documents == 6
    assert loads == ["pair", "pair"]


# --- the harness of 2023 ----------------------------------------------------------------------------


@pytest.mark.parametrize(("harness", "before"), [("current", " "), ("2023", "")])
def test_a_blimp_sentence_follows_nothing_in_the_harness_of_2023(
    recorder: RecordingLM, plain: Any, data_dir: Path, harness: Any, before: str
) -> None:
    spec = EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir), limit=1, harness=harness)
    found = evaluate(plain, None, spec)
    assert recorder.asked == [("", f"{before}Ann broke the cup."), ("", f"{before}Ann fell the cup.")]
    assert found.report["harness"] == harness


def test_all_other_requests_are_the_same_in_both_harnesses(
    recorder: RecordingLM, plain: Any, data_dir: Path, task_dir: Path
) -> None:
    tasks = tuple(name for name in (*ARTICLE_TASKS, "pair") if name != "blimp_causative")
    asked = []
    for harness in ("current", "2023"):
        spec = {"tasks": tasks, "data_dir": str(data_dir), "task_dir": str(task_dir), "harness": harness}
        evaluate(plain, None, EvaluateSpec.model_validate(spec))
        asked.append(recorder.asked.copy())
        recorder.asked.clear()
    assert len(asked[0]) > 20
    assert asked[0] == asked[1]


@pytest.mark.parametrize(("harness", "first"), [("current", "<s>"), ("2023", "</s>")])
def test_only_what_has_no_context_gets_a_first_token_in_the_harness_of_2023(
    plain: Any, tokenizer: Any, data_dir: Path, harness: Any, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starts(task: str) -> set[str]:
        seen: list[int] = []

        def planned(requests: Sequence[Request], budget: int, pair_cost: float) -> Plan:
            seen.extend(request.tokens[0] for request in requests)
            assert not any(tokenizer.bos_token_id in request.tokens[1:] for request in requests)
            return make_plan(requests, budget, pair_cost)

        monkeypatch.setattr(evaluation, "make_plan", planned)
        spec = EvaluateSpec(tasks=(task,), data_dir=str(data_dir), harness=harness)
        evaluate(plain, tokenizer, spec)
        return {tokenizer.convert_ids_to_tokens(token) for token in seen}

    assert starts("blimp_causative") == {first}
    (begun,) = starts("arithmetic_2ds")
    assert (begun == "<s>") is (harness == "current")
    assert begun != "</s>"


def test_an_adapter_moves_the_scores(tiny_model_dir: Path, tokenizer: Any, data_dir: Path) -> None:
    spec = EvaluateSpec(tasks=("truthfulqa_mc2",), data_dir=str(data_dir), limit=1)
    base = base_of(tiny_model_dir, "nf4")
    before = evaluate(base.model, tokenizer, spec)
    with attach(base, LoraSpec(r=4, alpha=16.0), seed=0) as adapter:
        stir(adapter.parameters())
        during = evaluate(adapter.model, tokenizer, spec)
    after = evaluate(base.model, tokenizer, spec)
    assert during.scores != before.scores == after.scores


def test_a_tied_output_head_keeps_its_adapter(
    tiny_tied_model_dir: Path, tokenizer: Any, data_dir: Path
) -> None:
    """HFLM ties the weights of a module that it is given, and fails on this one."""
    with attach(base_of(tiny_tied_model_dir, "nf4"), LoraSpec(r=4, alpha=16.0), seed=0) as adapter:
        stir(adapter.parameters())
        ids = torch.arange(10).unsqueeze(0)
        with torch.no_grad():
            before = adapter.model.eval()(ids).logits
            evaluate(
                adapter.model, tokenizer, EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir))
            )
            assert torch.equal(adapter.model(ids).logits, before)


# --- nothing of the caller's is changed -------------------------------------------------------------


def test_every_module_keeps_its_mode(plain: Any, tokenizer: Any, data_dir: Path) -> None:
    model = copy.deepcopy(plain).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    evaluate(model, tokenizer, EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir)))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(EvaluationFailed):
        evaluate(model, tokenizer, EvaluateSpec(tasks=("no_such_benchmark",)))
    assert [module.training for module in model.modules()] == before


def test_random_numbers_tokenizer_config_and_weights_are_unchanged(
    plain: Any, tokenizer: Any, data_dir: Path
) -> None:
    model, bare = copy.deepcopy(plain), copy.deepcopy(tokenizer)
    bare.pad_token = None  # lm-eval would set one

    def state() -> tuple[Any, ...]:
        numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        text = bare.backend_tokenizer.to_str(), bare.pad_token, bare.padding_side, len(bare)
        weights = [
            (name, tensor.sum().item(), tensor.requires_grad) for name, tensor in model.named_parameters()
        ]
        return *numbers, *text, weights, model.config.to_json_string(), torch.is_grad_enabled()

    before = state()
    evaluate(model, bare, EvaluateSpec(tasks=("mmlu_global_facts",), data_dir=str(data_dir), num_fewshot=1))
    assert state() == before


def test_scores_do_not_depend_on_the_processs_random_numbers(
    plain: Any, tokenizer: Any, data_dir: Path
) -> None:
    spec = EvaluateSpec(tasks=("arithmetic_2ds",), data_dir=str(data_dir), num_fewshot=1)
    first = evaluate(plain, tokenizer, spec)
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        draw()
    assert evaluate(plain, tokenizer, spec) == first


def test_the_gradient_of_a_4_bit_model_is_the_same_after_an_evaluation(
    tiny_model_dir: Path, tokenizer: Any, data_dir: Path
) -> None:
    """On a CPU with AVX512-BF16 an evaluation repacks unguarded 4-bit weights, and gradients go wrong."""
    ids = torch.arange(3, 67).unsqueeze(0)
    with attach(base_of(tiny_model_dir, "nf4"), LoraSpec(r=4, dropout=0.0), seed=0) as adapter:
        stir(adapter.parameters())

        def gradient() -> torch.Tensor:
            adapter.model.train()
            adapter.model(input_ids=ids, labels=ids).loss.backward()
            flat = torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()])
            for parameter in adapter.parameters():
                parameter.grad = None
            return flat

        before = gradient()
        evaluate(adapter.model, tokenizer, EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir)))
        assert before.abs().max() > 0
        assert torch.equal(gradient(), before)


def test_a_workers_log_stays_empty_and_lm_evals_logger_is_put_back(
    plain: Any, tokenizer: Any, data_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("lm_eval")
    before = logger.level, logger.propagate, list(logger.handlers)
    capfd.readouterr()
    evaluate(plain, tokenizer, EvaluateSpec(tasks=("arithmetic_2ds",), data_dir=str(data_dir)))
    assert capfd.readouterr() == ("", "")
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    assert not tqdm(range(1), file=io.StringIO()).disable


# --- scores and report ------------------------------------------------------------------------------


def test_the_standard_error_is_that_of_a_mean(recorder: RecordingLM, plain: Any, data_dir: Path) -> None:
    recorder._loglikelihood = lambda _, answer: (
        -1.0 if answer in (" Ann broke the cup.", " Bo arrives a door.") else -2.0
    )
    score = evaluate(plain, None, EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir))).scores
    assert (
        score["blimp_causative"].value == 0.75
    )  # the third and fourth are ties, which the first choice wins
    assert score["blimp_causative"].stderr == pytest.approx(math.sqrt(0.1875 * 4 / 3) / 2)


def test_one_document_has_no_standard_error(recorder: RecordingLM, plain: Any, data_dir: Path) -> None:
    scored = evaluate(plain, None, EvaluateSpec(data_dir=str(data_dir), limit=1)).scores
    assert [(score.documents, score.stderr) for score in scored.values()] == [(1, None)] * 6


def test_a_metric_that_is_not_a_mean_has_no_standard_error(
    recorder: RecordingLM, plain: Any, tmp_path: Path
) -> None:
    text = PAIR.replace("[{metric: acc}, {metric: acc_norm}]", "[{metric: f1}, {metric: brier_score}]")
    found = evaluate(plain, None, EvaluateSpec(tasks=("pair",), task_dir=str(write_task(tmp_path, text))))
    assert found.scores["pair"].metric == "f1"  # the first, where there is no accuracy
    assert found.scores["pair"].stderr is None
    assert found.report["tasks"]["pair"]["per_document"]["f1,none"] == [[0, 0], [1, 1], [0, 1]]


def test_the_main_metric_is_the_accuracy_wherever_it_stands(
    recorder: RecordingLM, plain: Any, tmp_path: Path
) -> None:
    text = PAIR.replace("[{metric: acc}, {metric: acc_norm}]", "[{metric: margin}, {metric: acc}]")
    text = text.replace("{metric: margin}", "{metric: margin, aggregation: mean, higher_is_better: true}")
    write_task(tmp_path, text + "process_results: !function judge.both\n")
    (tmp_path / "judge.py").write_text("def both(doc, results):\n    return {'margin': 0.25, 'acc': 1.0}\n")
    found = evaluate(plain, None, EvaluateSpec(tasks=("pair",), task_dir=str(tmp_path)))
    assert list(found.report["tasks"]["pair"]["metrics"]) == ["margin,none", "acc,none"]
    assert (found.scores["pair"].metric, found.scores["pair"].value) == ("acc", 1.0)


def test_generated_answers_are_scored_under_every_filter(
    recorder: RecordingLM, plain: Any, tmp_path: Path
) -> None:
    text = """
task: sum
dataset_path: json
dataset_kwargs: {data_files: {test: rows/sum.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."]}
filter_list:
  - {name: strict, filter: [{function: regex, regex_pattern: "#(\\\\d)"}, {function: take_first}]}
  - {name: loose, filter: [{function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    write_jsonl(
        write_task(tmp_path, text, "sum") / "rows" / "sum.jsonl", [{"question": "3+4", "answer": "7"}] * 2
    )
    found = evaluate(plain, None, EvaluateSpec(tasks=("sum",), task_dir=str(tmp_path)))
    metrics = found.report["tasks"]["sum"]["metrics"]
    assert {key: metric["value"] for key, metric in metrics.items()} == {
        "exact_match,strict": 0.0,
        "exact_match,loose": 1.0,
    }
    assert found.scores["sum"].value == 0.0
    assert len(found.report["tasks"]["sum"]["per_document"]["doc_hash"]) == 2
    json.loads(found.to_json())


GROUP = """
group: both
task: [pair, other]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def test_a_group_has_lm_evals_aggregate_with_its_standard_error(
    plain: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path)
    write_task(
        tmp_path, PAIR.replace("task: pair", "task: other").replace("rows/pair", "rows/other"), "other"
    )
    write_jsonl(tmp_path / "rows" / "other.jsonl", PAIR_ROWS * 2)
    (tmp_path / "both.yaml").write_text(GROUP)
    found = evaluate(plain, tokenizer, EvaluateSpec(tasks=("both",), task_dir=str(tmp_path)))

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.chdir(tmp_path)  # lm-eval looks for the rows in the working folder
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=plain, tokenizer=tokenizer), tasks=["both"], task_manager=manager
    )
    row = theirs["groups"]["both"]
    assert list(found.scores) == ["both"]
    assert found.scores["both"].documents == 9
    assert found.scores["both"].value == pytest.approx(row["acc,none"])
    assert found.scores["both"].stderr == pytest.approx(row["acc_stderr,none"])
    assert found.report["groups"]["both"]["members"] == ["pair", "other"]
    assert set(found.report["tasks"]) == {"pair", "other"}


def test_a_tag_gives_the_scores_of_its_benchmarks(recorder: RecordingLM, plain: Any, tmp_path: Path) -> None:
    write_task(tmp_path, PAIR + "tag: ours\n")
    write_task(tmp_path, PAIR.replace("task: pair", "task: other") + "tag: ours\n", "other")
    found = evaluate(plain, None, EvaluateSpec(tasks=("ours",), task_dir=str(tmp_path)))
    assert set(found.scores) == {"pair", "other"}


def test_members_of_a_group_take_their_own_rows(recorder: RecordingLM, plain: Any, tmp_path: Path) -> None:
    """As for `mmlu`: 57 benchmarks, each with its file."""
    (tmp_path / "facts.yaml").write_text(GROUP.replace("pair, other", "arithmetic_2ds, arithmetic_4ds"))
    write_rows(tmp_path)
    found = evaluate(
        plain, None, EvaluateSpec(tasks=("both",), task_dir=str(tmp_path), data_dir=str(tmp_path))
    )
    documents = {name: task["documents"] for name, task in found.report["tasks"].items()}
    assert documents == {name: len(ROWS[name]) for name in ("arithmetic_2ds", "arithmetic_4ds")}
    assert found.scores["both"].documents == 6


def test_the_report_is_plain_json_and_says_what_was_not_as_asked(
    plain: Any, tokenizer: Any, data_dir: Path
) -> None:
    model = copy.deepcopy(plain)
    model.config.max_position_embeddings = 64
    found = evaluate(model, tokenizer, EvaluateSpec(data_dir=str(data_dir), num_fewshot=1))
    written = json.loads(found.to_json())
    assert written["scores"]["arithmetic_2ds"]["documents"] == 3
    assert written["tasks"] == found.report["tasks"]
    assert any(
        "truthfulqa_mc1" in warning and "num_fewshot=1 is not used" in warning
        for warning in found.report["warnings"]
    )
    assert any("exceeds model's maximum length (64)" in warning for warning in found.report["warnings"])


def test_numbers_that_are_not_finite_survive_json() -> None:
    report = plain_data({"a": [float("nan"), np.float32("inf"), (np.int64(3), None, True)]})
    assert json.loads(Evaluation({}, report).to_json())["a"] == ["NaN", "Infinity", [3, None, True]]


def test_limit_and_batch_size_are_honoured(plain: Any, tokenizer: Any, data_dir: Path) -> None:
    spec = EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir), limit=3, batch_size=2)
    found = evaluate(plain, tokenizer, spec)
    assert found.scores["blimp_causative"].documents == 3
    assert (found.report["scoring"]["requests"], found.report["scoring"]["token_budget"]) == (6, 2 * 512)


# --- rows -------------------------------------------------------------------------------------------


def test_arithmetic_rows_go_through_the_tasks_own_process_docs(
    recorder: RecordingLM, plain: Any, data_dir: Path
) -> None:
    evaluate(plain, None, EvaluateSpec(tasks=("arithmetic_2ds",), data_dir=str(data_dir)))
    assert recorder.asked[0] == ("Question: What is 17 minus 14?\nAnswer:", " 3")


def test_few_shot_rows_come_from_the_dev_file(recorder: RecordingLM, plain: Any, data_dir: Path) -> None:
    evaluate(plain, None, EvaluateSpec(tasks=("mmlu_global_facts",), data_dir=str(data_dir), num_fewshot=2))
    prompt, _ = recorder.asked[0]
    assert prompt.index("How many suns?") < prompt.index("How many wheels?") < prompt.index("How many moons?")
    assert "Legs?" not in prompt


def test_a_dev_file_serves_a_task_that_has_no_few_shot_split(
    recorder: RecordingLM, plain: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path, "arithmetic_2ds")
    write_jsonl(tmp_path / "arithmetic_2ds_dev.jsonl", [ROWS["arithmetic_4ds"][0]])
    evaluate(plain, None, EvaluateSpec(tasks=("arithmetic_2ds",), data_dir=str(tmp_path), num_fewshot=1))
    assert all(
        prompt.startswith("Question: What is 1234 minus 99?\nAnswer: 1135") for prompt, _ in recorder.asked
    )


def test_without_few_shot_no_dev_file_is_needed_and_with_it_it_is_named(
    recorder: RecordingLM, plain: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path, "mmlu_global_facts")
    evaluate(plain, None, EvaluateSpec(tasks=("mmlu_global_facts",), data_dir=str(tmp_path)))
    with pytest.raises(BadData, match=r"few-shot rows of mmlu_global_facts .*/mmlu_global_facts_dev\.jsonl"):
        evaluate(
            plain, None, EvaluateSpec(tasks=("mmlu_global_facts",), data_dir=str(tmp_path), num_fewshot=1)
        )


def test_with_a_data_dir_nothing_is_asked_of_a_network(
    recorder: RecordingLM, plain: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the network was asked for: {args}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    evaluate(plain, None, EvaluateSpec(data_dir=str(data_dir)))
    with pytest.raises(BadData, match=r"no file .*gsm8k\.jsonl"):
        evaluate(plain, None, EvaluateSpec(tasks=("gsm8k",), data_dir=str(data_dir)))
    with pytest.raises(EvaluationFailed, match="the network was asked for"):  # the test itself can see one
        evaluate(plain, None, EvaluateSpec(tasks=("gsm8k",)))


def test_a_task_of_ours_finds_its_rows_from_any_working_folder(
    recorder: RecordingLM, plain: Any, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = evaluate(plain, None, EvaluateSpec(tasks=("pair",), task_dir=str(task_dir)))
    assert found.scores["pair"].documents == 3
    assert recorder.asked[0] == ("Sky?", " blue")


def test_a_data_dir_may_stand_beside_tasks_that_bring_their_own_rows(
    recorder: RecordingLM, plain: Any, task_dir: Path, data_dir: Path
) -> None:
    spec = EvaluateSpec(tasks=("pair", "blimp_causative"), task_dir=str(task_dir), data_dir=str(data_dir))
    assert {name: score.documents for name, score in evaluate(plain, None, spec).scores.items()} == {
        "pair": 3,
        "blimp_causative": 4,
    }


@pytest.mark.parametrize("where", ["data_dir", "task_dir"])
def test_rows_that_changed_are_read_anew_even_if_the_file_looks_the_same(
    where: str, recorder: RecordingLM, plain: Any, tmp_path: Path
) -> None:
    """The datasets library's cache knows a file by its path and time."""
    file = write_task(tmp_path) / "rows" / "pair.jsonl"
    if where == "data_dir":
        file = file.rename(tmp_path / "pair.jsonl")
    spec = EvaluateSpec.model_validate({"tasks": ["pair"], "task_dir": str(tmp_path), where: str(tmp_path)})
    evaluate(plain, None, spec)
    looks = file.stat()
    file.write_text(file.read_text().replace("Sky?", "Sea?"))
    os.utime(file, ns=(looks.st_atime_ns, looks.st_mtime_ns))
    assert file.stat().st_size == looks.st_size
    recorder.asked.clear()
    evaluate(plain, None, spec)
    assert recorder.asked[0] == ("Sea?", " blue")


def write_shuffled_task(folder: Path) -> Path:
    """Forty questions whose choices come in an order drawn at random."""
    write_task(folder, PAIR + "process_docs: !function shuffle.docs\n")
    (folder / "shuffle.py").write_text(
        "import random\n\n"
        "def one(row):\n"
        "    right, choices = row['choices'][row['answer']], random.sample(row['choices'], 2)\n"
        "    return {**row, 'choices': choices, 'answer': choices.index(right)}\n\n"
        "def docs(rows):\n"
        "    return rows.map(one)\n"
    )
    for place in (folder, folder / "rows"):
        write_jsonl(place / "pair.jsonl", [{"question": "?", "choices": ["yes", "no"], "answer": 0}] * 40)
    return folder


@pytest.mark.parametrize("where", ["data_dir", "task_dir"])
def test_choices_that_a_task_shuffles_are_judged_in_the_order_that_was_asked(
    where: str, recorder: RecordingLM, plain: Any, tmp_path: Path
) -> None:
    folder = str(write_shuffled_task(tmp_path))
    recorder._loglikelihood = lambda _, answer: -1.0 if answer == " yes" else -2.0
    spec = EvaluateSpec.model_validate({"tasks": ["pair"], "task_dir": folder, where: folder})
    assert evaluate(plain, None, spec).scores["pair"].value == 1.0
    first_choices = {answer for _, answer in recorder.asked[::2]}
    assert first_choices == {" yes", " no"}


def test_what_a_task_draws_at_random_is_what_it_draws_in_lm_eval(
    recorder: RecordingLM, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(write_shuffled_task(tmp_path))
    evaluate(plain, None, EvaluateSpec(tasks=("pair",), task_dir=folder))
    ours = recorder.asked.copy()
    recorder.asked.clear()

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    manager = TaskManager(include_defaults=False, include_path=folder)
    lm_eval.simple_evaluate(recorder, tasks=["pair"], task_manager=manager)
    assert recorder.asked == ours


# --- failures ---------------------------------------------------------------------------------------


def test_an_unknown_benchmark_names_the_nearest(recorder: RecordingLM, plain: Any) -> None:
    with pytest.raises(EvaluationFailed, match="got truthful_mc1; did you mean truthfulqa_mc1"):
        evaluate(plain, None, EvaluateSpec(tasks=("truthful_mc1",)))


def test_without_the_hub_the_remedy_is_a_data_dir(recorder: RecordingLM, plain: Any) -> None:
    with pytest.raises(
        EvaluationFailed, match=r"truthfulqa_mc1 must load: .* evaluate\.data_dir as truthfulqa_mc1\.jsonl"
    ):
        evaluate(plain, None, EvaluateSpec(tasks=("truthfulqa_mc1",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"blimp_causative\.jsonl must hold one JSON object a line"),
        ("[1]\n", r"blimp_causative\.jsonl must hold one JSON object a line"),
        ('{"sentence_good": "a"}\n{"sentence_good"\n', r"blimp_causative\.jsonl:2 must be one JSON object"),
        (
            '{"sentence_good": "a"}\n{"sentence_good": 1}\n',
            r"a column of .*blimp_causative\.jsonl must hold values of one type",
        ),
    ],
)
def test_malformed_rows_are_named_by_their_file(
    text: str, message: str, recorder: RecordingLM, plain: Any, tmp_path: Path
) -> None:
    (tmp_path / "blimp_causative.jsonl").write_text(text)
    with pytest.raises(BadData, match=message):
        evaluate(plain, None, EvaluateSpec(tasks=("blimp_causative",), data_dir=str(tmp_path)))


def test_rows_without_the_hubs_columns_fail_by_the_benchmarks_name(
    recorder: RecordingLM, plain: Any, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "mmlu_global_facts.jsonl", [{"query": "?"}])
    with pytest.raises(EvaluationFailed, match=r"the benchmark mmlu_global_facts must load: .*question"):
        evaluate(plain, None, EvaluateSpec(tasks=("mmlu_global_facts",), data_dir=str(tmp_path)))


def test_nothing_is_scored_before_every_benchmark_has_loaded(
    recorder: RecordingLM, plain: Any, data_dir: Path
) -> None:
    with pytest.raises(BadData):
        evaluate(plain, None, EvaluateSpec(tasks=("blimp_causative", "gsm8k"), data_dir=str(data_dir)))
    assert not recorder.asked


def test_what_a_benchmark_raises_while_scoring_has_its_name_and_its_cause(
    recorder: RecordingLM, plain: Any, data_dir: Path
) -> None:
    def out_of_memory(*_: str) -> float:
        raise torch.OutOfMemoryError("no room\nfor more")

    recorder._loglikelihood = out_of_memory
    with pytest.raises(
        EvaluationFailed, match="blimp_causative must give a score: OutOfMemoryError: no room; "
    ) as raised:
        evaluate(plain, None, EvaluateSpec(tasks=("blimp_causative",), data_dir=str(data_dir)))
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize("name", ["blimp_causative", "truthfulqa_mc1", "arithmetic_2ds"])
def test_a_model_that_computes_no_numbers_gets_no_score(
    name: str, plain: Any, tokenizer: Any, data_dir: Path
) -> None:
    """lm-eval takes the first choice then; in BLiMP and MC1 that is the right one, and the score 1."""
    broken = copy.deepcopy(plain)
    broken.lm_head.weight.data[:] = float("nan")
    with pytest.raises(EvaluationFailed, match=rf"must be finite, got \[nan.* for document 0 of {name}"):
        evaluate(broken, tokenizer, EvaluateSpec(tasks=(name,), data_dir=str(data_dir)))
