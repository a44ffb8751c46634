"""Prompts: a template is text with named fields in braces. They are filled in; nothing is ever evaluated."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sweeps.errors import InvalidValue

RESPONSE = "output"
"""The field that follows every prompt."""

DEFAULT = "alpaca"

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Template:
    """Plain texts with a field between each two of them: one text more than there are fields."""

    texts: tuple[str, ...]
    between: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """`{name}` is a field; `{{` and `}}` are braces. Raises `InvalidValue` for any other brace."""
        texts, between, end = [""], [], 0
        for piece in _PIECE.finditer(text):
            texts[-1] += text[end : piece.start()]
            end = piece.end()
            if piece.group() in ("{{", "}}"):
                texts[-1] += piece.group()[0]
            else:
                between.append(_field(piece))
                texts.append("")
        texts[-1] += text[end:]
        return cls(tuple(texts), tuple(between))

    @property
    def fields(self) -> tuple[str, ...]:
        """Each field once, in the order of the text."""
        return tuple(dict.fromkeys(self.between))

    def render(self, values: Mapping[str, str]) -> str:
        parts = [self.texts[0]]
        for name, text in zip(self.between, self.texts[1:], strict=True):
            parts += (values[name], text)
        return "".join(parts)


def _field(piece: re.Match[str]) -> str:
    name = piece.group(1)
    if name is None:
        raise InvalidValue(
            f"braces stand around a field, got a single {piece.group()} at character {piece.start() + 1}; "
            f"write {piece.group() * 2} for the brace itself"
        )
    if not _FIELD.fullmatch(name):
        raise InvalidValue(
            f"a field is a name alone in braces (letters, digits, _), got {{{name}}}; write a name, and the "
            "column that it stands for in data.columns, or {{ and }} for braces themselves"
        )
    return name


@dataclass(frozen=True)
class Prompt:
    """How the fields of a row become its prompt.

    A row may lack its `optional` field or leave it empty: then its prompt is made by `without`. Each of
    `filled` must hold some text; of the other fields one at least.
    """

    template: Template
    filled: tuple[str, ...] = ()
    optional: str | None = None
    without: Template | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        return self.template.fields

    def render(self, values: Mapping[str, str]) -> str:
        if self.without is not None and self.optional is not None and not values[self.optional]:
            return self.without.render(values)
        return self.template.render(values)


SHIPPED: Mapping[str, Prompt] = {
    DEFAULT: Prompt(
        Template.parse(_ALPACA_WITH_INPUT),
        filled=("instruction",),
        optional="input",
        without=Template.parse(_ALPACA_WITHOUT_INPUT),
    )
}
"""The prompts that have a name."""


@functools.lru_cache(maxsize=64)
def read_prompt(text: str) -> Prompt:
    """The shipped prompt of that name, or `text` itself as a template. Raises `InvalidValue`."""
    if text in SHIPPED:
        return SHIPPED[text]
    template = Template.parse(text)
    names = ", ".join(SHIPPED)
    if not template.fields:
        got = text if len(text) <= 60 else f"{text[:60]}..."
        raise InvalidValue(
            f"a prompt is {names}, or a text with at least one field such as {{instruction}}, got {got!r}; "
            f"name a field of the rows in braces, or write {names}"
        )
    if RESPONSE in template.fields:
        raise InvalidValue(
            f"the response follows the prompt by itself, got a prompt with {{{RESPONSE}}} in it; leave it out"
        )
    return Prompt(template)


def unknown_columns(prompt: str, columns: Mapping[str, str]) -> str | None:
    """Why `columns` maps fields that `prompt` does not have; None if it does not."""
    fields = (*read_prompt(prompt).fields, RESPONSE)
    unknown = [name for name in columns if name not in fields]
    if not unknown:
        return None
    return (
        f"each key is a field of the prompt ({', '.join(fields)}), got {', '.join(unknown)}; write `field: "
        "column` in data.columns, and the field in braces in data.prompt"
    )
