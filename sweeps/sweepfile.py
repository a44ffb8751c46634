"""YAML -> `Sweep`. A file with faults gives all of them at once, each with line and remedy (law L7)."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.checks import (
    all_are,
    cycles,
    mentioned,
    not_a_metric,
    probes,
    values_of_field,
)
from sweeps.document import SET, Document, Where, read_document, read_file
from sweeps.errors import Fault, InvalidSweep, InvalidTrial, InvalidValue, SweepsError
from sweeps.firsts import labels_for, no_choice_gives, not_varied, picks_for, there_is
from sweeps.forms import (
    FaultsForm,
    FileForm,
    ObjectiveForm,
    RangeForm,
    SearchForm,
    unknown_field,
    unknown_key,
    unknown_path,
    unknown_section,
)
from sweeps.overrides import is_local, lay_over, located, missing
from sweeps.rule import Rule, read_value
from sweeps.space import (
    Choices,
    Domain,
    Label,
    Option,
    Picks,
    Range,
    Space,
    cycle_fault,
    duplicates,
    range_laws,
    same,
)
from sweeps.spec import ARTICLE_TASKS, FIELDS, Part, TrialSpec
from sweeps.sweep import (
    LOSSES,
    MEAN_SCORE,
    SCORE,
    Faults,
    Objective,
    Resources,
    Retries,
    Sampler,
    Search,
    Sweep,
)
from sweeps.wording import nearest, shown, unknown, wrong, wrong_field

__all__ = ["Objective", "Resources", "Search", "Sweep", "load_sweep", "load_sweep_text"]

TaskNames = Callable[[str | None], Collection[str]]
"""The benchmarks known with a `task_dir`, or without one."""

_MOST_TRIAL_FAULTS = 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def load_sweep(
    path: Path | str,
    overrides: Sequence[str] = (),
    task_names: TaskNames | None = None,
    files_are_here: bool = True,
) -> Sweep:
    """Read the sweep file at `path`, with each `PATH=VALUE` of `overrides` laid over it.

    `task_names` gives the benchmarks that may be named besides the article's six; it is called only if
    one is. Local files that the sweep names are not looked for where they are not here, but on the machines
    that run it. Raises `InvalidSweep` with every fault.
    """
    path, text = Path(path), read_file(Path(path))
    base_dir = path.absolute().parent
    return load_sweep_text(text, str(path), overrides, base_dir, task_names, files_are_here)


def load_sweep_text(
    text: str,
    source: str,
    overrides: Sequence[str] = (),
    base_dir: Path | str = ".",
    task_names: TaskNames | None = None,
    files_are_here: bool = True,
) -> Sweep:
    """The same from text: relative paths in it are taken from `base_dir`, those of overrides from the working
    folder. A `Sweep`'s own text, source, overrides and base_dir give it again, wherever that is done."""
    document = read_document(text, source)
    kept = tuple(lay_over(document, override) for override in overrides)
    sweep = _Reader(document, Path(base_dir).absolute(), task_names, files_are_here).sweep(text, kept)
    if document.faults:
        raise InvalidSweep(source, document.faults)
    return sweep


# --- the reader -------------------------------------------------------------------------------------


class _Reader:
    """Reads one document section by section. A fault is kept in the document, and reading goes on without
    the value that has it: its path is `tainted`, so that no later check blames what follows from it."""

    def __init__(
        self, document: Document, base_dir: Path, task_names: TaskNames | None, files_are_here: bool
    ) -> None:
        self.document = document
        self.base_dir = base_dir
        self.files_are_here = files_are_here
        self.task_names = task_names
        self.tainted: set[str] = set()
        self.reported = 0

    def sweep(self, text: str, overrides: tuple[str, ...]) -> Sweep:
        top = self.section((), FileForm)
        template = self.template()
        search = self.search(template)
        objective = self.objective()
        resources = self.resources()
        faults = self.faults()
        name = self.name(top)
        self.check_cycles(template, search.space)
        self.check_tasks(template, search.space)
        self.check_objective(objective, template, search.space)
        self.check_trials(template, search)
        return Sweep(
            name=name,
            source=self.document.source,
            text=text,
            overrides=overrides,
            base_dir=self.base_dir,
            template=template,
            search=search,
            baseline=top.get("baseline", True),
            objective=objective,
            resources=resources,
            faults=faults,
        )

    def report(self, where: Where, message: str, taint: str | None = None) -> None:
        self.document.report(where, message)
        self.reported += 1
        if taint is not None:
            self.tainted.add(taint)

    def raw(self, where: Where) -> dict[str, Any]:
        """The mapping at `where`; a section that is missing or left empty has no keys."""
        value: Any = self.document.values
        for key in where:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return {}
        if not isinstance(value, dict):
            law = f"a section of key: value lines is needed, got {shown(value)}"
            self.report(where, f"{law}; write its keys below it, or leave it out")
            return {}
        return value

    def section(self, where: Where, part: type[Part]) -> dict[str, Any]:
        """The entries at `where` that `part` takes; the others are reported."""
        kept = {}
        for key, value in self.raw(where).items():
            if key not in part.model_fields:
                self.report((*where, key), unknown_key(key, part))
            elif reason := wrong(part, key, value):
                self.report((*where, key), reason)
            else:
                kept[key] = value
        return kept

    def name(self, top: Mapping[str, Any]) -> str:
        name = top.get("name")
        if name is None and "name" not in self.document.values:
            stem = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(self.document.source).stem)
            self.report(("name",), f"a name is needed, got none; add a line like name: {stem}")
        elif name is not None and not _NAME.fullmatch(name):
            law = "a name has up to 64 letters, digits, _ - and ., and starts with a letter or digit"
            remedy = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip("_.-")[:64] or "my_sweep"
            self.report(("name",), f"{law}, got {shown(name)}; write {remedy}")
        return name or ""

    # The trial

    def template(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for section, inner in self.raw(("trial",)).items():
            at = ("trial", section)
            if section not in TrialSpec.model_fields:
                self.report(at, unknown_section(section), taint=nearest(section, FIELDS))
            elif section == "train" and inner == "none":
                fields["train"] = None
            elif section == "train" and inner is None:
                self.report(at, "train must not be null; write none to train nothing, or leave the key out")
            else:
                fields |= self.trial_section(section)
        return fields

    def trial_section(self, section: str) -> dict[str, Any]:
        fields = {}
        for name, raw in self.raw(("trial", section)).items():
            at, path = ("trial", section, name), f"{section}.{name}"
            if path not in FIELDS:
                message, meant = unknown_field(section, name)
                self.report(at, message, taint=meant)
            elif (option := self.option(path, raw, at)) is not None:
                fields[path] = option.value
                if self.document.place(at).source == SET and path in self.raw(("search", "space")):
                    self.report(at, _without_effect(path, raw))
        return fields

    def option(self, path: str, raw: Any, at: Where) -> Option | None:
        """The constant or rule `raw`, labelled as it is written; None, and reported, where it is neither."""
        try:
            option = Option.of(read_value(path, raw))
        except InvalidValue as error:
            self.report(at, str(error), taint=path)
            return None
        if not is_local(path, option.value):
            return option
        local = located(path, option.value, self.base_dir)
        if self.files_are_here and (reason := missing(path, Path(local))):
            self.report(at, reason, taint=path)
            return None
        return Option(option.label, local)

    # The search

    def search(self, template: Mapping[str, Any]) -> Search:
        at = ("search",)
        entries = self.section(at, SearchForm)
        form = SearchForm(**entries)
        faulty = set(self.raw(at)) - set(entries)
        space = self.space("train" in template)
        first = self.first(form.first, template, space)
        if "sampler" not in faulty:
            self.check_sampler(form.sampler, space)
        if form.trials is None and form.sampler != "grid" and not faulty & {"trials", "sampler"} and space:
            message = f"{form.sampler} needs a number of trials, got none; add trials: 24"
            self.report((*at, "sampler"), message)
        if form.repeats > 1 and template.get("train", ...) is None:
            message = f"repeats differ by train.seed, got repeats={form.repeats} with train: none; write 1"
            self.report((*at, "repeats"), message)
        return Search(form.sampler, form.trials, space, first, form.repeats, form.seed)

    def space(self, untrained: bool) -> Space:
        domains = {}
        for path, raw in self.raw(("search", "space")).items():
            at = ("search", "space", path)
            if path not in FIELDS:
                self.report(at, unknown_path(path), taint=nearest(path, FIELDS))
            elif untrained and path.startswith("train."):
                self.report(
                    at, "nothing is trained with train: none; leave this out, or give train a section"
                )
            elif (domain := self.domain(path, raw, at)) is None:
                self.tainted.add(path)
            else:
                domains[path] = domain
        return Space(domains)

    def domain(self, path: str, raw: Any, at: Where) -> Domain | None:
        if isinstance(raw, list):
            return self.choices(path, raw, at)
        if isinstance(raw, dict):
            return self.range(path, at)
        if isinstance(raw, str) and FIELDS[path].is_number:
            option = self.option(path, raw, at)
            return None if option is None else Choices((option,))
        law = f"a list of choices, a range {{low: ..., high: ...}} or a rule is needed, got {shown(raw)}"
        remedy = "leave the field out" if raw is None else f"write [{_yaml(raw)}]"
        self.report(at, f"{law}; {remedy}, or put it under trial")
        return None

    def choices(self, path: str, raw: list[Any], at: Where) -> Choices | None:
        if not raw:
            self.report(at, "at least one choice is needed, got none; list some, or leave the field out")
            return None
        read = [(index, self.option(path, value, (*at, index))) for index, value in enumerate(raw)]
        options = {index: option for index, option in read if option is not None}
        for place, option in duplicates(options.values()):
            message = f"choices must differ, got {option.written} twice; remove one"
            self.report((*at, list(options)[place]), message, taint=path)
        return None if path in self.tainted else Choices(tuple(options.values()))

    def range(self, path: str, at: Where) -> Range | None:
        info = FIELDS[path]
        before = self.reported
        form = self.section(at, RangeForm)
        raw = self.raw(at)
        if not info.is_number:
            self.report(at, f"only a number has a range, {path} holds {info.kind}; list the choices")
            return None
        for end in ("low", "high"):
            if end not in raw:
                self.report(at, f"a range has a low and a high, {end} is missing; add {end}: ...")
            elif end in form and (reason := wrong_field(path, form[end])):
                self.report((*at, end), reason)
        if info.kind == "int" and form.get("integer") is False:
            self.report((*at, "integer"), f"{path} takes integers only; leave integer: false out")
        integer, log = form.get("integer", info.kind == "int"), form.get("log", False)
        numbers: list[Any] = [form.get(name) for name in ("low", "high", "step")]
        low, high, step = numbers if integer else [n if n is None else float(n) for n in numbers]
        if low is None or high is None:
            return None
        ends_are_sound = self.reported == before
        for law in range_laws(low, high, step, log, integer and ends_are_sound):
            self.report(at, law)
        return Range(low, high, step, log, integer) if self.reported == before else None

    def check_sampler(self, sampler: Sampler, space: Space) -> None:
        at = ("search", "space")
        if sampler == "grid":
            for path, domain in space.items():
                if domain.size is None:
                    message = "a grid needs numbers that can be counted, got a continuous range"
                    self.report((*at, path), f"{message}; add a step, or list the values")
        elif sampler == "cmaes" and not any(isinstance(raw, dict) for raw in self.raw(at).values()):
            remedy = "write one as {low: ..., high: ...}, or take another sampler, such as tpe"
            message = f"cmaes needs a numeric range in search.space, got none; {remedy}"
            self.report(("search", "sampler"), message)

    # What is tried first

    def first(self, raw: Any, template: Mapping[str, Any], space: Space) -> tuple[Picks, ...]:
        at = ("search", "first")
        if raw is None:
            return ()
        if not isinstance(raw, list):
            self.report(at, f"a list of trials is needed, got {shown(raw)}; write [{{lora.r: 8}}]")
            return ()
        picks = [self.first_picks(entry, (*at, index), template, space) for index, entry in enumerate(raw)]
        return tuple(one for one in picks if one is not None)

    def first_picks(self, entry: Any, at: Where, template: Mapping[str, Any], space: Space) -> Picks | None:
        """The picks that `entry` means. None, and reported, where it means none or more than one."""
        varied = self.raw(("search", "space"))
        before = self.reported
        if not isinstance(entry, dict):
            self.report(at, f"a mapping from field paths to values is needed, got {shown(entry)}")
            return None
        for path in entry:
            if path not in varied:
                self.report((*at, path), not_varied(path, varied))
        if any(path not in space for path in varied):
            return None
        candidates = {path: self.candidates(path, entry, at, space[path]) for path in space}
        if self.reported > before:
            return None
        picks = picks_for(entry, candidates, template, space)
        if picks is None:
            self.report(at, no_choice_gives(entry, candidates, template, space))
        return picks

    def candidates(self, path: str, entry: Mapping[str, Any], at: Where, domain: Domain) -> list[Label]:
        """The labels that the entry may mean for `path`; several are rules that may give its number."""
        if path not in entry:
            if domain.size == 1:
                return list(domain.labels())
            self.report(at, f"{path} is needed too; {there_is(domain)}")
            return []
        labels = labels_for(domain, entry[path])
        if not labels:
            self.report((*at, path), f"{shown(entry[path])} is not in search.space; {there_is(domain)}")
        return labels

    # The objective

    def objective(self) -> Objective:
        at = ("objective",)
        form = self.section(at, ObjectiveForm)
        directions = [key for key in self.raw(at) if key in ObjectiveForm.model_fields]
        if len(directions) > 1:
            self.report(at, "one of maximize and minimize is needed, got both; remove one")
        if len(form) != 1:
            if self.raw(at) and not directions:
                self.report(at, "maximize or minimize is needed; write {maximize: score.mean}")
            return Objective()
        [(direction, metric)] = form.items()
        return Objective(metric=metric, maximize=direction == "maximize")

    def check_objective(self, objective: Objective, template: Mapping[str, Any], space: Space) -> None:
        direction = "maximize" if objective.maximize else "minimize"
        at: Where = ("objective", direction)
        if not self.document.has(at):
            at = ("objective",)
        tasks = {task for _, tasks in self.task_lists(template, space) for task in tasks}
        reason = not_a_metric(objective, tasks)
        if reason and not (objective.metric.startswith(SCORE) and "evaluate.tasks" in self.tainted):
            self.report(at, reason)
        elif objective.metric in (*LOSSES, "train_seconds") and template.get("train", ...) is None:
            self.report(at, f"{objective.metric} is never measured with train: none; choose {MEAN_SCORE}")
        elif objective.metric == "eval.loss" and all_are(0, "data.held_out", template, space):
            self.report(
                at, "eval.loss is never measured with data.held_out 0; raise it, or choose another metric"
            )

    def resources(self) -> Resources:
        at = ("resources",)
        resources = Resources(**self.section(at, Resources))
        if resources.gpus > 1 and not resources.gpus.is_integer():
            message = f"gpus above 1 must be whole, got {resources.gpus}; write {int(resources.gpus)}"
            self.report((*at, "gpus"), message)
        return resources

    def faults(self) -> Faults:
        form = self.section(("faults",), FaultsForm)
        form["retries"] = Retries(**self.section(("faults", "retries"), Retries))
        return Faults(**form)

    # Checks over the whole

    def task_lists(self, template: Mapping[str, Any], space: Space) -> Iterator[tuple[Where, Sequence[str]]]:
        """Every list of benchmarks that a trial may have, with where it stands."""
        path = "evaluate.tasks"
        domain = space.get(path)
        if isinstance(domain, Choices):
            for index, option in enumerate(domain.options):
                yield ("search", "space", path, index), option.value
        else:
            yield ("trial", "evaluate", "tasks"), template.get(path, FIELDS[path].default)

    def check_tasks(self, template: Mapping[str, Any], space: Space) -> None:
        named = [
            ((*where, index), task)
            for where, tasks in self.task_lists(template, space)
            for index, task in enumerate(tasks)
            if task not in ARTICLE_TASKS
        ]
        if not named or self.task_names is None or "evaluate.task_dir" in self.tainted:
            return
        path = "evaluate.task_dir"
        folders = values_of_field(path, template, space)
        try:
            known = {name for folder in folders for name in self.task_names(folder)}
        except SweepsError as error:
            self.report(("trial", "evaluate", "task_dir"), str(error))
            return
        for where, task in named:
            if task not in known:
                self.report(where, unknown("task", task, sorted(known)))

    def check_cycles(self, template: Mapping[str, Any], space: Space) -> None:
        for cycle in cycles(template, space):
            fault = cycle_fault(cycle)
            self.report(self.where_rule(fault.path, cycle, space), fault.message)
            self.tainted |= set(cycle)

    def where_rule(self, path: str, needed: Collection[str], space: Space) -> Where:
        """Of the first rule for `path` that needs one of `needed`."""
        domain = space.get(path)
        if isinstance(domain, Choices):
            for option in domain.options:
                if isinstance(option.value, Rule) and set(option.value.needs) & set(needed):
                    return self.where_field(path, {path: option.label}, space)
        return self.where_field(path, {}, space)

    def check_trials(self, template: Mapping[str, Any], search: Search) -> None:
        """Try the laws of a trial on what the space can give, with what could be read."""
        space = search.space
        sound = {path: value for path, value in template.items() if path not in self.tainted}
        within = Space({path: domain for path, domain in space.items() if path not in self.tainted})
        found: dict[tuple[Where, str], None] = {}
        first = search.first if len(within) == len(space) else ()
        for picks in itertools.chain(first, probes(sound, within)):
            try:
                within.resolve(sound, picks)
            except InvalidTrial as error:
                for fault in error.faults:
                    if self.tainted.isdisjoint(mentioned(fault)):
                        found.setdefault((self.where_fault(fault, picks, within), fault.message))
        for where, message in itertools.islice(found, _MOST_TRIAL_FAULTS):
            self.report(where, message)
        if len(found) > _MOST_TRIAL_FAULTS:
            more = len(found) - _MOST_TRIAL_FAULTS
            self.report(("search", "space"), f"{more} more faults like these; correct the others first")

    def where_fault(self, fault: Fault, picks: Picks, space: Space) -> Where:
        """Where the file says what broke a law: the first field that the fault speaks of and the file has."""
        for path in mentioned(fault):
            where = self.where_field(path, picks, space)
            if self.document.has(where):
                return where
        section = ("trial", fault.path)
        return section if self.document.has(section) else ("trial",)

    def where_field(self, path: str, picks: Picks, space: Space) -> Where:
        if path not in space:
            return ("trial", *path.split("."))
        where = ("search", "space", path)
        domain = space[path]
        if isinstance(domain, Choices) and path in picks:
            index = [same(option.label, picks[path]) for option in domain.options].index(True)
            if self.document.has((*where, index)):
                return (*where, index)
        return where


# --- what the reader says ---------------------------------------------------------------------------


def _without_effect(path: str, raw: Any) -> str:
    law = f"search.space varies {path}, so this would change nothing, got {shown(raw)}"
    return f"{law}; write search.space.{path}=[{_yaml(raw)}]"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
