"""A YAML file as plain values that remember their lines, with what `--set` says laid over them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sweeps.errors import Fault, InvalidSweep, InvalidValue
from sweeps.wording import nearest, shown

Where = tuple[str | int, ...]
"""The keys and list positions that lead to a value: ("search", "space", "lora.r", 0)."""

SET = "--set"
LARGEST_FILE = 262_144
"""Bytes. A sweep file has a few thousand; the limit keeps a wrong file from being parsed for minutes."""

_MOST_BITS = 63
_TAG = "tag:yaml.org,2002:"
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Place(NamedTuple):
    """Where a value was written: a line of the file, or another source."""

    line: int | None = None
    source: str | None = None


class Document:
    """The values of one file, their places, and every fault found in them so far."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self.faults: list[Fault] = []
        self._places: dict[Where, Place] = {}
        self._broken: set[Where] = set()

    def note(self, where: Where, line: int) -> None:
        self._places[where] = Place(line)

    def has(self, where: Where) -> bool:
        """Whether something is written at exactly `where`."""
        return where in self._places

    def place(self, where: Where) -> Place:
        """Of the value at `where`, or of the nearest one around it."""
        for length in range(len(where), 0, -1):
            if where[:length] in self._places:
                return self._places[where[:length]]
        return Place()

    def report(self, where: Where, message: str) -> None:
        """Keep one fault, at the place of `where`, unless nothing there could be read to begin with."""
        if any(where[:length] in self._broken for length in range(len(where) + 1)):
            return
        place = self.place(where)
        self.faults.append(Fault(message, field_path(where), place.line, place.source))

    def spoil(self, where: Where, message: str, line: int | None = None) -> None:
        """Keep the fault of a value that cannot be read at all, so that no other is reported for it."""
        self.faults.append(Fault(message, field_path(where), line))
        self._broken.add(where)

    def refuse_set(self, path: str, message: str) -> None:
        """Keep the fault of a `--set` that cannot be laid over the file."""
        self.faults.append(Fault(message, path, source=SET))

    def put(self, where: Where, value: Any) -> None:
        """Lay `value` over whatever is at `where`; `InvalidValue` if no mapping can stand above it."""
        inner = self.values
        for depth, key in enumerate(where[:-1], start=1):
            if inner.get(str(key)) is None:
                inner[str(key)] = {}
            inner = inner[str(key)]
            if not isinstance(inner, dict):
                raise InvalidValue(f"{field_path(where[:depth])} must be a section, got {shown(inner)}")
        inner[str(where[-1])] = value
        self._places = {at: place for at, place in self._places.items() if at[: len(where)] != where}
        self._places[where] = Place(source=SET)


def field_path(where: Where) -> str:
    """As people write it: fields of the trial without their section, wherever they stand."""
    if where[:2] == ("search", "space") and len(where) > 2:
        where = where[2:3]
    elif where[:1] == ("trial",) and len(where) > 1:
        where = where[1:3]
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in where).lstrip(".")


# --- reading ----------------------------------------------------------------------------------------


def read_file(path: Path) -> str:
    """The text of a sweep file; `InvalidSweep` if there is none, or it is no text."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise InvalidSweep(str(path), [Fault(_not_found(path))]) from error
    except IsADirectoryError as error:
        raise InvalidSweep(
            str(path), [Fault("a file is needed, got a folder; name a YAML file in it")]
        ) from error
    except OSError as error:
        message = f"the file must be readable: {error.strerror}; check the path and its permissions"
        raise InvalidSweep(str(path), [Fault(message)]) from error
    if len(raw) > LARGEST_FILE:
        message = f"a sweep file has at most {LARGEST_FILE} bytes, this one has more; is it a sweep file?"
        raise InvalidSweep(str(path), [Fault(message)])
    return _decoded(raw, str(path))


def _not_found(path: Path) -> str:
    files = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = nearest(path.name, files)
    hint = f"; did you mean {path.with_name(near)}?" if near else "; check the path"
    return f"no such file, looked for {path.absolute()}{hint}"


def _decoded(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        message = f"the file must be UTF-8, got byte 0x{raw[error.start]:02x}; save it as UTF-8"
        raise InvalidSweep(source, [Fault(message, line=line)]) from error


def read_document(text: str, source: str) -> Document:
    """The mapping that `text` holds. Nothing is raised: its faults are in the document."""
    document = Document(source)
    root = _composed(text, document)
    if root is None:
        if not document.faults:
            document.spoil((), "the file must not be empty; start it with name: and trial:")
    elif isinstance(root, yaml.MappingNode):
        document.values = _mapping(root, (), document)
    else:
        got = "a list" if isinstance(root, yaml.SequenceNode) else shown(root.value)
        message = (
            f"the file must hold sections of key: value lines, got {got}; start it with name: and trial:"
        )
        document.spoil((), message, root.start_mark.line + 1)
    return document


def read_value_text(text: str) -> Any:
    """The value that `text` is as YAML, for `--set`; `InvalidValue` if it is none."""
    document = Document(SET)
    root = _composed(text, document)
    value = None if root is None else _value(root, ("",), document)
    if document.faults:
        raise InvalidValue(document.faults[0].message)
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML without its surprises: 3e-4 is a number, 010 is ten, 1:30 and 2024-01-01 are text, and no
    anchors, aliases or merge keys, which a small file can blow up to gigabytes with."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own way)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs of PyYAML leave it out
        name = getattr(event, "anchor", None)
        if name is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise yaml.composer.ComposerError(
                None, None, f"anchors and aliases are not read, got {sign}{name}", event.start_mark
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    f"{_TAG}bool",
    re.compile(rf"(?:{'|'.join(f'{word}|{word.title()}|{word.upper()}' for word in _WORDS)})\Z"),
    list("tTyYoOfFnN"),
)
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"[-+]?[0-9][0-9_]*\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
    list("-+0123456789."),
)


def _composed(text: str, document: Document) -> yaml.Node | None:
    strange = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if strange:
        line = text.count("\n", 0, strange.start()) + 1
        message = f"text is needed, got the character {strange.group()!r}; remove it"
        document.spoil((), message, line)
        return None
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        document.spoil((), *_syntax_fault(error))
    except RecursionError:
        document.spoil((), "the YAML is nested too deeply to be read; a sweep file has five levels")
    return None


def _syntax_fault(error: yaml.MarkedYAMLError) -> tuple[str, int]:
    problem, mark = error.problem or "it cannot be parsed", error.problem_mark
    remedy = "check the quotes, brackets and indentation here and before"
    if "unexpected end of stream" in problem:
        problem, remedy, mark = "a quote is not closed", "close it", error.context_mark
    elif "expected ':'" in problem:
        problem, remedy, mark = "a key without a colon", "write key: value", error.context_mark
    elif "\\t" in problem:
        remedy = "indent with spaces, not with tabs"
    elif "single document" in (error.context or ""):
        problem, remedy = "a second document starts here", "remove this line, or make two files"
    elif "anchors" in problem:
        remedy = "write the value out; text that starts with * or & goes into quotes"
    return f"YAML is needed: {problem}; {remedy}", (mark.line + 1 if mark else 1)


def _value(node: yaml.Node, where: Where, document: Document) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, where, document)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_item(item, (*where, index), document) for index, item in enumerate(node.value)]
    try:
        return _scalar(node)
    except InvalidValue as error:
        document.spoil(where, str(error), node.start_mark.line + 1)
        return None


def _item(node: yaml.Node, where: Where, document: Document) -> Any:
    document.note(where, node.start_mark.line + 1)
    return _value(node, where, document)


def _mapping(node: yaml.MappingNode, where: Where, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if node.tag != f"{_TAG}map":
        document.spoil(where, _tag_fault(node), node.start_mark.line + 1)
        return {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or not _is_unicode(key_node.value):
            document.spoil((*where, "?"), "a key must be one word; write key: value", line)
            continue
        key = str(key_node.value)
        at = (*where, key)
        if key in lines:
            message = f"a key must stand once, got {shown(key)} on lines {lines[key]} and {line}; remove one"
            document.faults.append(Fault(message, field_path(at), line))
            continue
        lines[key] = line
        document.note(at, value_node.start_mark.line + 1 if isinstance(value_node, yaml.ScalarNode) else line)
        values[key] = _value(value_node, at, document)
    return values


def _scalar(node: yaml.Node) -> Any:
    """A scalar by its tag. Tags that make objects of any kind are refused."""
    text = node.value
    kind = node.tag.removeprefix(_TAG)
    try:
        if kind == "str" and _is_unicode(text):
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return _WORDS[text.lower()]
        if kind == "float":
            return _float(text)
        if kind == "int":
            return _int(text)
    except (ValueError, KeyError) as error:
        raise InvalidValue(f"the tag !!{kind} does not fit {shown(text)}; remove the tag") from error
    if kind == "str":
        raise InvalidValue(f"text must be Unicode, got {shown(text)}; write the character itself")
    raise InvalidValue(_tag_fault(node))


def _is_unicode(text: str) -> bool:
    """Whether `text` can be written to a file; half of a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _float(text: str) -> float:
    return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))


def _int(text: str) -> int:
    if len(text) > _MOST_BITS or int(text.replace("_", "")).bit_length() > _MOST_BITS:
        raise InvalidValue(
            f"a whole number has at most {_MOST_BITS} bits, got {shown(text)}; write a smaller one"
        )
    return int(text.replace("_", ""))


def _tag_fault(node: yaml.Node) -> str:
    return f"a tag must not stand here, got {node.tag.replace(_TAG, '!!')}; write the plain value"
