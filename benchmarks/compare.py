"""Us and a handwritten script on the same trials, rows and documents, one after the other, and the ratios.

    python -m benchmarks.compare --part train --rows FILE.json [--loss-on response]
    python -m benchmarks.compare --part evaluate --data-dir DIR
    python -m benchmarks.compare --part sweep --rows FILE.json --data-dir DIR --trials 8

`train` and `evaluate` run one trial of each side in a process of its own; `sweep` runs Ray Tune with
OptunaSearch, Trainer, HFLM and the MLflow callback, and `sweepsvc launch`. The sides take turns, round after
round. Prints tables for docs/benchmarks.md; `--json FILE` keeps every figure.

Sides: plain and tuned are `benchmarks.handwritten` in its two dresses; ours computes in bfloat16 as they do;
ours-auto with the dtype that we choose ourselves, left out where that is bfloat16 too.

Rows are of the Alpaca columns; documents of the hub's columns, `<task>.jsonl`. What is not given is invented,
and the output says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.tables import facts, facts_line, table, times
from benchmarks.work import (
    SMOLLM2,
    TRIALS,
    Found,
    Job,
    LossOn,
    Outcome,
    Part,
    TrialRecord,
    write_documents,
    write_rows,
)
from sweeps.errors import CannotStart
from sweeps.spec import ARTICLE_TASKS

ROOT = Path(__file__).parent.parent
Side = Literal["plain", "tuned", "ours", "ours-auto"]
SIDES: tuple[Side, ...] = ("plain", "tuned", "ours", "ours-auto")
YARDSTICKS: tuple[Side, ...] = ("plain", "tuned")

# What is asked of us, as a ratio to each dress.
_TRAIN_TARGETS = {"all": {"plain": 1.8, "tuned": 1.3}, "response": {"plain": 2.2, "tuned": 1.6}}
_TARGETS = {"evaluate": {"plain": 8.0, "tuned": 8.0}, "sweep": {"plain": 4.0, "tuned": 3.0}}


@dataclasses.dataclass(frozen=True)
class Run:
    """One side in one round: what it did, and what was seen of it from outside."""

    side: Side
    outcome: Outcome
    peak_gb: float
    processor_seconds: float

    @property
    def figures(self) -> dict[str, float | None]:
        """Seconds a trial, in the mean over the trials of the run; of the whole run; and its peak."""
        seen = {"processor": self.processor_seconds, "peak": self.peak_gb}
        return {**parts(self.outcome), "whole": self.outcome.whole_seconds, **seen}

    def to_json(self) -> dict[str, Any]:
        return {"side": self.side, **self.figures, "outcome": self.outcome.model_dump(mode="json")}


def parts(outcome: Outcome) -> dict[str, float | None]:
    """Mean seconds a trial spent in each part.

    Between trials is what lies from one trial's end to the next one's and is none of the parts: None of a
    single trial. `around` is the rest of the whole run: imports, starting, the end.
    """
    trials = sorted(outcome.trials, key=lambda trial: trial.ended)
    later = trials[1:]
    span = trials[-1].ended - trials[0].ended
    between = (span - sum(map(busy, later))) / len(later) if later else None
    return {
        "load": statistics.fmean(trial.load_seconds for trial in trials),
        "train": statistics.fmean(trial.train_seconds for trial in trials),
        "evaluate": statistics.fmean(trial.evaluate_seconds for trial in trials),
        "between": between,
        "around": outcome.whole_seconds - span - busy(trials[0]),
    }


def busy(trial: TrialRecord) -> float:
    """Seconds in the three parts."""
    return trial.load_seconds + trial.train_seconds + trial.evaluate_seconds


# --- one process ------------------------------------------------------------------------------------


class Watch:
    """The highest resident memory of the largest process under one, and the processor seconds of all of them.

    The kernel's own high-water mark of each process is read ten times a second: a process that restarts its
    mark, as a trial of ours does, loses a tenth of a second at most, as does one that ends.
    """

    def __init__(self, process: int) -> None:
        self.peak_bytes = 0
        self._seconds: dict[int, float] = {}
        self._process = process
        self._family: list[int] = [process]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def processor_seconds(self) -> float:
        return sum(self._seconds.values())

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        number = 0
        while not self._done.wait(0.1):
            if number % 5 == 0:
                self._family = descendants(self._process)
            number += 1
            for member in self._family:
                self.peak_bytes = max(self.peak_bytes, high_water_bytes(member))
                self._seconds[member] = max(self._seconds.get(member, 0.0), processor_seconds(member))


def descendants(process: int) -> list[int]:
    """A process and all that came from it and are still its family's."""
    family, waiting = [], [process]
    while waiting:
        family.append(waiting.pop())
        for file in Path(f"/proc/{family[-1]}/task").glob("*/children"):
            try:
                waiting += map(int, file.read_text().split())
            except OSError:  # it has ended meanwhile
                continue
    return family


def high_water_bytes(process: int) -> int:
    """The kernel's peak of the process's resident memory; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def processor_seconds(process: int) -> float:
    """What the process has computed, user and system; 0 of one that has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0.0
    user, system = text.rpartition(")")[2].split()[11:13]  # the name before may hold anything
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def spawn(module: str, arguments: Sequence[str], threads: int, log: Path) -> tuple[float, Watch]:
    """Run a module of ours in a process of its own; its wall seconds, and what was seen of it."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(log.parent / "datasets"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=environment,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all of it can be ended together
        )
        watch = Watch(process.pid)
        try:
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of it has ended
                os.killpg(process.pid, signal.SIGKILL)
            watch.stop()
    seconds = time.perf_counter() - started
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"{module} ended with {code}; the end of {log}:\n{tail}")
    return seconds, watch


def run_side(side: Side, job: Job, place: Path) -> Run:
    place.mkdir(parents=True)
    job = job.model_copy(update={"place": str(place)})
    written, out = place / "job.json", place / "outcome.json"
    written.write_text(job.model_dump_json(), "utf-8")
    module = "benchmarks.handwritten" if side in YARDSTICKS else "benchmarks.ours"
    seconds, watch = spawn(module, [str(written), str(out)], job.threads, place / "log")
    outcome = Outcome.model_validate_json(out.read_text("utf-8"))
    if not outcome.whole_seconds:
        outcome = outcome.model_copy(update={"whole_seconds": seconds})
    return Run(side, outcome, watch.peak_bytes / 1e9, watch.processor_seconds)


# --- the whole comparison ---------------------------------------------------------------------------


def dressed(job: Job, side: Side, found: Found) -> Job:
    """The job as one side does it."""
    match side:
        case "plain" | "ours":
            return job
        case "tuned":
            sizes = {"batch": found.batch, "eval_batch": found.eval_batch}
            return job.model_copy(update={**sizes, "grouped": True, "tuned": True})
        case "ours-auto":
            return job.model_copy(update={"dtype": "auto"})


def take_turns(
    job: Job, sides: Sequence[Side], rounds: int, found: Found, place: Path, say: Callable[[str], None]
) -> list[list[Run]]:
    """Every side once a round; ours-auto only once where it turns out to be as ours."""
    runs: list[list[Run]] = []
    left = list(sides)
    for number in range(rounds):
        done = []
        for side in left:
            done.append(run_side(side, dressed(job, side, found), place / f"round-{number}" / side))
            say(f"round {number + 1}, {side}: {done[-1].outcome.whole_seconds:.1f} s")
        dtypes = {run.side: run.outcome.dtype for run in done}
        if "ours-auto" in dtypes and dtypes["ours-auto"] == dtypes.get("ours"):
            say("ours-auto is left out: the dtype that we choose is bfloat16")
            left.remove("ours-auto")
            done = [run for run in done if run.side != "ours-auto"]
        runs.append(done)
    return runs


def find_sizes(job: Job, place: Path) -> Found:
    """The batch sizes of the tuned dress, found on a part of the rows and documents."""
    place.mkdir(parents=True)
    samples = min(job.samples, 2 * job.update)
    small = job.model_copy(update={"place": str(place), "samples": samples, "grouped": True, "tuned": True})
    rows = json.loads(Path(job.rows).read_text("utf-8"))[:samples]
    (place / "rows.json").write_text(json.dumps(rows), "utf-8")
    documents = place / "documents"
    documents.mkdir()
    for file in Path(job.documents).iterdir():
        lines = file.read_text("utf-8").splitlines()
        kept = lines if file.stem.endswith("_dev") else lines[:_FIND_DOCUMENTS]
        (documents / file.name).write_text("\n".join(kept) + "\n", "utf-8")
    small = small.model_copy(update={"rows": str(place / "rows.json"), "documents": str(documents)})
    written, out = place / "job.json", place / "found.json"
    written.write_text(small.model_dump_json(), "utf-8")
    spawn("benchmarks.handwritten", ["--find", str(written), str(out)], job.threads, place / "log")
    return Found.model_validate_json(out.read_text("utf-8"))


_FIND_DOCUMENTS = 8


def judged(job: Job, runs: Sequence[Run], place: Path) -> tuple[float | None, dict[Side, list[float]]]:
    """Losses on the rows held out: the untouched base's, and each side's adapters' in the order of trials."""
    adapters = {run.side: [trial.adapter for trial in _in_order(run, job)] for run in runs}
    flat = [adapter for folders in adapters.values() for adapter in folders if adapter]
    if not flat:
        return None, {}
    names = [place / name for name in ("judge-job.json", "adapters.json", "losses.json")]
    names[0].write_text(job.model_dump_json(), "utf-8")
    names[1].write_text(json.dumps(flat), "utf-8")
    spawn("benchmarks.judge", [*map(str, names)], job.threads, place / "judge-log")
    base, *losses = json.loads(names[2].read_text("utf-8"))
    read = iter(losses)
    return base, {side: [next(read) for _ in folders] for side, folders in adapters.items()}


def _in_order(run: Run, job: Job) -> list[TrialRecord]:
    by_trial = {(trial.r, trial.rule): trial for trial in run.outcome.trials}
    return [by_trial[trial] for trial in job.trials]


def check_same_work(runs: Sequence[Run]) -> None:
    """Raise where two sides did not do the same: other trials, tokens, parameters or benchmarks."""
    first, *others = runs
    for other in others:
        for what in ("tokens", "trainable", "rows"):
            mine, theirs = (_by_trial(run, what) for run in (first, other))
            if mine != theirs:
                raise RuntimeError(f"{what} must be equal, got {first.side} {mine}, {other.side} {theirs}")
        benchmarks = [{name for t in run.outcome.trials for name in t.scores} for run in (first, other)]
        if benchmarks[0] != benchmarks[1]:
            raise RuntimeError(f"benchmarks must be equal, got {benchmarks[0]} and {benchmarks[1]}")


def _by_trial(run: Run, what: str) -> dict[tuple[int, str], Any]:
    return {(trial.r, trial.rule): getattr(trial, what) for trial in run.outcome.trials}


# --- what is printed --------------------------------------------------------------------------------


def ratios(runs: Sequence[Sequence[Run]], figure: str, ours: Side, other: Side) -> list[float]:
    """Theirs over ours, round by round: how many times faster we are, or by how much the peak is smaller."""
    found = []
    for done in runs:
        figures = {run.side: run.figures[figure] for run in done}
        mine, theirs = figures.get(ours), figures.get(other)
        if mine and theirs:
            found.append(theirs / mine)
    return found


def median(runs: Sequence[Sequence[Run]], figure: str, side: Side) -> float | None:
    values = [run.figures[figure] for done in runs for run in done if run.side == side]
    measured = [value for value in values if value is not None]
    return statistics.median(measured) if measured else None


_FIGURES = {
    "load": "load, s a trial",
    "train": "train, s a trial",
    "evaluate": "evaluate, s a trial",
    "between": "between two trials, s",
    "around": "start and end, s",
    "whole": "whole, s",
    "processor": "processor, s of the whole",
    "peak": "peak of the largest process, GB",
}


def speed_table(job: Job, runs: Sequence[Sequence[Run]]) -> str:
    """Medians of each side, and our ratio to each dress with its lowest and highest round."""
    sides = [side for side in SIDES if any(run.side == side for done in runs for run in done)]
    mines, others = ([side for side in sides if (side in YARDSTICKS) is wanted] for wanted in (False, True))
    pairs = [*itertools.product(mines, others)]
    head = ["part", *map(_title, sides), *(f"{mine} / {other}" for mine, other in pairs), "wanted"]
    rows: list[list[object]] = []
    for figure, title in _FIGURES.items():
        if any(median(runs, figure, side) for side in sides):
            spread = [_spread(ratios(runs, figure, mine, other)) for mine, other in pairs]
            rows.append([title, *(median(runs, figure, s) for s in sides), *spread, _wanted(job, figure)])
    if job.part != "evaluate":
        speed = {side: _rate(median(runs, "train", side), job) for side in sides}
        rows.append(["training rows/s", *speed.values(), *[None] * (len(pairs) + 1)])
    return table(head, rows)


def _title(side: Side) -> str:
    return f"{side}, bf16" if side == "ours" else side


def _rate(seconds: float | None, job: Job) -> float | None:
    return job.samples / seconds if seconds else None


def _spread(found: Sequence[float]) -> str:
    if len(found) < 2:
        return times(found[0] if found else None)
    return f"{times(statistics.median(found))} ({min(found):.2f} to {max(found):.2f})"


def _wanted(job: Job, figure: str) -> str | None:
    if figure == "peak":
        return "1 x"
    wanted: Mapping[str, float] | None = None
    if figure == "train":
        wanted = _TRAIN_TARGETS[job.loss_on]
    elif figure == "evaluate":
        wanted = _TARGETS["evaluate"]
    elif (figure, job.part) == ("whole", "sweep"):
        wanted = _TARGETS["sweep"]
    return " / ".join(f"{value:g} x" for value in dict.fromkeys(wanted.values())) if wanted else None


def results_table(
    job: Job, runs: Sequence[Run], base: float | None, held_out: Mapping[Side, list[float]]
) -> str:
    """Final losses and scores of the first round, side by side."""
    head = ["trial", "side", *(["train loss", "held-out loss"] if base is not None else []), *_tasks(runs)]
    rows: list[list[object]] = []
    if base is not None:
        rows.append(["untouched", "", None, _fixed(base), *[None] * len(_tasks(runs))])
    for place, (r, rule) in enumerate(job.trials):
        for run in runs:
            trial = _in_order(run, job)[place]
            losses = [_fixed(trial.train_loss), _fixed(held_out[run.side][place])] if base is not None else []
            scores = [_fixed(trial.scores.get(task)) for task in _tasks(runs)]
            name = f"r={r}, alpha={rule}" if job.part != "evaluate" else "untouched"
            rows.append([name, run.side, *losses, *scores])
    return table(head, rows)


def _fixed(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _tasks(runs: Sequence[Run]) -> list[str]:
    return [*dict.fromkeys(name for run in runs for trial in run.outcome.trials for name in trial.scores)]


def say_found(found: Found) -> list[str]:
    """What the tuned dress wears, and what was tried."""
    lines = []
    for title, seconds, size in (
        ("training", found.train_seconds, found.batch),
        ("HFLM", found.evaluate_seconds, found.eval_batch),
    ):
        if seconds:
            tried = ", ".join(f"{tries} in {took:.1f} s" for tries, took in seconds.items())
            lines.append(f"tuned: {title} in batches of {size} ({tried})")
    return lines


# --- the command ------------------------------------------------------------------------------------


def model_folder(model: str) -> str:
    """The folder of safetensors that both sides load: a package's GGUF file is converted once, before."""
    from sweeps.spec import ModelSpec
    from sweeps.trial.gguf import converted
    from sweeps.trial.source import FolderModel, GgufModel, locate

    source = locate(ModelSpec(id=model))
    match source:
        case GgufModel():
            return str(converted(source.path))
        case FolderModel():
            return str(source.path.absolute())
        case _:
            raise CannotStart(f"--model must be a folder, a GGUF file or package:NAME/FILE, got {model}")


def warm(folder: str) -> None:
    """Read every file once, so that no side finds the page cache colder than another."""
    for file in Path(folder).iterdir():
        if file.is_file():
            file.read_bytes()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--part", choices=("train", "evaluate", "sweep"), required=True)
    made.add_argument("--rows", type=Path, help="a JSON file of rows in the Alpaca columns")
    made.add_argument("--data-dir", type=Path, help="a folder of <task>.jsonl")
    made.add_argument("--trials", type=int, default=8, help="of the sweep")
    made.add_argument("--samples", type=int, default=96, help="rows a trial trains on, once each")
    made.add_argument("--update", type=int, default=32, help="rows an optimiser step")
    made.add_argument("--documents", type=int, default=40, help="of each benchmark")
    made.add_argument("--tasks", default=",".join(ARTICLE_TASKS))
    made.add_argument("--loss-on", choices=("all", "response"), default="all")
    made.add_argument("--rounds", type=int, help="how often each side runs; 3, and once for a sweep")
    made.add_argument("--sides", default=",".join(SIDES))
    made.add_argument("--model", default=SMOLLM2)
    made.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument("--tuned-batch", type=int, help="instead of looking for the best")
    made.add_argument("--tuned-eval-batch", type=int, help="likewise, of HFLM")
    made.add_argument("--json", type=Path, help="write every figure to this file")
    made.add_argument("--place", type=Path, help="keep the runs and their logs here")
    return made


def faults(given: argparse.Namespace) -> list[str]:
    """What of the arguments cannot be, all of it."""
    found = []
    if given.samples % given.update:
        found.append(f"--samples must be a multiple of --update, got {given.samples} and {given.update}")
    if given.samples // given.update < 2:
        found.append(
            f"two steps at least must be trained, got {given.samples} rows in updates of {given.update}"
        )
    if given.update % 8 and "plain" in given.sides:
        found.append(f"--update must be a multiple of 8, the plain batch, got {given.update}")
    if given.tuned_batch and given.update % given.tuned_batch:
        found.append(f"--tuned-batch must divide --update, got {given.tuned_batch} and {given.update}")
    if not 1 <= given.trials <= len(TRIALS):
        found.append(f"--trials must be from 1 to {len(TRIALS)}, got {given.trials}")
    if wrong := set(given.sides.split(",")) - {*SIDES}:
        found.append(f"--sides must be of {', '.join(SIDES)}, got {', '.join(sorted(wrong))}")
    for name in ("rows", "data_dir"):
        path = getattr(given, name)
        if path is not None and not path.exists():
            found.append(f"--{name.replace('_', '-')} must exist, got {path}")
    return found


def prepare(given: argparse.Namespace, place: Path) -> tuple[Job, list[str]]:
    """The job that all sides share, its files in `place`, and what is to be said of them."""
    (place / "documents").mkdir(parents=True)
    rows, held_out, said = write_rows(given.rows, given.samples, place)
    tasks = tuple(given.tasks.split(","))
    counts, invented = write_documents(given.data_dir, tasks, given.documents, place / "documents")
    part = cast(Part, given.part)
    job = Job(
        part=part,
        model=model_folder(given.model),
        dtype="bfloat16",
        quantization=given.quantization,
        rows=str(rows),
        held_out=str(held_out),
        samples=given.samples,
        update=given.update,
        loss_on=cast(LossOn, given.loss_on),
        trials=TRIALS[: given.trials if part == "sweep" else 1],
        documents=str(place / "documents"),
        tasks=tasks,
        place=str(place),
        threads=given.threads,
    )
    notes = []
    if part != "evaluate":
        loss = "the response" if job.loss_on == "response" else "all tokens"
        notes += [said, f"{job.samples} rows a trial in updates of {job.update}, loss on {loss}"]
    if part != "train":
        documents = ", ".join(f"{task} {count}" for task, count in counts.items())
        notes += [f"documents: {documents}", *invented]
    return job, notes


def compare(given: argparse.Namespace, place: Path, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Run everything; the report in Markdown, and every figure as plain data."""
    job, notes = prepare(given, place)
    warm(job.model)
    sides = cast("list[Side]", given.sides.split(","))
    found = Found(
        train_seconds={given.tuned_batch: 0.0} if given.tuned_batch else {},
        evaluate_seconds={given.tuned_eval_batch: 0.0} if given.tuned_eval_batch else {},
    )
    sizes = f"tuned: batches of {found.batch} and of {found.eval_batch} for HFLM, as asked for"
    chosen = [sizes] if found != Found() else []
    if "tuned" in sides and not chosen:
        found = find_sizes(job, place / "find")
        chosen = say_found(found)
        for line in chosen:
            say(line)
    rounds = given.rounds or (1 if job.part == "sweep" else 3)
    runs = take_turns(job, sides, rounds, found, place, say)
    check_same_work(runs[0])
    base, held_out = judged(job, runs[0], place)
    known = facts()
    notes += chosen
    notes += [f"{run.side}: {note}" for run in runs[0] for note in _own_notes(run)]
    notes.append(f"{rounds} round{'s' if rounds > 1 else ''}, medians; {job.threads} threads for each side")
    report = "\n\n".join(
        [
            speed_table(job, runs),
            results_table(job, runs[0], base, held_out),
            "\n".join(f"- {note}" for note in notes),
            facts_line(known),
        ]
    )
    kept: dict[str, Any] = {
        "facts": known,
        "notes": notes,
        "job": job.model_dump(mode="json"),
        "found": found.model_dump(mode="json"),
        "base_held_out_loss": base,
        "held_out_losses": held_out,
        "rounds": [[run.to_json() for run in done] for done in runs],
    }
    return report, kept


_TELLING = ("dtype", "token budget", "adapter dtype", "bf16 autocast", "HFLM", "4-bit weights")


def _own_notes(run: Run) -> list[str]:
    return [note for note in run.outcome.notes if note.startswith(_TELLING)]


def main(arguments: Sequence[str] | None = None) -> None:
    commands = parser()
    given = commands.parse_args(arguments)
    if found := faults(given):
        commands.error("; ".join(found))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="compare-") as temporary:
        place = (given.place or Path(temporary) / "runs").absolute()
        try:
            report, kept = compare(given, place, say)
        except CannotStart as error:
            commands.error(str(error))
    print(report)
    if given.json:
        given.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
