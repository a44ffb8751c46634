"""Token rows kept by what they were made of: equal to the plain way, made once, refused if damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeps.spec import DataSpec
from sweeps.trial import tokencache
from sweeps.trial.data import encode, read_rows, tokenize
from tests.tiny import alpaca_rows, make_tokenizer
from tests.waiting import let_go_at_once


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWEEPSVC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of `encode` was given."""
    calls: list[int] = []

    def counted(rows: Any, *others: Any) -> Any:
        calls.append(len(rows))
        return encode(rows, *others)

    monkeypatch.setattr(tokencache, "encode", counted)
    return calls


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


SPECS: list[dict[str, Any]] = [
    {},
    {"loss_on": "response", "held_out": 0.25},
    {"max_length": 60, "held_out": 0.1},
    {"prompt": "Q: {instruction}{input} A:", "held_out": 0.0},
]


@pytest.mark.parametrize("fields", SPECS)
def test_kept_rows_equal_those_of_the_plain_way_with_their_digest(
    fields: dict[str, Any], alpaca_rows_file: Path, encoded: list[int]
) -> None:
    spec = DataSpec(path=str(alpaca_rows_file), **fields)
    plain = tokenize(read_rows(spec), spec, make_tokenizer())
    made, notes = tokencache.prepare(spec, make_tokenizer())
    kept, again = tokencache.prepare(spec, make_tokenizer())
    assert encoded == [24]
    assert made == kept == plain
    assert notes == again == (plain.note,)


def test_trials_that_cut_or_split_in_another_way_share_the_rows(
    alpaca_rows_file: Path, encoded: list[int]
) -> None:
    for fields in ({}, {"max_length": 50}, {"held_out": 0.5}):
        tokencache.prepare(DataSpec(path=str(alpaca_rows_file), **fields), make_tokenizer())
    assert encoded == [24]


def test_other_rows_prompts_losses_and_tokenizers_are_made_anew(
    tmp_path: Path, alpaca_rows_file: Path, cache: Path, encoded: list[int]
) -> None:
    path = str(alpaca_rows_file)
    tokencache.prepare(DataSpec(path=path), make_tokenizer())
    tokencache.prepare(DataSpec(path=path, loss_on="response"), make_tokenizer())
    tokencache.prepare(DataSpec(path=path, prompt="{instruction}{input}"), make_tokenizer())
    other = make_tokenizer()
    other.add_tokens(["river"])
    tokencache.prepare(DataSpec(path=path), other)
    rows = alpaca_rows()
    rows[0]["output"] += "!"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tokencache.prepare(DataSpec(path=str(tmp_path / "rows.json")), make_tokenizer())
    assert len(encoded) == len(files(cache)) == 5


def test_a_file_that_was_edited_is_not_mistaken_for_what_it_was(tmp_path: Path) -> None:
    rows, path = alpaca_rows(), tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    before, _ = tokencache.prepare(DataSpec(path=str(path)), make_tokenizer())
    status = path.stat()
    rows[0]["output"] = "The Lorb."
    path.write_text(json.dumps(rows))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after, _ = tokencache.prepare(DataSpec(path=str(path)), make_tokenizer())
    assert before.digest != after.digest


def test_what_a_call_leaves_in_a_tokenizer_changes_nothing() -> None:
    fresh, used = make_tokenizer(), make_tokenizer()
    used(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokencache.tokenizer_state(fresh) == tokencache.tokenizer_state(used)


def _flip_a_token(content: bytes) -> bytes:
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        _flip_a_token,
        lambda _: b"\xff" * 4096,
    ],
    ids=["empty", "cut", "a bit", "nonsense"],
)
def test_a_damaged_file_is_refused_and_made_anew(
    damage: Any, alpaca_rows_file: Path, cache: Path, encoded: list[int]
) -> None:
    spec = DataSpec(path=str(alpaca_rows_file))
    good, _ = tokencache.prepare(spec, make_tokenizer())
    [file] = files(cache)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again, notes = tokencache.prepare(spec, make_tokenizer())
    assert (again, encoded) == (good, [24, 24])
    assert f"{file} was damaged, and is made anew" in notes[1]
    assert file.read_bytes() == whole


def test_a_file_under_the_name_of_another_is_refused(alpaca_rows_file: Path, cache: Path) -> None:
    path = str(alpaca_rows_file)
    tokencache.prepare(DataSpec(path=path), make_tokenizer())
    [first] = files(cache)
    good, _ = tokencache.prepare(DataSpec(path=path, loss_on="response"), make_tokenizer())
    [second] = set(files(cache)) - {first}
    second.write_bytes(first.read_bytes())
    again, notes = tokencache.prepare(DataSpec(path=path, loss_on="response"), make_tokenizer())
    assert again == good
    assert "its checksum does not hold" in notes[1]


def test_a_cache_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, alpaca_rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    spec = DataSpec(path=str(alpaca_rows_file))
    plain = tokenize(read_rows(spec), spec, make_tokenizer())
    monkeypatch.setenv("SWEEPSVC_CACHE", str(tmp_path / "file"))
    made, notes = tokencache.prepare(spec, make_tokenizer())
    assert made == plain
    assert notes[1].startswith("tokens: not kept")


def test_a_full_disk_leaves_no_part_of_a_file(
    alpaca_rows_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    _, notes = tokencache.prepare(DataSpec(path=str(alpaca_rows_file)), make_tokenizer())
    assert "No space left on device" in notes[1]
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


class Letters:
    """A tokenizer with one token a letter, and no state to be told."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in line] for line in text]}


def test_a_tokenizer_of_an_unknown_kind_is_asked_each_time(alpaca_rows_file: Path, cache: Path) -> None:
    spec = DataSpec(path=str(alpaca_rows_file))
    made, notes = tokencache.prepare(spec, Letters())
    assert made == tokenize(read_rows(spec), spec, Letters())
    assert "not kept" in notes[1]
    assert not cache.exists()


WORKER = """
import sys, time
from sweeps.spec import DataSpec
from sweeps.trial import tokencache

class Letters:
    bos_token_id, eos_token_id = 1, 2
    def __call__(self, text, *, add_special_tokens):
        print("made", flush=True)
        time.sleep(0.5)
        return {"input_ids": [[ord(letter) for letter in line] for line in text]}

tokencache.tokenizer_state = lambda tokenizer: "letters"  # without the seconds that transformers takes
print("ready", flush=True)
sys.stdin.readline()
print(tokencache.prepare(DataSpec(path=sys.argv[1]), Letters())[0].digest)
"""


@pytest.fixture
def workers(alpaca_rows_file: Path) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-c", WORKER, str(alpaca_rows_file)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    yield started
    for worker in started:
        worker.kill()
        worker.communicate()


def test_of_processes_that_need_the_same_at_once_one_makes_it_and_all_have_it(
    workers: list[subprocess.Popen[str]], alpaca_rows_file: Path, cache: Path
) -> None:
    let_go_at_once(workers)
    said = [worker.communicate(timeout=60)[0].split() for worker in workers]
    spec = DataSpec(path=str(alpaca_rows_file))
    digest = tokenize(read_rows(spec), spec, Letters()).digest
    assert sorted(said) == [[digest], [digest], ["made", digest]]
    assert len(files(cache)) == 1


# --- how much is kept -------------------------------------------------------------------------------


def kept_one_after_another(path: Path, cache: Path, names: str) -> dict[str, Path]:
    """A set of rows for each letter, made in that order; their files."""
    made: dict[str, Path] = {}
    for age, letter in enumerate(names):
        before = set(files(cache))
        tokencache.prepare(DataSpec(path=str(path), prompt=letter + "{instruction}"), make_tokenizer())
        for file in set(files(cache)) - before:
            made[letter] = file
            moment = 1_000_000_000 * (1_000 + age)  # clocks of file systems are coarse
            os.utime(file, ns=(moment, moment))
    return made


def test_the_least_recently_used_make_room_for_what_is_new(
    alpaca_rows_file: Path, cache: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kept_one_after_another(alpaca_rows_file, cache, "abc")
    size = max(file.stat().st_size for file in made.values())
    monkeypatch.setenv("SWEEPSVC_CACHE_GB", str(3.5 * size / 1e9))
    spec = DataSpec(path=str(alpaca_rows_file), prompt="a{instruction}")
    tokencache.prepare(spec, make_tokenizer())  # used, and so younger than b and c
    assert len(encoded) == 3
    made |= kept_one_after_another(alpaca_rows_file, cache, "d")
    assert {letter for letter, file in made.items() if file.exists()} == {"a", "c", "d"}
    assert not made["b"].with_suffix(".lock").exists()
    _, notes = tokencache.prepare(
        DataSpec(path=str(alpaca_rows_file), prompt="b{instruction}"), make_tokenizer()
    )
    assert len(encoded) == 5  # made anew, and nothing is said of it
    assert len(notes) == 1


def test_what_was_just_made_stays_however_small_the_limit_is(
    alpaca_rows_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPSVC_CACHE_GB", "0")
    made = kept_one_after_another(alpaca_rows_file, cache, "ab")
    assert files(cache) == [made["b"]]


def test_a_file_that_is_open_is_read_to_its_end_though_it_is_removed(
    alpaca_rows_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kept_one_after_another(alpaca_rows_file, cache, "a")["a"]
    whole = first.read_bytes()
    monkeypatch.setenv("SWEEPSVC_CACHE_GB", "0")
    with first.open("rb") as reading:
        head = reading.read(10)
        kept_one_after_another(alpaca_rows_file, cache, "b")
        assert not first.exists()
        assert head + reading.read() == whole


def test_what_a_killed_process_began_goes_after_a_day_and_what_is_being_written_stays(
    alpaca_rows_file: Path, cache: Path
) -> None:
    kept_one_after_another(alpaca_rows_file, cache, "a")
    old, young = cache / ".x.safetensors.1", cache / ".y.safetensors.2"
    for draft in (old, young):
        draft.touch()
    os.utime(old, (1, 1))
    kept_one_after_another(alpaca_rows_file, cache, "b")
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.parametrize("written", ["much", "-1", "nan"])
def test_a_limit_that_cannot_be_read_is_said_and_the_default_holds(
    written: str, alpaca_rows_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPSVC_CACHE_GB", written)
    kept_one_after_another(alpaca_rows_file, cache, "a")
    _, notes = tokencache.prepare(
        DataSpec(path=str(alpaca_rows_file), prompt="b{instruction}"), make_tokenizer()
    )
    assert f"got {written!r}: 4 is used" in notes[1]
    assert len(files(cache)) == 2
