"""A rehearsal: every distinct trial of a sweep for two steps on a small model, before GPU hours are spent.

The stage is set first: small models, few rows, few documents. What is wrong with a trial's data or targets
shows then, on the real names and all of the rows. The others run as a sweep of their own
(`sweeps.rehearsal`), through the same study, scheduler and tracker as a real one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rich.console import Console

from sweeps.errors import TrialError
from sweeps.rehearsal import StandIns, shrunk, sweep_of
from sweeps.result import Progress, TrialResult
from sweeps.spec import ARTICLE_TASKS, DataSpec, ModelSpec, TrialSpec
from sweeps.sweep import Sweep
from sweeps.trial.paths import write_whole
from sweepsvc.home import Home
from sweepsvc.plan import MOST_LISTED
from sweepsvc.proposing import Proposer
from sweepsvc.protocols import Proposal, SweepRecord

if TYPE_CHECKING:
    from sweeps.trial.data import Rows
    from sweeps.trial.miniature import Miniature

T = TypeVar("T")

MOST_TRIALS = 32
"""Trials that one rehearsal runs. Of more, those are taken first that show a value not seen yet."""

_ROWS = 24
_TEXTS = 2_000

NOT_SEEN = (
    "what a rehearsal cannot find: whether the memory suffices and how long it takes (see plan), whether the "
    "hub gives model, data and benchmarks, what the real weights do, and whether training converges"
)


class RehearsalHome(Home):
    """Rehearsals live in `<home>/rehearsals`, with stores of their own whatever the environment says: they
    are never seen among real sweeps."""

    def __init__(self, home: Home) -> None:
        super().__init__(home.path / "rehearsals")

    @property
    def study_url(self) -> str:
        return f"sqlite:///{self.path / 'study.db'}"

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.path / 'mlflow.db'}"

    def stage(self, sweep_id: str) -> Path:
        """Where a rehearsal has its models and rows."""
        return self.path / f"{sweep_id}.stage"


@dataclass
class Rehearsal:
    """What is to be run, and what is known before that.

    `cast` are the real trials that each small one stands for, in the order of the small sweep; it is None
    where no trial is left to run. `faults` are titles of real trials by what is wrong with them.
    """

    sweep: Sweep | None = None
    cast: list[list[str]] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    trials: int = 0

    def note(self, text: str) -> None:
        self.notes.setdefault(text)

    def blame(self, fault: str, titles: Sequence[str]) -> None:
        known = self.faults.setdefault(fault, [])
        known += [title for title in titles if title not in known]


def set_stage(sweep: Sweep, folder: Path) -> Rehearsal:
    """Make what the trials of `sweep` need in `folder`, and the small sweep of them."""
    stage, rehearsal = _Stage(folder), Rehearsal()
    small: dict[str, TrialSpec] = {}
    cast: dict[str, list[str]] = {}
    chosen, total = trials_of(sweep)
    if len(chosen) < total:
        is_finite = sweep.search.space.size is not None
        which = "every value at least once" if is_finite else "as the sampler draws them"
        rehearsal.note(f"{len(chosen)} of {total} trials are rehearsed: at most {MOST_TRIALS}, {which}")
    for proposal in chosen:
        spec, notes, errors = stage.small(proposal.spec)
        for error in errors:
            rehearsal.blame(f"{error.kind}: {error}", [_title(proposal)])
        if spec is None:
            continue
        for text in notes:
            rehearsal.note(text)
        small.setdefault(spec.digest, spec)
        cast.setdefault(spec.digest, []).append(_title(proposal))
    rehearsal.trials = len(chosen)
    rehearsal.cast = list(cast.values())
    if small:
        rehearsal.sweep = sweep_of(sweep, list(small.values()))
    for text in stage.notes:
        rehearsal.note(text)
    return rehearsal


def trials_of(sweep: Sweep) -> tuple[list[Proposal], int]:
    """The distinct trials to rehearse, without repeats, and how many there are, or will be drawn."""
    proposals = list(itertools.islice(_distinct_trials(sweep), MOST_LISTED))
    if sweep.search.space.size is None:
        return proposals, sweep.search.budget
    if len(proposals) <= MOST_TRIALS:
        return proposals, len(proposals)
    seen: set[tuple[str, str]] = set()
    telling: list[Proposal] = []
    others: list[Proposal] = []
    for proposal in proposals:
        written = {(path, str(proposal.rules.get(path, value))) for path, value in proposal.params.items()}
        (others if written <= seen else telling).append(proposal)
        seen |= written
    chosen = {proposal.key for proposal in (*telling, *others)[:MOST_TRIALS]}
    return [proposal for proposal in proposals if proposal.key in chosen], len(proposals)


def _distinct_trials(sweep: Sweep) -> Iterator[Proposal]:
    """Those that the sweep may run: of a grid what its budget runs, of another finite space all of it, and of
    an infinite one what its sampler would draw without results."""
    search = replace(sweep.search, repeats=1)
    if search.sampler != "grid" and search.space.size is not None:
        search = replace(search, sampler="grid", trials=None)
    once = replace(sweep, search=search)
    if search.sampler == "grid":
        proposer = Proposer(once, None)
        while (asked := proposer.next()) is not None:
            yield asked.proposal
        return
    from sweepsvc.study import scratch_study

    study = scratch_study(replace(once, search=replace(search, trials=min(search.budget, MOST_TRIALS))))
    while (proposal := study.ask()) is not None:
        yield proposal


# --- the stage --------------------------------------------------------------------------------------


class _Stage:
    """Makes each stand-in once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: dict[str, None] = {}
        self._made: dict[str, Any] = {}

    def small(self, spec: TrialSpec) -> tuple[TrialSpec | None, list[str], list[TrialError]]:
        """The trial in small, and what that changes; or None, and all that is wrong with it in large."""
        from sweeps.trial.estimate import check_fit

        errors: list[TrialError] = []

        def tried(make: Callable[[], T]) -> T | None:
            try:
                return make()
            except TrialError as error:
                errors.append(error)
                return None

        tried(lambda: check_fit(spec))  # has the real model layers of these names, and as wide?
        data = None if spec.train is None else tried(lambda: self._data(spec.data))
        miniature = tried(lambda: self._miniature(spec.model, data))
        if data and miniature:
            tried(lambda: self._check_rows(spec, data, miniature))
        placed = tried(lambda: _targets(spec, miniature)) if miniature and not errors else None
        if miniature is None or placed is None:
            return None, [], errors
        rows = str(data.file) if data else None
        given = StandIns(str(miniature.folder), rows, *self._benchmarks(spec), *placed)
        return (*shrunk(spec, given), [])

    def _once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gave or raised the first time."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except TrialError as error:
                self._made[key] = error
        if isinstance(made := self._made[key], TrialError):
            raise made
        return cast("T", made)

    def _miniature(self, model: ModelSpec, data: _Data | None) -> Miniature:
        from sweeps.trial.invented import alpaca_rows
        from sweeps.trial.miniature import save_miniature

        name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '__', model.id)[-80:].lstrip('.')}@{model.revision or 'main'}"

        def make() -> Miniature:
            texts = data.texts if data else [" ".join(row.values()) for row in alpaca_rows()]
            made = save_miniature(model, self.folder / "models" / name, texts)
            self.notes.setdefault(made.note)
            return made

        return self._once(f"model {model.id} {model.revision} {model.trust_remote_code}", make)

    def _data(self, data: DataSpec) -> _Data:
        """The same for all that differ only in what is done with the rows."""
        key = data.model_dump_json(exclude={"held_out", "loss_on", "max_length"})
        return self._once(f"data {key}", lambda: self._read(data))

    def _read(self, data: DataSpec) -> _Data:
        """All of the rows, and a file of some of them: invented ones where they are on the hub."""
        from sweeps.trial.data import read_rows
        from sweeps.trial.invented import instruction_rows
        from sweeps.trial.readers import read_file

        number = sum(key.startswith("data ") for key in self._made)
        file = self.folder / "rows" / f"{number}.jsonl"
        if data.path is None:
            self.notes.setdefault(f"the rows of {data.id} are on the hub: invented ones in their place")
            _write_rows(file, instruction_rows(data))
            return _Data(file, read_rows(data.model_copy(update={"id": None, "path": str(file)})))
        rows = read_rows(data)
        raw = read_file(Path(data.path))
        kept = raw[:: max(1, len(raw) // _ROWS)][:_ROWS]
        self.notes.setdefault(f"{len(kept)} rows of {data.path} are trained on, all {len(raw)} are read")
        _write_rows(file, kept)
        return _Data(file, rows)

    def _check_rows(self, spec: TrialSpec, data: _Data, miniature: Miniature) -> None:
        """Cut all of the rows, as the trial will: also those that are not trained on here."""
        from sweeps.trial.data import tokenize

        def check() -> bool:
            rows = tokenize(data.rows, spec.data, miniature.tokenizer)
            if rows.truncated and spec.data.path is not None:
                count = len(rows.train) + len(rows.held_out)
                self.notes.setdefault(
                    f"{rows.truncated} of {count} rows are cut at data.max_length={spec.data.max_length}"
                )
            return True

        self._once(f"check {spec.data.model_dump_json()} {miniature.folder}", check)

    def _benchmarks(self, spec: TrialSpec) -> tuple[tuple[str, ...], str | None]:
        """The benchmarks whose rows are local or can be invented, and the folder of their rows."""
        from sweeps.trial.invented import benchmark_rows
        from sweeps.trial.tasks import benchmarks

        wanted = spec.evaluate
        if wanted.data_dir is not None:
            return wanted.tasks, wanted.data_dir
        own = set()
        if wanted.task_dir is not None:
            known = benchmarks(wanted.task_dir).items()
            own = {name for name, task in known if task.file and task.file.is_relative_to(wanted.task_dir)}
        invented = [task for task in wanted.tasks if task in ARTICLE_TASKS and task not in own]
        left_out = [task for task in wanted.tasks if task not in own and task not in invented]
        if left_out:
            self.notes.setdefault(f"not scored here, since their rows are on the hub: {', '.join(left_out)}")
        if not invented:
            return tuple(task for task in wanted.tasks if task in own), None
        self.notes.setdefault(f"rows are invented for {', '.join(invented)}")
        rows = self.folder / "benchmarks" / "_".join(invented)
        for task in invented:
            _write_rows(rows / f"{task}.jsonl", benchmark_rows(task))
            _write_rows(rows / f"{task}_dev.jsonl", benchmark_rows(task))
        return tuple(task for task in wanted.tasks if task not in left_out), str(rows)


@dataclass(frozen=True)
class _Data:
    """A file of few rows, and all that were read, invented or not."""

    file: Path
    rows: Rows

    @property
    def texts(self) -> Iterator[str]:
        """What a tokenizer may be made from."""
        return (row.prompt + row.response for row in self.rows.good[:_TEXTS])


def _write_rows(file: Path, rows: Sequence[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def _targets(spec: TrialSpec, miniature: Miniature) -> tuple[str | tuple[str, ...], int]:
    """The targets as the small model names them, and the narrowest side of those layers.

    A layer that is named in full, with its number, may be one of those that the small model lacks: then its
    kind stands for it.
    """
    from sweeps.trial.targets import match

    targets = spec.lora.targets if spec.train is not None else "all"
    if not isinstance(targets, str):
        names = [name if _is_there(name, miniature) else name.rpartition(".")[2] for name in targets]
        targets = tuple(dict.fromkeys(names))
    return targets, min(min(shape) for shape in match(miniature.layers, targets).values())


def _is_there(name: str, miniature: Miniature) -> bool:
    return any(layer == name or layer.endswith(f".{name}") for layer in miniature.layers)


class RehearsalView:
    """One line a trial, by the names of the real ones. Scores of random weights say nothing."""

    def __init__(self, console: Console, cast: Sequence[Sequence[str]]) -> None:
        self._console = console
        self._cast = cast

    def note(self, text: str) -> None:
        """What a sampler or a tracker says is not of the settings."""

    def started(self, proposal: Proposal) -> None: ...

    def reported(self, proposal: Proposal, progress: Progress) -> None: ...

    def again(self, proposal: Proposal, why: str) -> None: ...

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        why = f"{result.failure.kind}: {result.failure.message}" if result.failure else ""
        end = f"failed: {why}" if why else "fine" if result.outcome == "completed" else result.outcome
        names = real_trials(proposal, self._cast)
        others = f", and {len(names) - 1} that equal it in small" if len(names) > 1 else ""
        text = f"{names[0]}{others}: {end}, {result.measured.wall_seconds:.1f} s"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def real_trials(proposal: Proposal, cast: Sequence[Sequence[str]]) -> Sequence[str]:
    """The real trials that a small one stands for."""
    return [proposal.key] if proposal.number is None else cast[proposal.number]


# --- the verdict ------------------------------------------------------------------------------------


def judge(rehearsal: Rehearsal, record: SweepRecord | None) -> None:
    """Add what the run found: a fault for each failure that is one of the settings."""
    if record is None:
        return
    for trial in (*record.baselines, *record.trials):
        failure = trial.result.failure if trial.result else None
        if failure is None:
            continue
        titles = real_trials(trial.proposal, rehearsal.cast)
        if failure.kind == "diverged":
            rehearsal.note(f"{titles[0]} diverged on random weights, which says little: {failure.message}")
        else:
            rehearsal.blame(f"{failure.kind}: {failure.message}", titles)


def verdict(rehearsal: Rehearsal) -> str:
    """`rehearsed: 6 trials, all fine`, or each fault with its trials and its remedy."""
    if not rehearsal.faults:
        return f"rehearsed: {_count(rehearsal.trials, 'trial')}, all fine"
    lines = []
    for fault, titles in rehearsal.faults.items():
        others = f" and {len(titles) - 1} more" if len(titles) > 1 else ""
        lines.append(f"{titles[0]}{others}: {fault}")
    count = _count(len(rehearsal.faults), "fault")
    lines.append(f"rehearsed: {_count(rehearsal.trials, 'trial')}, {count}; nothing of the sweep was started")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _title(proposal: Proposal) -> str:
    """By what it picks: which number it gets is the sampler's to say."""
    picks = [f"{path}={proposal.rules.get(path, value)}" for path, value in proposal.params.items()]
    return f"trial ({', '.join(picks)})" if picks else "the trial"
