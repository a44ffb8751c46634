"""Checks over a whole sweep: circles of rules, the laws of its trials, an objective that can be measured."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from sweeps.errors import Fault
from sweeps.space import Choices, Label, Range, Space, same
from sweeps.spec import FIELDS
from sweeps.sweep import COSTS, LOSSES, MEAN_SCORE, SCORE, Objective, dependencies, rules_at
from sweeps.wording import nearest, unknown

MOST_COMBINATIONS = 10_000
"""Up to so many, every combination is tried against the laws of a trial before anything starts."""

_FIELD_IN_TEXT = re.compile(r"\b[a-z]+\.[a-z_0-9]+\b")


def cycles(template: Mapping[str, Any], space: Space) -> list[tuple[str, ...]]:
    """Each circle of fields whose rules need each other, the first path again at the end."""
    needs = {
        path: {need for rule in rules_at(path, template, space) for need in rule.needs}
        for path in (*template, *space)
    }
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for start in needs:
        for cycle in _cycles_from(start, (), needs, set()):
            found.setdefault(frozenset(cycle), cycle)
    return list(found.values())


def _cycles_from(
    path: str, trail: tuple[str, ...], needs: Mapping[str, Iterable[str]], seen: set[str]
) -> Iterator[tuple[str, ...]]:
    if path in trail:
        yield (*trail[trail.index(path) :], path)
    elif path not in seen:
        seen.add(path)
        for need in sorted(needs.get(path, ())):
            yield from _cycles_from(need, (*trail, path), needs, seen)


def probes(template: Mapping[str, Any], space: Space) -> Iterator[dict[str, Label]]:
    """Every combination where there are few. Else each choice and end of a range beside the first of the
    others, and each rule with all choices and ends of what it is computed from."""
    if space.size is not None and space.size <= MOST_COMBINATIONS:
        yield from space.combinations()
        return
    first = space.first()
    yield first
    for path, domain in space.items():
        yield from ({**first, path: label} for label in domain.ends())
    for path in (*template, *space):
        if rules_at(path, template, space):
            together = space.only({path, *dependencies(path, template, space)})
            corners = itertools.product(*(domain.ends() for domain in together.values()))
            for labels in itertools.islice(corners, MOST_COMBINATIONS):
                yield {**first, **dict(zip(together, labels, strict=True))}


def not_a_metric(objective: Objective, tasks: Collection[str]) -> str | None:
    """Why no trial can ever be judged by `objective`; None if one can."""
    metric = objective.metric
    scores = [f"{SCORE}{task}" for task in sorted(tasks)]
    if metric in (*LOSSES, *COSTS):
        if objective.maximize:
            return f"less of {metric} is better, got maximize; write {{minimize: {metric}}}"
        return None
    if metric.startswith(SCORE) and not tasks:
        return f"{metric} is never measured without a benchmark; list some in evaluate.tasks"
    if metric in (MEAN_SCORE, *scores):
        return None
    if metric.startswith(SCORE):
        near = nearest(metric.removeprefix(SCORE), ["mean", *tasks])
        remedy = f"did you mean {SCORE}{near}?" if near else "list it there"
        return f"{metric} is never measured, evaluate.tasks does not list it; {remedy}"
    return unknown("metric", metric, [MEAN_SCORE, *scores, *LOSSES, *COSTS])


def values_of_field(path: str, template: Mapping[str, Any], space: Space) -> list[Any]:
    """Every constant that the field at `path` may have."""
    domain = space.get(path)
    if isinstance(domain, Choices):
        return [option.value for option in domain.options]
    if isinstance(domain, Range):
        return [*domain.ends()]
    return [template.get(path, FIELDS[path].default)]


def all_are(value: Any, path: str, template: Mapping[str, Any], space: Space) -> bool:
    """Whether the field at `path` is `value` in every trial."""
    return all(same(value, one) for one in values_of_field(path, template, space))


def mentioned(fault: Fault) -> list[str]:
    """The field paths that a fault speaks of, its own first."""
    return [path for path in (fault.path, *_FIELD_IN_TEXT.findall(fault.message)) if path in FIELDS]
