"""`search.first`: an entry by value, such as `{lora.r: 256, lora.alpha: 512}`, as picks of the space."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from sweeps.errors import InvalidTrial, InvalidValue
from sweeps.rule import Rule, is_number
from sweeps.space import Choices, Domain, Label, Picks, Range, Space, settled, written_list
from sweeps.wording import nearest, shown

Candidates = Mapping[str, list[Label]]
"""For each path of the space the labels that an entry may mean; several are rules."""


def not_varied(path: str, space: Mapping[str, Any]) -> str:
    near = nearest(path, space)
    remedy = f"did you mean {near}?" if near else f"there is {', '.join(space) or 'none'}"
    return f"only what search.space varies can be tried first, got {shown(path)}; {remedy}"


def there_is(domain: Domain) -> str:
    if isinstance(domain, Choices):
        return f"there is {written_list(domain.options)}"
    by = f" by {domain.step}" if domain.step else ""
    return f"there is {domain.low} to {domain.high}{by}"


def labels_for(domain: Domain, value: Any) -> list[Label]:
    """The labels that `value` may mean: itself, or each rule where it is another number."""
    label = json.dumps(value) if isinstance(value, list | dict) else value
    try:
        return [domain.value(label)] if isinstance(domain, Range) else [domain.option(label).label]
    except InvalidValue:
        rules = domain.rules if is_number(value) else ()
        return [rule.text for rule in rules]


def picks_for(
    entry: Mapping[str, Any], candidates: Candidates, template: Mapping[str, Any], space: Space
) -> Picks | None:
    """The first of the candidates whose rules give the numbers of `entry`."""
    for labels in itertools.product(*candidates.values()):
        picks = dict(zip(candidates, labels, strict=True))
        if _gives(entry, picks, template, space):
            return picks
    return None


def _gives(entry: Mapping[str, Any], picks: Picks, template: Mapping[str, Any], space: Space) -> bool:
    wanted = {path: value for path, value in entry.items() if _by_rule(value, picks[path])}
    if not wanted:
        return True
    try:
        values = settled({**template, **space.values_of(picks)})
    except InvalidTrial:
        return False
    return all(math.isclose(values[path], number, rel_tol=1e-9) for path, number in wanted.items())


def _by_rule(value: Any, label: Label) -> bool:
    """Whether the entry wrote the number that the rule under `label` should give."""
    return is_number(value) and isinstance(label, str)


def no_choice_gives(
    entry: Mapping[str, Any], candidates: Candidates, template: Mapping[str, Any], space: Space
) -> str:
    """What the entry's numbers could have been, given its other values."""
    wanted = [path for path, value in entry.items() if _by_rule(value, candidates[path][0])]
    others = [path for path in entry if path not in wanted]
    given = f" with {_assignments(entry, others)}" if others else ""
    could_be = "; ".join(
        f"{path}: {', '.join(_options_with_numbers(path, candidates, template, space))}" for path in wanted
    )
    return f"no choice of search.space gives {_assignments(entry, wanted)}{given}; there is {could_be}"


def _assignments(entry: Mapping[str, Any], paths: list[str]) -> str:
    return ", ".join(f"{path}={shown(entry[path])}" for path in paths)


def _options_with_numbers(
    path: str, candidates: Candidates, template: Mapping[str, Any], space: Space
) -> Iterator[str]:
    domain = space[path]
    assert isinstance(domain, Choices)
    for option in domain.options:
        picks = {other: labels[0] for other, labels in candidates.items()} | {path: option.label}
        try:
            number = settled({**template, **space.values_of(picks)})[path]
        except InvalidTrial:
            number = None
        known = isinstance(option.value, Rule) and number is not None
        yield f"{option.written} = {number}" if known else option.written
