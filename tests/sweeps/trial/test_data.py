"""Instruction data: files, prompts, tokens, the held-out split; bad rows by their number."""

import json
from array import array
from pathlib import Path

import pytest

from sweeps.errors import BadData
from sweeps.spec import DataSpec
from sweeps.trial import data

ROWS = [
    {"instruction": "Name a river.", "input": "", "output": "The Tarn."},
    {"instruction": "Translate.", "input": "chat", "output": "cat"},
]


class Letters:
    """A tokenizer with one token a character."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in line] for line in text]}


def written(folder: Path, name: str, text: str) -> DataSpec:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return DataSpec(path=str(path))


def test_json_jsonl_and_csv_give_the_same_rows(tmp_path: Path) -> None:
    as_json = data.read_rows(written(tmp_path, "a.json", json.dumps(ROWS)))
    as_lines = data.read_rows(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n"))
    csv_text = "instruction,input,output\nName a river.,,The Tarn.\nTranslate.,chat,cat\n"
    as_csv = data.read_rows(written(tmp_path, "a.csv", csv_text))
    assert as_json == as_lines == as_csv == [data.Row(**row) for row in ROWS]


def test_a_csv_of_excel_and_one_with_a_long_field_are_read(tmp_path: Path) -> None:
    long = "word " * 40_000
    rows = data.read_rows(written(tmp_path, "a.csv", f"\ufeffinstruction,output\nq,{long}\n"))
    assert rows == [data.Row("q", "", long)]


def test_the_prompt_is_alpacas_and_the_response_follows_it_directly() -> None:
    without, with_input = (data.Row(**row).prompt for row in ROWS)
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a river.\n\n### Response:"
    )
    assert "### Instruction:\nTranslate.\n\n### Input:\nchat\n\n### Response:" in with_input


def test_braces_in_a_row_are_plain_text() -> None:
    assert "{input}" in data.Row("Say {input}.", "", "x").prompt


def test_a_row_is_bos_prompt_response_eos() -> None:
    row = data.Row("q", "", "answer")
    tokens = data.tokenize([row], DataSpec(held_out=0.0), Letters()).train[0]
    assert tokens == data.TokenRow(array("i", [1, *map(ord, row.prompt + "answer"), 2]), given=1)


def test_the_loss_on_the_response_alone_gives_the_whole_prompt() -> None:
    row = data.Row("q", "", "answer")
    tokens = data.tokenize([row], DataSpec(held_out=0.0, loss_on="response"), Letters()).train[0]
    assert (tokens.given, tokens.predicted) == (1 + len(row.prompt), len("answer") + 1)


def test_a_prompt_whose_last_token_merges_with_the_response_gives_one_token_less() -> None:
    assert data._common(array("i", [1, 5, 6, 2]), array("i", [1, 5, 9, 7, 2])) == 2
    assert data._common(array("i", [5, 6]), array("i", [9, 6, 7])) == 1


def test_a_row_that_is_cut_before_its_response_is_refused() -> None:
    spec = DataSpec(held_out=0.0, loss_on="response", max_length=50)
    with pytest.raises(BadData, match=r"row 1: a token must remain to predict, .*data.max_length=50; raise"):
        data.tokenize([data.Row("q", "", "a")], spec, Letters())


def test_a_tokenizer_without_a_bos_gets_none() -> None:
    plain = Letters()
    plain.bos_token_id = None
    tokens = data.tokenize([data.Row("q", "", "a")], DataSpec(held_out=0.0), plain).train[0]
    assert tokens.ids[0] == ord("B")


def test_long_rows_are_cut_and_counted() -> None:
    rows = [data.Row("q", "", "a"), data.Row("q", "", "a" * 500)]
    tokens = data.tokenize(rows, DataSpec(held_out=0.0, max_length=300), Letters())
    assert tokens.truncated == 1
    assert [len(row) for row in tokens.train] == [len(rows[0].prompt) + 3, 300]


def test_held_out_rows_are_not_trained_on_and_do_not_depend_on_the_order_of_calls() -> None:
    rows = [data.Row(f"q{number}", "", "a") for number in range(50)]
    first = data.tokenize(rows, DataSpec(held_out=0.1), Letters())
    again = data.tokenize(rows, DataSpec(held_out=0.1), Letters())
    assert (len(first.train), len(first.held_out)) == (45, 5)
    assert first == again
    assert not {bytes(row.ids) for row in first.train} & {bytes(row.ids) for row in first.held_out}


def test_the_digest_changes_with_a_token_and_with_the_split() -> None:
    rows = [data.Row(f"q{number}", "", "a") for number in range(10)]
    digest = data.tokenize(rows, DataSpec(held_out=0.1), Letters()).digest
    assert digest != data.tokenize(rows, DataSpec(held_out=0.2), Letters()).digest
    assert digest != data.tokenize(rows, DataSpec(held_out=0.1, loss_on="response"), Letters()).digest
    rows[3] = data.Row("q3", "", "b")
    assert digest != data.tokenize(rows, DataSpec(held_out=0.1), Letters()).digest


def test_a_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(BadData, match=r"got 1 rows with data.held_out=0.5; lower held_out"):
        data.tokenize([data.Row("q", "", "a")], DataSpec(held_out=0.5), Letters())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[]", "at least one row is needed"),
        ("a.json", '{"a": 1}', "must be one JSON list of rows, got dict"),
        ("a.json", '{"a": 1}\n{"a": 2}', "a file with an object a line is .jsonl"),
        ("a.json", "[1]", "row 1 of .* must be an object, got int"),
        ("a.json", '[{"instruction": "q", "input": ""}]', "row 1 of .* must have a column output"),
        ("a.json", '[{"instruction": "q", "output": 3}]', "row 1 of .*: output must be text, got int"),
        ("a.json", '[{"instruction": "q", "output": " "}]', "row 1 of .*: output must not be empty"),
        ("a.json", '[{"instruction": "", "output": "a"}]', "row 1 of .*: instruction must not be empty"),
        ("a.jsonl", '{"instruction": "q", "output": "a"}\n{', "a.jsonl:2 must be one JSON object"),
        ("a.csv", "instruction,answer\nq,a\n", "row 1 of .* must have a column output, got .*answer"),
        ("a.csv", "instruction,input,output\nWhere?,,Paris, France\n", "row 1 .* got more: .*in quotes"),
        ("a.csv", 'instruction,output\nq,"a\n', "a.csv must be CSV with a header"),
        ("a.txt", "q", "ends in .json, .jsonl or .csv"),
    ],
)
def test_a_bad_file_is_named_with_its_row(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(BadData, match=message):
        data.read_rows(written(tmp_path, name, text))


def test_a_missing_file_and_one_that_is_not_utf8_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"none.json must be readable"):
        data.read_rows(DataSpec(path=str(tmp_path / "none.json")))
    (tmp_path / "a.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(BadData, match=r"a.json must be UTF-8"):
        data.read_rows(DataSpec(path=str(tmp_path / "a.json")))


def test_a_hub_dataset_that_cannot_be_reached_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadData, match=r"the dataset nobody/nothing \(split train\) must load .* data.path"):
        data.read_rows(DataSpec(id="nobody/nothing"))
