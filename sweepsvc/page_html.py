"""HTML from plain values. Whatever is not made here is text, and escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | Html


def escaped(content: Content) -> Html:
    return content if isinstance(content, Html) else Html(html.escape(content, quote=True))


def breakable(name: str) -> Html:
    """A name that may be broken behind an underscore or a point."""
    return Html(re.sub(r"([_.])(?=\w)", r"\1<wbr>", escaped(name)))


def joined(parts: Iterable[Content], between: str = "") -> Html:
    return Html(between.join(escaped(part) for part in parts))


def element(name: str, *content: Content, **attributes: str) -> Html:
    """`<name class="...">content</name>`; an attribute's underscore is a hyphen, `class_` is `class`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value, quote=True)}"'
        for key, value in attributes.items()
        if value
    )
    return Html(f"<{name}{given}>{joined(content)}</{name}>")


def data(value: float, shown: str) -> Html:
    """A number as it is shown, with every digit of it for whoever reads the page by a program."""
    return element("data", shown, value=repr(value))


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]], class_: str = "") -> Html:
    """A table of texts whose first column heads its rows."""
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_="text") for cell in row[1:]),
        )
        for row in rows
    ]
    heads = [element("th", name, scope="col", class_="text") for name in head]
    return scrolling(
        element("table", element("thead", element("tr", *heads)), element("tbody", *body), class_=class_)
    )


def scrolling(content: Html) -> Html:
    """What is wider than the page scrolls by itself, by keyboard too."""
    return element("div", content, class_="scroll", tabindex="0")
