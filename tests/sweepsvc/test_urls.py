from __future__ import annotations

from pathlib import Path

import pytest

from sweepsvc.urls import masked, sqlite_file


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@db:5432/x", "postgresql://me:***@db:5432/x"),
        ("postgresql+psycopg2://me:s/c?e#t@db/x", "postgresql+psycopg2://me:***@db/x"),
        ("redis://:secret@db", "redis://:***@db"),
        (
            "cannot reach http://me:a@b@host/ (http://me:c@host)",
            "cannot reach http://me:***@host/ (http://me:***@host)",
        ),
        (
            "postgresql://db/x?user=me&password=secret&sslmode=require",
            "postgresql://db/x?user=me&password=***&sslmode=require",
        ),
        ("https://example.org:5000/me", "https://example.org:5000/me"),
        ("sqlite:////home/me/study.db", "sqlite:////home/me/study.db"),
        ("no address: a@b", "no address: a@b"),
    ],
)
def test_passwords_are_starred_out_of_addresses_and_nothing_else(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:////a/study.db", Path("/a/study.db")),
        ("sqlite:///runs/study.db", Path("runs/study.db")),
        ("sqlite+pysqlite:////a/study.db?timeout=3", Path("/a/study.db")),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("postgresql://db/x", None),
        ("http://host/sqlite:///x", None),
    ],
)
def test_only_an_sqlite_address_is_a_file(url: str, file: Path | None) -> None:
    assert sqlite_file(url) == file
