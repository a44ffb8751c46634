"""Addresses of stores, as they may be shown and as files."""

from __future__ import annotations

import re
from pathlib import Path

# Up to the last @ of the word: rather too much than a part of a password that has an @ or a / itself.
_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):\S*(?=@)")
_OPTION = re.compile(r"(?i)\b(password|passwd|secret|token)=[^&\s]*")
_SQLITE = re.compile(r"sqlite(\+pysqlite)?:///(?P<file>[^?]*)")


def masked(text: str) -> str:
    """`text` with the password of every address in it starred out: it may be printed and recorded."""
    return _OPTION.sub(r"\1=***", _PASSWORD.sub(r"\1:***", text))


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite address; None for a server, or for a database in memory."""
    match = _SQLITE.match(url)
    if match is None or match["file"] in ("", ":memory:"):
        return None
    return Path(match["file"])
