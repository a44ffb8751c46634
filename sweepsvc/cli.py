"""The commands. Heavy imports happen inside them, so that `--help` is instant.

Exit codes: 0 done, every trial completed or pruned; 2 bad input, nothing started; 3 done, some trials
failed; 4 interrupted, can be resumed; 1 a fault of ours.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sweeps.collecting import importing
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
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="Object storage for trials' files, where a cluster's machines share no home. "
        "[default: SWEEPSVC_STORAGE]",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDR",
        help="A Ray cluster: auto (this machine is part of it), or its head's http://HOST:8265 or "
        "ray://HOST:10001, where the driver then runs. [default: RAY_ADDRESS, or Ray on this machine]",
    ),
]
DetachOption = Annotated[
    bool, typer.Option("--detach", help="Have the cluster run the driver, and do not wait for it.")
]

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
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Only try every trial for two steps on a small model, on the CPU."),
    ] = False,
    address: AddressOption = None,
    detach: DetachOption = False,
    storage: StorageOption = None,
    home: HomeOption = None,
) -> None:
    """Run a sweep: propose, train, score and record its trials."""
    from sweepsvc.launch import new_sweep_id

    if rehearse and (address or detach):
        raise CannotStart("a rehearsal runs on this machine, got --address or --detach; leave them out")
    if (elsewhere := _elsewhere(address, detach)) is not None:
        from sweepsvc import remote

        sent = _load(file, overrides, files_are_here=False)
        errand = remote.launch_errand(sent, sweep_id or new_sweep_id(sent.name), remote.Place(home, storage))
        raise typer.Exit(remote.send(errand, elsewhere, detach))
    sweep = _load(file, overrides)
    place = _home(home, storage)
    place.check()

    with importing():
        from sweepsvc import session

    name = sweep_id or new_sweep_id(sweep.name)
    if rehearse:
        _exit_as(lambda: session.rehearse(sweep, place, name))
    _exit_as(lambda: session.launch(sweep, place, name, session.Joined(address)))


def _elsewhere(address: str | None, detach: bool) -> str | None:
    """The cluster that is to run the driver; None where it runs here."""
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    return address if detach or "://" in address else None


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
    address: AddressOption = None,
    detach: DetachOption = False,
    storage: StorageOption = None,
    home: HomeOption = None,
) -> None:
    """Go on with a sweep: what failed, was cut off or never ran, from its last checkpoint."""
    from sweepsvc.resume import Selection

    selection = Selection(failed, tuple(trials or ()), from_scratch)
    if (elsewhere := _elsewhere(address, detach)) is not None:
        from sweepsvc import remote

        options = remote.ResumeOptions(add_trials, as_launched, take_over)
        errand = remote.resume_errand(sweep, selection, options, remote.Place(home, storage))
        raise typer.Exit(remote.send(errand, elsewhere, detach))

    with importing():
        from sweepsvc import session

    asked = session.Asked(selection, add_trials, as_launched, take_over, session.Joined(address))
    _exit_as(lambda: session.resume(sweep, _home(home, storage), asked))


@app.command(hidden=True)
def drive(errand: Annotated[Path, typer.Argument(metavar="ERRAND")]) -> None:
    """Be the driver that `launch` or `resume` has sent to this cluster."""
    from sweepsvc import remote

    _exit_as(lambda: remote.drive(errand, _task_names))


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
    from sweepsvc.owner import as_it_stands
    from sweepsvc.study import load_record
    from sweepsvc.view import results, status_json, terminal

    place = _home(home)
    place.check()
    record = as_it_stands(load_record(sweep, place.study_url))
    if as_json:
        _print_json(status_json(record))
        return
    console = terminal()
    console.print(results(record, console), markup=False, highlight=False)


@app.command()
def watch(sweep: MaybeSweepId = None, home: HomeOption = None) -> None:
    """Follow a sweep that runs elsewhere, as `launch` shows it, from the study and the tracker alone."""
    from sweepsvc.watch import watch as follow

    record = follow(sweep, _home(home))
    if record is not None:
        ended = record
        _exit_as(lambda: ended)


@app.command()
def logs(
    sweep: MaybeSweepId = None,
    trial: Annotated[
        str | None, typer.Option("--trial", metavar="N", help="This trial, or `baseline`. [default: failed]")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the trial has ended.")] = False,
    home: HomeOption = None,
) -> None:
    """Show what is known of a trial, step by step; without --trial, how the failed ones ended."""
    from sweepsvc.logs import logs as tell

    try:
        tell(sweep, _home(home), trial, follow, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("no longer followed; the sweep goes on where it runs", file=sys.stderr)


@app.command()
def report(
    sweeps: Annotated[
        list[str], typer.Argument(metavar="SWEEP...", help="Ids, or the starts of them alone.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", metavar="DIR", help="Where to. [default: report/ of the sweep]")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Write what came of a sweep as one page, with Markdown and CSV; of several, side by side."""
    from sweepsvc.report_files import write_report

    place = _home(home)
    place.check()
    for line in write_report(sweeps, place, out):
        print(line)


@app.command()
def plan(
    file: SweepFile,
    overrides: SetOption = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="The GPU to predict for: a100-40gb, ... [default: resources.accelerator, or the one here]",
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="HOURS", min=0, help="GPU hours that may be spent.")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure a few steps on the device, here, and correct the plan."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the trials that a sweep would run, with their parameters, memory and time; starts nothing."""
    from sweepsvc.plan import plan as make_plan
    from sweepsvc.plan import plan_json

    made = make_plan(_load(file, overrides), device, budget, calibrate)
    if as_json:
        _print_json(plan_json(made))
        return

    from sweepsvc.view import plan_lines, plan_table, terminal

    console = terminal()
    console.print(plan_table(made))
    for line in plan_lines(made):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def data(file: SweepFile, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Show what a sweep trains on: rows, token lengths, prompts; starts nothing."""
    from sweepsvc.dataview import data_json, look, shown

    view = look(_load(file, overrides))
    if as_json:
        _print_json(data_json(view))
        return

    from sweepsvc.view import terminal

    console = terminal()
    for part in shown(view):
        console.print(part, highlight=False, soft_wrap=True)


@app.command()
def export(
    sweep: SweepId,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="A new or empty folder.")],
    best: Annotated[bool, typer.Option("--best", help="The trial with the best objective.")] = False,
    trial: Annotated[int | None, typer.Option("--trial", metavar="N", help="This trial.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="The whole model: the adapter merged into the unquantised base.")
    ] = False,
    register: Annotated[
        str | None, typer.Option("--register", metavar="NAME", help="Into MLflow's model registry, too.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Write a completed trial's adapter, or the whole model, into a folder with a model card."""
    if best == (trial is not None):
        given = "both" if best else "neither"
        raise CannotStart(f"exactly one of --best and --trial N must be given, got {given}; say which trial")
    from sweepsvc.export import Asked
    from sweepsvc.export import export as write
    from sweepsvc.study import load_record

    place = _home(home)
    place.check()
    record = load_record(sweep, place.study_url)
    with _ended_by_sigterm():
        made = write(record, place, Asked(out, trial, merge, register))
    for line in made.lines():
        print(line)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that no draft is left."""
    import signal

    from sweeps.signals import handled

    try:
        with handled(signal.default_int_handler, signal.SIGTERM):
            yield
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `export` made.")],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="The instruction to answer.")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens of the answer.")
    ] = 256,
) -> None:
    """Ask an exported adapter or model, with the prompt of its training; on a GPU if there is one."""
    from sweeps.trial.generate import generate as answer

    print(answer(folder, prompt, max_tokens))


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


def _load(file: Path, overrides: list[str] | None, files_are_here: bool = True) -> Sweep:
    from sweeps.sweepfile import load_sweep

    names = _task_names if files_are_here else None  # a task_dir is elsewhere, too
    return load_sweep(file, overrides or (), names, files_are_here)


def _task_names(task_dir: str | None) -> Any:
    from sweeps.trial.tasks import task_names

    return task_names(task_dir)


def _home(home: Path | None, storage: str | None = None) -> Home:
    from sweepsvc.home import Home

    return Home(home, storage)


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
    finally:
        gc.freeze()  # else the process looks through all that it imported once more before it ends
