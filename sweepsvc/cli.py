"""The commands. Heavy imports happen inside them, so that `--help` is instant.

Exit codes: 0 done, every trial completed or pruned; 2 bad input, nothing started; 3 done, some trials
failed; 4 interrupted, can be resumed; 1 a fault of ours.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sweeps.errors import CannotContinue, CannotStart, InvalidSweep, TrialError, UnknownSweep

if TYPE_CHECKING:
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


SweepId = Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's id, or the start of one alone.")]
MaybeSweepId = Annotated[
    str | None,
    typer.Argument(metavar="[SWEEP]", help="A sweep's id, or the start of one alone. [default: newest]"),
]


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
    place.check()

    from sweepsvc import session

    _exit_as(lambda: session.launch(sweep, place, sweep_id or new_sweep_id(sweep.name)))


@app.command()
def resume(
    sweep: SweepId,
    failed: Annotated[bool, typer.Option("--failed", help="Only those that failed, whatever for.")] = False,
    trials: Annotated[
        list[str] | None, typer.Option("--trial", metavar="N", help="Only this trial; may be repeated.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin them anew, without their checkpoints.")
    ] = False,
    add_trials: Annotated[
        int,
        typer.Option("--add-trials", metavar="N", min=0, help="Go on past the budget, by so many trials."),
    ] = 0,
    as_launched: Annotated[
        bool, typer.Option("--as-launched", help="Go on with the file as it was, whatever it is now.")
    ] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="The host that drove the sweep is gone for good.")
    ] = False,
    home: HomeOption = None,
) -> None:
    """Go on with a sweep: what failed, was cut off or never ran, from its last checkpoint."""
    from sweepsvc import session
    from sweepsvc.resume import Selection

    selection = Selection(failed, tuple(trials or ()), from_scratch)
    asked = session.Asked(selection, add_trials, as_launched, take_over)
    _exit_as(lambda: session.resume(sweep, _home(home), asked))


@app.command()
def stop(
    sweep: MaybeSweepId = None,
    wait: Annotated[bool, typer.Option(help="Wait until it has stopped.")] = True,
    home: HomeOption = None,
) -> None:
    """Stop a sweep that runs elsewhere: its trials write a checkpoint and end as interrupted."""
    from sweepsvc import session

    session.stop(sweep, _home(home), wait)


@app.command()
def sync(sweep: MaybeSweepId = None, home: HomeOption = None) -> None:
    """Rebuild the tracker's copy of a sweep from its study and its result files."""
    from sweepsvc import session

    session.sync(sweep, _home(home))


def _exit_as(drive: Callable[[], SweepRecord]) -> None:
    try:
        state = drive().state
    except KeyboardInterrupt:  # before the first trial or behind the last one; typer would exit with 1
        print("interrupted", file=sys.stderr)
        state = "interrupted"
    raise typer.Exit({"completed": 0, "failed": SOME_FAILED}.get(state, INTERRUPTED))


@app.command()
def status(
    sweep: MaybeSweepId = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show a sweep's trials and how they went."""
    from sweepsvc.study import load_record
    from sweepsvc.view import results, status_json, terminal

    place = _home(home)
    place.check()
    record = _as_it_stands(load_record(sweep, place.study_url))
    if as_json:
        _print_json(status_json(record))
        return
    console = terminal()
    console.print(results(record, console), markup=False, highlight=False)


def _as_it_stands(record: SweepRecord) -> SweepRecord:
    """A sweep whose driver is gone is interrupted, whatever the driver last wrote."""
    from dataclasses import replace

    from sweepsvc.owner import is_driven

    if is_driven(record.state, record.owner):
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

    from sweepsvc.view import terminal, with_rule

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
    console = terminal()
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
    except CannotContinue as error:
        print(error, file=sys.stderr)
        sys.exit(INTERRUPTED)
