"""Instruction data: files, prompts, tokens, the held-out split; bad rows by their number."""

import json
from array import array
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

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


def written(folder: Path, name: str, text: str, **fields: Any) -> DataSpec:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return DataSpec(path=str(path), **fields)


def rows_file(folder: Path, rows: list[Any], **fields: Any) -> DataSpec:
    return written(folder, "rows.json", json.dumps(rows), **fields)


def rows_of(*responses: str) -> data.Rows:
    """Rows with prompts of ten letters."""
    good = [data.Row(number, f"prompt {number:03}", text) for number, text in enumerate(responses, start=1)]
    return data.Rows(good)


def test_json_jsonl_csv_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    as_json = data.read_rows(rows_file(tmp_path, ROWS))
    as_lines = data.read_rows(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n"))
    csv_text = "instruction,input,output\nName a river.,,The Tarn.\nTranslate.,chat,cat\n"
    as_csv = data.read_rows(written(tmp_path, "a.csv", csv_text))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    as_parquet = data.read_rows(DataSpec(path=str(tmp_path / "a.parquet")))
    assert as_json == as_lines == as_csv == as_parquet
    assert [(row.number, row.response) for row in as_json.good] == [(1, "The Tarn."), (2, "cat")]


def test_a_hub_dataset_gives_the_rows_of_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = data.read_rows(DataSpec(id="some/rows", split="test"))
    assert (rows, asked) == (data.read_rows(rows_file(tmp_path, ROWS)), [("some/rows", "test")])


def test_a_csv_of_excel_and_one_with_a_long_field_are_read(tmp_path: Path) -> None:
    long = "word " * 40_000
    [row] = data.read_rows(written(tmp_path, "a.csv", f"\ufeffinstruction,output\nq,{long}\n")).good
    assert row.response == long


def test_the_prompt_is_alpacas_and_the_response_follows_it_directly(tmp_path: Path) -> None:
    without, with_input = data.read_rows(rows_file(tmp_path, ROWS)).good
    assert without.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a river.\n\n### Response:"
    )
    assert "### Instruction:\nTranslate.\n\n### Input:\nchat\n\n### Response:" in with_input.prompt


def test_a_prompt_of_ones_own_takes_its_fields_from_the_columns_that_are_named(tmp_path: Path) -> None:
    rows = [{"Frage": "Wo {liegt} Albi?", "hint": None, "Antwort": "Am Tarn."}]
    columns = {"question": "Frage", "output": "Antwort"}
    spec = rows_file(tmp_path, rows, prompt="Q: {question}{hint}\nA: ", columns=columns)
    assert data.read_rows(spec).good == [data.Row(1, "Q: Wo {liegt} Albi?\nA: ", "Am Tarn.")]


def test_alpacas_fields_may_be_columns_of_other_names(tmp_path: Path) -> None:
    renamed = [{"task": row["instruction"], "context": row["input"], "output": row["output"]} for row in ROWS]
    columns = {"instruction": "task", "input": "context"}
    assert (
        data.read_rows(rows_file(tmp_path, renamed, columns=columns)).good
        == data.read_rows(rows_file(tmp_path, ROWS)).good
    )


def test_a_column_that_is_named_for_the_input_must_be_there(tmp_path: Path) -> None:
    spec = rows_file(tmp_path, [{"instruction": "q", "output": "a"}], columns={"input": "contxt"})
    with pytest.raises(
        BadData, match=r"row 1 of .*: a row must have a column contxt, got instruction, output"
    ):
        data.read_rows(spec)


BAD = [
    {"instruction": "q", "output": "a"},
    {"instruction": "q", "output": ""},
    ["q", "a"],
    {"instruction": "q", "output": "b"},
    {"instruction": "q"},
]


def test_bad_rows_are_refused_by_their_numbers_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BadData) as refused:
        data.read_rows(rows_file(tmp_path, BAD))
    assert str(refused.value) == (
        f"row 2 of {tmp_path}/rows.json: output must not be empty (3 rows are bad, also 3, 5); mend the "
        "data, or write data.on_bad_row: skip"
    )


def test_bad_rows_are_skipped_where_the_file_says_so_counted_and_named(tmp_path: Path) -> None:
    spec = rows_file(tmp_path, BAD, on_bad_row="skip", held_out=0.5)
    rows = data.read_rows(spec)
    assert [row.number for row in rows.good] == [1, 4]
    assert [(row.number, row.reason) for row in rows.skipped] == [
        (2, "output must not be empty"),
        (3, "a row must be an object, got list"),
        (5, "a row must have a column output, got instruction; name the dataset's own in data.columns"),
    ]
    tokens = data.tokenize(rows, spec, Letters())
    assert (len(tokens.train), len(tokens.held_out)) == (1, 1)
    assert tokens.note.startswith(
        "data: 1 rows to train on, 1 held out (split seed 42), 0 cut at max_length, 3 bad rows skipped: "
        "row 2 (output must not be empty), row 3 "
    )
    assert tokens.note.endswith(f"(digest {tokens.digest})")


def test_rows_that_are_all_bad_are_no_rows(tmp_path: Path) -> None:
    with pytest.raises(
        BadData, match=r"at least one row is needed, got none .* that can be used: row 1: output"
    ):
        data.read_rows(rows_file(tmp_path, BAD[1:2], on_bad_row="skip"))


def test_a_row_is_bos_prompt_response_eos() -> None:
    tokens = data.tokenize(rows_of("answer"), DataSpec(held_out=0.0), Letters()).train[0]
    assert tokens == data.TokenRow(array("i", [1, *map(ord, "prompt 001answer"), 2]), given=1)


def test_the_loss_on_the_response_alone_gives_the_whole_prompt() -> None:
    tokens = data.tokenize(rows_of("answer"), DataSpec(held_out=0.0, loss_on="response"), Letters()).train[0]
    assert (tokens.given, tokens.predicted) == (1 + len("prompt 001"), len("answer") + 1)


def test_a_prompt_whose_last_token_merges_with_the_response_gives_one_token_less() -> None:
    assert data._common(array("i", [1, 5, 6, 2]), array("i", [1, 5, 9, 7, 2])) == 2
    assert data._common(array("i", [5, 6]), array("i", [9, 6, 7])) == 1


def test_a_row_that_is_cut_before_its_response_is_refused_or_skipped() -> None:
    rows = rows_of("a", "b")
    spec = DataSpec(held_out=0.0, loss_on="response", max_length=10)
    with pytest.raises(
        BadData, match=r"row 1 of .*: a token must remain to predict, .*data.max_length=10; raise"
    ):
        data.tokenize(rows, spec, Letters())
    with pytest.raises(
        BadData, match=r"at least one row is needed, .*: row 1: a token must remain to predict"
    ):
        data.tokenize(rows, spec.model_copy(update={"on_bad_row": "skip"}), Letters())
    long = data.Rows([*rows.good, data.Row(3, "p", "c")], [data.BadRow(4, "no")])
    kept = data.tokenize(long, spec.model_copy(update={"on_bad_row": "skip"}), Letters())
    assert [row.number for row in kept.skipped] == [1, 2, 4]
    assert [bytes(row.ids) for row in kept.train] == [bytes(array("i", [1, ord("p"), ord("c"), 2]))]


def test_a_tokenizer_without_a_bos_gets_none() -> None:
    plain = Letters()
    plain.bos_token_id = None
    tokens = data.tokenize(rows_of("a"), DataSpec(held_out=0.0), plain).train[0]
    assert tokens.ids[0] == ord("p")


def test_long_rows_are_cut_and_counted() -> None:
    tokens = data.tokenize(rows_of("a", "a" * 500), DataSpec(held_out=0.0, max_length=300), Letters())
    assert tokens.truncated == 1
    assert [len(row) for row in tokens.train] == [13, 300]


def test_held_out_rows_are_not_trained_on_and_do_not_depend_on_the_order_of_calls() -> None:
    rows = rows_of(*"a" * 50)
    first = data.tokenize(rows, DataSpec(held_out=0.1), Letters())
    again = data.tokenize(rows, DataSpec(held_out=0.1), Letters())
    assert (len(first.train), len(first.held_out)) == (45, 5)
    assert first == again
    assert not {bytes(row.ids) for row in first.train} & {bytes(row.ids) for row in first.held_out}


def test_the_digest_changes_with_a_token_and_with_the_split() -> None:
    rows = rows_of(*"a" * 10)
    digest = data.tokenize(rows, DataSpec(held_out=0.1), Letters()).digest
    assert digest != data.tokenize(rows, DataSpec(held_out=0.2), Letters()).digest
    assert digest != data.tokenize(rows, DataSpec(held_out=0.1, loss_on="response"), Letters()).digest
    assert digest != data.tokenize(rows_of(*"aaabaaaaaa"), DataSpec(held_out=0.1), Letters()).digest


def test_the_digest_of_todays_default_is_what_it_was(tmp_path: Path) -> None:
    """Results of earlier versions say their data by it, and checkpoints go on only with an equal one."""
    spec = rows_file(tmp_path, [*ROWS, *ROWS])
    assert data.tokenize(data.read_rows(spec), spec, Letters()).digest == "4c6ab3ddc4bd2914"


def test_a_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(BadData, match=r"got 1 rows with data.held_out=0.5; lower held_out"):
        data.tokenize(rows_of("a"), DataSpec(held_out=0.5), Letters())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[]", "at least one row is needed"),
        ("a.json", '{"a": 1}', "must be one JSON list of rows, got dict"),
        ("a.json", '{"a": 1}\n{"a": 2}', "a file with an object a line is .jsonl"),
        ("a.json", "[" * 100_000, "a.json is nested too deeply"),
        ("a.json", "[1]", "row 1 of .*: a row must be an object, got int"),
        ("a.json", '[{"instruction": "q", "input": ""}]', "row 1 of .*: a row must have a column output"),
        ("a.json", '[{"instruction": "q", "output": 3}]', "row 1 of .*: output must be text, got int"),
        ("a.json", '[{"instruction": "q", "output": null}]', "row 1 of .*: output must be text, got null"),
        ("a.json", '[{"instruction": "q", "input": 1, "output": "a"}]', "input must be text, got int"),
        ("a.json", '[{"instruction": "q", "input": " ", "output": "a"}]', "input must not be empty"),
        (
            "a.json",
            '[{"instruction": "q", "output": "\\ud800"}]',
            "output must be Unicode, got half of a char",
        ),
        ("a.json", '[{"instruction": "q", "output": " "}]', "row 1 of .*: output must not be empty"),
        ("a.json", '[{"instruction": "", "output": "a"}]', "row 1 of .*: instruction must not be empty"),
        ("a.jsonl", '{"instruction": "q", "output": "a"}\n{', "a.jsonl:2 must be one JSON object"),
        ("a.csv", "instruction,answer\nq,a\n", "row 1 of .* have a column output, got .*answer; name"),
        ("a.csv", "instruction,input,output\nWhere?,,Paris, France\n", "row 1 .* got more: .*in quotes"),
        ("a.csv", 'instruction,output\nq,"a\n', "a.csv must be CSV with a header"),
        ("a.parquet", "q", "a.parquet must be a whole Parquet file"),
        ("a.txt", "q", "ends in one of .json, .jsonl, .csv, .parquet"),
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
