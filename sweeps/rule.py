"""Rules: arithmetic over other fields, such as "2*r". Parsed into a whitelist, never eval'ed."""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sweeps.errors import InvalidValue
from sweeps.spec import FIELDS
from sweeps.wording import nearest, need, shown, unknown, wrong_field

Number = int | float

LONGEST_RULE = 200
"""Characters. A rule that needs more is a mistake, or an attempt to keep the parser busy."""

_MOST_BITS = 1024
"""Of a whole number within a rule: about what a float holds, and little enough for any power to be quick."""

_MOST_BITS_KEPT = 63
"""Of an integer field: what the databases of studies and trackers hold."""

_ROUNDING = 1e-9
"""Relative error up to which a rule's number counts as whole."""


@dataclass(frozen=True)
class Rule:
    """An arithmetic expression over other fields, such as "2*r": parsed into a whitelist, never eval'ed.

    `path` is the field that the rule is written for, `names` maps each name in the text to the absolute
    path of the field that it means.
    """

    text: str
    path: str
    names: Mapping[str, str] = field(compare=False)
    tree: ast.expr = field(compare=False, repr=False)

    @classmethod
    def parse(cls, text: str, path: str) -> Rule:
        """Read `text` as a rule for the field at `path`; `InvalidValue` says what cannot stand there."""
        text = text.strip()
        tree = _parsed(text)
        names: dict[str, str] = {}
        for name in _names(tree, text):
            names[name] = _absolute(name, path, text)
        return cls(text, path, names, tree)

    @property
    def needs(self) -> tuple[str, ...]:
        """The absolute paths of the fields that the rule is computed from."""
        return tuple(dict.fromkeys(self.names.values()))

    @property
    def canonical(self) -> str:
        """Equal for rules that differ in spaces and parentheses only."""
        return ast.unparse(self.tree)

    def value(self, values: Mapping[str, Any]) -> Number:
        """The rule's number, given a value for each path that it needs; whole for an integer field.

        Raises `InvalidValue` where there is none (a division by zero, a value that is no number, an
        overflow) or where the field does not take it.
        """
        number = self._finite(values)
        if FIELDS[self.path].kind == "int":
            number = self._whole(number, values)
        reason = wrong_field(self.path, number)
        if reason:
            raise InvalidValue(f"{reason} from {shown(self.text)}{self._given(values)}")
        return number

    def _finite(self, values: Mapping[str, Any]) -> Number:
        for path in self.needs:
            if not is_number(values[path]):
                raise InvalidValue(
                    f"a rule computes with numbers, {shown(self.text)} needs {path}, "
                    f"got {shown(values[path])}; write a number for {path}"
                )
        try:
            number = _evaluated(self.tree, {name: values[path] for name, path in self.names.items()})
            if math.isfinite(number):
                return number
            reason = f"it is {number}"
        except ZeroDivisionError:
            reason = "it divides by zero"
        except OverflowError:
            reason = "it is too large"
        except (TypeError, ValueError):  # an even root or a logarithm of something negative
            reason = "it is not a real number"
        raise InvalidValue(
            f"a rule must give a finite number, {shown(self.text)} does not{self._given(values)}: {reason}; "
            "change the rule or what it needs"
        )

    def _whole(self, number: Number, values: Mapping[str, Any]) -> int:
        nearest_whole = round(number)
        if nearest_whole.bit_length() > _MOST_BITS_KEPT:
            raise InvalidValue(
                f"an integer has at most {_MOST_BITS_KEPT} bits, {shown(self.text)} gives {number:g}"
                f"{self._given(values)}; write a smaller one"
            )
        if abs(number - nearest_whole) > _ROUNDING * max(1.0, abs(number)):
            raise InvalidValue(
                f"an integer is needed, {shown(self.text)} gives {number:g}{self._given(values)}; "
                f"write round({self.text}), or // for a division"
            )
        return nearest_whole

    def _given(self, values: Mapping[str, Any]) -> str:
        given = ", ".join(f"{path}={shown(values[path])}" for path in self.needs)
        return f" with {given}" if given else ""


def is_number(value: Any) -> bool:
    """Whether `value` is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


_Arithmetic = Callable[[Any, Any], Any]


def _power(base: Number, exponent: Number) -> Number:
    """`base ** exponent`, refused before it is computed where the result could not be held."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if base.bit_length() * exponent > _MOST_BITS:
            raise OverflowError
        return int(base**exponent)
    power = float(base) ** exponent
    if isinstance(power, complex):
        raise ValueError
    return power


_OPERATORS: dict[type[ast.operator], _Arithmetic] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, tuple[Callable[..., Number], range]] = {  # with the numbers of arguments they take
    "min": (min, range(2, LONGEST_RULE)),
    "max": (max, range(2, LONGEST_RULE)),
    "round": (round, range(1, 2)),
    "sqrt": (math.sqrt, range(1, 2)),
    "log2": (math.log2, range(1, 2)),
}
_GRAMMAR = "a rule holds numbers, field names, + - * / // % **, parentheses and min max round sqrt log2"


def _parsed(text: str) -> ast.expr:
    if not text:
        raise InvalidValue("a rule must not be empty; write it like '2*r'")
    if len(text) > LONGEST_RULE:
        raise InvalidValue(
            f"a rule has at most {LONGEST_RULE} characters, got {len(text)} ({shown(text)}); shorten it"
        )
    try:
        with warnings.catch_warnings():  # Python's advice about its own syntax is not for the sweep's author
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise InvalidValue(
            f"{_GRAMMAR}, got {shown(text)}; write it like '2*r' or 'lora.r ** 0.5'"
        ) from error


def _names(node: ast.expr, text: str) -> Iterator[str]:
    """Every field name below `node`, in the order of the text; refuses what is no arithmetic."""
    match node:
        case ast.Constant(value=int() | float() as value) if is_number(value):
            return
        case ast.Name(id=name):
            yield name
        case ast.Attribute():
            yield _dotted(node, text)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
            yield from _names(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            yield from _names(left, text)
            yield from _names(right, text)
        case ast.BinOp(op=ast.BitXor()):
            raise InvalidValue(f"a power is written **, got {shown(text)}; write ** for ^")
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            if len(arguments) not in _FUNCTIONS[name][1]:
                wanted = "one number" if len(_FUNCTIONS[name][1]) == 1 else "two numbers or more"
                raise InvalidValue(f"{name}() takes {wanted}, got {len(arguments)} in {shown(text)}")
            for argument in arguments:
                yield from _names(argument, text)
        case ast.Call(func=ast.Name(id=name)) if name not in _FUNCTIONS:
            raise InvalidValue(f"in {shown(text)}: {unknown('function', name, _FUNCTIONS)}")
        case _:
            raise InvalidValue(f"{_GRAMMAR}, got {shown(ast.unparse(node))} in {shown(text)}")


def _dotted(node: ast.expr, text: str) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=name):
            return f"{_dotted(inner, text)}.{name}"
        case _:
            raise InvalidValue(f"{_GRAMMAR}, got {shown(ast.unparse(node))} in {shown(text)}")


def _absolute(name: str, path: str, text: str) -> str:
    """The field that `name` means in a rule for `path`: of the same section first, then anywhere."""
    same_section = f"{path.partition('.')[0]}.{name}"
    everywhere = [other for other in FIELDS if other.rpartition(".")[2] == name]
    found = next((one for one in (name, same_section) if one in FIELDS), None)
    if found is None and len(everywhere) > 1:
        raise InvalidValue(
            f"{name} may mean {' or '.join(everywhere)} in {shown(text)}; write the one that is meant in full"
        )
    if found is None and not everywhere:
        raise InvalidValue(_unknown_name(name, path, text))
    found = found or everywhere[0]
    if not FIELDS[found].is_number:
        raise InvalidValue(
            f"a rule computes with numbers, {found} holds {FIELDS[found].kind}, got {shown(text)}; "
            "list the values instead"
        )
    return found


def _unknown_name(name: str, path: str, text: str) -> str:
    section = path.partition(".")[0]
    numbers = [other for other, info in FIELDS.items() if info.is_number]
    beside = [other.rpartition(".")[2] for other in numbers if other.startswith(f"{section}.")]
    near = nearest(name, numbers if "." in name else [*beside, *numbers])
    remedy = f"did you mean {near}?" if near else "name a number field, such as lora.r or train.samples"
    return f"unknown name {shown(name)} in {shown(text)}; {remedy}"


def _evaluated(node: ast.expr, names: Mapping[str, Number]) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.UnaryOp(op=sign, operand=operand):
            return _plain(_SIGNS[type(sign)](_evaluated(operand, names)))
        case ast.BinOp(left=left, op=op, right=right):
            return _plain(_OPERATORS[type(op)](_evaluated(left, names), _evaluated(right, names)))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name][0](*(_evaluated(argument, names) for argument in arguments))
        case _:
            return names[ast.unparse(node)]  # a dotted path


def _plain(number: Any) -> Number:
    assert is_number(number)
    return number


def read_value(path: str, raw: Any) -> Any:
    """`raw` as a constant or, where the field holds a number and `raw` is text, as a rule.

    Raises `InvalidValue` if the field at `path` takes neither.
    """
    reason = wrong_field(path, raw)
    if reason and FIELDS[path].is_number and isinstance(raw, str):
        return _read_rule(path, raw)
    if reason:
        raise InvalidValue(reason)
    return raw


def _read_rule(path: str, text: str) -> Rule:
    try:
        return Rule.parse(text, path)
    except InvalidValue as error:
        number = need(FIELDS[path].part, FIELDS[path].name).text
        raise InvalidValue(f"{number} or a rule is needed: {error}") from error
