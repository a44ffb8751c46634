"""What is known of one trial, in order, from the study and the tracker alone."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sweeps.errors import CannotStart
from sweeps.result import Progress
from sweeps.space import field_value
from sweeps.spec import FIELDS
from sweepsvc.home import Home
from sweepsvc.owner import as_it_stands
from sweepsvc.protocols import Point, Proposal, Reader, Report, RunHistory, SweepRecord, TrialRecord
from sweepsvc.recorder import MlflowReader
from sweepsvc.study import StudyReader
from sweepsvc.urls import masked
from sweepsvc.view import outcome_text, progress_text, title, with_rule
from sweepsvc.watch import POLL_SECONDS, SETTLING_POLLS, SHARE, Patient, ReadStudy, read_again

Say = Callable[[str], None]

_FIELDS = {
    "train.loss": "train_loss",
    "eval.loss": "eval_loss",
    "lr": "lr",
    "tokens_per_second": "tokens_per_second",
}


def logs(prefix: str | None, home: Home, key: str | None, follows: bool, say: Say) -> None:
    """Say what is known of the trial `key`, or without one how the failed trials ended.

    `follows` goes on until the trial has ended, or nobody drives the sweep. Raises `UnknownSweep`, and
    `CannotStart` where there is no such trial or the study cannot be read.
    """
    home.check()
    if key is None and follows:
        raise CannotStart("--follow goes with one trial, got none; say which with --trial N")
    study = StudyReader(prefix, home.study_url)
    record = as_it_stands(read_again(study))
    if key is None:
        for line in failures(record):
            say(line)
        return
    telling = Telling(MlflowReader(home.tracking_uri), say)
    telling.begin(_trial(record, key))
    if follows:
        record = _followed(study, telling, record, key)
    telling.end(_trial(record, key), record.state == "running")


def _followed(study: ReadStudy, telling: Telling, record: SweepRecord, key: str) -> SweepRecord:
    patient = Patient(study, telling.say, SETTLING_POLLS * POLL_SECONDS)
    while _trial(record, key).result is None and record.state == "running":
        began = time.monotonic()
        telling.go_on(_trial(record, key))
        spent_seconds = patient.seconds + time.monotonic() - began
        time.sleep(max(POLL_SECONDS, spent_seconds / SHARE))
        latest = patient.read()
        record = as_it_stands(latest) if latest is not None else record
    return record


def _trial(record: SweepRecord, key: str) -> TrialRecord:
    trials = {trial.proposal.key: trial for trial in (*record.baselines, *record.trials)}
    if key not in trials:
        raise CannotStart(f"--trial must name a trial of the sweep, got {key}; it has {there_are(record)}")
    return trials[key]


def there_are(record: SweepRecord) -> str:
    """`baseline, 0 to 23`: the keys that a sweep's trials have so far."""
    names = [trial.proposal.key for trial in record.baselines]
    numbers = [trial.proposal.key for trial in record.trials]
    if numbers:
        names.append(f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else numbers[0])
    return ", ".join(names) or "none yet"


def failures(record: SweepRecord) -> Iterator[str]:
    """The end and the traceback of each failed trial; without one, which trials there are."""
    everything = (*record.baselines, *record.trials)
    failed = [trial for trial in everything if trial.state == "failed"]
    for trial in failed:
        yield from _end(trial)
    if not failed:
        counts = Counter(trial.state for trial in everything)
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        yield f"no trial of {record.sweep_id} has failed: {states or 'there is none yet'}"
    yield f"one trial from its start: --trial N, with N one of {there_are(record)}"


# --- one trial --------------------------------------------------------------------------------------


class Telling:
    """Says what is known of one trial, and nothing twice, however often it is asked to go on."""

    def __init__(self, reader: Reader, say: Say) -> None:
        self._reader = reader
        self.say = say
        self._setbacks = 0
        self._said: set[tuple[int, str]] = set()
        self._newest: Mapping[str, Point] = {}
        self._has_begun = self._is_away = False

    def begin(self, trial: TrialRecord) -> None:
        """The trial and its parameters."""
        self.say(f"{title(trial.proposal)}: {trial.state}{_attempts(trial)}")
        for path, value in _parameters(trial.proposal).items():
            self.say(f"  {path} = {value}")

    def go_on(self, trial: TrialRecord) -> None:
        """Setbacks and reports that were not said yet."""
        for why in trial.setbacks[self._setbacks :]:
            self.say(masked(f"an attempt came to nothing: {why}"))
        self._setbacks = len(trial.setbacks)
        if trial.mlflow_run_id is not None:
            self._reports(trial, trial.mlflow_run_id)

    def _reports(self, trial: TrialRecord, run_id: str) -> None:
        try:
            newest = self._reader.newest(run_id)
            if newest and newest == self._newest:
                return
            history = self._reader.history(run_id)
        except CannotStart as error:
            if not self._is_away:
                self.say(f"the tracker does not answer, its part is left out: {error}")
            self._is_away = True
            return
        if self._is_away:
            self.say("the tracker answers again")
        self._is_away, self._newest = False, newest or {}
        if history is None:
            return
        if not self._has_begun:
            self.say(f"{_when(history.started_ms)}  started")
        self._has_begun = True
        for at_ms, text in _timeline(history, trial):
            if (at_ms, text) not in self._said:
                self._said.add((at_ms, text))
                self.say(f"{_when(at_ms)}  {text}")

    def end(self, trial: TrialRecord, is_driven: bool) -> None:
        """What is left: the last reports, the notes of the result and the end."""
        self.go_on(trial)
        if trial.result is not None:
            for note in trial.result.notes:
                self.say(masked(f"note: {note}"))
            for line in _end(trial):
                self.say(line)
        elif trial.attempts == 0:
            self.say(f"{title(trial.proposal)} has not begun")
        elif is_driven:
            self.say(f"{title(trial.proposal)} is running; --follow goes on until it has ended")
        else:
            self.say(f"{title(trial.proposal)} was cut off with its driver; `resume` goes on with it")


def _attempts(trial: TrialRecord) -> str:
    return {0: "", 1: ", 1 attempt"}.get(trial.attempts, f", {trial.attempts} attempts")


def _parameters(proposal: Proposal) -> dict[str, str]:
    """What the space varies, and every other field that is not as it is by default."""
    spec = proposal.spec
    sections = ("model", "evaluate") if spec.train is None else tuple(type(spec).model_fields)
    others = {
        path: field_value(spec, path)
        for path, info in FIELDS.items()
        if path.partition(".")[0] in sections and field_value(spec, path) != info.default
    }
    values = {**proposal.params, **others}
    return {path: _text(value, proposal.rules.get(path)) for path, value in values.items()}


def _text(value: Any, rule: str | None) -> str:
    if isinstance(value, list | tuple):
        return with_rule(", ".join(str(one) for one in value), rule)
    return with_rule(value, rule)


def _timeline(history: RunHistory, trial: TrialRecord) -> list[tuple[int, str]]:
    """Reports by step, and where attempts before the last one ended; each with its time."""
    lines = [(one.at_ms, _line(one.progress)) for one in reports(history, trial.proposal.spec.steps)]
    ends = sorted(history.curves.get("wall_seconds", ()), key=lambda point: point.at_ms)
    earlier = ends[:-1] if trial.result is not None else ends
    lines += [(end.at_ms, f"an attempt ended, {end.value:.0f} s of work so far") for end in earlier]
    return sorted(lines, key=lambda line: line[0])


def _line(progress: Progress) -> str:
    rate = "" if progress.lr is None else f"  lr {progress.lr:.3g}"
    return f"{progress_text(progress)}{rate}"


def reports(history: RunHistory, steps: int) -> list[Report]:
    """The numbers of a run merged by step. Of one that was recorded twice, the first stands.

    The final numbers, which a run has beside them under the same names, are left out: they came with
    `wall_seconds`.
    """
    final = set(history.curves.get("wall_seconds", ()))
    values: dict[int, dict[str, float]] = {}
    times: dict[int, int] = {}
    for name, attribute in _FIELDS.items():
        for point in sorted(history.curves.get(name, ()), key=lambda point: point.at_ms):
            if point in final:
                continue
            values.setdefault(point.step, {}).setdefault(attribute, point.value)
            times[point.step] = min(point.at_ms, times.get(point.step, point.at_ms))
    return [
        Report(
            Progress.model_validate({"phase": "training", "step": step, "steps": steps, **one}), times[step]
        )
        for step, one in sorted(values.items())
    ]


def _when(at_ms: int) -> str:
    return f"{datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _end(trial: TrialRecord) -> Sequence[str]:
    assert trial.result is not None
    lines = [masked(f"{title(trial.proposal)} {outcome_text(trial.result)}")]
    if trial.result.failure is not None and trial.result.failure.traceback:
        lines.append(masked(trial.result.failure.traceback.rstrip()))
    return lines
