"""Every command and every file of the README is a real one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.sweepfile import load_sweep_text
from sweeps.trial.tasks import task_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("#")[0].split()
    for language, text in BLOCKS
    if language == "sh"
    for line in text.splitlines()
    if line.strip()
]


def test_the_readme_has_commands_and_a_sweep_file() -> None:
    assert len(COMMANDS) >= 6
    assert [language for language, _ in BLOCKS].count("yaml") == 1


@pytest.mark.parametrize("target", [words[1] for words in COMMANDS if words[0] == "make"])
def test_every_make_target_exists(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [words for words in COMMANDS if "sweepsvc" in words], ids=" ".join)
def test_every_command_and_option_exists(words: list[str]) -> None:
    arguments = words[words.index("sweepsvc") + 1 :]
    options = {word for word in arguments if word.startswith("--")}
    shown = subprocess.run(
        [sys.executable, "-m", "sweepsvc", arguments[0], "--help"],
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "PATH": ""},
    )
    assert shown.returncode == 0, shown.stderr
    assert all(option in shown.stdout for option in options)


def test_the_sweep_file_is_valid_as_it_stands(tmp_path: Path) -> None:
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    sweep = load_sweep_text(text, "mine.yaml", (), tmp_path, task_names)
    assert (sweep.name, sweep.search.trials) == ("mine", 12)
    assert load_sweep_text(text, "mine.yaml", ("search.trials=3",), tmp_path, task_names).search.trials == 3


def test_the_sweep_file_of_the_reference_page_is_valid_as_it_stands(tmp_path: Path) -> None:
    page = (ROOT / "docs/sweep-file.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert load_sweep_text(text, "rank_alpha.yaml", (), tmp_path, task_names).search.trials == 24


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda path: path.name)
def test_every_search_space_is_valid_and_opens_with_question_cost_and_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert load_sweep_text(text, str(path), (), path.parent, task_names).name == path.stem
    head = text.partition("\nname:")[0]
    assert "?" in head.splitlines()[0]
    assert "Costs about" in head
    assert f"python -m sweepsvc launch search_spaces/{path.name}" in head


def test_there_are_search_spaces_to_check() -> None:
    assert {path.name for path in (ROOT / "search_spaces").glob("*.yaml")} >= {
        "quickstart.yaml",
        "rank_alpha.yaml",
    }


def test_the_quickstart_facts_are_what_their_script_makes(tmp_path: Path) -> None:
    folder = ROOT / "search_spaces/quickstart"
    subprocess.run([sys.executable, folder / "make_facts.py", "--out", tmp_path], check=True)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["facts.jsonl", "facts.yaml", "facts_train.json"]
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in made)
