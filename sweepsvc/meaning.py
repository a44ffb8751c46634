"""What two sweep files mean, field by field, and where they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeps.rule import Rule
from sweeps.space import Choices, Domain
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep_text


def differences(launched: Sweep, now: Sweep) -> list[str]:
    """What would change the trials of a sweep that runs already: `field: was -> is`, one line each.

    A larger budget is none of it, nor are `resources` and `faults`, which change no result.
    """
    before, after = _meaning(launched), _meaning(now)
    changed = [path for path in dict.fromkeys((*before, *after)) if before.get(path) != after.get(path)]
    if _is_more(launched.search.trials, now.search.trials):
        changed = [path for path in changed if path != "search.trials"]
    return [f"{path}: {before.get(path, 'not set')} -> {after.get(path, 'not set')}" for path in changed]


def as_it_is_now(launched: Sweep, copy: Path) -> Sweep:
    """The sweep as its file stands now: the one that it was launched from, or the copy in its folder.

    Where a file is gone the sweep is as launched. Raises `InvalidSweep` with what is wrong in a file.
    """
    for file in (copy, Path(launched.source)):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text != launched.text:
            return load_sweep_text(text, launched.source, launched.overrides, launched.base_dir)
    return launched


def _is_more(before: int | None, after: int | None) -> bool:
    return before is not None and (after is None or after >= before)


def _meaning(sweep: Sweep) -> dict[str, str]:
    """Every field of a sweep file that changes its trials, as text."""
    search = sweep.search
    fields: dict[str, Any] = {"name": sweep.name}
    fields |= {f"trial.{path}": value for path, value in sweep.template.items()}
    fields |= {f"search.space.{path}": _domain(domain) for path, domain in search.space.items()}
    fields |= {
        "search.sampler": search.sampler,
        "search.trials": search.trials,
        "search.first": [dict(picks) for picks in search.first],
        "search.repeats": search.repeats,
        "search.seed": search.seed,
        "baseline": sweep.baseline,
        "objective": sweep.objective.model_dump(),
    }
    return {path: _text(value) for path, value in fields.items()}


def _domain(domain: Domain) -> Any:
    if isinstance(domain, Choices):
        return [option.label for option in domain.options]
    ends = {"low": domain.low, "high": domain.high, "step": domain.step, "log": domain.log}
    return {name: value for name, value in ends.items() if value is not None and value is not False}


def _text(value: Any) -> str:
    if isinstance(value, Rule):
        return value.text
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
