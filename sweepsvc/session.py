"""Commands that drive a sweep, over the real study, tracker and scheduler."""

from __future__ import annotations

import contextlib
import functools
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from sweeps.errors import CannotContinue, CannotStart, InvalidSweep, InvalidTrial
from sweeps.signals import Interrupting, handled
from sweeps.sweep import Sweep
from sweeps.trial.paths import write_whole
from sweeps.trial.warming import warming
from sweepsvc import cluster, owner
from sweepsvc.facts import gather
from sweepsvc.home import Home, SweepFolder
from sweepsvc.launch import SweepRun, all_or_nothing, drive, prepare, state_of
from sweepsvc.meaning import as_it_is_now, differences
from sweepsvc.nextsteps import next_steps, resume_line
from sweepsvc.outbox import Outbox
from sweepsvc.protocols import SweepRecord
from sweepsvc.recorder import MlflowRecorder
from sweepsvc.rehearse import NOT_SEEN, RehearsalHome, RehearsalView, judge, set_stage, verdict
from sweepsvc.resume import Selection, reconcile
from sweepsvc.scheduler import RayScheduler
from sweepsvc.stored import TrialFiles
from sweepsvc.study import (
    Driving,
    Launched,
    ask_to_stop,
    forget_unlaunched,
    load_driving,
    load_launched,
    load_record,
    open_study,
    reopen_study,
)
from sweepsvc.sync import synchronise
from sweepsvc.view import LineView, LiveView, View, results, terminal
from sweepsvc.worker import Kept

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Joined:
    """The Ray cluster that a driver joins, or Ray on this machine.

    `begun` is what it says once it has begun, `git_commit` that of a sweep file on another machine.
    """

    address: str | None = None
    begun: str = ""
    git_commit: str = ""


@dataclass(frozen=True)
class Asked:
    """What `resume` is asked to do besides going on."""

    selection: Selection = field(default_factory=Selection)
    add_trials: int = 0
    as_launched: bool = False
    take_over: bool = False
    cluster: Joined = Joined()


# --- the commands -----------------------------------------------------------------------------------


def launch(sweep: Sweep, home: Home, sweep_id: str, joined: Joined = Joined()) -> SweepRecord:
    """Run a sweep from its start; how it stands at the end."""
    console = terminal()
    view = _view(console, sweep)
    shown = functools.partial(_shown, console, home)
    return _launched(sweep, home, sweep_id, console, view, shown, joined)


def rehearse(sweep: Sweep, home: Home, sweep_id: str) -> SweepRecord:
    """Run every distinct trial of a sweep in small; how that stands.

    Raises `CannotStart` with everything that a launch would fail for.
    """
    console = terminal()
    place = RehearsalHome(home)
    place.check()
    stage = place.stage(sweep_id)
    try:
        rehearsal = set_stage(sweep, stage)
    except OSError as error:
        raise CannotStart(
            f"the home must be writable, got {stage}: {error.strerror or error}; give another --home"
        ) from error
    for note in rehearsal.notes:
        _say(console, note)
    record = None
    if rehearsal.sweep is not None:
        view = contextlib.nullcontext(RehearsalView(console, rehearsal.cast))
        record = _launched(rehearsal.sweep, place, sweep_id, console, view, lambda record: record)
        if record.state == "interrupted":
            return record
    said = len(rehearsal.notes)
    judge(rehearsal, record)
    for note in list(rehearsal.notes)[said:]:
        _say(console, note)
    _say(console, NOT_SEEN)
    if rehearsal.faults:
        raise CannotStart(verdict(rehearsal))
    assert record is not None
    shutil.rmtree(stage, ignore_errors=True)
    _say(console, verdict(rehearsal))
    return record


def _launched(
    sweep: Sweep,
    home: Home,
    sweep_id: str,
    console: Console,
    viewing: contextlib.AbstractContextManager[View],
    then: Callable[[SweepRecord], SweepRecord],
    joined: Joined = Joined(),
) -> SweepRecord:
    """How a new sweep stands at its end; `then` has it before the scheduler and the signals are let go."""
    with contextlib.ExitStack() as stack:
        # Also before the first trial and after the last one, where no trial has to be waited for.
        signals = Interrupting()
        stack.enter_context(handled(signals, signal.SIGINT, signal.SIGTERM))
        _say(console, f"sweep {sweep_id} in {home.path}")
        if joined.address is None:
            stack.enter_context(_tokenising(sweep))  # while Ray, the stores, the actors and the base start
        facts = gather(Path(sweep.source))
        if joined.git_commit:
            facts["git_commit"] = joined.git_commit
        if home.storage:
            facts["storage"] = home.storage
        scheduler = stack.enter_context(_scheduler(sweep, home.sweep(sweep_id), joined))
        _check(sweep, scheduler, home, console)
        _clear_away(home.sweep(sweep_id), home)
        folder = prepare(sweep, home, sweep_id)
        with all_or_nothing(folder) as undo:
            stack.enter_context(owner.owning(folder))
            study = open_study(sweep, sweep_id, home.study_url, facts)
            undo.callback(study.discard)
            stack.enter_context(study.beating())
            recorder = MlflowRecorder(sweep, sweep_id, home.tracking_uri, home.artifacts, facts)
            recorder.open()
            baselines = study.baselines()
        with viewing as view, _saying_how_to_go_on(console, home, sweep_id):
            run = SweepRun(study, Outbox(recorder, folder), folder, view, sweep.faults, baselines)
            _say_begun(joined, console)
            record = _driven(run, scheduler, signals)
        return then(record)


def resume(prefix: str, home: Home, asked: Asked) -> SweepRecord:
    """Go on with a sweep; how it stands at the end."""
    console = terminal()
    home.check()
    launched = load_launched(prefix, home.study_url)
    home = home.storing(launched.storage)
    sweep_id, folder = launched.sweep_id, home.sweep(launched.sweep_id)
    with contextlib.ExitStack() as stack:
        # Also before the first trial and after the last one, where no trial has to be waited for.
        signals = Interrupting()
        stack.enter_context(handled(signals, signal.SIGINT, signal.SIGTERM))
        stack.enter_context(_owning(launched, folder, asked.take_over))
        sweep = launched.sweep if asked.as_launched else _unchanged(launched.sweep, folder)
        _check_budget(sweep, asked.add_trials)
        before = load_record(sweep_id, home.study_url)
        asked.selection.check(before)
        _say(console, f"sweep {sweep_id} in {home.path}")

        started = time.perf_counter()
        facts = gather(Path(sweep.source))
        added = launched.added_trials + asked.add_trials
        study = reopen_study(sweep, sweep_id, home.study_url, facts, added)
        stack.enter_context(study.beating())
        if sweep.text != launched.sweep.text:
            write_whole(folder.sweep_file, sweep.text)
        recorder = MlflowRecorder(sweep, sweep_id, home.tracking_uri, home.artifacts, facts)
        open_runs = _open_runs(recorder, console)
        tracking = Outbox(recorder, folder, _known_runs(before))
        files = TrialFiles(folder)
        files.forget_stop()
        found = reconcile(study, files, tracking, asked.selection, open_runs)
        asks = asked.selection.is_everything or asked.add_trials > 0
        asks = asks and not study.has_ended
        for line in (*found.lines(asks), *study.repairs):
            _say(console, line)
        _say(console, f"reconciled in {time.perf_counter() - started:.1f} s")

        queue, told = found.queue, found.to_reopen
        forgotten = set(found.steps) if asked.selection.from_scratch else set()
        with _view(console, sweep) as view, _saying_how_to_go_on(console, home, sweep_id):
            run = SweepRun(study, tracking, folder, view, sweep.faults, queue, asks, told, forgotten)
            if queue or asks:
                scheduler = stack.enter_context(_scheduler(sweep, folder, asked.cluster))
                _check(sweep, scheduler, home, console)
                _say_begun(asked.cluster, console)
                record = _driven(run, scheduler, signals)
            else:
                record = run.close()
        return _shown(console, home, record)


def stop(prefix: str | None, home: Home, waits: bool = True) -> None:
    """Ask the driver of a sweep to stop, as one Ctrl-C would, and wait until it has.

    The word is left in the study, so the driver may be on any machine.
    """
    console = terminal()
    home.check()
    driving = load_driving(prefix, home.study_url)
    sweep_id = driving.sweep_id
    if not _is_driven(driving):
        state = owner.as_it_stands(load_record(sweep_id, home.study_url)).state
        raise CannotStart(f"only a sweep that runs can be stopped, and {sweep_id} is {state}")
    ask_to_stop(driving, home.study_url)
    with contextlib.suppress(OSError):  # where its folder is here: at once, and not with the next heartbeat
        home.sweep(sweep_id).stop.touch()
    _say(
        console, f"asked {owner.named(driving.owner)} to stop: the running trials write a checkpoint and end"
    )
    if waits:
        while (now := _driving_again(driving, home)).owner == driving.owner and _is_driven(now):
            time.sleep(_POLL_SECONDS)
        if now.owner != driving.owner:
            _say(console, f"it has ended; driven by {owner.named(now.owner)} now: ask again to stop that one")
            return
        record = load_record(sweep_id, home.study_url)
        _say(console, next_steps(home, replace(record, state=state_of(record))))


def _driving_again(driving: Driving, home: Home) -> Driving:
    """As it is now; as it was where the study does not answer just now: the word is left in it."""
    with contextlib.suppress(CannotStart):
        return load_driving(driving.sweep_id, home.study_url)
    return driving


def _is_driven(driving: Driving) -> bool:
    return owner.is_driven(driving.state, driving.owner, driving.heartbeat)


def sync(prefix: str | None, home: Home) -> None:
    """Make the tracker's copy of a sweep complete, from the study and the trials' files."""
    console = terminal()
    home.check()
    launched = load_launched(prefix, home.study_url)
    sweep, folder = launched.sweep, home.storing(launched.storage).sweep(launched.sweep_id)
    with _owning(launched, folder, take_over=False):
        record = load_record(launched.sweep_id, home.study_url)
        files = TrialFiles(folder)
        for trial in (*record.baselines, *record.trials) if folder.storage else ():
            files.fetch(trial.proposal)
        facts = {**record.facts, "owner": owner.this_process()}
        recorder = MlflowRecorder(sweep, launched.sweep_id, home.tracking_uri, home.artifacts, facts)
        synced = synchronise(record, folder, recorder, _known_runs(record))
        study = reopen_study(sweep, launched.sweep_id, home.study_url, facts, launched.added_trials)
        for key, run_id in synced.runs.items():
            study.tracked(key, run_id)
        study.close(state_of(study.read()))
    _say(console, str(synced))


# --- their parts ------------------------------------------------------------------------------------


_OF_A_LAUNCH = {"sweep.yaml", "owner", "stop", "ray"}


def _clear_away(folder: SweepFolder, home: Home) -> None:
    """Remove what a launch left that was killed before its sweep began: nobody could go on with that."""
    if not folder.path.is_dir():
        return
    names = {path.name for path in folder.path.iterdir() if not path.name.startswith(".")}
    if names - _OF_A_LAUNCH or not names:
        return
    with contextlib.suppress(CannotStart), owner.owning(folder):  # if a driver lives, prepare says so
        if forget_unlaunched(folder.path.name, home.study_url):
            shutil.rmtree(folder.path)


def _driven(run: SweepRun, scheduler: RayScheduler, signals: Interrupting) -> SweepRecord:
    """`drive`, which starts nothing where a signal before it was lost."""
    if signals.was_heard:
        run.ask_to_stop()
    return drive(run, scheduler)


def _tokenising(sweep: Sweep) -> contextlib.AbstractContextManager[object]:
    """Tokenise the rows of the sweep's first trial on this machine, which is often the one that trains."""
    try:
        first = sweep.resolve(sweep.search.space.first()).spec
    except InvalidTrial:
        return contextlib.nullcontext()
    return warming(first)


def _scheduler(sweep: Sweep, folder: SweepFolder, joined: Joined) -> RayScheduler:
    minutes = sweep.faults.checkpoint_minutes
    kept = Kept(folder.path.name, str(folder.stop), folder.storage)
    return RayScheduler(sweep.resources, folder.ray, kept, minutes, address=joined.address)


def _check(sweep: Sweep, scheduler: RayScheduler, home: Home, console: Console) -> None:
    """Raise `CannotStart` where the machines cannot run the sweep's trials."""
    scheduler.check()
    for note in cluster.check(sweep, scheduler, home):
        _say(console, note)


@contextlib.contextmanager
def _owning(launched: Launched, folder: SweepFolder, take_over: bool) -> Iterator[None]:
    """Be the one driver of a sweep that had another before."""
    driving = launched.driving
    if _is_driven(driving) and owner.is_elsewhere(driving.owner) and not take_over:
        raise CannotStart(
            f"{owner.busy(launched.sweep_id, driving.owner)}; if that host is gone for good, say "
            f"--take-over, or wait until nothing was heard of it for {owner.SILENCE_SECONDS:g} s"
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    with owner.owning(folder):
        yield


def _unchanged(launched: Sweep, folder: SweepFolder) -> Sweep:
    """The sweep as its file says it now; `CannotStart` if that would be another sweep."""
    try:
        now = as_it_is_now(launched, folder.sweep_file)
    except InvalidSweep as error:
        raise CannotStart(f"{error}\n{_REMEDY}") from error
    changed = differences(launched, now)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise CannotStart(
            f"a sweep that runs already must keep its meaning, and its file changes\n{lines}\n{_REMEDY}"
        )
    return now


_REMEDY = "put it back, go on with the file as it was (--as-launched), or launch it as another sweep"


def _check_budget(sweep: Sweep, add_trials: int) -> None:
    if add_trials and sweep.search.trials is None:
        raise CannotStart(
            f"--add-trials adds to search.trials, got {add_trials} for a sweep that runs every combination; "
            "add to its space, and launch it as another sweep"
        )


def _open_runs(recorder: MlflowRecorder, console: Console) -> Mapping[str, str]:
    """The runs without an end; none where the tracker cannot be asked: it is a copy, and can wait."""
    try:
        recorder.open()
        return recorder.open_runs()
    except CannotStart as error:
        _say(console, f"the tracker does not answer, its records wait in the outbox: {error}")
        return {}


def _known_runs(record: SweepRecord) -> dict[str, str]:
    return {
        trial.proposal.key: trial.mlflow_run_id
        for trial in (*record.baselines, *record.trials)
        if trial.mlflow_run_id is not None
    }


# --- what is said -----------------------------------------------------------------------------------


def _shown(console: Console, home: Home, record: SweepRecord) -> SweepRecord:
    """`record`, after a person has seen how the sweep stands and what comes next."""
    console.print(results(record, console), markup=False, highlight=False)
    _say(console, next_steps(home, record))
    return record


def _say_begun(joined: Joined, console: Console) -> None:
    if joined.begun:
        _say(console, joined.begun)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _view(console: Console, sweep: Sweep) -> Iterator[View]:
    if not console.is_terminal:
        yield LineView(console)
        return
    with LiveView(console, sweep.objective.metric, sweep.objective.maximize) as view:
        yield view


@contextlib.contextmanager
def _saying_how_to_go_on(console: Console, home: Home, sweep_id: str) -> Iterator[None]:
    """Where the ledger fails, there is no record to end with, and the sweep can be resumed all the same."""
    try:
        yield
    except CannotContinue as error:
        raise CannotContinue(f"{error}\n{resume_line(home, sweep_id)}") from error
