"""Which benchmarks there are: the same as lm-eval says, in a tenth of its time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.spec import ARTICLE_TASKS
from sweeps.trial.tasks import benchmarks, index_roots, task_names


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_lm_evals_tasks_groups_and_tags_are_known() -> None:
    assert {*ARTICLE_TASKS, "mmlu", "arithmetic", "gsm8k"} <= task_names()
    assert "no_such_benchmark" not in task_names()


def test_names_come_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from sweeps.trial.tasks import task_names; assert len(task_names()) > 10_000; "
        "assert not {'lm_eval', 'torch', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folders_own_tasks_groups_and_tags_are_known(tmp_path: Path) -> None:
    write(
        tmp_path,
        one="task: one\ntag: [odd, all]\nprocess_docs: !function utils.process\n",
        two="include: base\ntask: two\n",
        both="group: both\ntask: [one, {task: two, num_fewshot: 3}, {group: inner, task: [gsm8k]}]\n",
        nothing="- a list\n",
        broken="task: [\n",
        cycle="include: cycle.yaml\ntask: cycle\n",
        lost="include: no_such_file\ntask: lost\n",
        null="task: null\n",
    )
    (tmp_path / "base").write_text("task: hidden\ntag: even\n")
    own = task_names(str(tmp_path)) - task_names()
    assert own == {"one", "two", "both", "odd", "all", "even"}
    assert benchmarks(str(tmp_path))["both"].members == ("one", "two", "inner", "gsm8k")
    assert benchmarks(str(tmp_path))["even"].members == ("two",)


def test_a_file_of_ours_takes_the_place_of_lm_evals(tmp_path: Path) -> None:
    write(tmp_path, mine="task: gsm8k\n")
    assert benchmarks(str(tmp_path))["gsm8k"].file == tmp_path / "mine.yaml"
    assert index_roots("gsm8k", str(tmp_path)) == [tmp_path]
    assert index_roots("gsm8k") != [tmp_path]


def test_a_benchmark_needs_its_own_folder_and_a_group_those_of_its_members(tmp_path: Path) -> None:
    write(tmp_path, mixed="group: mixed\ntask: [arithmetic_2ds, blimp_causative]\n")
    (arithmetic,) = index_roots("arithmetic_2ds")
    assert arithmetic.name == "arithmetic"
    assert index_roots("arithmetic") == [arithmetic]
    assert index_roots("mixed", str(tmp_path)) == [arithmetic.parent, tmp_path]
    assert index_roots("arithmetic_2ds", str(tmp_path)) == [arithmetic]
    assert index_roots("no_such_benchmark") == []


@pytest.mark.slow
def test_names_files_and_members_are_those_of_lm_evals_index() -> None:
    from lm_eval.tasks import TaskManager

    index, ours = TaskManager().task_index, benchmarks()
    assert set(ours) == set(index)
    assert {name: ours[name].file for name in ours} == {
        name: entry.yaml_path for name, entry in index.items()
    }
    for name in ("mmlu", "arithmetic", "super-glue-t5-prompt", "leaderboard", "acp_bench"):
        part = TaskManager(include_defaults=False, include_path=index_roots(name)).task_index
        waiting, seen = [name], set()
        while waiting:
            found = waiting.pop()
            seen.add(found)
            if found in index:  # a group may define a member in place
                assert part[found].yaml_path == index[found].yaml_path
                assert part[found].tags == index[found].tags
                waiting += {*ours[found].members, *index[found].tags} - seen
        assert len(seen) > 5
