"""Templates: named fields in braces, filled in and never evaluated; which columns they stand for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from sweeps.errors import InvalidSweep, InvalidValue
from sweeps.prompts import SHIPPED, Template, read_prompt
from sweeps.spec import DataSpec, TrialSpec
from sweeps.sweepfile import load_sweep_text


def test_fields_are_filled_in_and_what_they_hold_is_plain_text() -> None:
    template = Template.parse("{a} and {b}, again {a}")
    assert template.fields == ("a", "b")
    assert template.render({"a": "{b} {{", "b": "{a.__class__}"}) == "{b} {{ and {a.__class__}, again {b} {{"


def test_doubled_braces_are_braces() -> None:
    assert Template.parse('{{"q": "{q}"}}').render({"q": "why"}) == '{"q": "why"}'
    assert Template.parse("{{{q}}}").render({"q": "why"}) == "{why}"


@pytest.mark.parametrize(
    "field",
    ["q.__class__", "q[0]", "q!r", "q:>9", "q:{w}", "", "0", " q", "q-1", "q()", "ä"],
)
def test_what_is_more_than_a_name_is_refused(field: str) -> None:
    with pytest.raises(InvalidValue, match=r"a field is a name alone in braces|braces stand around a field"):
        read_prompt(f"say {{{field}}}")


@pytest.mark.parametrize("text", ["{q", "q}", "{q}}", "{{q}", "a { b"])
def test_a_single_brace_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(InvalidValue, match=r"got a single [{}] at character \d+; write (\{\{|\}\}) for"):
        read_prompt(text)


def test_a_text_without_a_field_is_a_name_that_is_not_known() -> None:
    with pytest.raises(
        InvalidValue, match=r"a prompt is alpaca, or a text with .*, got 'alpcaa'; name a field"
    ):
        read_prompt("alpcaa")


def test_the_response_does_not_stand_in_the_prompt() -> None:
    with pytest.raises(InvalidValue, match=r"follows the prompt by itself, got a prompt with \{output\}"):
        read_prompt("{instruction} {output}")


def test_alpaca_has_a_form_with_an_input_and_one_without() -> None:
    alpaca = SHIPPED["alpaca"]
    assert alpaca.fields == ("instruction", "input")
    assert "### Input:\nhere\n\n" in alpaca.render({"instruction": "q", "input": "here"})
    assert "Input" not in alpaca.render({"instruction": "q", "input": ""})


def test_a_trial_with_a_prompt_that_is_none_cannot_exist() -> None:
    with pytest.raises(ValidationError, match="a field is a name alone in braces"):
        DataSpec(prompt="{q.__class__}")
    with pytest.raises(
        ValidationError, match=r"each key is a field of the prompt \(q, output\), got r; write"
    ):
        DataSpec(prompt="{q}", columns={"r": "column"})


def test_a_column_of_its_fields_own_name_goes_without_saying() -> None:
    said = TrialSpec(data=DataSpec(columns={"input": "input", "output": "answer"}))
    assert said.data.columns == {"output": "answer"}
    assert said.digest == TrialSpec(data=DataSpec(columns={"output": "answer"})).digest
    assert TrialSpec.model_validate_json(said.model_dump_json()) == said


def test_prompts_and_columns_can_be_searched_and_tried_first() -> None:
    text = (
        "name: x\nsearch:\n  space:\n"
        '    data.prompt: [alpaca, "{instruction}"]\n'
        "    data.columns: [{}, {instruction: task}]\n"
        "  first: [{data.prompt: alpaca, data.columns: {instruction: task}}]\n"
    )
    sweep = load_sweep_text(text, "x.yaml")
    specs = [sweep.resolve(picks).spec.data for picks in sweep.search.space.combinations()]
    assert [(spec.prompt, spec.columns) for spec in specs] == [
        ("alpaca", {}),
        ("alpaca", {"instruction": "task"}),
        ("{instruction}", {}),
        ("{instruction}", {"instruction": "task"}),
    ]
    [first] = sweep.search.first
    assert sweep.resolve(first).spec.data == specs[1]


def test_a_single_column_can_be_set() -> None:
    sweep = load_sweep_text("name: x\n", "x.yaml", ("data.columns.output=answer",))
    assert sweep.resolve({}).spec.data.columns == {"output": "answer"}
    with pytest.raises(InvalidSweep, match="each key is a field of the prompt"):
        load_sweep_text("name: x\n", "x.yaml", ("data.columns.answer=output",))


def test_the_example_of_the_reference_page_is_valid_as_it_stands(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/sweep-file.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^    data:\n(?:      .*\n)+", page, flags=re.MULTILINE)
    (tmp_path / "questions.parquet").touch()
    data = load_sweep_text(f"name: x\ntrial:\n{block}", "x.yaml", (), tmp_path).resolve({}).spec.data
    assert (data.prompt, data.columns["question"]) == ("Question: {question}\nAnswer: ", "Frage")
