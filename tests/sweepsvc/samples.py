"""Small sweeps and results for the service's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sweeps.result import Failure, Measured, Outcome, Score, TrialResult
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep_text

TASK = "blimp_causative"


def sweep_of(search: str, rest: str = "", trial: str = "", name: str = "demo") -> Sweep:
    """A sweep with `search` and `trial` in YAML's flow style, and `rest` as further lines."""
    text = f"name: {name}\ntrial: {{evaluate: {{tasks: [{TASK}]}}{trial}}}\nsearch: {{{search}}}\n{rest}\n"
    return load_sweep_text(text, "/sweeps/demo.yaml", (), Path("/sweeps"))


def result_of(outcome: Outcome, score: float | None = None, **more: Any) -> TrialResult:
    """A result with one score; a failed one has a failure."""
    scores = {} if score is None else {TASK: Score(value=score, stderr=0.01, documents=100)}
    if outcome == "failed":
        trace = "Traceback ...\nDiverged: the loss is nan"
        more["failure"] = Failure(kind="diverged", message="the loss is nan", traceback=trace)
    measured = Measured(peak_memory_gb=1.5, wall_seconds=3.0)
    return TrialResult(outcome=outcome, scores=scores, measured=measured, steps=4, **more)
