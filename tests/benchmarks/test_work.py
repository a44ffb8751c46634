from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks.work import HELD_OUT, TRIALS, invented_documents, invented_rows, write_documents, write_rows
from sweeps.errors import CannotStart
from sweeps.spec import ARTICLE_TASKS


def test_invented_rows_are_as_long_as_alpacas() -> None:
    words = sorted(len(" ".join(row.values()).split()) for row in invented_rows(2000))
    assert words[0] < 20
    assert statistics.median(words) == pytest.approx(110 - 37, abs=8)  # the prompt around them is the rest
    assert words[-1] > 600


def test_invented_rows_are_the_same_every_time() -> None:
    assert invented_rows(5) == invented_rows(5)
    assert any(row["input"] for row in invented_rows(5))


def test_rows_that_are_given_are_split_in_trained_and_held_out(tmp_path: Path) -> None:
    file = tmp_path / "given.json"
    file.write_text(json.dumps(invented_rows(8 + HELD_OUT)))
    train, held_out, note = write_rows(file, 8, tmp_path)
    rows = [json.loads(path.read_text()) for path in (train, held_out)]
    assert [len(part) for part in rows] == [8, HELD_OUT]
    assert not [row for row in rows[0] if row in rows[1]]
    assert "8 of given.json" in note


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "given.json"
    file.write_text(json.dumps(invented_rows(8)))
    with pytest.raises(CannotStart, match=r"got 8 in given\.json with --samples 8; lower --samples"):
        write_rows(file, 8, tmp_path)


def test_rows_that_are_not_given_are_invented_and_said(tmp_path: Path) -> None:
    assert "invented" in write_rows(None, 8, tmp_path)[2]


@pytest.mark.parametrize("task", ARTICLE_TASKS)
def test_invented_documents_differ_and_are_the_same_every_time(task: str) -> None:
    documents = invented_documents(task, 6)
    assert documents == invented_documents(task, 6)
    assert len({json.dumps(document) for document in documents}) == 6


def test_documents_come_from_the_folder_and_what_it_lacks_is_invented_and_said(tmp_path: Path) -> None:
    given, folder = tmp_path / "given", tmp_path / "documents"
    given.mkdir()
    folder.mkdir()
    (given / "blimp_causative.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n' * 5)
    counts, notes = write_documents(given, ["blimp_causative", "arithmetic_2ds"], 3, folder)
    assert counts == {"blimp_causative": 3, "arithmetic_2ds": 3}
    assert notes == ["arithmetic_2ds: 3 invented documents (--data-dir has no arithmetic_2ds.jsonl)"]
    assert (folder / "blimp_causative.jsonl").read_text().count("sentence_good") == 3


def test_a_benchmark_that_cannot_be_invented_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="got hellaswag"):
        write_documents(None, ["hellaswag"], 3, tmp_path)


def test_no_two_trials_are_equal() -> None:
    assert len(set(TRIALS)) == len(TRIALS) == 16
