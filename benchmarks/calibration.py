"""How good a calibrated plan is: what it tells of a trial's training, beside what the trial then takes.

    python -m benchmarks.calibration                 # the quickstart's first trial, on the GPU or CPU here
    python -m benchmarks.calibration --file search_spaces/consumer_24gb.yaml --samples 2000

Calibrated and trained in turn, so that a busy machine disturbs both; nothing is scored.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--file", type=Path, default=Path("search_spaces/quickstart.yaml"))
    parser.add_argument("--samples", type=int, help="rows to train on, in place of the file's")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()

    import torch

    from sweeps.devices import device_reported
    from sweeps.sweepfile import load_sweep
    from sweeps.trial.base import Resident
    from sweeps.trial.calibrate import calibrate
    from sweeps.trial.paths import TrialFolder
    from sweeps.trial.predict import predict
    from sweeps.trial.run import run_trial
    from sweeps.trial.tasks import task_names

    overrides = []
    if arguments.samples:
        overrides = [f"train.samples={arguments.samples}", "schedule.warmup_steps=0"]
    sweep = load_sweep(arguments.file, overrides, task_names=task_names)
    spec = sweep.resolve(next(iter(sweep.search.space.combinations()))).spec
    spec = spec.model_copy(update={"evaluate": spec.evaluate.model_copy(update={"tasks": ()})})
    on_gpu = torch.cuda.is_available()
    device = device_reported(torch.cuda.get_device_name()) if on_gpu else None
    if on_gpu and device is None:
        parser.error(f"the GPU here, {torch.cuda.get_device_name()}, is not in the table of devices")
    for _ in range(arguments.rounds):
        made = calibrate(spec, device)
        told = predict(spec, device, not on_gpu, made)
        with tempfile.TemporaryDirectory() as folder:
            for _ in run_trial(spec, Resident(), Path(folder)):
                pass
            result = TrialFolder(folder).read_result()
        assert result is not None
        assert told.train_seconds is not None
        took, peak = result.measured.train_seconds, result.measured.peak_accelerator_allocated_gb
        print(f"{made.note}; told {told.train_seconds:.1f} s, took {took:.1f} s", flush=True)
        if peak is not None:
            print(f"told a peak of {told.peak_memory_gb:.2f} GB, was {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
