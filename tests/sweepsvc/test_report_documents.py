"""Which documents a score is of, and when two trials may be compared by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sweeps.result import Score
from sweepsvc.report_documents import NO_FILE, Documents, compare, documents_of, read_documents
from sweepsvc.report_stats import Paired


def evaluation(values: list[Any], hashes: list[str] | None = None, name: str = "facts") -> dict[str, Any]:
    column = {"doc_hash": hashes or [f"h{i}" for i in range(len(values))], "acc,none": values}
    task = {"metrics": {"acc,none": {"value": 0.5, "stderr": 0.1}}, "per_document": column}
    return {"tasks": {name: task}, "groups": {}}


def score(value: float) -> Score:
    return Score(value=value, stderr=0.1, metric="acc", documents=4)


def test_the_documents_of_a_score_are_read_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(evaluation([1.0, 0.0, True, 0])))
    found = read_documents(file, {"facts": score(0.5)})
    assert found == {
        "facts": Documents(("facts/h0", "facts/h1", "facts/h2", "facts/h3"), (1.0, 0.0, 1.0, 0.0))
    }


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, NO_FILE),
        ("{", "evaluation.json cannot be read"),
        ("[]", "evaluation.json has no scores by document"),
        ('{"tasks": {}, "groups": {}}', "evaluation.json has no scores by document"),
        (
            json.dumps(evaluation([1.0, 1.0, 0.0])),
            "its score is not the mean of the scores in evaluation.json",
        ),
        (json.dumps(evaluation(["NaN", 1.0])), "its score is not a mean over documents"),
        (json.dumps(evaluation([[1, 2], [3, 4]])), "its score is not a mean over documents"),
        (json.dumps(evaluation([1.0, 0.0], ["h0"])), "its score is not a mean over documents"),
    ],
)
def test_documents_that_are_not_those_of_the_score_are_not_used(
    tmp_path: Path, text: str | None, why: str
) -> None:
    file = tmp_path / "evaluation.json"
    if text is not None:
        file.write_text(text)
    assert read_documents(file, {"facts": score(0.5)}) == {"facts": why}


def test_a_group_has_the_documents_of_its_members() -> None:
    both = evaluation([1.0, 0.0], name="a")
    both["tasks"] |= evaluation([0.0, 0.0], name="b")["tasks"]
    both["groups"] = {"inner": {"members": ["b"]}, "outer": {"members": ["a", "inner"]}}
    found = documents_of(both, "outer", score(0.25))
    assert found == Documents(("a/h0", "a/h1", "b/h0", "b/h1"), (1.0, 0.0, 0.0, 0.0))
    # A mean of the members' means would be another number, and is then not tested.
    assert (
        documents_of(both, "outer", score(0.4))
        == "its score is not the mean of the scores in evaluation.json"
    )


def test_a_document_without_a_score_is_left_out() -> None:
    assert documents_of(evaluation([1.0, None, 0.0]), "facts", score(0.5)) == Documents(
        ("facts/h0", "facts/h2"), (1.0, 0.0)
    )


def test_only_the_same_documents_are_compared() -> None:
    one, other = Documents(("a", "b"), (1.0, 0.0)), Documents(("a", "c"), (1.0, 0.0))
    assert compare(one, other) == "the documents are not the same"
    assert compare(one, NO_FILE) == NO_FILE
    assert compare(NO_FILE, one) == f"of what it is compared with: {NO_FILE}"
    assert isinstance(compare(one, one), Paired)
