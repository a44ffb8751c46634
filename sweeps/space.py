"""Domains: what a sweep may put at a field path: choices, ranges, and rules over other fields ("2*r").

A *rule* gives a number from other fields, an *option* is a rule or a constant under a label that a sampler
can hold, and *picks* map field paths to labels (to a number where the domain is a range).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from sweeps.errors import Fault, InvalidTrial, InvalidValue
from sweeps.rule import Number, Rule, is_number
from sweeps.spec import FIELDS, TrialSpec
from sweeps.wording import shown, wrong_field

__all__ = [
    "Choices",
    "Domain",
    "Label",
    "Option",
    "Picks",
    "Range",
    "Resolved",
    "Rule",
    "Space",
    "field_value",
    "settled",
]

Label = str | int | float | bool | None
Picks = Mapping[str, Label]

_OFF_GRID = Decimal("1e-6")
"""Share of a step up to which a number counts as lying on the grid: samplers add floats up."""


# --- domains ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One choice: its label, and the constant or rule that it stands for."""

    label: Label
    value: Any

    @classmethod
    def of(cls, value: Any) -> Option:
        """Labelled by the rule's text, by a list's or mapping's JSON text, or by the constant itself."""
        if isinstance(value, Rule):
            return cls(value.text, value)
        if isinstance(value, list | tuple):
            return cls(json.dumps(list(value)), tuple(value))
        if isinstance(value, Mapping):
            return cls(json.dumps(value), value)
        return cls(value, value)

    @property
    def written(self) -> str:
        """The label as text: 1 is "1", null is "null"."""
        return self.label if isinstance(self.label, str) else json.dumps(self.label)

    @property
    def identity(self) -> tuple[str, Any]:
        """Equal for options that say the same in other words; true is not 1."""
        if isinstance(self.value, Rule):
            return "rule", self.value.canonical
        return type(self.label).__name__ if not is_number(self.label) else "number", self.label


@dataclass(frozen=True)
class Choices:
    """Constants and rules side by side."""

    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise InvalidValue("at least one choice is needed, got none; list some, or leave the field out")
        for _, option in duplicates(self.options):
            raise InvalidValue(f"choices must differ, got {option.written} twice; remove one")

    @property
    def size(self) -> int:
        return len(self.options)

    @functools.cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules among the options."""
        return tuple(option.value for option in self.options if isinstance(option.value, Rule))

    def labels(self) -> Iterator[Label]:
        return (option.label for option in self.options)

    def option(self, label: Label) -> Option:
        """The option under `label`; `InvalidValue` lists those there are."""
        found = self._by_label.get(_key(label))
        if found is None:
            raise InvalidValue(f"one of {written_list(self.options)} is needed, got {shown(label)}")
        return found

    @functools.cached_property
    def _by_label(self) -> dict[tuple[bool, Label], Option]:
        return {_key(option.label): option for option in self.options}

    def value(self, label: Label) -> Any:
        return self.option(label).value

    def ends(self) -> tuple[Label, ...]:
        return tuple(self.labels())


def _key(label: Label) -> tuple[bool, Label]:
    return isinstance(label, bool), label


def same(one: Any, other: Any) -> bool:
    """Equality in which true is not 1."""
    return _key(one) == _key(other)


def written_list(options: Iterable[Option]) -> str:
    return ", ".join(option.written for option in options)


def duplicates(options: Iterable[Option]) -> Iterator[tuple[int, Option]]:
    """Each option that says the same as one before it, with its position."""
    seen: set[tuple[str, Any]] = set()
    for index, option in enumerate(options):
        if option.identity in seen:
            yield index, option
        seen.add(option.identity)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `high` is lowered to the last one that `step` reaches.

    Without a step, integers go by 1 and other numbers are continuous. `log` draws evenly over the
    logarithm. Values on a grid are exact decimals: low=0.1, step=0.1 holds 0.3, not 0.30000000000000004.
    """

    low: Number
    high: Number
    step: Number | None = None
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        laws = range_laws(self.low, self.high, self.step, self.log, self.integer)
        if laws:
            raise InvalidValue("; ".join(laws))
        if self.size is not None:
            object.__setattr__(self, "high", self._at(self.size - 1))

    @property
    def size(self) -> int | None:
        """How many numbers there are; None if the range is continuous."""
        if self._by is None:
            return None
        return int((_decimal(self.high) - _decimal(self.low)) // self._by) + 1

    def labels(self) -> Iterator[Number]:
        """Every number of the grid, from the lowest. A continuous range has none to list."""
        assert self.size is not None
        return (self._at(index) for index in range(self.size))

    def value(self, label: Label) -> Number:
        """`label` as a number of the range, moved onto the grid where it is a rounding error beside it."""
        law = f"a number from {self.low} to {self.high}{f' by {self._by}' if self._by else ''} is needed"
        if not isinstance(label, int | float) or isinstance(label, bool) or not math.isfinite(label):
            raise InvalidValue(f"{law}, got {shown(label)}")
        number = float(label) if self._by is None else self._on_grid(label)
        if number is None or not self.low <= number <= self.high:
            raise InvalidValue(f"{law}, got {shown(label)}")
        return number

    def _on_grid(self, number: Number) -> Number | None:
        assert self._by is not None
        steps = (_decimal(number) - _decimal(self.low)) / self._by
        return self._at(round(steps)) if abs(steps - round(steps)) <= _OFF_GRID else None

    def ends(self) -> tuple[Number, ...]:
        return self.low, self.high

    @property
    def rules(self) -> tuple[Rule, ...]:
        return ()

    @property
    def _by(self) -> Decimal | None:
        if self.step is not None:
            return _decimal(self.step)
        return Decimal(1) if self.integer else None

    def _at(self, index: int) -> Number:
        assert self._by is not None
        number = _decimal(self.low) + index * self._by
        return int(number) if self.integer else float(number)


def _decimal(number: Number) -> Decimal:
    return Decimal(repr(number))


def range_laws(low: Number, high: Number, step: Number | None, log: bool, integer: bool) -> list[str]:
    """Every law that a range breaks, with its values and remedy."""
    broken = []
    if low >= high:
        broken.append(f"low < high must hold, got low={low}, high={high}; swap them, or list the values")
    if log and low <= 0:
        broken.append(f"low > 0 must hold for a log range, got low={low}; raise low, or leave log out")
    if step is not None and step <= 0:
        broken.append(f"step > 0 must hold, got step={step}; write a positive step, or leave it out")
    if step is not None and log:
        broken.append(f"step and log exclude each other, got step={step}; remove one, or list the values")
    if step is not None and step > high - low >= 0 and step > 0:
        broken.append(
            f"step <= high - low must hold, got step={step}, low={low}, high={high}; write a smaller step"
        )
    numbers = {"low": low, "high": high, "step": step}
    fractions = [f"{name}={number}" for name, number in numbers.items() if isinstance(number, float)]
    if integer and fractions:
        broken.append(
            f"a range of integers has whole ends and steps, got {', '.join(fractions)}; "
            "write whole numbers without a point or exponent"
        )
    return broken


Domain = Choices | Range


# --- spaces -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """What picks resolve to.

    `params` maps each path of the space to its resolved value (`lora.alpha`: 16.0); `rules` maps each
    path that has a rule, in the space or in the template, to how its value was written ("2*r", or "1").
    """

    spec: TrialSpec
    params: dict[str, Any]
    rules: dict[str, str]


class Space(Mapping[str, Domain]):
    """An ordered mapping from field paths to their domains. Without any it holds exactly one trial."""

    def __init__(self, domains: Mapping[str, Domain] | None = None) -> None:
        self._domains = dict(domains or {})

    def __getitem__(self, path: str) -> Domain:
        return self._domains[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    def __repr__(self) -> str:
        return f"Space({self._domains!r})"

    @property
    def size(self) -> int | None:
        """How many combinations there are; None if a range is continuous."""
        sizes = [domain.size for domain in self.values()]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def combinations(self) -> Iterator[dict[str, Label]]:
        """Every combination of labels exactly once, the last path varying fastest.

        Raises `InvalidValue` if a range is continuous.
        """
        continuous = [path for path, domain in self.items() if domain.size is None]
        if continuous:
            raise InvalidValue(
                f"only a finite space can be listed, {', '.join(continuous)} is continuous; "
                "add a step, or list the values"
            )
        return self._combinations(list(self))

    def _combinations(self, paths: list[str]) -> Iterator[dict[str, Label]]:
        if not paths:
            yield {}
            return
        for label in self[paths[0]].labels():
            for others in self._combinations(paths[1:]):
                yield {paths[0]: label, **others}

    def only(self, paths: Iterable[str]) -> Space:
        """The space of `paths` alone, in this space's order."""
        kept = set(paths)
        return Space({path: domain for path, domain in self.items() if path in kept})

    def first(self) -> dict[str, Label]:
        """The first choice or the low end of each domain."""
        return {path: domain.ends()[0] for path, domain in self.items()}

    def resolve(self, template: Mapping[str, Any], picks: Picks) -> Resolved:
        """The trial that `picks`, one for each path of the space, make of `template`.

        `template` maps field paths to constants and rules; a path of the space takes the place of the
        template's, and `train: None` says that nothing is trained. Raises `InvalidTrial`.
        """
        options = self._picked(picks)
        fields = {**template, **{path: option.value for path, option in options.items()}}
        spec = _spec(settled(fields))
        written = {path: value.text for path, value in template.items() if isinstance(value, Rule)}
        written |= {path: options[path].written for path, domain in self.items() if domain.rules}
        rules = {path: text for path, text in written.items() if path not in self or self[path].rules}
        return Resolved(spec, {path: field_value(spec, path) for path in self}, rules)

    def values_of(self, picks: Picks) -> dict[str, Any]:
        """The constant or rule behind each pick. Raises `InvalidTrial` for one that is not of the space."""
        return {path: option.value for path, option in self._picked(picks).items()}

    def _picked(self, picks: Picks) -> dict[str, Option]:
        if set(picks) != set(self):
            raise InvalidTrial(
                [Fault(f"a pick is needed for each of {', '.join(self)}, got {', '.join(picks) or 'none'}")]
            )
        options, faults = {}, []
        for path, domain in self.items():
            try:
                options[path] = _option(domain, picks[path])
            except InvalidValue as error:
                faults.append(Fault(str(error), path))
        if faults:
            raise InvalidTrial(faults)
        return options


def _option(domain: Domain, label: Label) -> Option:
    return domain.option(label) if isinstance(domain, Choices) else Option.of(domain.value(label))


def field_value(spec: TrialSpec, path: str) -> Any:
    """The value at a field path of `spec`; None for a field of `train` where nothing is trained."""
    section, _, name = path.partition(".")
    return getattr(getattr(spec, section), name, None)


def settled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with each rule replaced by its number. Raises `InvalidTrial` with every rule that has none."""
    values: dict[str, Any] = {}
    faults: dict[str, Fault] = {}
    for path in fields:
        try:
            _settle(path, fields, values, ())
        except InvalidTrial as error:
            faults |= {f"{fault.path}: {fault.message}": fault for fault in error.faults}
    if faults:
        raise InvalidTrial(list(faults.values()))
    return {path: values[path] for path in fields}


def _settle(path: str, fields: Mapping[str, Any], values: dict[str, Any], trail: tuple[str, ...]) -> Any:
    if path in values:
        return values[path]
    if path in trail:
        cycle = (*trail[trail.index(path) :], path)
        raise InvalidTrial([cycle_fault(cycle)])
    given = fields[path] if path in fields else FIELDS[path].default
    if isinstance(given, Rule):
        given = _computed(given, fields, values, (*trail, path))
    values[path] = given
    return given


def _computed(
    rule: Rule, fields: Mapping[str, Any], values: dict[str, Any], trail: tuple[str, ...]
) -> Number:
    needs = {path: _settle(path, fields, values, trail) for path in rule.needs}
    untrained = [path for path in needs if path.startswith("train.") and fields.get("train", ...) is None]
    if untrained:
        message = (
            f"{shown(rule.text)} needs {untrained[0]}, which a trial without training lacks; write a number"
        )
        raise InvalidTrial([Fault(message, rule.path)])
    try:
        return rule.value(needs)
    except InvalidValue as error:
        raise InvalidTrial([Fault(str(error), rule.path)]) from error


def cycle_fault(cycle: tuple[str, ...]) -> Fault:
    """The fault of rules that need each other; the first path of `cycle` is also its last.

    It reads the same from whichever of its fields the circle was entered.
    """
    start = cycle.index(min(cycle))
    cycle = (*cycle[start:-1], *cycle[:start], cycle[start])
    message = f"rules must not need each other in a circle, got {' -> '.join(cycle)}; write a number for one"
    return Fault(message, cycle[0])


def _spec(fields: Mapping[str, Any]) -> TrialSpec:
    nested: dict[str, Any] = {}
    for path, value in fields.items():
        section, _, name = path.partition(".")
        if not name:
            nested[section] = value  # `train: None`
        else:
            nested.setdefault(section, {})[name] = value
    try:
        return TrialSpec.model_validate(nested)
    except ValidationError as error:
        raise InvalidTrial(_faults(error, nested)) from error


def _faults(error: ValidationError, nested: Mapping[str, Any]) -> list[Fault]:
    """pydantic's messages as ours, one for each field or law."""
    faults: dict[str, Fault] = {}
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"][:2])
        if detail["type"] == "value_error":
            message = detail["msg"].removeprefix("Value error, ")
        elif path in FIELDS:
            section, name = path.split(".")
            message = wrong_field(path, nested[section][name]) or detail["msg"]
        else:
            message = detail["msg"]
        faults.setdefault(f"{path}: {message}", Fault(message, path))
    return list(faults.values())
