"""How long `resume` takes to find out how a sweep stands: study, result files and MLflow against each other.

    python -m benchmarks.resuming --trials 2000

A real sweep of trials that do nothing (`overhead.py`), then `python -m sweepsvc resume` on it, three times:
its own figure ("reconciled in") and the wall time of the whole command, imports included.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.overhead import SWEEP_ID, measure

TIMES = 3


def resume(home: Path) -> tuple[float, float]:
    """The seconds of the reconciling, and of the command."""
    command = [sys.executable, "-m", "sweepsvc", "resume", SWEEP_ID, "--home", str(home)]
    start = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - start
    said = re.search(r"reconciled in ([\d.]+) s", run.stdout)
    if run.returncode != 0 or said is None:
        raise RuntimeError(f"resume ended with {run.returncode}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return float(said[1]), wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--parallel", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measure(given.trials, "random", given.parallel, Path(place))
        for _ in range(TIMES):
            reconciled, wall = resume(Path(place))
            print(f"{given.trials} finished trials: reconciled in {reconciled:.1f} s, command {wall:.1f} s")


if __name__ == "__main__":
    main()
