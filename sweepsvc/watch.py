"""A sweep that another process drives, followed from the study and the tracker alone.

The study is read again and again; what differs from the reading before becomes the events of a `View`. The
numbers of running trials come from the tracker, asked in a thread of its own, since it may hang.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from rich.console import Console

from sweeps.errors import CannotStart
from sweeps.result import Progress
from sweeps.signals import handled
from sweepsvc.home import Home
from sweepsvc.nextsteps import next_steps
from sweepsvc.owner import as_it_stands, named
from sweepsvc.protocols import Point, Reader, SweepRecord, TrialRecord
from sweepsvc.recorder import MlflowReader
from sweepsvc.study import StudyReader
from sweepsvc.urls import masked
from sweepsvc.view import LineView, LiveView, View, best_trial, results, terminal, title

POLL_SECONDS = 2.0

SETTLING_POLLS = 5
"""For so long is waited, when a study answers again, until its driver has said that it lives."""

SHARE = 0.1
"""Of the time, at most, is spent on reading: where a reading takes long, the next one comes later."""

LEAVING_SECONDS = 5.0
"""How long somebody who leaves waits for the tracker's last answer, at most."""

TABLE_ROWS = 20
"""As many trials that ended before are shown in a table; more of them are counted in a line."""


class ReadStudy(Protocol):
    """Gives a sweep as it stands now; see `study.StudyReader`."""

    def read(self) -> SweepRecord: ...


def watch(prefix: str | None, home: Home) -> SweepRecord | None:
    """Show a sweep as `launch` does until nobody drives it; how it stands then, None if the person left.

    Raises `UnknownSweep`, and `CannotStart` if the study cannot be read to begin with.
    """
    console = terminal()
    home.check()
    study = StudyReader(prefix, home.study_url)
    record = as_it_stands(read_again(study))
    try:
        # Ctrl-C too: a shell has what it starts in the background ignore it, and so would Python.
        with handled(signal.default_int_handler, signal.SIGINT, signal.SIGTERM):
            if record.state == "running":
                record = _watched(study, record, home, console)
            _say(console, results(record, console))
            _say(console, next_steps(home, record))
    except KeyboardInterrupt:
        _say(console, f"the watching has ended, the sweep {study.sweep_id} has not: it goes on where it runs")
        return None
    return record


def _watched(study: ReadStudy, record: SweepRecord, home: Home, console: Console) -> SweepRecord:
    _say(console, f"sweep {record.sweep_id}, driven by {named(record.owner)}; Ctrl-C ends the watching alone")
    ended = [trial for trial in (*record.baselines, *record.trials) if trial.result is not None]
    if ended:
        _say(console, _before(record, ended, console))
    with _view(console, record, ended) as view, Newest(MlflowReader(home.tracking_uri)) as newest:
        return follow(study, newest, view, record)


def _before(record: SweepRecord, ended: Sequence[TrialRecord], console: Console) -> object:
    """What ended before: a table, or one line where that would be long."""
    if len(ended) <= TABLE_ROWS:
        keys = {trial.proposal.key for trial in ended}
        baselines = [trial for trial in record.baselines if trial.proposal.key in keys]
        trials = [trial for trial in record.trials if trial.proposal.key in keys]
        return results(replace(record, baselines=baselines, trials=trials), console)
    counts = Counter(trial.state for trial in ended)
    line = f"{len(ended):,} ended before: " + ", ".join(
        f"{count:,} {state}" for state, count in counts.items()
    )
    best = best_trial(record)
    if best is None:
        return line
    return f"{line}; best so far {record.objective_metric} {best.value:.4g} ({title(best.proposal)})"


def _say(console: Console, what: object) -> None:
    console.print(what, markup=False, highlight=False, soft_wrap=isinstance(what, str))


@contextlib.contextmanager
def _view(console: Console, record: SweepRecord, before: Sequence[TrialRecord]) -> Iterator[View]:
    if not console.is_terminal:
        yield LineView(console)
        return
    with LiveView(console, record.objective_metric, record.maximize, before) as view:
        yield view


# --- following --------------------------------------------------------------------------------------


def follow(
    study: ReadStudy,
    newest: Newest,
    view: View,
    record: SweepRecord,
    poll_seconds: float = POLL_SECONDS,
) -> SweepRecord:
    """Tell `view` what happens in a sweep from `record` on, until nobody drives it; how it stands then.

    A study that does not answer is asked again, for as long as it takes. Raises `UnknownSweep` if the sweep
    is deleted.
    """
    changes = Changes(view, record)
    patient = Patient(study, view.note, SETTLING_POLLS * poll_seconds)
    while patient.is_away or as_it_stands(record).state == "running":
        newest.want(changes.running())
        time.sleep(max(poll_seconds, patient.seconds / SHARE))
        for note in newest.notes():
            view.note(note)
        changes.report(newest.take())
        record = patient.read() or record
        changes.tell(record)
    return as_it_stands(record)


def read_again(study: ReadStudy) -> SweepRecord:
    """The sweep as it stands now: of a driver that ended since, the last words are read, too."""
    record = study.read()
    return record if as_it_stands(record).state == record.state else study.read()


class Patient:
    """Reads a study that may be away for a while, and says once that it is, once that it is back.

    `seconds` is what the last reading took. A driver that could not write either has `settling_seconds` to
    say that it lives.
    """

    def __init__(self, study: ReadStudy, say: Callable[[str], None], settling_seconds: float) -> None:
        self._study = study
        self._say = say
        self._settling_seconds = settling_seconds
        self.is_away = False
        self.seconds = 0.0

    def read(self) -> SweepRecord | None:
        """None while the study does not answer. Raises `UnknownSweep` if the sweep is gone from it."""
        began = time.monotonic()
        try:
            record = read_again(self._study)
        except CannotStart as error:
            if not self.is_away:
                self._say(f"the study does not answer, it is asked again until it does: {error}")
            self.is_away = True
            return None
        self.seconds = time.monotonic() - began
        if not self.is_away:
            return record
        self._say("the study answers again")
        self.is_away = False
        time.sleep(self._settling_seconds)
        return self.read()


@dataclass
class _Told:
    """What a view has heard of one trial.

    `numbers` are the newest that were reported, in attempt number `reported`; `is_scored`, that this attempt
    has come to its evaluation.
    """

    record: TrialRecord | None = None
    attempts: int = 0
    setbacks: int = 0
    is_on: bool = False
    has_ended: bool = False
    is_scored: bool = False
    reported: int = 0
    numbers: Mapping[str, Point] = field(default_factory=dict)


class Changes:
    """Tells a view what has changed from one record of a sweep to the next, and nothing twice.

    Of what was before `record` it tells nothing but that the running trials have started.
    """

    def __init__(self, view: View, record: SweepRecord) -> None:
        self._view = view
        self._told = {trial.proposal.key: _as_before(trial) for trial in _all(record)}
        self._proposed_all = record.ended
        self._owner = record.owner
        self.tell(record)

    def tell(self, record: SweepRecord) -> None:
        if record.owner != self._owner:
            self._owner = record.owner
            self._view.note(f"driven by {named(record.owner)} now")
        for trial in _all(record):
            told = self._told.setdefault(trial.proposal.key, _Told())
            if told.record is not trial:
                self._tell_trial(trial, told)
                told.record = trial
        if record.ended and not self._proposed_all:
            self._proposed_all = True
            self._view.note(f"every trial of the sweep is proposed: {len(record.trials)}")

    def _tell_trial(self, trial: TrialRecord, told: _Told) -> None:
        proposal = trial.proposal
        for why in trial.setbacks[told.setbacks :]:
            if not told.is_on and told.attempts < trial.attempts:
                self._start(trial, told)
            self._view.again(proposal, f"{why}; it is tried again")
            told.is_on = False
        told.setbacks = len(trial.setbacks)
        while told.attempts < trial.attempts:
            if told.is_on:
                self._view.again(proposal, "was cut off, and goes on")
            self._start(trial, told)
        if trial.result is None:
            told.has_ended = False  # it may have been opened again
        elif not told.has_ended:
            self._view.ended(proposal, trial.result)
            told.is_on, told.has_ended = False, True

    def _start(self, trial: TrialRecord, told: _Told) -> None:
        self._view.started(trial.proposal)
        told.attempts += 1
        told.is_on, told.has_ended, told.is_scored = True, False, False

    def running(self) -> dict[str, str]:
        """The tracker's run of each trial that is running and has one, by the trial's key."""
        return {
            key: told.record.mlflow_run_id
            for key, told in self._told.items()
            if told.is_on and told.record is not None and told.record.mlflow_run_id is not None
        }

    def report(self, newest: Mapping[str, Mapping[str, Point]]) -> None:
        """Report the numbers of those running trials, by their keys, that have newer ones."""
        for key, numbers in newest.items():
            told = self._told.get(key)
            if told is None or told.record is None or not told.is_on or numbers == told.numbers:
                continue
            proposal, steps = told.record.proposal, told.record.proposal.spec.steps
            made = newer(told.numbers, numbers, steps, one_attempt=told.reported == told.attempts)
            # The tracker does not say that a trial is scored: it is, after its last step. Of a trial that was
            # tried before somebody looked, that step may be the earlier attempt's.
            are_its_own = told.attempts == 1 or told.numbers
            is_through = bool(made) and made[-1].step == steps and are_its_own
            if is_through and not told.is_scored and proposal.spec.evaluate.tasks:
                made.append(Progress(phase="evaluating", step=steps, steps=steps))
                told.is_scored = True
            for progress in made:
                self._view.reported(proposal, progress)
            told.numbers, told.reported = numbers, told.attempts


def _all(record: SweepRecord) -> Sequence[TrialRecord]:
    return [*record.baselines, *record.trials]


def _as_before(trial: TrialRecord) -> _Told:
    """As if everything up to here were told, but for the attempt that is on."""
    told = _Told(attempts=trial.attempts, setbacks=len(trial.setbacks), has_ended=trial.result is not None)
    if trial.state == "running":
        told.attempts = max(0, trial.attempts - 1)
    return told


def newer(
    before: Mapping[str, Point], now: Mapping[str, Point], steps: int, one_attempt: bool = True
) -> list[Progress]:
    """What `now` has that `before` had not, as the trial would have reported it: a held-out loss at its step.

    Final numbers, which come with `wall_seconds` under the same names, are no report. Between two attempts
    there is no pace to tell the seconds that are left by.
    """
    final = now.get("wall_seconds")
    now = {name: point for name, point in now.items() if point != final}
    fresh = {name: point for name, point in now.items() if point != before.get(name)}
    if not fresh:
        return []
    step = max(point.step for point in fresh.values())
    held_out = fresh.pop("eval.loss", None)
    made = []
    if held_out is not None and held_out.step < step:
        made.append(Progress(phase="training", step=held_out.step, steps=steps, eval_loss=held_out.value))
        held_out = None
    numbers = {name: point.value for name, point in now.items() if point.step == step and name != "eval.loss"}
    made.append(
        Progress(
            phase="training",
            step=step,
            steps=steps,
            train_loss=numbers.get("train.loss"),
            eval_loss=held_out.value if held_out else None,
            lr=numbers.get("lr"),
            tokens_per_second=numbers.get("tokens_per_second"),
            seconds_left=_seconds_left(before, now, steps) if one_attempt else None,
        )
    )
    return made


def _seconds_left(before: Mapping[str, Point], now: Mapping[str, Point], steps: int) -> float | None:
    """Of the training, at its pace between the two; None where they do not tell one."""
    then, last = before.get("train.loss"), now.get("train.loss")
    if then is None or last is None or last.step <= then.step:
        return None
    pace = (last.at_ms - then.at_ms) / 1000 / (last.step - then.step)
    return max(0.0, pace * (steps - last.step))


# --- the tracker ------------------------------------------------------------------------------------


class Newest:
    """The newest numbers of running trials, asked of the tracker in a thread; nobody ever waits for it.

    Inside its block it asks, every `poll_seconds`, for the runs that were wanted last.
    """

    def __init__(self, reader: Reader, poll_seconds: float = POLL_SECONDS) -> None:
        self._reader = reader
        self._poll_seconds = poll_seconds
        self._changed = threading.Condition()
        self._wanted: Mapping[str, str] = {}
        self._found: dict[str, Mapping[str, Point]] = {}
        self._notes: list[str] = []
        self._is_away = self._is_over = False
        self._thread = threading.Thread(target=self._work, name="newest", daemon=True)

    def __enter__(self) -> Newest:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        # A thread that is in a library's native code while Python ends takes the process down with an abort.
        self._thread.join(LEAVING_SECONDS)

    def want(self, runs: Mapping[str, str]) -> None:
        """From now on, ask for these runs of trials, by the trials' keys."""
        with self._changed:
            self._wanted = dict(runs)
            self._changed.notify_all()

    def take(self) -> dict[str, Mapping[str, Point]]:
        """What was found since the last call, by the trials' keys."""
        with self._changed:
            found, self._found = self._found, {}
        return found

    def notes(self) -> list[str]:
        """What a person should know, since the last call: that the tracker is away, that it answers again."""
        with self._changed:
            said, self._notes = self._notes, []
        return said

    def _work(self) -> None:
        while (wanted := self._next()) is not None:
            began, pause_seconds = time.monotonic(), self._poll_seconds
            try:
                for key, run_id in wanted.items():
                    numbers = self._reader.newest(run_id)
                    with self._changed:
                        if numbers is not None:
                            self._found[key] = numbers
            except Exception as error:  # MLflow's, a server's, the network's: the study's part goes on
                self._failed(error)
            else:
                self._answered()
                pause_seconds = max(pause_seconds, (time.monotonic() - began) / SHARE)
            with self._changed:
                self._changed.wait_for(lambda: self._is_over, pause_seconds)

    def _next(self) -> Mapping[str, str] | None:
        """What is wanted, once something is; None when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._is_over)
            return None if self._is_over else self._wanted

    def _failed(self, error: Exception) -> None:
        with self._changed:
            if not self._is_away:
                reason = masked(str(error).strip().partition("\n")[0])
                self._notes.append(f"the tracker does not answer, what the study says goes on: {reason}")
            self._is_away = True

    def _answered(self) -> None:
        with self._changed:
            if self._is_away:
                self._notes.append("the tracker answers again")
            self._is_away = False
