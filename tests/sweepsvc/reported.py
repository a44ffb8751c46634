"""Sweeps as the study has them, and what lies beside it, for the tests of reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sweeps.result import Failure, Measured, Outcome, Progress, Score, TrialResult
from sweeps.spec import TrialSpec
from sweepsvc.protocols import Importance, Proposal, Report, SweepRecord, TrialRecord
from sweepsvc.report import build
from sweepsvc.report_documents import Documents
from sweepsvc.report_words import Evidence, SweepReport
from tests.sweepsvc.samples import sweep_of

ANSWERS = {  # of ten documents each
    "baseline": [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    "0": [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    "1": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
}


def proposal(
    number: int | None, r: int = 8, alpha: float = 16.0, rule: str = "", repeat: int = 0
) -> Proposal:
    spec = TrialSpec.model_validate({"lora": {"r": r, "alpha": alpha}, "evaluate": {"tasks": ["facts"]}})
    if number is None:
        return Proposal(key="baseline", spec=spec.untrained())
    rules = {"lora.alpha": rule} if rule else {}
    params = {"lora.r": r, "lora.alpha": alpha}
    return Proposal(str(number), spec, number=number, params=params, rules=rules, repeat=repeat)


def ended(of: Proposal, outcome: Outcome, *, loss: float = 1.0, **scores: float) -> TrialRecord:
    """How the trial ended, with its scores, by task, and every number one would be misled by."""
    failure = (
        Failure(kind="diverged", message="the loss must stay finite, got nan")
        if outcome == "failed"
        else None
    )
    result = TrialResult(
        outcome=outcome,
        scores={task: Score(value=value, stderr=0.05, documents=10) for task, value in scores.items()},
        train_loss=loss,
        trainable_params=0 if of.is_baseline else 1000,
        measured=Measured(
            peak_memory_gb=1.0 + (of.number or 0),
            train_seconds=0.0 if of.is_baseline else 20.0 + (of.number or 0),
            eval_seconds=3.0,
            wall_seconds=31.0,
        ),
        failure=failure,
        environment={"torch": "2.13.0", "device": "A100" if of.number != 1 else "H100"},
        notes=("dtype bfloat16: set by model.dtype",),
    )
    value = sum(scores.values()) / len(scores) if scores and outcome == "completed" else None
    return TrialRecord(of, outcome, 1, result, value, f"run-{of.key}")


def demo_trials() -> list[TrialRecord]:
    return [
        ended(proposal(0, 8, 1.0, "1"), "completed", facts=0.2),
        ended(proposal(1, 32, 64.0, "2*r"), "completed", facts=0.9),
        ended(proposal(2, 32, 1.0, "1"), "failed", facts=0.99),
        ended(proposal(3, 8, 16.0, "2*r"), "interrupted", facts=0.98),
        ended(proposal(4, 64, 128.0, "2*r"), "pruned", facts=0.97),
        TrialRecord(proposal(5, 64, 1.0, "1"), "waiting"),
    ]


def record_of(trials: Sequence[TrialRecord], **changes: Any) -> SweepRecord:
    record = SweepRecord(
        sweep_id="demo-1",
        state="failed",
        objective_metric="score.mean",
        maximize=True,
        baselines=[ended(proposal(None), "completed", facts=0.1)],
        trials=trials,
        facts={"git_commit": "0123abc", "owner": "host:1:2"},
    )
    return dataclasses.replace(record, **changes)


def documents(answers: Mapping[str, Sequence[float]] = ANSWERS) -> dict[str, dict[str, Documents]]:
    return {
        key: {"facts": Documents(tuple(f"facts/{i}" for i in range(len(one))), tuple(map(float, one)))}
        for key, one in answers.items()
    }


def losses(*values: float) -> list[Report]:
    return [
        Report(Progress(phase="training", step=step, steps=9, train_loss=value), step)
        for step, value in enumerate(values, 1)
    ]


def evidence_of(**changes: Any) -> Evidence:
    values: dict[str, Any] = {
        "documents": documents(),
        "reports": {"0": losses(3.0, 2.0), "1": losses(3.0, 0.5), "2": losses(3.0, 90.0, float("nan"))},
        "importance": Importance({"lora.alpha": 0.75, "lora.r": 0.25}, 4),
        "made_at": "2026-11-25 10:00 UTC",
        "command": "python -m sweepsvc launch demo.yaml",
    }
    return Evidence(**{**values, **changes})


def report_of(trials: Sequence[TrialRecord] | None = None, **changes: Any) -> SweepReport:
    record = record_of(demo_trials() if trials is None else trials, **changes)
    sweep = sweep_of('sampler: grid, space: {lora.r: [8, 32], lora.alpha: ["2*r", 1]}')
    return build(record, sweep, evidence_of())
