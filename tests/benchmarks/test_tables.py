from __future__ import annotations

from benchmarks.tables import cell, facts, facts_line, machine, table, times


def test_a_table_is_markdown_and_what_was_not_measured_is_blank() -> None:
    assert table(["part", "s"], [["load", 1.2345], ["train", None]]).splitlines() == [
        "| part  | s    |",
        "|-------|------|",
        "| load  | 1.23 |",
        "| train |      |",
    ]


def test_a_number_keeps_three_digits_and_a_large_one_all_before_the_point() -> None:
    assert [cell(value) for value in (0.012345, 12.345, 12345.6, 7, "x")] == [
        "0.0123",
        "12.3",
        "12346",
        "7",
        "x",
    ]


def test_a_ratio_that_was_not_measured_is_blank() -> None:
    assert (times(1.836), times(None)) == ("1.84 x", "")


def test_the_facts_name_the_date_the_machine_and_the_versions() -> None:
    known = facts()
    line = facts_line(known)
    assert known["date"] in line
    assert machine() in line
    assert f"torch {known['torch']}" in line
