"""What lies between two trials of one actor: the seconds of the switch, and the memory that stays.

    python -m benchmarks.residency --trials 100 --model tiny
    python -m benchmarks.residency --trials 100 --model smollm2 --plot docs/residency.png

Trials of two steps in one process, through the runner that an actor keeps, on a base that is loaded once;
each has another rank than the one before. A switch is the time from a trial's last word to the next one's
first training step, by the clock and in seconds of the processor, which a busy machine does not change.
Memory is the process's resident size when a trial has ended. `--fresh` has each trial make its layers
anew, for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sweeps.spec import EvaluateSpec, TrialSpec
from sweeps.sweepfile import load_sweep
from sweeps.trial.paths import TrialFolder
from sweeps.trial.run import TrialRunner

QUICKSTART = Path(__file__).parent.parent / "search_spaces" / "quickstart.yaml"
RANKS = (4, 16, 32)
WARM = 5
"""Trials before the memory is looked at: libraries and allocators fill up in the first ones."""


@dataclass(frozen=True)
class Passage:
    """From one trial's end to the next one's: seconds to the first training step (of the clock, and of the
    processor), in training, in leaving it (saving the adapter, writing the result); resident MB then."""

    switch_seconds: float
    switch_cpu_seconds: float
    train_seconds: float
    leave_seconds: float
    memory_mb: float


def smollm2() -> TrialSpec:
    """The quickstart's first trial on two rows, one a step, without its benchmark."""
    sweep = load_sweep(QUICKSTART, task_names=lambda _: ("facts",))
    spec = sweep.resolve(sweep.search.space.first()).spec
    assert spec.train is not None
    short = spec.train.model_copy(update={"batch_size": 1, "samples": 2})
    schedule = spec.schedule.model_copy(update={"warmup_steps": 0})
    evaluate = EvaluateSpec(tasks=())
    return spec.model_copy(update={"train": short, "schedule": schedule, "evaluate": evaluate})


def tiny(place: Path) -> TrialSpec:
    """The same on a random model of two layers."""
    from tests.tiny import save_rows, save_tiny_model, tiny_spec

    model, rows = save_tiny_model(place / "model"), save_rows(place / "rows.json")
    settings = {"train.samples": 2, "train.batch_size": 1, "schedule.warmup_steps": 0, "train.eval_every": 0}
    return tiny_spec(model, rows, **{"model.quantization": "nf4", **settings})


def passages(spec: TrialSpec, trials: int, place: Path, fresh: bool) -> list[Passage]:
    """Run `trials` trials, one after another; what lay between them, the first load left out."""
    runner, process = TrialRunner(), psutil.Process()
    found: list[Passage] = []
    for number in range(trials + 1):
        lora = spec.lora.model_copy(update={"r": RANKS[number % len(RANKS)], "alpha": 8.0 + number})
        if fresh and runner._resident._base is not None:
            runner._resident._base.spare.clear()
        begin, cpu = time.perf_counter(), time.process_time()
        first = last = 0.0
        folder = place / "trials" / str(number)
        for progress in runner(spec.model_copy(update={"lora": lora}), folder):
            if progress.phase == "training":
                last = time.perf_counter()
                if not first:
                    first, cpu = last, time.process_time() - cpu
        end = time.perf_counter()
        result = TrialFolder(folder).read_result()
        assert result is not None
        assert result.outcome == "completed", result.failure
        memory = process.memory_info().rss / 1e6
        found.append(Passage(first - begin, cpu, last - first, end - last, memory))
    return found[1:]


def plot(found: Sequence[Passage], model: str, file: Path) -> None:
    """Memory and switch of each trial, one above the other."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5))
    above.plot([passage.memory_mb for passage in found], linewidth=1)
    above.set(ylabel="resident MB after the trial", title=f"{len(found)} trials in one actor, {model}")
    above.set_ylim(bottom=0)
    below.plot([passage.switch_seconds for passage in found], linewidth=1)
    below.axhline(0.5, linestyle=":", linewidth=1, color="grey")
    below.set(xlabel="trial", ylabel="switch, seconds")
    below.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def growth_mb(found: Sequence[Passage]) -> float:
    """The median of the last tenth over that of the first, after the warm-up."""
    memory = [passage.memory_mb for passage in found[WARM:]]
    share = max(1, len(memory) // 10)
    return statistics.median(memory[-share:]) - statistics.median(memory[:share])


def _summary(seconds: Sequence[float]) -> str:
    return f"median {statistics.median(seconds):.3f} s, slowest {max(seconds):.3f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        spec = smollm2() if given.model == "smollm2" else tiny(place)
        found = passages(spec, given.trials, place, given.fresh)
    switches = [passage.switch_seconds for passage in found]
    processor = [passage.switch_cpu_seconds for passage in found]
    leaves = [passage.leave_seconds for passage in found]
    memory = [passage.memory_mb for passage in found]
    early = memory[min(WARM, len(memory)) - 1]
    print(
        f"{given.trials} trials of two steps, {given.model}\n"
        f"switch: {_summary(switches)}; of the processor {_summary(processor)}\n"
        f"leaving a trial: {_summary(leaves)}\n"
        f"resident after trial 1 {memory[0]:.0f} MB, {WARM} {early:.0f} MB, last {memory[-1]:.0f} MB, most "
        f"{max(memory):.0f} MB; growth from trial {WARM} on {growth_mb(found):+.1f} MB"
    )
    if given.plot:
        plot(found, given.model, given.plot)


if __name__ == "__main__":
    main()
