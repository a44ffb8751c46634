"""The ledger of a sweep: the one file that imports optuna.

What is where. A sweep is an Optuna study named by its id; the sweep file, its overrides and digest, the
objective and the facts are attributes of the study, and so is each baseline. A trial is an Optuna trial
whose attributes are `proposal` (number, spec, params, rules), `started` (attempts, MLflow run, setbacks) and
`result`. Its state is read from these, Optuna's own state only informs the sampler. An Optuna trial without a
`proposal` is no trial of the sweep. Of several with the same number the latest is in force: Optuna never
changes a trial that has ended, so one that runs again is another row.

What a `kill -9` leaves. Each attribute appears whole, and only the driver writes, in this order:

    open   the study, then its attributes, `launched` last      without `launched`: no sweep
    ask    the sampler's draw, then `proposal`                  without `proposal`: nobody's, to be failed
           (a proposal of `random`, or that no sampler drew, is one write)
    start  `started`                                            without: waiting, though it may run
    tell   `result`, then Optuna's state and value              `result` stands, the rest is repeated from it
    reopen a new row with `proposal` and `started`, in one write

Two attributes of the study are no part of that: `heartbeat`, when the driver last said that it lives, and
`stop_asked`, which others write: the driver that is asked to stop. A driver that finds another one's name in
`owner` writes nothing any more.

`reopen_study` finishes each half-written step from what is there.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import hashlib
import json
import logging
import sqlite3
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import ValidationError
from sqlalchemy import bindparam, text
from sqlalchemy.exc import SQLAlchemyError

from sweeps.collecting import without_collecting
from sweeps.errors import CannotContinue, CannotStart, TakenOver, UnknownSweep
from sweeps.result import TrialResult
from sweeps.space import Choices, Domain, Picks
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep_text
from sweepsvc import database
from sweepsvc.home import FORMAT
from sweepsvc.owner import HEARTBEAT_SECONDS, named
from sweepsvc.proposing import Asked, Proposer, Source, baseline_proposals
from sweepsvc.protocols import Importance, Proposal, SweepRecord, SweepState, SweepSummary, TrialRecord
from sweepsvc.records import (
    Entry,
    another_attempt,
    objective_value,
    proposal_entry,
    proposal_of,
    reopened,
    result_entry,
    result_of,
    trial_record,
    trial_state,
    with_run,
    with_setback,
)
from sweepsvc.urls import masked, sqlite_file

log = logging.getLogger(__name__)

_BASELINE = "baseline:"
_STOP_ASKED = "stop_asked"
_RUN = "run:"
"""Before the key of a trial whose run became known when the trial had ended."""


# --- opening ----------------------------------------------------------------------------------------


def open_study(sweep: Sweep, sweep_id: str, url: str, facts: Mapping[str, str]) -> OptunaStudy:
    """A new study named `sweep_id` in the database at `url`, which is made if it is an SQLite file.

    An SQLite file on a network file system is not safe: give a server's address there. Raises `CannotStart`
    if the id is taken or the database cannot be used.
    """
    storage = _create_database(url)
    try:
        study = _create_study(sweep, sweep_id, storage)
        for key, value in _attributes(sweep, facts).items():
            study.set_user_attr(key, value)
        return OptunaStudy(sweep, study, storage)
    except _STORAGE_ERRORS as error:
        raise _unusable(url, error) from error


def scratch_study(sweep: Sweep) -> OptunaStudy:
    """A study that is kept nowhere: what would be proposed, without a result to learn from."""
    storage = InMemoryStorage()
    study = _create_study(sweep, "scratch", storage)
    for key, value in _attributes(sweep, {}).items():
        study.set_user_attr(key, value)
    return OptunaStudy(sweep, study, storage)


def forget_unlaunched(sweep_id: str, url: str) -> bool:
    """Delete the study of a launch that was killed before its sweep began; False if the sweep did begin."""
    storage = _open_database(url, for_writing=True)
    if storage is None:
        return True
    try:
        named = [study for study in storage.get_all_studies() if study.study_name == sweep_id]
        if any("launched" in study.user_attrs for study in named):
            return False
        for study in named:
            storage.delete_study(study._study_id)
        return True
    finally:
        _release(storage)


@dataclass(frozen=True)
class Launched:
    """A sweep as it was launched, or last resumed. `added_trials` have come to its budget since."""

    sweep_id: str
    sweep: Sweep
    added_trials: int
    driving: Driving
    storage: str


@dataclass(frozen=True)
class Driving:
    """How a sweep stands by its driver's words: its state, its last driver, and when that last spoke."""

    sweep_id: str
    state: SweepState
    owner: str
    heartbeat: str


def load_launched(sweep_id: str | None, url: str) -> Launched:
    """The sweep with that id or unique prefix, the newest for None. Raises `UnknownSweep`, `CannotStart`."""
    with _one(sweep_id, url) as (_, study):
        attributes = study.user_attrs
        if "base_dir" not in attributes:
            raise CannotStart(
                f"the sweep {study.study_name} was made before sweeps could be resumed; launch it anew"
            )
        sweep = load_sweep_text(
            attributes["sweep_file"],
            attributes["source"],
            attributes["overrides"],
            attributes["base_dir"],
        )
        added = attributes.get("added_trials", 0)
        storage = attributes["facts"].get("storage", "")
        return Launched(study.study_name, sweep, added, _driving(study), storage)


def load_driving(sweep_id: str | None, url: str) -> Driving:
    """How the sweep with that id or unique prefix is driven, without its trials, which may be thousands."""
    with _one(sweep_id, url) as (_, study):
        return _driving(study)


def _driving(study: Any) -> Driving:
    attributes = study.user_attrs
    owner = attributes.get("owner", attributes["facts"].get("owner", ""))
    return Driving(study.study_name, attributes["state"], owner, attributes.get("heartbeat", ""))


def ask_to_stop(driving: Driving, url: str) -> None:
    """Leave word for the sweep's driver that it is to stop; it reads that with its next heartbeat."""
    storage = _open_database(url, for_writing=True)
    assert storage is not None
    try:
        study_id = storage.get_study_id_from_name(driving.sweep_id)
        storage.set_study_user_attr(study_id, _STOP_ASKED, driving.owner)
    except _STORAGE_ERRORS as error:
        raise _unusable(url, error) from error
    finally:
        _release(storage)


def reopen_study(
    sweep: Sweep, sweep_id: str, url: str, facts: Mapping[str, str], added_trials: int = 0
) -> OptunaStudy:
    """The study of a sweep whose driver is gone, with every half-written step finished (see `repairs`).

    `sweep` is the sweep as launched, or with changes that leave the meaning of its trials: they are kept.
    """
    storage = _open_database(url, for_writing=True)
    assert storage is not None
    try:
        study = optuna.load_study(study_name=sweep_id, storage=storage)
        kept = study.user_attrs
        same_budget = (kept["sweep_file"], kept.get("added_trials", 0)) == (sweep.text, added_trials)
        for key, value in {
            "sweep_file": sweep.text,
            "overrides": list(sweep.overrides),
            "file_digest": sweep.file_digest,
            "added_trials": added_trials,
            "ended": kept.get("ended", False) and same_budget,
            "owner": facts["owner"],
            "heartbeat": _now(),
            _STOP_ASKED: "",
            "state": "running",
        }.items():
            if kept.get(key) != value:
                study.set_user_attr(key, value)
        return OptunaStudy(sweep.with_more(added_trials), study, storage)
    except _STORAGE_ERRORS as error:
        raise _unusable(url, error) from error


_STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, SQLAlchemyError, sqlite3.Error, OSError)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """A ledger that cannot be written ends the sweep: going on would lose results."""
    try:
        yield
    except _STORAGE_ERRORS as error:
        reason = masked(str(error.__cause__ or error).strip().partition("\n")[0])
        raise CannotContinue(
            f"the study must be writable, got {reason}; free the disk, or end whatever holds the "
            "database, then resume the sweep"
        ) from error


def _create_database(url: str) -> BaseStorage:
    file = sqlite_file(url)
    try:
        if file is None:
            return database.make_on_a_server(lambda: _on_a_server(url))
        with database.one_makes(file):
            return _in_a_file(url)
    except Exception as error:  # SQLAlchemy's, a driver's, the file system's: each of them means the same
        raise _unusable(url, error) from error


def _open_database(url: str, for_writing: bool = False) -> BaseStorage | None:
    """A database that is there: it is not made, None if it is an SQLite file that does not exist."""
    file = sqlite_file(url)
    if file is not None and not file.exists():
        return None
    try:
        if file is None:
            return _on_a_server(url, skip_table_creation=True)
        return _in_a_file(url, for_writing, skip_table_creation=True)
    except Exception as error:
        raise _unusable(url, error) from error


def _on_a_server(url: str, **options: Any) -> RDBStorage:
    storage = RDBStorage(url, **options)
    database.try_before_use(storage.engine)
    return storage


def _in_a_file(url: str, for_writing: bool = True, **options: Any) -> RDBStorage:
    connect = database.sqlite_options(for_writing)
    return RDBStorage(url, engine_kwargs={"connect_args": connect}, **options)


def _release(storage: BaseStorage) -> None:
    """Close every connection: the last one out folds SQLite's log into its file. A later use opens anew."""
    storage.remove_session()
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()


def _unusable(url: str, error: Exception) -> CannotStart:
    reason = str(error.__cause__ or error).strip().partition("\n")[0]
    return CannotStart(
        f"the study database must be reachable and of this Optuna's schema, got {masked(url)}: "
        f"{masked(reason)}; check --home and SWEEPSVC_STUDY_URL"
    )


def _create_study(sweep: Sweep, sweep_id: str, storage: BaseStorage) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # each study and each result is a line otherwise
    logging.getLogger("optuna._gp").setLevel(logging.ERROR)  # it would like greenlet, and says so each time
    direction = "maximize" if sweep.objective.maximize else "minimize"
    try:
        return optuna.create_study(
            storage=storage, sampler=RandomSampler(), study_name=sweep_id, direction=direction
        )
    except optuna.exceptions.DuplicatedStudyError:
        raise CannotStart(
            f"a sweep needs an id of its own, the study database has {sweep_id}; give another --id"
        ) from None


def _attributes(sweep: Sweep, facts: Mapping[str, str]) -> dict[str, Any]:
    """The study's attributes, in the order of writing."""
    return {
        "format": FORMAT,
        "name": sweep.name,
        "source": str(Path(sweep.source).absolute()),
        "base_dir": str(sweep.base_dir),
        "sweep_file": sweep.text,
        "overrides": list(sweep.overrides),
        "file_digest": sweep.file_digest,
        "objective": {"metric": sweep.objective.metric, "maximize": sweep.objective.maximize},
        "facts": dict(facts),
        "owner": facts.get("owner", ""),
        "heartbeat": _now(),
        "state": "running",
        "launched": _now(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


# --- sampling ---------------------------------------------------------------------------------------


def _distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    """A choice is one of its labels: a sampler learns about "2*r", not about what it resolved to."""
    if isinstance(domain, Choices):
        return CategoricalDistribution(list(domain.labels()))
    if domain.integer:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log, step=int(domain.step or 1))
    return FloatDistribution(float(domain.low), float(domain.high), log=domain.log, step=domain.step)


def _startup_trials(sweep: Sweep) -> int:
    """Trials drawn at random before a model of the results takes over: a third of the budget, 4 to 10."""
    return max(4, min(10, (sweep.search.trials or 0) // 3))


def _is_as_bad_as_any(result: TrialResult) -> bool:
    """Whether a sampler should keep away from it: it was stopped early, or can never fit its device.

    Optuna ranks a pruned trial without a value last; of a failed one its samplers learn nothing.
    """
    return result.outcome == "pruned" or (
        result.failure is not None and result.failure.kind == "out_of_memory"
    )


def _sampler(sweep: Sweep, draw: int) -> BaseSampler:
    """Optuna's sampler of that name, for draw number `draw` alone, counted from 0.

    Its random numbers are a function of the seed and that count, so that a resumed sweep goes on drawing
    where it was cut, and does not draw its first trials again. A grid is listed by us and never drawn.
    """
    seed = sweep.search.seed % 2**32  # numpy's limit
    of_draw = int.from_bytes(hashlib.sha256(f"{seed}:{draw}".encode()).digest()[:4])
    startup = _startup_trials(sweep)
    # We say once which fields are drawn independently (`_sampler_notes`); Optuna would for each trial.
    quiet: dict[str, Any] = {"warn_independent_sampling": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match sweep.search.sampler:
            case "tpe":
                # Each trial has every field, so one joint model fits and groups would add nothing.
                return TPESampler(seed=of_draw, n_startup_trials=startup, multivariate=True)
            case "gp":
                return GPSampler(seed=of_draw, n_startup_trials=startup, **quiet)
            case "cmaes":
                return CmaEsSampler(seed=of_draw, **quiet)
            case "qmc":
                # One sequence for all draws, whose place is kept in the study; without scrambling the seed
                # has no effect. What the sequence does not cover is drawn at random.
                others = RandomSampler(seed=of_draw)
                return QMCSampler(seed=seed, scramble=True, independent_sampler=others, **quiet)
            case _:
                return RandomSampler(seed=of_draw)


def _sampler_notes(sweep: Sweep) -> list[str]:
    """What the sampler does otherwise than its name says."""
    search = sweep.search
    if search.sampler in ("tpe", "gp"):
        return [f"{search.sampler}: drawn at random until {_startup_trials(sweep)} trials have completed"]
    choices = [path for path, domain in search.space.items() if isinstance(domain, Choices)]
    if search.sampler == "cmaes" and choices:
        return [f"cmaes: it models numeric ranges only, {', '.join(choices)} drawn at random beside them"]
    return []


class _Draws(Source, Protocol):
    """A source whose draws are counted from 0, those of earlier drivers included.

    `drawn` is the study's trial that the last draw has made, None where none was made.
    """

    draws: int
    drawn: optuna.Trial | None


class _OptunaSource:
    """Draws by `study.ask`, which makes a trial of each and has the sampler look at those before it."""

    def __init__(
        self, sweep: Sweep, study: optuna.Study, distributions: Mapping[str, Any], draws: int
    ) -> None:
        self._sweep = sweep
        self._study = study
        self._distributions = dict(distributions)
        self.draws = draws
        self.drawn: optuna.Trial | None = None

    def draw(self) -> Picks:
        self._study.sampler = _sampler(self._sweep, self.draws)
        self.draws += 1
        self.drawn = self._study.ask(self._distributions)
        return dict(self.drawn.params)

    def reject(self, why: Mapping[str, int | str]) -> None:
        """Close the draw as failed: no sampler learns from that, and no record lists it."""
        assert self.drawn is not None
        for key, value in why.items():
            self.drawn.set_user_attr(key, value)
        self._study.tell(self.drawn, state=TrialState.FAIL)


class _RandomSource:
    """Draws what `_OptunaSource` would, and looks at no trial for it: the cost does not grow with them.

    A draw is no trial of the study until it is proposed, so one that is rejected leaves nothing behind.
    """

    def __init__(self, sweep: Sweep, distributions: Mapping[str, Any], draws: int) -> None:
        self._sweep = sweep
        self._distributions = dict(distributions)
        self.draws = draws
        self.drawn: optuna.Trial | None = None

    def draw(self) -> Picks:
        sampler = _sampler(self._sweep, self.draws)
        self.draws += 1
        return {path: _at_random(sampler, path, domain) for path, domain in self._distributions.items()}

    def reject(self, why: Mapping[str, int | str]) -> None:
        """Nothing: the next proposal says how many draws there were."""


def _at_random(sampler: BaseSampler, path: str, domain: Any) -> Any:
    if domain.single():  # takes no random number, as in Optuna
        return domain.choices[0] if isinstance(domain, CategoricalDistribution) else domain.low
    drawn = sampler.sample_independent(None, None, path, domain)  # it looks at neither study nor trial
    return domain.to_external_repr(domain.to_internal_repr(drawn))  # as the study gives it back


# --- the study --------------------------------------------------------------------------------------


class OptunaStudy:
    """The ledger over Optuna; see `protocols.Study`. Made by `open_study` and `reopen_study`."""

    @without_collecting()
    def __init__(self, sweep: Sweep, study: optuna.Study, storage: BaseStorage) -> None:
        kept = _Kept(_trials(storage, study.study_name), study.user_attrs)
        self._sweep = sweep
        self._study = study
        self._storage = storage
        self._engine = (
            database.without_transactions(storage.engine) if isinstance(storage, RDBStorage) else None
        )
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._owner = study.user_attrs["owner"]
        self._lost: TakenOver | None = None
        self._has_ended_beating = threading.Event()
        self._distributions = {path: _distribution(domain) for path, domain in sweep.search.space.items()}
        # A grid is listed and `random` learns nothing: neither needs Optuna to look at earlier trials.
        self._learns = sweep.search.sampler not in ("grid", "random")
        self._source: _Draws = (
            _OptunaSource(sweep, study, self._distributions, kept.draws)
            if self._learns
            else _RandomSource(sweep, self._distributions, kept.draws)
        )
        self._rows = kept.rows
        self._proposer = Proposer(sweep, self._source, kept.asked())
        self._baselines = kept.baselines
        self.has_ended = study.user_attrs.get("ended", False)
        self.repairs = self._repaired(kept)

    @property
    def ended_because(self) -> str:
        return self._proposer.ended_because

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made for the user, each with its reason."""
        return (*_sampler_notes(self._sweep), *self._proposer.notes)

    def baselines(self) -> Sequence[Proposal]:
        proposals = baseline_proposals(self._sweep)
        for proposal in proposals:
            if proposal.key not in self._baselines:
                self._write_baseline(proposal.key, {"proposal": proposal_entry(proposal)})
        return proposals

    def ask(self) -> Proposal | None:
        with self._writing():
            asked = self._proposer.next()
            if asked is None:
                self._note_the_end()
                return None
            said = {"drawn": asked.drawn, "draws": self._source.draws}
            entry = {"proposal": {**proposal_entry(asked.proposal), **said}}
            trial_id = self._keep_draw(entry) or self._add_row(asked.picks, entry)
        self._rows[asked.proposal.key] = _Row(trial_id, asked.picks, entry)
        return asked.proposal

    def _note_the_end(self) -> None:
        if not self.has_ended:
            self._study.set_user_attr("ended", True)
        self.has_ended = True

    def _keep_draw(self, entry: Entry) -> int | None:
        """The trial that the sampler's draw has made becomes the proposal's; its id, None without one."""
        drawn = self._source.drawn
        if drawn is None or not entry["proposal"]["drawn"]:
            return None
        drawn.set_user_attr("proposal", entry["proposal"])
        return int(drawn._trial_id)

    def _add_row(self, picks: Picks, entry: Entry) -> int:
        """A running trial that the study has not, whole in one write; its id."""
        trial = create_trial(
            state=TrialState.RUNNING,
            params=dict(picks),
            distributions=self._distributions,
            user_attrs=dict(entry),
        )
        return int(self._storage.create_new_trial(self._study_id, template_trial=trial))

    def started(self, proposal: Proposal) -> int:
        begun = another_attempt(self._entry(proposal.key))
        self._write(proposal.key, "started", begun)
        return int(begun["attempts"])

    def tracked(self, key: str, mlflow_run_id: str) -> None:
        entry = self._entry(key)
        known = with_run(entry, mlflow_run_id)
        if known == entry.get("started"):
            return
        if "result" not in entry:
            self._write(key, "started", known)
            return
        with self._writing():  # Optuna changes nothing of a trial that has ended
            self._study.set_user_attr(_RUN + key, mlflow_run_id)

    def setback(self, proposal: Proposal, why: str) -> None:
        self._write(proposal.key, "started", with_setback(self._entry(proposal.key), why))

    def tell(self, proposal: Proposal, result: TrialResult) -> None:
        if "result" in self._entry(proposal.key):
            raise ValueError(
                f"a trial is told once, got a second result for {proposal.key} ({result.outcome}); drop it"
            )
        self._write(proposal.key, "result", result_entry(result))
        if not proposal.is_baseline:
            self._tell_optuna(proposal.key, result)
            self._rows[proposal.key].forget()

    def _tell_optuna(self, key: str, result: TrialResult) -> None:
        value = objective_value(result, self._sweep.objective.metric)
        state = TrialState.PRUNED if _is_as_bad_as_any(result) else TrialState.FAIL
        if result.outcome == "completed" and value is None:
            log.warning(
                "trial %s completed without a finite %s: it has no rank, and no sampler learns from it",
                key,
                self._sweep.objective.metric,
            )
        if value is not None:
            state = TrialState.COMPLETE
        trial_id = self._rows[key].trial_id
        with self._writing():
            if self._learns:
                number = self._storage.get_trial_number_from_id(trial_id)
                self._study.tell(number, value, state=state)
            else:  # the same less what a sampler would be told, at a third of the cost
                self._storage.set_trial_state_values(trial_id, state, None if value is None else [value])

    def reopen(self, proposal: Proposal) -> None:
        if proposal.is_baseline:
            self._write_baseline(proposal.key, reopened(self._entry(proposal.key)))
            return
        self._entry(proposal.key)
        row = self._rows[proposal.key]
        with self._writing():
            again = dict(reopened(self._storage.get_trial(row.trial_id).user_attrs))
            self._rows[proposal.key] = _Row(self._add_row(row.picks, again), row.picks, again)

    def _entry(self, key: str) -> Entry:
        if key in self._baselines:
            return self._baselines[key]
        if key not in self._rows:
            raise ValueError(f"only what this study proposed can be started or told, got {key}; ask first")
        return self._rows[key].entry

    def _write(self, key: str, name: str, value: Any) -> None:
        if key in self._baselines:
            self._write_baseline(key, {**self._baselines[key], name: value})
            return
        row = self._rows[key]
        if not self._upserted(row.trial_id, name, value):
            with self._writing():
                self._storage.set_trial_user_attr(row.trial_id, name, value)
        row.entry[name] = value

    def _upserted(self, trial_id: int, name: str, value: Any) -> bool:
        """Write what Optuna's `set_trial_user_attr` would, if the sweep is this driver's, in one statement.

        Optuna takes four, and we one more for the owner. False where nothing was written.
        """
        dialect = "" if self._engine is None else self._engine.dialect.name
        if dialect not in ("sqlite", "postgresql"):
            return False
        # SQLite lets one write at a time; Postgres is told that nobody may take the sweep over meanwhile.
        hold = " FOR SHARE" if dialect == "postgresql" else ""
        with _writing():
            written = self._change(
                "INSERT INTO trial_user_attributes (trial_id, key, value_json) SELECT :trial, :name, :value "
                "WHERE EXISTS (SELECT 1 FROM study_user_attributes "
                f"WHERE study_id = :study AND key = 'owner' AND value_json = :owner{hold}) "
                "ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json",
                trial=trial_id,
                name=name,
                value=json.dumps(value),
                owner=json.dumps(self._owner),
            )
        return written > 0

    def _write_baseline(self, key: str, entry: Mapping[str, Any]) -> None:
        """All of a baseline is one attribute, so it is one write."""
        with self._writing():
            self._study.set_user_attr(_BASELINE + key, entry)
        self._baselines[key] = dict(entry)

    def _repaired(self, kept: _Kept) -> list[str]:
        """Finish what a killed driver left half-written; what was done, for people."""
        for number in kept.nobodys:
            self._study.tell(number, state=TrialState.FAIL)
        for key in kept.half_told:
            entry = self._rows[key].entry
            self._tell_optuna(key, result_of(entry))
        repairs = [
            f"trial {key}: its result was written and not yet told to the sampler" for key in kept.half_told
        ]
        for row in self._rows.values():
            if "result" in row.entry:
                row.forget()
        if kept.nobodys:
            repairs.append(f"{len(kept.nobodys)} rows of the study that stand for no trial were closed")
        return repairs

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Nothing is written to a sweep that another driver has.

        A driver that was cut off may come back at any moment, so that is looked at before it writes.
        """
        with _writing():
            self._check_owner(self._attributes("owner").get("owner", self._owner))
            yield

    def _check_owner(self, owner: str) -> None:
        if self._lost is None and owner != self._owner:
            self._lost = TakenOver(
                f"a sweep has one driver, and {named(owner)} has taken this one over; what it does is in "
                "`status`"
            )
        if self._lost is not None:
            raise self._lost

    def heartbeat(self) -> bool:
        if self._lost is not None:
            raise self._lost
        try:
            found = self._attributes("owner", _STOP_ASKED)
            if found.get("owner", self._owner) == self._owner:
                self._say_alive()
        except _STORAGE_ERRORS:  # the next word that matters will say so
            return False
        self._check_owner(found.get("owner", self._owner))
        return found.get(_STOP_ASKED) == self._owner

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Say that the driver lives while the block runs, though it may wait for minutes for something."""
        thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._has_ended_beating.set()
            thread.join()

    def _beat(self) -> None:
        while not self._has_ended_beating.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(*_STORAGE_ERRORS):
                if self._attributes("owner").get("owner") == self._owner:
                    self._say_alive()

    def _attributes(self, *keys: str) -> Mapping[str, str]:
        """Those attributes of the study, and no other: a sweep may have thousands."""
        if self._engine is None:  # in memory, nobody else can see or ask
            return {}
        wanted = text(
            "SELECT key, value_json FROM study_user_attributes WHERE study_id = :study AND key IN :keys"
        ).bindparams(bindparam("keys", expanding=True))
        with self._engine.connect() as connection:
            rows = connection.execute(wanted, {"study": self._study_id, "keys": keys})
            return {key: json.loads(value) for key, value in rows}

    def _say_alive(self) -> None:
        self._change(
            "UPDATE study_user_attributes SET value_json = :now "
            "WHERE study_id = :study AND key = 'heartbeat'",
            now=json.dumps(_now()),
        )

    def _change(self, words: str, **values: Any) -> int:
        """How many rows the statement has changed. In a connection of its own: any thread may."""
        if self._engine is None:
            return 0
        with self._engine.connect() as connection:
            return int(connection.execute(text(words), {"study": self._study_id, **values}).rowcount)

    def discard(self) -> None:
        """Take the study back: the sweep could not start, so there is nothing to see of it."""
        self._has_ended_beating.set()
        self._storage.delete_study(self._study_id)
        self._release()

    def close(self, state: SweepState) -> None:
        with self._writing():
            self._has_ended_beating.set()
            self._study.set_user_attr("state", state)
            self._release()

    def _release(self) -> None:
        _release(self._storage)
        if self._engine is not None:
            self._engine.dispose()

    @without_collecting()
    def read(self) -> SweepRecord:
        return _sweep_record(
            self._study.study_name, self._study.user_attrs, _trials(self._storage, self._study.study_name)
        )


@dataclass
class _Row:
    """The Optuna trial in force for one of ours: its id among Optuna's, its picks and attributes."""

    trial_id: int
    picks: Picks
    entry: dict[str, Any]

    def forget(self) -> None:
        """Keep of a trial that was told no more than that, and its run: a sweep has thousands."""
        outcome = {"outcome": self.entry["result"]["outcome"]}
        self.entry = {name: self.entry[name] for name in ("started",) if name in self.entry}
        self.entry["result"] = outcome


class _Kept:
    """What earlier drivers left in a study; nothing, for a new one."""

    def __init__(self, trials: Sequence[FrozenTrial], attributes: Mapping[str, Any]) -> None:
        self.rows: dict[str, _Row] = {}
        self.baselines: dict[str, dict[str, Any]] = {
            key.removeprefix(_BASELINE): dict(value)
            for key, value in attributes.items()
            if key.startswith(_BASELINE)
        }
        running = {trial.number for trial in trials if not trial.state.is_finished()}
        rejected = sum(
            "duplicate_of" in trial.user_attrs or "invalid" in trial.user_attrs for trial in trials
        )
        in_force: dict[str, int] = {}
        for trial in trials:
            if "proposal" in trial.user_attrs:
                key = trial.user_attrs["proposal"]["key"]
                self.rows[key] = _Row(trial._trial_id, trial.params, dict(trial.user_attrs))
                in_force[key] = trial.number
        self.nobodys = sorted(running - set(in_force.values()))
        self.half_told = [
            key for key, row in self.rows.items() if in_force[key] in running and "result" in row.entry
        ]
        # A draw without either attribute was cut before it came to anything: it is drawn again. A rejected
        # one of `random` left no row, and the next proposal says how many draws there were by then.
        proposals = [row.entry["proposal"] for row in self.rows.values()]
        counted = rejected + sum(proposal["drawn"] for proposal in proposals)
        self.draws = max([counted, *(proposal.get("draws", 0) for proposal in proposals)])

    def asked(self) -> list[Asked]:
        """Every proposal so far, in the order of the numbers."""
        asked = [Asked(proposal_of(row.entry["proposal"]), row.picks) for row in self.rows.values()]
        return sorted(asked, key=lambda one: one.proposal.number or 0)


# --- reading ----------------------------------------------------------------------------------------


@without_collecting()
def load_record(sweep_id: str | None, url: str) -> SweepRecord:
    """Everything known of the sweep with that id or unique prefix; of the newest one for None.

    Writes nothing, and does not make a database that is not there. Raises `UnknownSweep`.
    """
    with _one(sweep_id, url) as (storage, study):
        return _sweep_record(study.study_name, study.user_attrs, _trials(storage, study.study_name))


class StudyReader:
    """One sweep, read again and again while another process drives it; see `load_record`.

    Only what can have changed is read anew, trials that had not ended and later ones, and a record is made
    anew only of what did change. Nothing is held open between two readings, so a server may be started anew.
    """

    def __init__(self, sweep_id: str | None, url: str) -> None:
        self._url = url
        self._known: dict[str, tuple[Entry, TrialRecord]] = {}
        with _one(sweep_id, url) as (storage, study):
            self.sweep_id: str = study.study_name
            self._study_id = study._study_id
            self._storage = storage
            self._cache = optuna.storages.get_storage(storage)

    @without_collecting()
    def read(self) -> SweepRecord:
        """`CannotStart` if the study does not answer just now, `UnknownSweep` if the sweep was deleted."""
        file = sqlite_file(self._url)
        if file is not None and not file.exists():  # SQLite would make it
            raise _unusable(self._url, FileNotFoundError("there is no such file"))
        try:
            attributes = self._cache.get_study_user_attrs(self._study_id)
            trials = self._cache.get_all_trials(self._study_id, deepcopy=False)
        except KeyError:
            raise UnknownSweep(f"the sweep {self.sweep_id} was deleted from {masked(self._url)}") from None
        except _STORAGE_ERRORS as error:
            raise _unusable(self._url, error) from error
        finally:
            _release(self._storage)
        return _sweep_record(self.sweep_id, attributes, trials, self._record)

    def _record(self, entry: Entry, metric: str) -> TrialRecord:
        key = entry["proposal"]["key"]
        before = self._known.get(key)
        if before is not None and (entry is before[0] or entry == before[0]):
            return before[1]
        made = trial_record(entry, metric)
        self._known[key] = (entry, made)
        return made


@contextlib.contextmanager
def _one(sweep_id: str | None, url: str) -> Iterator[tuple[BaseStorage, Any]]:
    """The sweep with that id or unique prefix, the newest for None."""
    with _reading(url) as (storage, studies):
        if storage is None or not studies:
            raise UnknownSweep(
                f"a sweep must have been launched, got none in {masked(url)}; launch one, or give --home"
            )
        study = _chosen(sweep_id, studies)
        form = study.user_attrs.get("format", 0)
        if form > FORMAT:
            raise CannotStart(
                f"a sweep must be of format {FORMAT} or lower, got {form} in {study.study_name}: a later "
                "version of sweepsvc made it; use that version, or a newer one"
            )
        yield storage, study


LEAST_FOR_IMPORTANCE = 4
"""Completed trials, and twice as many as there are fields: of fewer, a forest of trees says what it likes."""


def load_importance(sweep_id: str, url: str) -> Importance:
    """How much each searched field matters to the objective, by Optuna's fANOVA; the same at every call."""
    with _one(sweep_id, url) as (storage, named):
        study = optuna.load_study(study_name=named.study_name, storage=storage, sampler=RandomSampler())
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        varied = sorted(
            path for path in _shared_params(trials) if len({trial.params[path] for trial in trials}) > 1
        )
        why_not = _no_importance(trials, varied)
        if why_not:
            return Importance({}, len(trials), why_not)
        forest = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=forest, params=varied)
        return Importance({path: float(share) for path, share in shares.items()}, len(trials))


def _shared_params(trials: Sequence[FrozenTrial]) -> set[str]:
    return set.intersection(*(set(trial.params) for trial in trials)) if trials else set()


def _no_importance(trials: Sequence[FrozenTrial], varied: Sequence[str]) -> str:
    least = max(LEAST_FOR_IMPORTANCE, 2 * len(varied))
    if len(trials) < least:
        return f"{least} completed trials are needed at least, there are {len(trials)}"
    if not varied:
        return "no searched field had more than one value"
    if len({trial.value for trial in trials}) == 1:
        return "every completed trial has the same value of the objective"
    return ""


def list_sweeps(url: str) -> list[SweepSummary]:
    """Every sweep in the database, the newest first; none if there is no database."""
    with _reading(url) as (storage, studies):
        return [_summary(storage, study) for study in studies]


@contextlib.contextmanager
def _reading(url: str) -> Iterator[tuple[BaseStorage | None, list[Any]]]:
    """The database, and its studies that are sweeps of ours, the newest first; nothing if there is none."""
    storage = _open_database(url)
    if storage is None:
        yield None, []
        return
    try:
        studies = [study for study in storage.get_all_studies() if "launched" in study.user_attrs]
        studies.sort(key=lambda study: study.user_attrs["launched"], reverse=True)
        yield storage, studies
    except _STORAGE_ERRORS as error:
        raise _unusable(url, error) from error
    finally:
        _release(storage)


def _chosen(sweep_id: str | None, studies: Sequence[Any]) -> Any:
    if sweep_id is None:
        return studies[0]
    by_id = {study.study_name: study for study in studies}
    fitting = [sweep_id] if sweep_id in by_id else [name for name in by_id if name.startswith(sweep_id)]
    if len(fitting) == 1:
        return by_id[fitting[0]]
    law = f"a sweep's id or the start of one alone is needed, got {sweep_id!r}"
    if fitting:
        raise UnknownSweep(f"{law}, which starts {_names(fitting)}; write more of it")
    near = difflib.get_close_matches(sweep_id, by_id, n=3, cutoff=0.4)
    raise UnknownSweep(
        f"{law}; did you mean {_names(near)}?" if near else f"{law}; there is {_names(list(by_id))}"
    )


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _trials(storage: BaseStorage, sweep_id: str) -> list[FrozenTrial]:
    study_id = storage.get_study_id_from_name(sweep_id)
    trials: list[FrozenTrial] = storage.get_all_trials(study_id, deepcopy=False)
    return trials


def _summary(storage: BaseStorage, study: Any) -> SweepSummary:
    entries = _entries(_trials(storage, study.study_name))
    return SweepSummary(
        sweep_id=study.study_name,
        name=study.user_attrs["name"],
        state=study.user_attrs["state"],
        launched=study.user_attrs["launched"],
        counts=Counter(trial_state(entry) for entry in entries),
    )


def _sweep_record(
    sweep_id: str,
    attributes: Mapping[str, Any],
    trials: Iterable[FrozenTrial],
    make: Callable[[Entry, str], TrialRecord] = trial_record,
) -> SweepRecord:
    objective = attributes["objective"]
    metric = objective["metric"]
    baselines = {key: value for key, value in attributes.items() if key.startswith(_BASELINE)}
    runs = {key.removeprefix(_RUN): run for key, run in attributes.items() if key.startswith(_RUN)}

    def record(entry: Entry) -> TrialRecord:
        made = make(entry, metric)
        late = runs.get(made.proposal.key)
        return made if late is None else replace(made, mlflow_run_id=late)

    try:
        return SweepRecord(
            sweep_id=sweep_id,
            state=attributes["state"],
            objective_metric=metric,
            maximize=objective["maximize"],
            baselines=[record(baselines[key]) for key in sorted(baselines, key=_by_length)],
            trials=[record(entry) for entry in _entries(trials)],
            facts=attributes["facts"],
            ended=attributes.get("ended", False),
            owner=attributes.get("owner", attributes["facts"].get("owner", "")),
            heartbeat=attributes.get("heartbeat", ""),
        )
    except ValidationError as error:
        made_by = attributes["facts"].get("version.sweepsvc", "another version")
        raise CannotStart(
            f"a trial of {sweep_id} has fields that this version does not know, sweepsvc {made_by} made it; "
            f"use that version ({error.error_count()} fields, the first {error.errors()[0]['loc']})"
        ) from error


def _by_length(key: str) -> tuple[int, str]:
    """`baseline-2` before `baseline-10`."""
    return len(key), key


def _entries(trials: Iterable[FrozenTrial]) -> list[Entry]:
    """Those that are trials of the sweep, the latest row of each, in the order of their proposal."""
    latest = {
        trial.user_attrs["proposal"]["number"]: trial.user_attrs
        for trial in sorted(trials, key=lambda trial: trial.number)
        if "proposal" in trial.user_attrs
    }
    return [latest[number] for number in sorted(latest)]
