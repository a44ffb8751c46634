"""Prose that drifts from the code fails here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sweeps.spec import FIELDS, FieldInfo

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("search_spaces/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def field_row(info: FieldInfo) -> str:
    """A field's line in docs/sweep-file.md."""
    default = info.default
    if isinstance(default, tuple):
        default = "the article's six"
    text = "" if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"
    return f"| `{info.path}` | {text} | {info.description} |"


def test_every_field_is_in_the_reference_with_its_default() -> None:
    page = (ROOT / "docs/sweep-file.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| `[a-z]+\.[a-z0-9_]+` ", line)]
    assert rows == [field_row(info) for info in FIELDS.values()]


def links() -> list[tuple[Path, str]]:
    found = [(page, target) for page in PAGES for target in LINK.findall(page.read_text(encoding="utf-8"))]
    return [(page, target) for page, target in found if not target.startswith(("http:", "https:"))]


def test_there_are_pages_and_links_to_check() -> None:
    assert len(PAGES) >= 6
    assert len(links()) >= 5


@pytest.mark.parametrize(("page", "target"), links(), ids=lambda value: str(value)[-40:])
def test_every_link_resolves(page: Path, target: str) -> None:
    assert (page.parent / target).exists()
