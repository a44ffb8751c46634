"""The commands. Heavy imports happen inside them, so that `--help` is instant.

Exit codes: 0 done, every trial completed or pruned; 2 bad input, nothing started; 3 done, some trials
failed; 4 interrupted; 1 a fault of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sweeps.errors import CannotStart, InvalidSweep, TrialError, UnknownSweep

if TYPE_CHECKING:
    from rich.console import Console

    from sweeps.sweep import Sweep
    from sweepsvc.home import Home
    from sweepsvc.protocols import SweepRecord

BAD_INPUT, SOME_FAILED, INTERRUPTED = 2, 3, 4

app = typer.Typer(
    help="Sweeps over LoRA and QLoRA fine-tuning: one YAML file becomes trained, scored, recorded trials.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SweepFile = Annotated[Path, typer.Argument(metavar="FILE", help="The sweep file, YAML.")]
HomeOption = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="Where sweeps live. [default: SWEEPSVC_HOME, or runs/]"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field of the file; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def launch(
    file: SweepFile,
    overrides: SetOption = None,
    sweep_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="The sweep's id. [default: name and time]")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Run a sweep: propose, train, score and record its trials."""
    from sweepsvc.launch import new_sweep_id

    sweep = _load(file, overrides)
    place = _home(home)
    state = _launch(sweep, place, sweep_id or new_sweep_id(sweep.name))
    raise typer.Exit({"completed": 0, "failed": SOME_FAILED}.get(state, INTERRUPTED))


def _launch(sweep: Sweep, home: Home, sweep_id: str) -> str:
    from sweepsvc.facts import gather
    from sweepsvc.launch import SweepRun, all_or_nothing, drive, prepare
    from sweepsvc.recorder import MlflowRecorder
    from sweepsvc.scheduler import RayScheduler
    from sweepsvc.study import open_study

    console = _console()
    console.print(f"sweep {sweep_id} in {home.path}", markup=False, highlight=False, soft_wrap=True)
    facts = gather(Path(sweep.source))
    with RayScheduler(sweep.resources, home.sweep(sweep_id).ray) as scheduler:
        scheduler.check()
        folder = prepare(sweep, home, sweep_id)
        with all_or_nothing(folder) as undo:
            study = open_study(sweep, sweep_id, home.study_url, facts)
            undo.callback(study.discard)
            recorder = MlflowRecorder(sweep, sweep_id, home.tracking_uri, home.artifacts, facts)
            recorder.open()
        with _view(console, sweep) as view:
            state = drive(SweepRun(study, recorder, folder, view), scheduler)
    _print_results(console, study.read())
    console.print(_next_steps(home, sweep_id), markup=False, highlight=False, soft_wrap=True)
    return state


@app.command()
def status(
    sweep: Annotated[
        str | None,
        typer.Argument(metavar="[SWEEP]", help="A sweep's id or a unique prefix. [default: newest]"),
    ] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show a sweep's trials and how they went."""
    from sweepsvc.study import load_record
    from sweepsvc.view import status_json

    record = _as_it_stands(load_record(sweep, _home(home).study_url))
    if as_json:
        _print_json(status_json(record))
        return
    _print_results(_console(), record)


def _as_it_stands(record: SweepRecord) -> SweepRecord:
    """A sweep whose driver is gone is interrupted, whatever the driver last wrote."""
    from dataclasses import replace

    from sweepsvc.facts import owner_lives

    if record.state == "running" and owner_lives(record.facts):
        return record

    def stopped(trials: Any) -> list[Any]:
        return [
            replace(trial, state="interrupted") if trial.state == "running" else trial for trial in trials
        ]

    state = "interrupted" if record.state == "running" else record.state
    return replace(record, state=state, baselines=stopped(record.baselines), trials=stopped(record.trials))


@app.command()
def plan(file: SweepFile, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Show the trials that a sweep would run, with their trainable parameters; starts nothing."""
    from sweepsvc.plan import plan as make_plan
    from sweepsvc.plan import plan_json

    made = make_plan(_load(file, overrides))
    if as_json:
        _print_json(plan_json(made))
        return

    from rich.table import Table

    from sweepsvc.view import with_rule

    table = Table(
        title=f"{made.sweep.name}: {made.runs} trials, {made.baselines} baselines", title_justify="left"
    )
    table.add_column("trial", justify="right")
    paths = list(made.sweep.search.space)
    for path in paths:
        table.add_column(path, justify="right")
    table.add_column("trainable parameters", justify="right")
    for number, trial in enumerate(made.trials):
        values = [with_rule(trial.resolved.params[path], trial.resolved.rules.get(path)) for path in paths]
        table.add_row(str(number), *values, f"{trial.trainable_params:,}")
    console = _console()
    console.print(table)
    console.print(made.note, markup=False, highlight=False)


@app.command()
def ui(
    home: HomeOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
) -> None:
    """Open the MLflow UI on the store of this home, to compare trials in a browser."""
    from sweepsvc.recorder import ui_command

    place = _home(home)
    if place.tracking_uri.startswith("http"):
        print(f"the tracker is a server of its own: open {place.tracking_uri}")
        return
    if place.tracking_uri.startswith("sqlite:///") and not Path(place.tracking_uri[10:]).exists():
        raise UnknownSweep(
            f"a sweep must have run in {place.path} before there is something to see; launch one"
        )
    print(f"MLflow UI on http://{host}:{port} (Ctrl-C ends it)", flush=True)
    command = ui_command(place.tracking_uri, place.artifacts, host=host, port=port)
    os.execv(command[0], command)


def _load(file: Path, overrides: list[str] | None) -> Sweep:
    from sweeps.sweepfile import load_sweep

    return load_sweep(file, overrides or (), task_names=_task_names)


def _task_names(task_dir: str | None) -> Any:
    from sweeps.trial.tasks import task_names

    return task_names(task_dir)


def _home(home: Path | None) -> Home:
    from sweepsvc.home import Home

    return Home(home)


def _console() -> Console:
    from rich.console import Console

    # A pipe or a file gets whole rows, however many columns a table has.
    return Console() if sys.stdout.isatty() else Console(width=240)


@contextlib.contextmanager
def _view(console: Console, sweep: Sweep) -> Iterator[Any]:
    from sweepsvc.view import LineView, LiveView

    if not console.is_terminal:
        yield LineView(console)
        return
    with LiveView(console, sweep.objective.metric, sweep.objective.maximize) as view:
        yield view


def _print_results(console: Console, record: SweepRecord) -> None:
    from sweepsvc.view import results

    console.print(results(record, console), markup=False, highlight=False)


def _next_steps(home: Home, sweep_id: str) -> str:
    where = "" if home.path == Path("runs").absolute() else f" --home {shlex.quote(str(home.path))}"
    command = f"{shlex.quote(_python())} -m sweepsvc"
    return (
        f"compare the trials in the MLflow UI:  {command} ui{where}\n"
        f"see them again here:                  {command} status {sweep_id}{where}"
    )


def _python() -> str:
    """This Python, as one would type it here: `.venv/bin/python`."""
    with contextlib.suppress(ValueError):
        return str(Path(sys.executable).relative_to(Path.cwd()))
    return sys.executable


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def main() -> None:
    """Run a command; what the person got wrong is a message and exit 2, never a traceback."""
    try:
        app()
    except InvalidSweep as error:
        count = len(error.faults)
        print(
            *error.lines(),
            f"{count} fault{'s' if count > 1 else ''}; nothing was started",
            sep="\n",
            file=sys.stderr,
        )
        sys.exit(BAD_INPUT)
    except (CannotStart, UnknownSweep, TrialError) as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_INPUT)
