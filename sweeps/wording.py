"""The laws of single values, in words: `an integer > 0 is needed, got -8`."""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import math
import types
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sweeps.spec import FIELDS, Part

_LONGEST_SHOWN = 60
_MOST_NAMED = 13
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Need:
    """What one field takes: a sentence for people, and the parts that a remedy is made of."""

    text: str
    types: frozenset[type]
    words: tuple[str, ...]


@functools.cache
def need(part: type[Part], name: str) -> Need:
    """What the field `name` of `part` takes."""
    annotation = _annotation(part, name)
    members = tuple(_members(annotation))
    words = tuple(word for member, _ in members for word in _literals(member))
    taken = frozenset(typing.get_origin(member) or member for member, _ in members)
    return Need(_sentence(annotation), taken - {Literal}, words)


def wrong(part: type[Part], name: str, value: Any) -> str | None:
    """Why the field `name` of `part` does not take `value`; None if it does."""
    try:
        _adapter(part, name).validate_python(value)
    except ValidationError as error:
        [first, *_] = error.errors()
        if first["type"] == "value_error":  # a law with words of its own
            return first["msg"].removeprefix("Value error, ")
        field = need(part, name)
        return f"{field.text} is needed, got {shown(value)}{_remedy(field, part.model_fields[name], value)}"
    return None


def wrong_field(path: str, value: Any) -> str | None:
    """Why the field at `path` of a trial, such as `lora.r`, does not take `value`; None if it does."""
    return wrong(FIELDS[path].part, FIELDS[path].name, value)


def unknown(kind: str, word: str, words: Collection[str]) -> str:
    """`unknown key 'lorra'; did you mean lora?`, or all there is where nothing is near."""
    near = nearest(word, words)
    if near is not None:
        return f"unknown {kind} {shown(word)}; did you mean {near}?"
    beside = [one for one in words if "." in word and one.startswith(f"{word.partition('.')[0]}.")]
    some = ", ".join(itertools.islice(beside or words, _MOST_NAMED)) or "none"
    more = ", ..." if len(beside or words) > _MOST_NAMED else ""
    return f"unknown {kind} {shown(word)}; there is {some}{more}"


def nearest(word: str, words: Collection[str]) -> str | None:
    """The one of `words` that `word` is most likely a slip of."""
    cutoff = 0.8 if "." in word else 0.6  # two paths of one section are alike in half their letters
    whole = difflib.get_close_matches(word.lower(), words, n=1, cutoff=cutoff)
    if whole:
        return whole[0]
    begun = [one for one in words if len(word) > 2 and one.startswith(word.lower())]
    if len(begun) == 1:
        return begun[0]
    last = {path.rpartition(".")[2]: path for path in reversed(tuple(words))}
    part = difflib.get_close_matches(word.lower().rpartition(".")[2], last, n=1, cutoff=0.8)
    return last[part[0]] if part else None


def shown(value: Any) -> str:
    """`value` as a person would write it in the file, cut where it is long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _annotation(part: type[Part], name: str) -> Any:
    """The annotation of a field together with its bounds, which pydantic keeps apart."""
    field = part.model_fields[name]
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


@functools.cache
def _adapter(part: type[Part], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(_annotation(part, name))


def _members(annotation: Any, constraints: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The alternatives that an annotation allows, each with its bounds."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *notes = typing.get_args(annotation)
        kept = [note.metadata if isinstance(note, FieldInfo) else [note] for note in notes]
        bounds = itertools.chain.from_iterable(kept)
        yield from _members(inner, (*constraints, *bounds))
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member, constraints)
    else:
        yield annotation, constraints


def _literals(member: Any) -> tuple[str, ...]:
    return typing.get_args(member) if typing.get_origin(member) is Literal else ()


def _sentence(annotation: Any) -> str:
    return " or ".join(_phrase(member, bounds) for member, bounds in _members(annotation))


def _phrase(member: Any, constraints: tuple[Any, ...]) -> str:
    if words := _literals(member):
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if typing.get_origin(member) is tuple:
        return f"a list of {_sentence(typing.get_args(member)[0])}"
    if typing.get_origin(member) is dict:
        return "a mapping from text to text"
    bounds = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in constraints
        for name, sign in _SIGNS.items()
        if getattr(constraint, name, None) is not None
    ]
    return " ".join([_NOUNS[member], " and ".join(bounds)]).strip()


_NOUNS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def _remedy(field: Need, info: FieldInfo, value: Any) -> str:
    """What to write instead, where that can be told from the value."""
    if value is None and info.default is not PydanticUndefined:
        return f"; leave the key out for its default, {shown(info.default)}"
    if isinstance(value, str):
        return _remedy_for_text(field, value)
    if isinstance(value, bool):
        return ""
    if isinstance(value, float) and int in field.types and math.isfinite(value) and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, int | float) and str in field.types:
        return f"; write it in quotes, '{value}'"
    if isinstance(value, dict) and str in field.types:
        return "; text that begins with a brace goes into quotes"
    if dict in field.types:
        return "; write it as a mapping, {field: column}"
    if isinstance(value, list) and tuple not in field.types:
        return "; values to try one after the other go into search.space"
    return ""


def _remedy_for_text(field: Need, value: str) -> str:
    near = nearest(value, field.words)
    if near:
        return f"; did you mean {near}?"
    if dict in field.types:
        return "; write it as a mapping, {field: column}"
    if tuple in field.types:
        return f"; write it as a list, [{value}]"
    if bool in field.types and value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return "; write it without quotes"
    if field.types & {int, float}:
        return "; write a number without quotes or units"
    return ""
