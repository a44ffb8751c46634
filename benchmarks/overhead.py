"""The service's own cost a trial: proposing, scheduling, recording, on a trial that does nothing.

    python -m benchmarks.overhead --trials 200 --sampler random
    python -m benchmarks.overhead --trials 10000 --sampler grid
    python -m benchmarks.overhead --study-url postgresql+psycopg2://... --tracking-uri postgresql+psycopg2://...

Real study, Ray, MLflow, files; only the trial is empty. A trial's cost is the time from the end of the one
before to its own, so that starting Ray and importing libraries do not count; the wall time stands beside. The
tracker hears of trials meanwhile, and of the last ones after the end: "all told" is the time until it has
heard everything, a trial.
Each block of trials is shown by itself, with the memory and the CPU seconds of the driver: what grows with
the number of trials shows there. `--profile FILE` writes what the driver's functions took, for `python -m
pstats FILE`.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from sweeps.result import Measured, Progress, Score, TrialResult
from sweeps.spec import TrialSpec
from sweeps.sweepfile import load_sweep_text
from sweeps.trial.keeping import Keeping
from sweeps.trial.paths import TrialFolder
from sweepsvc.facts import gather
from sweepsvc.home import Home
from sweepsvc.launch import SweepRun, drive, prepare
from sweepsvc.outbox import Outbox
from sweepsvc.protocols import Proposal
from sweepsvc.recorder import MlflowRecorder
from sweepsvc.scheduler import RayScheduler
from sweepsvc.study import open_study
from sweepsvc.urls import masked
from sweepsvc.view import LineView

SWEEP_ID = "overhead-1"
SWEEP = """
name: overhead
trial: {{evaluate: {{tasks: [blimp_causative]}}}}
search:
  sampler: {sampler}
  {budget}
  space:
{space}
baseline: false
resources: {{gpus: 0, cpus: 1, parallel: {parallel}}}
"""
DRAWN = """
    lora.r: {low: 1, high: 100000}
    lora.alpha: ["2*r", "r", 1]
"""
LISTED = """
    lora.r: [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    lora.alpha: [3, 5, 7, 9, 11, 13, 15, 17, 19, 21]
    train.seed: SEEDS
"""


class NoOpTrials:
    """A runner whose trials report once and leave a result."""

    def __call__(self, spec: TrialSpec, folder: Path, keeping: Keeping) -> Iterator[Progress]:
        files = TrialFolder(folder)
        files.write_spec(spec)
        yield Progress(phase="training", step=1, steps=1, train_loss=1.0, lr=spec.optimizer.lr)
        files.write_result(
            TrialResult(
                outcome="completed",
                scores={"blimp_causative": Score(value=1 / spec.lora.r)},
                measured=Measured(peak_memory_gb=0.1),
            )
        )


@dataclass(frozen=True)
class End:
    """When a trial ended, in seconds, and what the driver had taken by then."""

    at: float
    cpu_seconds: float
    memory_mb: float


class TimedRun(SweepRun):
    """A sweep run that notes when each trial ended, and shows each block of them."""

    def __init__(self, block: int, *parts: object) -> None:
        super().__init__(*parts)  # type: ignore[arg-type]
        self._block = block
        self.ends: list[End] = []
        self._process = psutil.Process()

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        super().ended(proposal, result)
        memory = self._process.memory_info().rss / 1e6
        self.ends.append(End(time.perf_counter(), time.process_time(), memory))
        if len(self.ends) % self._block == 0:
            self.show()

    def show(self) -> None:
        """What one trial of the last block took, and what the driver had grown to at its end."""
        block = self.ends[-self._block - 1 :]
        gaps = [after.at - before.at for before, after in itertools.pairwise(block)]
        cpu = (block[-1].cpu_seconds - block[0].cpu_seconds) / len(gaps)
        print(
            f"to trial {len(self.ends):>6}: median {statistics.median(gaps):.4f} s, mean "
            f"{statistics.mean(gaps):.4f} s a trial, {cpu:.4f} s of it the driver's CPU; driver "
            f"{block[-1].memory_mb:.1f} MB",
            flush=True,
        )


def sweep_text(trials: int, sampler: str, parallel: int) -> str:
    """A sweep of `trials` no-op trials; a grid has no budget, its space is that large."""
    if sampler != "grid":
        space, budget = DRAWN, f"trials: {trials}"
    elif trials % 100 == 0:
        space, budget = LISTED.replace("SEEDS", str(list(range(trials // 100)))), ""
    else:
        raise SystemExit(f"the grid has 100 trials a seed, got --trials {trials}; give a multiple of 100")
    return SWEEP.format(sampler=sampler, budget=budget, space=space, parallel=parallel)


def measure(
    trials: int,
    sampler: str,
    parallel: int,
    place: Path,
    study_url: str = "",
    tracking_uri: str = "",
    block: int = 1000,
) -> tuple[list[End], float, float]:
    """How each trial ended, when the tracker had heard it all, and the wall seconds of the whole sweep.

    Study and tracker are SQLite files in `place` where no address is given.
    """
    sweep = load_sweep_text(sweep_text(trials, sampler, parallel), str(place / "overhead.yaml"), (), place)
    home, sweep_id = Home(place), SWEEP_ID
    facts = gather(Path(sweep.source))
    start = time.perf_counter()
    runner = "benchmarks.overhead:NoOpTrials"
    with RayScheduler(sweep.resources, home.sweep(sweep_id).ray, runner=runner) as scheduler:
        folder = prepare(sweep, home, sweep_id)
        study = open_study(sweep, sweep_id, study_url or home.study_url, facts)
        recorder = MlflowRecorder(sweep, sweep_id, tracking_uri or home.tracking_uri, home.artifacts, facts)
        recorder.open()
        with (place / "log").open("w") as log:
            tracking = Outbox(recorder, folder)
            run = TimedRun(block, study, tracking, folder, LineView(Console(file=log)), sweep.faults)
            record = drive(run, scheduler)
        told = time.perf_counter()
    assert record.state == "completed", record.state
    assert "in the outbox" not in (place / "log").read_text("utf-8"), "the tracker did not hear everything"
    assert len(run.ends) == trials
    return run.ends, told, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--block", type=int, default=1000)
    parser.add_argument("--study-url", default="")
    parser.add_argument("--tracking-uri", default="")
    parser.add_argument("--profile", default="")
    given = parser.parse_args()
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as place:
        if given.profile:
            profile.enable()
        stores = (given.study_url, given.tracking_uri)
        ends, told, wall = measure(
            given.trials, given.sampler, given.parallel, Path(place), *stores, block=given.block
        )
    if given.profile:
        profile.disable()
        profile.dump_stats(given.profile)
    gaps = [after.at - before.at for before, after in itertools.pairwise(ends)]
    later = gaps[len(gaps) // 2 :]
    named = ", ".join(masked(url) for url in stores if url) or "SQLite"
    print(
        f"{given.trials} no-op trials, sampler {given.sampler}, {given.parallel} at once, {named}: "
        f"median {statistics.median(gaps):.4f} s, mean {statistics.mean(gaps):.4f} s, "
        f"mean of the later half {statistics.mean(later):.4f} s a trial; all told "
        f"{(told - ends[0].at) / len(gaps):.4f} s a trial; whole sweep {wall:.1f} s"
    )


if __name__ == "__main__":
    main()
