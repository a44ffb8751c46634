"""What a person sees: lines, the live table, the final table, the stable JSON."""

from __future__ import annotations

import io
import json
from typing import Any

from rich.console import Console

from sweeps.result import Failure, Measured, Progress, Score, TrialResult
from sweeps.spec import TrialSpec
from sweepsvc import view
from sweepsvc.protocols import Proposal, SweepRecord, TrialRecord


def proposal(number: int | None, r: int = 8, alpha: float = 16.0, rule: str = "2*r") -> Proposal:
    spec = TrialSpec.model_validate({"lora": {"r": r, "alpha": alpha}})
    if number is None:
        return Proposal(key="baseline", spec=spec.untrained())
    params = {"lora.r": r, "lora.alpha": alpha}
    return Proposal(key=str(number), spec=spec, number=number, params=params, rules={"lora.alpha": rule})


def completed(score: float, trainable: int = 1000) -> TrialResult:
    measured = Measured(peak_memory_gb=14.18, wall_seconds=100.04, train_seconds=90.0, eval_seconds=9.0)
    scores = {"facts": Score(value=score, stderr=0.05, documents=72)}
    return TrialResult(outcome="completed", scores=scores, trainable_params=trainable, measured=measured)


FAILED = TrialResult(outcome="failed", failure=Failure(kind="diverged", message="the loss must stay finite"))


def record(**changes: Any) -> SweepRecord:
    trials = [
        TrialRecord(proposal(0), "completed", 1, completed(0.5), 0.5, "run0"),
        TrialRecord(proposal(1, 32, 64.0), "completed", 1, completed(0.75), 0.75, "run1"),
        TrialRecord(proposal(2, 32, 1.0, "1"), "failed", 1, FAILED, None, "run2"),
        TrialRecord(proposal(3, 8, 1.0, "1"), "waiting"),
    ]
    baseline = TrialRecord(proposal(None), "completed", 1, completed(0.2, 0), 0.2, "base")
    values: dict[str, Any] = {
        "sweep_id": "demo-1",
        "state": "failed",
        "objective_metric": "score.mean",
        "maximize": True,
        "baselines": [baseline],
        "trials": trials,
        "facts": {},
    }
    return SweepRecord(**{**values, **changes})


def text_of(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_table_has_the_baseline_on_top_and_marks_the_best() -> None:
    lines = [
        line for line in text_of(view.result_table(record())).splitlines() if "│" in line and "┃" not in line
    ]
    assert [line.split("│")[1].strip() for line in lines] == [
        "baseline",
        "0",
        "1 *",
        "2 failed: diverged",
        "3 waiting",
    ]
    assert [cell.strip() for cell in lines[2].split("│")[2:-1]] == [
        "32",
        "64 (2*r)",
        "1,000",
        "0.750 ± 0.050",
        "14.18",
        "100.0",
    ]


def test_a_narrow_terminal_loses_no_number() -> None:
    narrow = Console(file=io.StringIO(), width=60)
    narrow.print(view.results(record(), narrow))
    shown = narrow.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert "trial 1 (lora.r=32, lora.alpha=2*r) * completed" in shown
    assert "    facts 0.750 ± 0.050" in shown
    assert "    1,000 trainable, 100.0 s, 14.18 GB" in shown
    assert "    diverged: the loss must stay finite" in shown
    wide = Console(file=io.StringIO(), width=120)
    wide.print(view.results(record(), wide))
    assert "┃ trial" in wide.file.getvalue()  # type: ignore[attr-defined]


def test_a_score_that_is_not_finite_is_null_in_json() -> None:
    broken = TrialRecord(proposal(0), "completed", 1, completed(float("nan")), None, "run0")
    given = view.status_json(record(trials=[broken]))
    assert given["trials"][0]["scores"] == {"facts": None}
    json.dumps(given, allow_nan=False)


def test_a_failed_trial_shows_no_numbers() -> None:
    failed = next(line for line in text_of(view.result_table(record())).splitlines() if "diverged" in line)
    assert [cell.strip() for cell in failed.split("│")[4:-1]] == ["", "", "", ""]


def test_the_best_is_the_least_when_the_objective_is_minimised() -> None:
    best = view.best_trial(record(maximize=False))
    assert best is not None
    assert best.proposal.number == 0
    assert view.best_trial(record(trials=[])) is None


def test_the_json_has_the_stable_names() -> None:
    given = view.status_json(record())
    assert set(given) >= {"sweep", "state", "trials"}
    stable = (
        "number state params score scores peak_memory_gb wall_seconds train_seconds eval_seconds attempts"
    )
    for trial in given["trials"]:
        assert set(trial) >= {*stable.split(), "mlflow_run_id", "error"}
    assert given["trials"][1]["params"] == {"lora.r": 32, "lora.alpha": 64.0, "lora.alpha_rule": "2*r"}
    assert given["trials"][1]["scores"] == {"facts": 0.75}
    assert given["trials"][2]["error"] == "diverged: the loss must stay finite"
    assert given["trials"][3]["score"] is None
    json.dumps(given, allow_nan=False)


def test_a_prompt_of_many_lines_is_shown_on_one() -> None:
    prompt = "Question:\n{question}\n" + "Think. " * 20
    shown = view.title(Proposal("3", TrialSpec(), 3, {"data.prompt": prompt, "lora.alpha": 16.0}))
    assert shown.startswith("trial 3 (data.prompt=Question: {question} Think.")
    assert shown.endswith("..., lora.alpha=16.0)")
    assert len(shown) < 120
    assert "\n" not in view.with_rule(prompt, None)


def test_a_pipe_gets_one_line_an_event() -> None:
    console = Console(file=io.StringIO(), width=80)
    lines = view.LineView(console)
    lines.note("the space has 4 distinct trials, all proposed")
    lines.started(proposal(0))
    report = Progress(
        phase="training", step=20, steps=54, train_loss=2.3149, tokens_per_second=812.4, seconds_left=41.2
    )
    lines.reported(proposal(0), report)
    lines.ended(proposal(0), completed(0.5))
    lines.ended(proposal(1), FAILED)
    seen = [line.partition("] ")[2] for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert seen == [
        "the space has 4 distinct trials, all proposed",
        "trial 0 (lora.r=8, lora.alpha=2*r) started",
        "trial 0 (lora.r=8, lora.alpha=2*r) training step 20/54  loss 2.3149  812 tokens/s  41 s left",
        "trial 0 (lora.r=8, lora.alpha=2*r) completed: facts 0.500 ± 0.050, 100 s",
        "trial 1 (lora.r=8, lora.alpha=2*r) failed: diverged: the loss must stay finite",
    ]


def test_a_terminal_gets_a_bar_for_each_running_trial_and_the_best_so_far() -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    live = view.LiveView(console, "score.mean", maximize=True)
    live.started(proposal(0))
    live.started(proposal(1, 32, 64.0))
    live.reported(proposal(1, 32, 64.0), Progress(phase="training", step=5, steps=10, train_loss=1.5))
    live.ended(proposal(0), completed(0.5))
    screen = text_of(live._render())
    assert "1 ended, 0 failed  best so far score.mean 0.5 (trial 0 (lora.r=8, lora.alpha=2*r))" in screen
    assert "trial 1 (lora.r=32, lora.alpha=2*r)" in screen
    assert "training step 5/10  loss 1.5000" in screen
    live.ended(proposal(2), completed(0.4))
    live.ended(proposal(None), completed(0.9))
    assert "3 ended, 0 failed  best so far score.mean 0.5" in text_of(live._render())


def test_a_table_that_begins_late_counts_what_ended_before() -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    live = view.LiveView(console, "score.mean", maximize=True, before=record().trials)
    live.ended(proposal(3), completed(0.4))
    assert "4 ended, 1 failed  best so far score.mean 0.75 (trial 1" in text_of(live._render())
