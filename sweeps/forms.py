"""The sections of a sweep file besides its trial: what each takes, and what a slip may have meant."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from sweeps.spec import FIELDS, CountInt, Flag, Part, PositiveInt, Text, TrialSpec
from sweeps.sweep import Faults, Resources, Retries, Sampler
from sweeps.wording import nearest, shown, unknown

_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class FileForm(Part):
    """The file itself. `Any` marks the sections, which are read by rules of their own."""

    name: Text
    trial: Any = None
    search: Any = None
    baseline: Flag = True
    objective: Any = None
    resources: Any = None
    faults: Any = None


class SearchForm(Part):
    """`search:`"""

    sampler: Sampler = "grid"
    trials: PositiveInt | None = None
    space: Any = None
    first: Any = None
    repeats: PositiveInt = 1
    seed: CountInt = 0


class FaultsForm(Faults):
    """`faults:`"""

    retries: Any = None


class ObjectiveForm(Part):
    """`objective:`, one of the two."""

    maximize: Text = ""
    minimize: Text = ""


class RangeForm(Part):
    """A range under `search.space`."""

    low: _Finite
    high: _Finite
    step: _Finite | None = None
    log: Flag = False
    integer: Flag = False


def unknown_key(key: str, part: type[Part]) -> str:
    if part is FileForm and key in TrialSpec.model_fields:
        return f"unknown key {shown(key)}; put it under trial:"
    return unknown("key", key, part.model_fields)


def unknown_section(key: str) -> str:
    near = key if key in FIELDS else nearest(key, TrialSpec.model_fields) or nearest(key, FIELDS)
    if near and "." in near:
        section, _, name = near.partition(".")
        return f"unknown key {shown(key)}; write {section}: {{{name}: ...}}"
    return unknown("key", key, TrialSpec.model_fields)


def unknown_field(section: str, name: str) -> tuple[str, str | None]:
    """The message, and the field that was meant if one is near."""
    names = [info.name for path, info in FIELDS.items() if path.startswith(f"{section}.")]
    elsewhere = next((path for path, info in FIELDS.items() if info.name == name), None)
    if elsewhere is not None:
        return f"unknown key {shown(name)}; did you mean {elsewhere}?", elsewhere
    near = nearest(name, names)
    return unknown("key", name, names), f"{section}.{near}" if near else None


def unknown_path(path: str) -> str:
    if path in TrialSpec.model_fields:
        example = next(field for field in FIELDS if field.startswith(f"{path}."))
        return f"unknown field path {shown(path)}; write each of its fields in full, like {example}: [...]"
    return unknown("field path", path, FIELDS)


def override_paths() -> list[str]:
    """What `--set` may name besides the fields of a trial."""
    forms: list[tuple[str, type[Part]]] = [
        ("search", SearchForm),
        ("resources", Resources),
        ("objective", ObjectiveForm),
        ("faults", Faults),
        ("faults.retries", Retries),
    ]
    return [f"{section}.{name}" for section, form in forms for name in form.model_fields]
