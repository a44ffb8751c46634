"""The service's own cost a trial: proposing, scheduling, recording, on a trial that does nothing.

    python -m benchmarks.overhead --trials 200 --sampler random

Real study, Ray, MLflow, files; only the trial is empty. A trial's cost is the time from the end of the one
before to its own, so that starting Ray and importing libraries do not count; the wall time stands beside.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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
from sweepsvc.view import LineView

SWEEP_ID = "overhead-1"
SWEEP = """
name: overhead
trial: {{evaluate: {{tasks: [blimp_causative]}}}}
search:
  sampler: {sampler}
  trials: {trials}
  space:
    lora.r: {{low: 1, high: 100000}}
    lora.alpha: ["2*r", "r", 1]
baseline: false
resources: {{gpus: 0, cpus: 1, parallel: {parallel}}}
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


class TimedRun(SweepRun):
    """A sweep run that notes when each trial ended."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)  # type: ignore[arg-type]
        self.ends: list[float] = []

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        super().ended(proposal, result)
        self.ends.append(time.perf_counter())


def measure(trials: int, sampler: str, parallel: int, place: Path) -> tuple[list[float], float]:
    """When each trial ended, in seconds, and the wall seconds of the whole sweep."""
    text = SWEEP.format(sampler=sampler, trials=trials, parallel=parallel)
    sweep = load_sweep_text(text, str(place / "overhead.yaml"), (), place)
    home, sweep_id = Home(place), SWEEP_ID
    facts = gather(Path(sweep.source))
    start = time.perf_counter()
    runner = "benchmarks.overhead:NoOpTrials"
    with RayScheduler(sweep.resources, home.sweep(sweep_id).ray, runner=runner) as scheduler:
        folder = prepare(sweep, home, sweep_id)
        study = open_study(sweep, sweep_id, home.study_url, facts)
        recorder = MlflowRecorder(sweep, sweep_id, home.tracking_uri, home.artifacts, facts)
        recorder.open()
        with (place / "log").open("w") as log:
            tracking = Outbox(recorder, folder)
            run = TimedRun(study, tracking, folder, LineView(Console(file=log)), sweep.faults)
            record = drive(run, scheduler)
    assert record.state == "completed", record.state
    assert len(run.ends) == trials
    return run.ends, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--parallel", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        ends, wall = measure(given.trials, given.sampler, given.parallel, Path(place))
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    later = gaps[len(gaps) // 2 :]
    print(
        f"{given.trials} no-op trials, sampler {given.sampler}, {given.parallel} at once: "
        f"median {statistics.median(gaps):.4f} s, mean {statistics.mean(gaps):.4f} s, "
        f"mean of the later half {statistics.mean(later):.4f} s a trial; whole sweep {wall:.1f} s"
    )


if __name__ == "__main__":
    main()
