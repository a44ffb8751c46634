"""Law L7: a bad sweep file gives every fault at once, each with its line, its field and its remedy.

The files stand in `malformed.txt`: `### title`, the file, and a line `>>> LINE: MESSAGE` for each fault, `-`
where it has no line. HERE is the folder of the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pytest

from sweeps.errors import InvalidSweep
from sweeps.sweepfile import load_sweep

KNOWN_TASKS = ("truthfulqa_mc1", "mmlu_global_facts", "piqa")


class Bad(NamedTuple):
    title: str
    text: str
    faults: list[str]


def read_table() -> list[Bad]:
    table = Path(__file__).with_name("malformed.txt").read_text(encoding="utf-8")
    return [read_entry(entry) for entry in re.split(r"^### ", table, flags=re.MULTILINE)[1:]]


def read_entry(entry: str) -> Bad:
    title, _, rest = entry.partition("\n")
    text, *faults = re.split(r"^>>> ", rest, flags=re.MULTILINE)
    return Bad(title, text, [fault.strip() for fault in faults])


FILES = read_table()


def faults_of(path: Path) -> list[str]:
    def task_names(task_dir: str | None) -> Collection[str]:
        return KNOWN_TASKS

    with pytest.raises(InvalidSweep) as caught:
        load_sweep(path, (), task_names)
    for fault, line in zip(caught.value.faults, caught.value.lines(), strict=True):
        assert line == f"{path}:{fault.line}: {fault}" if fault.line else f"{path}: {fault}"
    return [f"{fault.line or '-'}: {fault}" for fault in caught.value.faults]


@pytest.mark.parametrize("file", FILES, ids=[file.title for file in FILES])
def test_a_malformed_file_gives_each_fault_with_its_line_and_remedy(file: Bad, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(file.text, encoding="utf-8")
    assert faults_of(path) == [fault.replace("HERE", str(tmp_path)) for fault in file.faults]


def test_the_table_is_read_whole() -> None:
    assert len(FILES) >= 45
    assert len({file.title for file in FILES}) == len({file.text for file in FILES}) == len(FILES)
    assert all(file.faults for file in FILES)
    assert max(len(file.faults) for file in FILES) > 20


def test_every_line_that_a_fault_names_is_a_line_of_the_file() -> None:
    for file in FILES:
        lines = [fault.partition(":")[0] for fault in file.faults]
        assert all(line == "-" or 1 <= int(line) <= file.text.count("\n") for line in lines), file.title


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"name: x\n# caf\xe9\n", "2: the file must be UTF-8, got byte 0xe9; save it as UTF-8"),
        ("name: x\n".encode("utf-16"), "1: the file must be UTF-8, got byte 0xff; save it as UTF-8"),
        (b"name: x\n# \x07\n", r"2: text is needed, got the character '\x07'; remove it"),
        (b"name: x\n\x00\n", r"2: text is needed, got the character '\x00'; remove it"),
    ],
)
def test_a_file_that_is_no_text_names_the_line(raw: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(raw)
    assert faults_of(path) == [fault]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "name: x\ntrial:\n  train: {samples: 1280}\n  schedule: {warmup_step: 5}\n",
            "4: schedule.warmup_step: unknown key 'warmup_step'; did you mean warmup_steps?",
        ),
        (
            "name: x\nsearch:\n  space:\n    lora.r: [8, 0]\n    lora.alpha: [16, 2*r]\n",
            "4: lora.r: an integer > 0 is needed, got 0",
        ),
        (
            "name: x\nsearch:\n  sampler: tpee\n  space:\n    lora.dropout: {low: 0, high: 0.5}\n",
            "3: search.sampler: one of grid, random, tpe, gp, cmaes, qmc is needed, got 'tpee'; "
            "did you mean tpe?",
        ),
        (
            "name: x\nsearch:\n  space:\n    lora.r: {low: 8.0, high: 16}\n",
            "4: lora.r: an integer > 0 is needed, got 8.0; write 8",
        ),
        (
            "name: x\nsearch:\n  sampler: cmaes\n  trials: 2\n  space:\n    lora.r: {low: 9, high: 8}\n",
            "6: lora.r: low < high must hold, got low=9, high=8; swap them, or list the values",
        ),
    ],
)
def test_a_fault_does_not_bring_others_that_follow_from_it(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert faults_of(path) == [fault]


def test_no_such_file_offers_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "rank_alpha.yaml").write_text("name: x\n")
    path = tmp_path / "rank_alpa.yaml"
    near = f"did you mean {tmp_path / 'rank_alpha.yaml'}?"
    assert faults_of(path) == [f"-: no such file, looked for {path}; {near}"]
    path = tmp_path / "nowhere" / "x.yaml"
    assert faults_of(path) == [f"-: no such file, looked for {path}; check the path"]


def test_a_folder_is_no_sweep_file(tmp_path: Path) -> None:
    assert faults_of(tmp_path) == ["-: a file is needed, got a folder; name a YAML file in it"]


def test_a_file_beneath_a_file_is_a_fault_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert faults_of(tmp_path / "x" / "y.yaml") == [
        "-: the file must be readable: Not a directory; check the path and its permissions"
    ]


def test_a_file_that_is_no_sweep_file_at_all_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\x00" * 1_000_000)
    assert faults_of(path) == [
        "-: a sweep file has at most 262144 bytes, this one has more; is it a sweep file?"
    ]
