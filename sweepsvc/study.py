"""The ledger of a sweep: the one file that imports optuna.

What is where. A sweep is an Optuna study named by its id; the sweep file, its overrides and digest, the
objective and the facts are attributes of the study, and so is each baseline. A trial is an Optuna trial
whose attributes are `proposal` (number, spec, params, rules), `started` (attempts, MLflow run) and `result`.
Its state is read from these, Optuna's own state only informs the sampler. An Optuna trial without a
`proposal` is no trial of the sweep.

What a `kill -9` leaves. Each attribute appears whole, and only the driver writes, in this order:

    open   the study, then its attributes, `launched` last      without `launched`: no sweep
    ask    the sampler's draw, then `proposal`                  without `proposal`: nobody's, to be failed
           (a proposal that no sampler drew is one write)
    start  `started`                                            without: waiting, though it may run
    tell   `result`, then Optuna's state and value              `result` stands, the rest is repeated from it

So a later driver can finish each half-written step from what is there.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import logging
import sqlite3
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeps.errors import CannotStart, UnknownSweep
from sweeps.result import TrialResult
from sweeps.space import Choices, Domain, Picks
from sweeps.sweep import Sweep
from sweepsvc.proposing import Asked, Proposer, baseline_proposals
from sweepsvc.protocols import Proposal, SweepRecord, SweepState, SweepSummary
from sweepsvc.records import (
    Entry,
    objective_value,
    proposal_entry,
    result_entry,
    started_entry,
    trial_record,
    trial_state,
)
from sweepsvc.urls import masked, sqlite_file

log = logging.getLogger(__name__)

BUSY_SECONDS = 60
"""How long one writer waits for another on the same SQLite file."""

_BASELINE = "baseline:"


# --- opening ----------------------------------------------------------------------------------------


def open_study(sweep: Sweep, sweep_id: str, url: str, facts: Mapping[str, str]) -> OptunaStudy:
    """A new study named `sweep_id` in the database at `url`, which is made if it is an SQLite file.

    An SQLite file on a network file system is not safe: give a server's address there. Raises `CannotStart`
    if the id is taken or the database cannot be used.
    """
    storage = _create_database(url)
    study = _create_study(sweep, sweep_id, storage)
    for key, value in _attributes(sweep, facts).items():
        study.set_user_attr(key, value)
    return OptunaStudy(sweep, study, storage)


def scratch_study(sweep: Sweep) -> OptunaStudy:
    """A study that is kept nowhere: what would be proposed, without a result to learn from."""
    storage = InMemoryStorage()
    study = _create_study(sweep, "scratch", storage)
    for key, value in _attributes(sweep, {}).items():
        study.set_user_attr(key, value)
    return OptunaStudy(sweep, study, storage)


class _QuickConnection(sqlite3.Connection):
    """Appends to a write-ahead log: a write costs 1 ms, not 15, and readers never wait for the driver.

    What is committed survives the death of the process. A power cut may take the last moments with it, and
    leaves the database whole.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


def _create_database(url: str) -> BaseStorage:
    file = sqlite_file(url)
    try:
        if file is None:
            return RDBStorage(url)
        file.parent.mkdir(parents=True, exist_ok=True)
        options = {"timeout": BUSY_SECONDS, "factory": _QuickConnection}
        return RDBStorage(url, engine_kwargs={"connect_args": options})
    except Exception as error:  # SQLAlchemy's, a driver's, the file system's: each of them means the same
        raise _unusable(url, error) from error


def _open_database(url: str) -> BaseStorage | None:
    """The database for reading: it is not made, None if it is an SQLite file that is not there."""
    file = sqlite_file(url)
    if file is not None and not file.exists():
        return None
    options = {"connect_args": {"timeout": BUSY_SECONDS}} if file is not None else {}
    try:
        return RDBStorage(url, engine_kwargs=options, skip_table_creation=True)
    except Exception as error:
        raise _unusable(url, error) from error


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
            storage=storage, sampler=_sampler(sweep), study_name=sweep_id, direction=direction
        )
    except optuna.exceptions.DuplicatedStudyError:
        raise CannotStart(
            f"a sweep needs an id of its own, the study database has {sweep_id}; give another --id"
        ) from None


def _attributes(sweep: Sweep, facts: Mapping[str, str]) -> dict[str, Any]:
    """The study's attributes, in the order of writing."""
    return {
        "name": sweep.name,
        "source": str(sweep.source),
        "sweep_file": sweep.text,
        "overrides": list(sweep.overrides),
        "file_digest": sweep.file_digest,
        "objective": {"metric": sweep.objective.metric, "maximize": sweep.objective.maximize},
        "facts": dict(facts),
        "state": "running",
        "launched": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
    }


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


def _sampler(sweep: Sweep) -> BaseSampler:
    """Optuna's sampler of that name. A grid is listed by us, its sampler is never asked."""
    seed = sweep.search.seed % 2**32  # numpy's limit
    startup = _startup_trials(sweep)
    # We say once which fields are drawn independently (`_sampler_notes`); Optuna would for each trial.
    quiet: dict[str, Any] = {"seed": seed, "warn_independent_sampling": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match sweep.search.sampler:
            case "tpe":
                # Each trial has every field, so one joint model fits and groups would add nothing.
                return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True)
            case "gp":
                return GPSampler(n_startup_trials=startup, **quiet)
            case "cmaes":
                return CmaEsSampler(**quiet)
            case "qmc":
                return QMCSampler(scramble=True, **quiet)  # without scrambling the seed has no effect
            case _:
                return RandomSampler(seed=seed)


def _sampler_notes(sweep: Sweep) -> list[str]:
    """What the sampler does otherwise than its name says."""
    search = sweep.search
    if search.sampler in ("tpe", "gp"):
        return [f"{search.sampler}: drawn at random until {_startup_trials(sweep)} trials have completed"]
    choices = [path for path, domain in search.space.items() if isinstance(domain, Choices)]
    if search.sampler == "cmaes" and choices:
        return [f"cmaes: it models numeric ranges only, {', '.join(choices)} drawn at random beside them"]
    return []


class _OptunaSource:
    """Draws by `study.ask`."""

    def __init__(self, study: optuna.Study, distributions: Mapping[str, Any]) -> None:
        self._study = study
        self._distributions = dict(distributions)
        self.drawn: optuna.Trial | None = None

    def draw(self) -> Picks:
        self.drawn = self._study.ask(self._distributions)
        return dict(self.drawn.params)

    def reject(self, why: Mapping[str, int | str]) -> None:
        """Close the draw as failed: no sampler learns from that, and no record lists it."""
        assert self.drawn is not None
        for key, value in why.items():
            self.drawn.set_user_attr(key, value)
        self._study.tell(self.drawn, state=TrialState.FAIL)


# --- the study --------------------------------------------------------------------------------------


class OptunaStudy:
    """The ledger over Optuna; see `protocols.Study`. Made by `open_study`."""

    def __init__(self, sweep: Sweep, study: optuna.Study, storage: BaseStorage) -> None:
        self._sweep = sweep
        self._study = study
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._distributions = {path: _distribution(domain) for path, domain in sweep.search.space.items()}
        self._source = _OptunaSource(study, self._distributions)
        self._proposer = Proposer(sweep, self._source)
        self._optuna_numbers: dict[str, int] = {}
        self._baselines: dict[str, Entry] = {}
        self._attempts: Counter[str] = Counter()
        self._told: set[str] = set()

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
                self._write_baseline(proposal.key, "proposal", proposal_entry(proposal))
        return proposals

    def ask(self) -> Proposal | None:
        asked = self._proposer.next()
        if asked is None:
            return None
        self._optuna_numbers[asked.proposal.key] = (
            self._keep_draw(asked.proposal) if asked.drawn else self._add_trial(asked)
        )
        return asked.proposal

    def _keep_draw(self, proposal: Proposal) -> int:
        """The sampler's draw becomes the trial; its number among Optuna's."""
        drawn = self._source.drawn
        assert drawn is not None
        drawn.set_user_attr("proposal", proposal_entry(proposal))
        return int(drawn.number)

    def _add_trial(self, asked: Asked) -> int:
        """A running trial that no sampler drew, whole in one write; its number among Optuna's."""
        trial = create_trial(
            state=TrialState.RUNNING,
            params=dict(asked.picks),
            distributions=self._distributions,
            user_attrs={"proposal": proposal_entry(asked.proposal)},
        )
        trial_id = self._storage.create_new_trial(self._study_id, template_trial=trial)
        return int(self._storage.get_trial(trial_id).number)

    def started(self, proposal: Proposal, mlflow_run_id: str | None) -> None:
        self._refuse_unknown(proposal)
        self._attempts[proposal.key] += 1
        self._write(proposal, "started", started_entry(self._attempts[proposal.key], mlflow_run_id))

    def tell(self, proposal: Proposal, result: TrialResult) -> None:
        self._refuse_unknown(proposal)
        if proposal.key in self._told:
            raise ValueError(
                f"a trial is told once, got a second result for {proposal.key} ({result.outcome}); drop it"
            )
        self._write(proposal, "result", result_entry(result))
        self._told.add(proposal.key)
        if not proposal.is_baseline:
            self._tell_optuna(proposal, result)

    def _tell_optuna(self, proposal: Proposal, result: TrialResult) -> None:
        value = objective_value(result, self._sweep.objective.metric)
        state = TrialState.PRUNED if result.outcome == "pruned" else TrialState.FAIL
        if result.outcome == "completed" and value is None:
            log.warning(
                "trial %s completed without a finite %s: it has no rank, and no sampler learns from it",
                proposal.key,
                self._sweep.objective.metric,
            )
        if value is not None:
            state = TrialState.COMPLETE
        self._study.tell(self._optuna_numbers[proposal.key], value, state=state)

    def _refuse_unknown(self, proposal: Proposal) -> None:
        if proposal.key not in self._optuna_numbers and proposal.key not in self._baselines:
            raise ValueError(
                f"only what this study proposed can be started or told, got {proposal.key}; ask first"
            )

    def _write(self, proposal: Proposal, name: str, entry: Entry) -> None:
        if proposal.is_baseline:
            self._write_baseline(proposal.key, name, entry)
            return
        number = self._optuna_numbers[proposal.key]
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        self._storage.set_trial_user_attr(trial_id, name, entry)

    def _write_baseline(self, key: str, name: str, entry: Entry) -> None:
        """All of a baseline is one attribute, so it is one write."""
        self._baselines[key] = {**self._baselines.get(key, {}), name: entry}
        self._study.set_user_attr(_BASELINE + key, self._baselines[key])

    def discard(self) -> None:
        """Take the study back: the sweep could not start, so there is nothing to see of it."""
        self._storage.delete_study(self._study_id)
        self._storage.remove_session()

    def close(self, state: SweepState) -> None:
        self._study.set_user_attr("state", state)
        _release(self._storage)

    def read(self) -> SweepRecord:
        return _sweep_record(
            self._study.study_name, self._study.user_attrs, self._study.get_trials(deepcopy=False)
        )


# --- reading ----------------------------------------------------------------------------------------


def load_record(sweep_id: str | None, url: str) -> SweepRecord:
    """Everything known of the sweep with that id or unique prefix; of the newest one for None.

    Writes nothing, and does not make a database that is not there. Raises `UnknownSweep`.
    """
    with _reading(url) as (storage, studies):
        if storage is None or not studies:
            raise UnknownSweep(
                f"a sweep must have been launched, got none in {masked(url)}; launch one, or give --home"
            )
        study = _chosen(sweep_id, studies)
        return _sweep_record(study.study_name, study.user_attrs, _trials(storage, study.study_name))


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


def _sweep_record(sweep_id: str, attributes: Mapping[str, Any], trials: Iterable[FrozenTrial]) -> SweepRecord:
    objective = attributes["objective"]
    metric = objective["metric"]
    baselines = {key: value for key, value in attributes.items() if key.startswith(_BASELINE)}
    return SweepRecord(
        sweep_id=sweep_id,
        state=attributes["state"],
        objective_metric=metric,
        maximize=objective["maximize"],
        baselines=[trial_record(baselines[key], metric) for key in sorted(baselines, key=_by_length)],
        trials=[trial_record(entry, metric) for entry in _entries(trials)],
        facts=attributes["facts"],
    )


def _by_length(key: str) -> tuple[int, str]:
    """`baseline-2` before `baseline-10`."""
    return len(key), key


def _entries(trials: Iterable[FrozenTrial]) -> list[Entry]:
    """Those that are trials of the sweep, in the order of their proposal."""
    proposed = [trial.user_attrs for trial in trials if "proposal" in trial.user_attrs]
    return sorted(proposed, key=lambda entry: entry["proposal"]["number"])
