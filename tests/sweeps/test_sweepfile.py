"""What a good sweep file becomes, and how `--set` changes it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from sweeps.errors import BadData, InvalidSweep
from sweeps.spec import ARTICLE_TASKS, TrialSpec
from sweeps.sweepfile import Sweep, load_sweep, load_sweep_text

RANK_ALPHA = """\
name: rank_alpha
trial:                                  # what all trials share
  model:     {id: meta-llama/Llama-2-7b-hf, quantization: nf4}
  data:      {id: yahma/alpaca-cleaned}
  lora:      {r: 8, alpha: 16, dropout: 0.05, targets: all}
  optimizer: {name: adamw, lr: 3e-4, weight_decay: 0.01}
  schedule:  {name: cosine, warmup_steps: 100}
  train:     {batch_size: 128, samples: 50000, seed: 1337}
  evaluate:  {tasks: [truthfulqa_mc1, mmlu_global_facts]}
search:
  sampler: tpe
  trials: 24
  space:
    lora.r: [8, 16, 32, 64, 128, 256]
    lora.alpha: ["2*r", "r", "r/2", 1]
  first: [{lora.r: 256, lora.alpha: 512}]
  repeats: 2
baseline: true
objective: {maximize: score.mean}
resources: {gpus: 1, accelerator: A100}
"""


def load(text: str, *overrides: str, **more: Any) -> Sweep:
    return load_sweep_text(text, "x.yaml", overrides, **more)


def faults_of(text: str, *overrides: str, **more: Any) -> list[str]:
    with pytest.raises(InvalidSweep) as caught:
        load(text, *overrides, **more)
    return caught.value.lines()


# --- the file


def test_the_file_of_the_design_becomes_a_sweep() -> None:
    sweep = load(RANK_ALPHA)
    assert sweep.name == "rank_alpha"
    assert (sweep.search.sampler, sweep.search.trials, sweep.search.repeats) == ("tpe", 24, 2)
    assert list(sweep.search.space) == ["lora.r", "lora.alpha"]
    assert sweep.search.space.size == 24
    assert sweep.search.first == ({"lora.r": 256, "lora.alpha": "2*r"},)
    assert sweep.baseline
    assert (sweep.objective.metric, sweep.objective.maximize) == ("score.mean", True)
    assert (sweep.resources.gpus, sweep.resources.accelerator) == (1, "A100")
    assert sweep.template["optimizer.lr"] == 3e-4


def test_a_name_alone_is_one_trial_with_the_articles_values() -> None:
    sweep = load("name: x\n")
    assert [sweep.resolve(picks).spec for picks in sweep.search.space.combinations()] == [TrialSpec()]
    assert sweep.search.budget == 1
    assert (sweep.search.sampler, sweep.baseline, sweep.resources.gpus) == ("grid", True, 1)
    assert sweep.objective.metric == "score.mean"


def test_a_section_whose_lines_are_all_commented_out_is_empty() -> None:
    text = "name: x\ntrial:\n  lora:\n  # r: 8\nsearch:\n  space:\n  first:\nobjective:\nresources:\n"
    assert load(text).resolve({}).spec == TrialSpec()


def test_a_sweep_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("name: x\n").name = "y"  # type: ignore[misc]


def test_a_rule_of_the_trial_is_resolved() -> None:
    sweep = load("name: x\ntrial: {lora: {r: 32, alpha: 2*r}}\n")
    resolved = sweep.resolve({})
    assert resolved.spec.lora.alpha == 64
    assert resolved.rules == {"lora.alpha": "2*r"}


def test_the_harness_of_2023_is_a_year_with_quotes_and_without() -> None:
    for written in ("2023", "'2023'"):
        sweep = load(f"name: x\ntrial: {{evaluate: {{harness: {written}}}}}\n")
        assert sweep.resolve({}).spec.evaluate.harness == "2023"
        assert load("name: x\n", f"evaluate.harness={written}").resolve({}).spec == sweep.resolve({}).spec
    assert faults_of("name: x\ntrial: {evaluate: {harness: 2022}}\n")[0].startswith(
        "x.yaml:2: evaluate.harness: one of current, 2023 is needed, got 2022"
    )


def test_harnesses_and_flags_with_a_third_word_can_be_searched() -> None:
    space = "{evaluate.harness: [current, 2023], train.gradient_checkpointing: [auto, true]}"
    text = f"name: x\nsearch: {{space: {space}}}\n"
    specs = [load(text).resolve(picks).spec for picks in load(text).search.space.combinations()]
    found = {(spec.evaluate.harness, spec.train and spec.train.gradient_checkpointing) for spec in specs}
    assert found == {("current", "auto"), ("current", True), ("2023", "auto"), ("2023", True)}


def test_a_trial_may_train_nothing() -> None:
    sweep = load("name: x\ntrial: {train: none}\nsearch: {space: {model.id: [a, b]}}\n")
    assert [sweep.resolve(picks).spec.train for picks in sweep.search.space.combinations()] == [None, None]


def test_a_field_in_trial_and_in_space_is_the_spaces() -> None:
    sweep = load("name: x\ntrial: {lora: {r: 4}}\nsearch: {space: {lora.r: [8]}}\n")
    assert sweep.resolve({"lora.r": 8}).spec.lora.r == 8


@pytest.mark.parametrize("name", ["a", "rank_alpha", "r-8.v2", "9", "x" * 64])
def test_a_name_that_is_safe_for_a_folder_is_kept(name: str) -> None:
    assert load(f"name: '{name}'\n").name == name


# --- the space


def domains(lines: str, sampler: str = "tpe, trials: 2") -> Any:
    return load(f"name: x\nsearch: {{sampler: {sampler}, space: {{{lines}}}}}\n").search.space


def test_a_range_of_an_integer_field_is_integer_and_of_another_field_is_not() -> None:
    assert domains("lora.r: {low: 8, high: 64}")["lora.r"].integer
    assert not domains("lora.alpha: {low: 8, high: 64}")["lora.alpha"].integer
    assert domains("lora.alpha: {low: 8, high: 64, integer: true}")["lora.alpha"].integer


def test_a_range_keeps_its_log_and_step() -> None:
    space = domains("optimizer.lr: {low: 1e-5, high: 1e-3, log: true}, lora.r: {low: 8, high: 64, step: 8}")
    assert space["optimizer.lr"].log
    assert list(space["lora.r"].labels()) == [8, 16, 24, 32, 40, 48, 56, 64]


def test_a_lone_text_on_a_number_field_is_a_single_rule() -> None:
    space = domains("lora.r: [8, 16], lora.alpha: 2*r")
    assert list(space["lora.alpha"].labels()) == ["2*r"]


def test_lists_are_choices_of_a_list_field() -> None:
    space = domains("lora.targets: [qv, all, [q_proj, o_proj]]")
    assert list(space["lora.targets"].labels()) == ["qv", "all", '["q_proj", "o_proj"]']


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "qmc"])
def test_every_sampler_but_grid_takes_a_continuous_range(sampler: str) -> None:
    assert domains("lora.dropout: {low: 0, high: 0.5}", f"{sampler}, trials: 3").size is None


@pytest.mark.parametrize(
    ("search", "budget"),
    [
        ("{space: {lora.r: [8, 16, 32]}}", 3),
        ("{trials: 2, space: {lora.r: [8, 16, 32]}}", 2),
        ("{trials: 9, space: {lora.r: [8, 16, 32]}}", 3),
        ("{sampler: random, trials: 9, space: {lora.r: [8, 16, 32]}}", 3),
        ("{sampler: random, trials: 9, space: {lora.dropout: {low: 0, high: 0.5}}}", 9),
        ("{sampler: tpe}", 1),
    ],
)
def test_the_budget_is_the_trials_asked_for_or_what_the_space_holds(search: str, budget: int) -> None:
    assert load(f"name: x\nsearch: {search}\n").search.budget == budget


# --- first


SPACE = "lora.r: [8, 16, 256], lora.alpha: [2*r, r, 16]"


def first(entry: str, space: str = SPACE) -> Any:
    text = f"name: x\nsearch: {{sampler: tpe, trials: 3, space: {{{space}}}, first: [{entry}]}}\n"
    return load(text).search.first[0]


@pytest.mark.parametrize(
    ("entry", "label"),
    [
        ("{lora.r: 256, lora.alpha: 512}", "2*r"),
        ("{lora.r: 256, lora.alpha: 256}", "r"),
        ("{lora.r: 256, lora.alpha: 256.0}", "r"),
        ("{lora.r: 256, lora.alpha: 2*r}", "2*r"),
        ("{lora.r: 256, lora.alpha: 16}", 16),
        ("{lora.r: 8, lora.alpha: 16}", 16),
        ("{lora.alpha: 8, lora.r: 8}", "r"),
    ],
)
def test_a_first_value_is_a_label_or_the_number_that_a_rule_gives(entry: str, label: Any) -> None:
    picks = first(entry)
    assert picks["lora.alpha"] == label
    assert list(picks) == ["lora.r", "lora.alpha"]


def test_a_first_entry_may_leave_out_what_has_one_choice_only() -> None:
    assert first("{lora.r: 16}", "lora.r: [8, 16], lora.alpha: 2*r") == {"lora.r": 16, "lora.alpha": "2*r"}


def test_a_first_value_of_a_range_is_any_number_in_it() -> None:
    assert first("{lora.dropout: 0.25}", "lora.dropout: {low: 0, high: 0.5}") == {"lora.dropout": 0.25}


def test_a_first_list_is_matched_by_its_items() -> None:
    picks = first("{lora.targets: [q_proj]}", "lora.targets: [all, [q_proj]]")
    assert picks == {"lora.targets": '["q_proj"]'}


def test_two_rules_of_a_first_entry_are_matched_together() -> None:
    space = "train.batch_size: [64, 128], train.samples: [100*batch_size, 200*batch_size], "
    space += "schedule.warmup_steps: [samples//1000, samples//500]"
    picks = first("{train.batch_size: 64, train.samples: 12800, schedule.warmup_steps: 25}", space)
    assert picks["train.samples"] == "200*batch_size"
    assert picks["schedule.warmup_steps"] == "samples//500"


# --- baselines and repeats


def test_there_is_one_baseline_for_each_distinct_base_and_its_benchmarks() -> None:
    text = "name: x\nsearch: {space: {model.id: [a, b], lora.r: [8, 16], evaluate.limit: [5, 5*lora.r]}}\n"
    found = [(spec.model.id, spec.evaluate.limit) for spec in load(text).baselines()]
    assert found == [(model, limit) for model in "ab" for limit in (5, 40, 80)]
    assert all(spec.train is None for spec in load(text).baselines())


def test_adapters_that_are_scored_in_the_unquantised_base_have_that_for_their_baseline() -> None:
    space = "search: {space: {model.quantization: [none, nf4, fp4]}}"
    (baseline,) = load(f"name: x\ntrial: {{evaluate: {{weights: merged}}}}\n{space}\n").baselines()
    assert baseline.model.quantization == "none"
    assert len(load(f"name: x\n{space}\n").baselines()) == 3


def test_a_baseline_follows_rules_through_rules() -> None:
    space = "lora.r: [8, 16], lora.alpha: 2*r, evaluate.limit: lora.alpha"
    specs = load(f"name: x\nsearch: {{space: {{{space}}}}}\n").baselines()
    assert [spec.evaluate.limit for spec in specs] == [16, 32]


def test_a_space_over_the_adapter_alone_has_one_baseline() -> None:
    assert [spec.digest for spec in load(RANK_ALPHA).baselines()] == [
        load(RANK_ALPHA).resolve({"lora.r": 8, "lora.alpha": 1}).spec.untrained().digest
    ]


def test_a_continuous_space_over_the_adapter_has_its_baseline_too() -> None:
    text = "name: x\nsearch: {sampler: tpe, trials: 3, space: {lora.dropout: {low: 0, high: 0.5}}}\n"
    assert len(load(text).baselines()) == 1


@pytest.mark.parametrize(
    "line",
    [
        "baseline: false",
        "trial: {train: none}",
        "trial: {evaluate: {tasks: []}}\nobjective: {minimize: eval.loss}",
    ],
)
def test_there_is_no_baseline_where_none_is_wanted_or_it_would_say_nothing(line: str) -> None:
    assert load(f"name: x\n{line}\n").baselines() == ()


def test_a_repeat_differs_by_its_seed_alone() -> None:
    sweep = load("name: x\n")
    spec = sweep.resolve({}).spec
    assert sweep.repeated(spec, 0) == spec
    repeat = sweep.repeated(spec, 2)
    assert repeat.train is not None
    assert repeat.train.seed == 1339
    changed = {name for name in TrialSpec.model_fields if getattr(repeat, name) != getattr(spec, name)}
    assert changed == {"train"}


# --- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.samples=51200", "train.samples", 51_200),
        ("trial.train.samples=51200", "train.samples", 51_200),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("lora={r: 2}", "lora.r", 2),
        ("model.id=other/model", "model.id", "other/model"),
        ("evaluate.tasks=[blimp_causative]", "evaluate.tasks", ("blimp_causative",)),
        (" train.seed = 7 ", "train.seed", 7),
    ],
)
def test_an_override_sets_a_field_of_the_trial(override: str, path: str, value: Any) -> None:
    sweep = load("name: x\ntrial: {lora: {alpha: 3}}\n", override)
    section, _, name = path.partition(".")
    assert getattr(getattr(sweep.resolve({}).spec, section), name) == value


def test_overrides_set_everything_else_too() -> None:
    sweep = load(
        RANK_ALPHA,
        "name=other",
        "search.trials=4",
        "search.space.lora.r=[8]",
        "search.space.lora.dropout={low: 0, high: 0.5}",
        "search.first=[{lora.r: 8, lora.alpha: r, lora.dropout: 0.1}]",
        "resources.gpus=0",
        "objective.minimize=eval.loss",
        "baseline=false",
        "search.repeats=1",
    )
    assert (sweep.name, sweep.search.trials, sweep.resources.gpus) == ("other", 4, 0)
    assert list(sweep.search.space) == ["lora.r", "lora.alpha", "lora.dropout"]
    assert list(sweep.search.space["lora.r"].labels()) == [8]
    assert sweep.search.first == ({"lora.r": 8, "lora.alpha": "r", "lora.dropout": 0.1},)
    assert (sweep.objective.metric, sweep.objective.maximize) == ("eval.loss", False)
    assert (sweep.baseline, sweep.search.repeats) == (False, 1)


def test_the_last_of_two_overrides_of_one_path_counts() -> None:
    assert load("name: x\n", "name=y", "name=z").name == "z"


def test_a_rule_may_be_set() -> None:
    assert load("name: x\n", "lora.alpha=4*r").resolve({}).spec.lora.alpha == 32


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("lora.r", "--set: PATH=VALUE is needed, got 'lora.r'; write it like train.samples=512"),
        ("=8", "--set: PATH=VALUE is needed, got '=8'"),
        ("lor.r=8", "--set: lor.r: unknown path 'lor.r'; did you mean lora.r?"),
        ("serch.trials=8", "--set: serch.trials: unknown path 'serch.trials'; did you mean search.trials?"),
        ("lora.rr=8", "--set: lora.rr: unknown key 'rr'; did you mean r?"),
        ("search.trails=8", "--set: search.trails: unknown key 'trails'; did you mean trials?"),
        ("lora.r=[8, 16]", "--set: lora.r: an integer > 0 is needed, got [8, 16]; values to try one after"),
        ("lora.r=-8", "--set: lora.r: an integer > 0 is needed, got -8"),
        ("lora.r=[8", "--set: lora.r: YAML is needed: expected ',' or ']'"),
        ("name=*x", "--set: name: YAML is needed: anchors and aliases are not read, got *x"),
        ("name.x=8", "--set: name.x: name must be a section, got 'x'"),
        ("lora.alpha=2*q", "--set: lora.alpha: a number > 0 or a rule is needed: unknown name 'q'"),
        ("name=", "--set: name: text is needed, got null"),
        ("search.space.lora.rank=[8]", "--set: lora.rank: unknown field path 'lora.rank'; did you mean"),
        ("train.samples=64", "--set: train.samples: train.samples >= train.batch_size must hold"),
        ("objective.minimize=score.x", "--set: objective: score.x is never measured"),
    ],
)
def test_a_broken_override_is_reported_under_its_own_source(override: str, fault: str) -> None:
    [line] = faults_of("name: x\n", override)
    assert line.startswith(fault)


def test_an_override_that_the_space_would_hide_is_refused() -> None:
    [line] = faults_of(RANK_ALPHA, "lora.r=4")
    assert line == (
        "--set: lora.r: search.space varies lora.r, so this would change nothing, got 4; "
        "write search.space.lora.r=[4]"
    )


def test_faults_of_overrides_come_with_those_of_the_file() -> None:
    lines = faults_of("name: x\nbaselin: true\n", "lora.r=-8", "nonsense")
    assert [line.split(" ")[0] for line in lines] == ["--set:", "--set:", "x.yaml:2:"]


# --- local files


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "rows.json").write_text("[]")
    (tmp_path / "sweeps" / "bench").mkdir()
    (tmp_path / "model").mkdir()
    return tmp_path


def test_relative_paths_are_taken_from_the_folder_of_the_file(files: Path) -> None:
    path = files / "sweeps" / "x.yaml"
    path.write_text(
        "name: x\ntrial:\n  model: {id: ../model}\n  data: {path: rows.json}\n"
        "  evaluate: {data_dir: bench, task_dir: ./bench}\n"
    )
    spec = load_sweep(path).resolve({}).spec
    assert spec.model.id == str(files / "model")
    assert spec.data.path == str(files / "sweeps" / "rows.json")
    assert spec.evaluate.data_dir == spec.evaluate.task_dir == str(files / "sweeps" / "bench")


def test_a_relative_path_of_the_space_keeps_its_label_and_is_resolved(files: Path) -> None:
    text = "name: x\nsearch: {space: {model.id: [./model, org/model], data.path: [sweeps/rows.json]}}\n"
    sweep = load(text, base_dir=files)
    assert list(sweep.search.space["model.id"].labels()) == ["./model", "org/model"]
    resolved = sweep.resolve({"model.id": "./model", "data.path": "sweeps/rows.json"})
    assert resolved.spec.model.id == resolved.params["model.id"] == str(files / "model")
    assert resolved.spec.data.path == str(files / "sweeps" / "rows.json")


def test_a_path_may_start_in_the_home_folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(files))
    sweep = load("name: x\ntrial: {model: {id: ~/model}, data: {path: ~/sweeps/rows.json}}\n")
    assert sweep.template["model.id"] == str(files / "model")
    assert sweep.template["data.path"] == str(files / "sweeps" / "rows.json")


def test_a_hub_id_is_no_path() -> None:
    assert load("name: x\ntrial: {model: {id: org/model}}\n").template["model.id"] == "org/model"
    assert (
        load("name: x\ntrial: {model: {id: package:a/b.gguf}}\n").template["model.id"] == "package:a/b.gguf"
    )


def test_relative_paths_of_overrides_are_taken_from_the_working_folder(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files / "sweeps")
    sweep = load("name: x\n", "data.path=rows.json", "evaluate={data_dir: bench}", base_dir=files)
    assert sweep.resolve({}).spec.data.path == str(files / "sweeps" / "rows.json")
    assert sweep.resolve({}).spec.evaluate.data_dir == str(files / "sweeps" / "bench")


def test_the_same_sweep_is_loaded_again_from_its_text_in_any_folder(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files / "sweeps")
    overrides = [
        "data.path=rows.json",
        "search.space.model.id=[./bench, org/é𝜋]",
        "search.trials=2",
        "objective.minimize=eval.loss",
    ]
    sweep = load("name: x\ntrial: {evaluate: {data_dir: sweeps/bench}}\n", *overrides, base_dir=files)
    monkeypatch.chdir("/")
    again = load_sweep_text(sweep.text, sweep.source, sweep.overrides, sweep.base_dir)
    assert again == sweep
    assert again.file_digest == sweep.file_digest


def test_the_digest_changes_with_the_text_and_with_the_overrides() -> None:
    sweeps = [
        load("name: x\n"),
        load("name: x\n\n"),
        load("name: x\n", "name=y"),
        load("name: x\n", "baseline=true"),
    ]
    assert len({sweep.file_digest for sweep in sweeps}) == len(sweeps)
    assert load("name: x\n").file_digest == load("name: x\n").file_digest


# --- benchmarks


class Names:
    """The benchmarks known, and what was asked."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.asked: list[str | None] = []

    def __call__(self, task_dir: str | None) -> Collection[str]:
        self.asked.append(task_dir)
        return self.names


def test_task_names_are_not_asked_for_where_the_articles_are_enough() -> None:
    names = Names()
    load("name: x\n", task_names=names)
    load(f"name: x\ntrial: {{evaluate: {{tasks: [{ARTICLE_TASKS[0]}]}}}}\n", task_names=names)
    assert names.asked == []


def test_task_names_are_asked_for_with_the_absolute_task_folder(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    names = Names("mine")
    load(
        "name: x\ntrial: {evaluate: {tasks: [mine], task_dir: tasks}}\n", base_dir=tmp_path, task_names=names
    )
    assert names.asked == [str(tmp_path / "tasks")]


def test_any_task_is_taken_where_no_names_are_known() -> None:
    text = "name: x\ntrial: {evaluate: {tasks: [whatever]}}\n"
    assert load(text).template["evaluate.tasks"] == ("whatever",)


def test_tasks_are_not_looked_up_in_a_folder_that_is_missing(tmp_path: Path) -> None:
    names = Names()
    text = "name: x\ntrial: {evaluate: {tasks: [mine], task_dir: tasks}}\n"
    [line] = faults_of(text, base_dir=tmp_path, task_names=names)
    assert f"no such folder, looked for {tmp_path / 'tasks'}" in line
    assert names.asked == []


def test_tasks_in_the_space_are_checked_too() -> None:
    text = "name: x\nsearch:\n  space:\n    evaluate.tasks:\n    - [piqa]\n    - [piqa, pika]\n"
    [line] = faults_of(text, task_names=Names("piqa"))
    assert line == "x.yaml:6: evaluate.tasks: unknown task 'pika'; did you mean piqa?"


def test_a_task_folder_that_cannot_be_read_is_a_fault_of_the_file(tmp_path: Path) -> None:
    def names(task_dir: str | None) -> Collection[str]:
        raise BadData("mine.yaml must be YAML")

    (tmp_path / "tasks").mkdir()
    text = "name: x\ntrial:\n  evaluate:\n    tasks: [mine]\n    task_dir: tasks\n"
    [line] = faults_of(text, base_dir=tmp_path, task_names=names)
    assert line == "x.yaml:5: evaluate.task_dir: mine.yaml must be YAML"


# --- large spaces


def test_a_space_too_large_to_be_tried_whole_is_tried_at_its_ends_and_along_its_rules() -> None:
    text = (
        "name: x\nsearch:\n  sampler: random\n  trials: 3\n  space:\n"
        "    train.seed: {low: 0, high: 1000000}\n    lora.r: [8, 16, 32]\n"
        "    lora.dropout: {low: 0.0, high: 0.5}\n    lora.alpha: [r, 'r*(r-16)*(dropout-1)*-1']\n"
    )
    lines = faults_of(text)
    assert {line.split(": ")[0] for line in lines} == {"x.yaml:9"}
    assert any("with lora.r=8, lora.dropout=0.5" in line for line in lines)
    assert any("got 0.0 from" in line and "lora.r=16" in line for line in lines)


def test_each_choice_of_a_continuous_space_is_tried_beside_the_first_of_the_others() -> None:
    text = (
        "name: x\nsearch:\n  sampler: random\n  trials: 3\n  space:\n"
        "    lora.dropout: {low: 0.0, high: 0.5}\n    schedule.warmup_steps:\n    - 10\n    - 400\n"
    )
    [line] = faults_of(text)
    assert line.startswith("x.yaml:9: schedule.warmup_steps: schedule.warmup_steps < steps must hold")


def test_many_faults_of_one_kind_are_counted_not_listed() -> None:
    text = "name: x\nsearch:\n  space:\n    lora.r: {low: 1, high: 500}\n    lora.alpha: [r-500]\n"
    lines = faults_of(text)
    assert len(lines) == 21
    assert "480 more faults like these" in lines[0]


def test_first_trials_of_a_continuous_space_are_tried_against_the_laws() -> None:
    text = (
        "name: x\nsearch:\n  sampler: tpe\n  trials: 2\n  space:\n"
        "    lora.dropout: {low: 0.0, high: 0.5}\n    lora.alpha: 1/(dropout-0.25)**2\n"
    )
    assert load(text, "search.first=[{lora.dropout: 0.1}]").search.first
    [line] = faults_of(text, "search.first=[{lora.dropout: 0.25}]")
    assert line.startswith("x.yaml:7: lora.alpha: a rule must give a finite number")
    assert "with lora.dropout=0.25: it divides by zero" in line


# --- the floor


def test_reading_a_sweep_file_imports_no_heavy_library() -> None:
    code = "import sys, sweeps.sweepfile; print('\\n'.join(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = {name.partition(".")[0] for name in found.split()}
    assert {"yaml", "pydantic", "sweeps"} <= modules
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "lm_eval", "datasets", "numpy", "pandas"}
    service = {"ray", "optuna", "mlflow", "sweepsvc", "rich", "typer"}
    assert modules & (heavy | service) == set()
