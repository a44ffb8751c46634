"""YAML as values with lines: what is read differently from PyYAML, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sweeps.document import LARGEST_FILE, SET, Document, Place, field_path, read_document, read_file
from sweeps.errors import InvalidSweep


def value_of(text: str) -> Any:
    document = read_document(f"x: {text}\n", "x.yaml")
    assert document.faults == []
    return document.values["x"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("1e+2", 100.0),
        ("-2.5e-1", -0.25),
        (".5", 0.5),
        ("1.", 1.0),
        ("8", 8),
        ("-8", -8),
        ("+8", 8),
        ("50_000", 50_000),
        ("010", 10),
        ("true", True),
        ("No", False),
        ("on", True),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
        ("2*r", "2*r"),
        ("r/2", "r/2"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("'8'", "8"),
        ("!!str 8", "8"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("0x10", "0x10"),
        ("=", "="),
    ],
)
def test_a_scalar_is_read_as_people_mean_it(text: str, value: Any) -> None:
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


def test_not_a_number_is_read_as_one() -> None:
    assert value_of(".nan") != value_of(".nan")


def test_every_value_keeps_its_line() -> None:
    document = read_document("a: 1\nb:\n  c: 2\n  d:\n  - 3\n  - {e: 4}\n\nf:\n  5\n", "x.yaml")
    lines = {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "d"): 4,
        ("b", "d", 0): 5,
        ("b", "d", 1): 6,
        ("b", "d", 1, "e"): 6,
        ("f",): 9,
    }
    assert {where: document.place(where).line for where in lines} == lines


def test_what_is_not_written_has_the_place_of_what_is_around_it() -> None:
    document = read_document("a:\n  b: 1\n", "x.yaml")
    assert document.place(("a", "c", "d")) == Place(line=1)
    assert document.place(("z",)) == Place()


def test_a_value_laid_over_the_file_has_no_line_but_a_source() -> None:
    document = read_document("a: {b: [1, 2]}\n", "x.yaml")
    document.put(("a", "b"), [3])
    document.put(("c", "d"), 4)
    assert document.values == {"a": {"b": [3]}, "c": {"d": 4}}
    assert document.place(("a", "b", 1)) == Place(source=SET)
    assert document.place(("a",)) == Place(line=1)


def test_a_key_that_stands_twice_names_both_lines_and_keeps_the_first() -> None:
    document = read_document("a: 1\nb: 2\na: 3\nb: 4\n", "x.yaml")
    assert document.values == {"a": 1, "b": 2}
    assert [(fault.line, fault.message) for fault in document.faults] == [
        (3, "a key must stand once, got 'a' on lines 1 and 3; remove one"),
        (4, "a key must stand once, got 'b' on lines 2 and 4; remove one"),
    ]


@pytest.mark.parametrize("text", ["&x 1", "*x", "{<<: *x}", "[&y a, *y]"])
def test_anchors_and_aliases_are_refused(text: str) -> None:
    [fault] = read_document(f"x: {text}\n", "x.yaml").faults
    assert "anchors and aliases are not read" in fault.message
    assert fault.line == 1


def test_a_bomb_of_aliases_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    [fault] = read_document("\n".join(lines), "x.yaml").faults
    assert fault.message.startswith("YAML is needed: anchors and aliases are not read, got &a0")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [echo]",
        "!!python/name:os.system",
        "!thing {a: 1}",
        "!thing [1]",
        "!!binary aGk=",
        "!!timestamp 2024-01-01",
        "!!set {a, b}",
    ],
)
def test_a_tag_makes_no_object(text: str) -> None:
    [fault] = read_document(f"y: 1\nx: {text}\n", "x.yaml").faults
    assert "a tag must not stand here" in fault.message
    assert fault.line == 2


def test_a_tag_that_contradicts_its_value_is_refused() -> None:
    [fault] = read_document("x: !!int abc\n", "x.yaml").faults
    assert fault.message == "the tag !!int does not fit 'abc'; remove the tag"


@pytest.mark.parametrize("text", ["[" * 50_000, "{a: " * 50_000, "- " * 20_000])
def test_a_file_that_is_nested_without_end_is_refused(text: str) -> None:
    [fault] = read_document(text, "x.yaml").faults
    assert "nested too deeply" in fault.message


def test_an_integer_must_fit_a_database() -> None:
    assert value_of(str(2**63 - 1)) == 2**63 - 1
    for number in (str(2**63), "9" * 10_000):
        [fault] = read_document(f"x: {number}\n", "x.yaml").faults
        assert "a whole number has at most 63 bits" in fault.message


def test_what_cannot_be_read_is_reported_once() -> None:
    document = read_document(f"x: {2**63}\n", "x.yaml")
    document.report(("x",), "another fault of it")
    assert len(document.faults) == 1


def test_field_paths_read_like_the_fields_they_mean() -> None:
    assert field_path(("trial", "lora", "r")) == "lora.r"
    assert field_path(("trial",)) == "trial"
    assert field_path(("search", "space", "lora.r", 3)) == "lora.r"
    assert field_path(("search", "first", 0, "lora.r")) == "search.first[0].lora.r"
    assert field_path(("resources", "gpus")) == "resources.gpus"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_file(path) == "a: 1\r\nb: 2\r\n"
    document = read_document(read_file(path), str(path))
    assert document.values == {"a": 1, "b": 2}
    assert document.place(("b",)).line == 2


def test_half_a_character_is_no_text() -> None:
    assert value_of('"\\u00e9"') == "é"
    [fault] = read_document('x: "\\ud800"\n', "x.yaml").faults
    assert fault.message.startswith(r"text must be Unicode, got '\ud800'")
    [fault] = read_document('"\\ud800": x\n', "x.yaml").faults
    assert fault.message == "a key must be one word; write key: value"


def test_a_file_of_the_largest_size_is_read_and_a_larger_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"#" * LARGEST_FILE)
    assert len(read_file(path)) == LARGEST_FILE
    path.write_bytes(b"#" * (LARGEST_FILE + 1))
    with pytest.raises(InvalidSweep, match=f"at most {LARGEST_FILE} bytes"):
        read_file(path)


def test_a_document_without_faults_says_nothing() -> None:
    assert Document("x.yaml").faults == []
