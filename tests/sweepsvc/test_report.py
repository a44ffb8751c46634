"""What a report says of a sweep: only what completed is compared, and each number is the study's."""

from __future__ import annotations

import math

import pytest
from scipy.stats import t

from sweeps.spec import TrialSpec
from sweepsvc.protocols import Proposal
from sweepsvc.report import build
from sweepsvc.report_compare import compared
from sweepsvc.report_documents import Documents
from sweepsvc.report_text import as_csv, legend, score_text, summary
from sweepsvc.report_views import HeatMap, curves, heat_map
from sweepsvc.report_words import Row, SweepReport
from tests.sweepsvc.reported import (
    demo_trials,
    documents,
    ended,
    evidence_of,
    proposal,
    record_of,
    report_of,
)
from tests.sweepsvc.samples import sweep_of


def row(report: SweepReport, key: str) -> Row:
    return next(one for one in report.rows if one.key == key)


def test_baselines_come_first_and_every_trial_is_there() -> None:
    report = report_of()
    assert [one.key for one in report.rows] == ["baseline", "0", "1", "2", "3", "4", "5"]
    assert [one.key for one in report.completed] == ["0", "1"]
    assert report.best is row(report, "1")


@pytest.mark.parametrize("key", ["2", "3", "4", "5"])
def test_what_did_not_complete_has_its_state_and_no_number(key: str) -> None:
    one = row(report_of(), key)
    assert one.state in ("failed", "interrupted", "pruned", "waiting")
    assert one.cells == {}
    numbers = (one.mean, one.headline, one.objective, one.peak_memory_gb, one.train_seconds, one.wall_seconds)
    assert numbers == (None,) * 6
    assert not one.on_front
    assert not one.is_best


def test_a_difference_is_to_the_baseline_with_a_test_over_the_same_documents() -> None:
    report = report_of()
    small, large = row(report, "0").cells["facts"], row(report, "1").cells["facts"]
    assert small.difference == 0.2 - 0.1
    assert small.paired is not None
    assert (small.paired.p_value, small.within_noise) == (1.0, True)
    assert large.paired is not None
    assert large.paired.p_value == 2 / 2**8
    assert not large.within_noise
    assert row(report, "baseline").cells["facts"].difference is None


def test_without_documents_there_is_a_difference_and_no_mark_and_it_is_said() -> None:
    sweep = sweep_of("sampler: grid")
    known = documents({key: one for key, one in documents_by_key().items() if key != "0"})
    report = build(record_of(demo_trials()), sweep, evidence_of(documents=known))
    cell = row(report, "0").cells["facts"]
    assert cell.difference == 0.2 - 0.1
    assert not cell.within_noise
    assert report.untested == {"there is no evaluation.json": ("0 facts",)}
    assert "Not tested, so without a mark: 0 facts: there is no evaluation.json." in legend(report)


def documents_by_key() -> dict[str, list[float]]:
    return {key: list(one["facts"].scores) for key, one in documents().items()}


def test_a_trial_is_compared_with_the_baseline_of_its_own_model() -> None:
    spec = TrialSpec.model_validate({"model": {"id": "other"}, "evaluate": {"tasks": ["facts"]}})
    base = ended(Proposal("baseline-1", spec.untrained()), "completed", facts=0.5)
    trial = ended(Proposal("0", spec, number=0, params={"model.id": "other"}), "completed", facts=0.6)
    first = ended(proposal(None), "completed", facts=0.1)
    made = report_of([trial], baselines=[first, base])
    assert row(made, "0").baseline == "baseline-1"
    assert row(made, "0").cells["facts"].difference == 0.6 - 0.5
    alone = report_of([trial])
    assert row(alone, "0").baseline is None
    assert row(alone, "0").cells["facts"].difference is None


def test_a_score_that_is_not_finite_is_no_score() -> None:
    report = report_of([ended(proposal(0), "completed", facts=math.nan)])
    assert row(report, "0").cells == {}
    assert (row(report, "0").mean, row(report, "0").headline) == (None, None)


def test_repeats_are_spread_without_those_that_did_not_complete() -> None:
    trials = [
        ended(proposal(0), "completed", facts=0.2),
        ended(proposal(1, repeat=1), "completed", facts=0.4),
        ended(proposal(2, repeat=2), "failed", facts=0.9),
    ]
    (group,) = report_of(trials).repeats
    assert (group.keys, group.left_out) == (("0", "1"), ("2 failed",))
    assert group.spreads["facts"].mean == pytest.approx(0.3)
    assert group.spreads["facts"].count == 2
    assert report_of().repeats == ()


def test_the_map_has_alpha_as_it_was_written_and_no_number_for_what_failed() -> None:
    found = heat_map(report_of())
    assert isinstance(found, HeatMap)
    assert (found.rs, found.alphas) == ((8, 32, 64), ("2*r", "1"))
    assert {place: cell.value for place, cell in found.cells.items()} == {
        (8, "1"): 0.2,
        (32, "2*r"): 0.9,
        (32, "1"): None,
        (8, "2*r"): None,
        (64, "2*r"): None,
        (64, "1"): None,
    }
    assert found.cells[32, "1"].how == "failed"
    assert (found.share(0.2), found.share(0.9)) == (0.0, 1.0)


def test_the_map_says_what_a_number_of_several_trials_is() -> None:
    trials = [
        ended(proposal(0, 8, 16.0), "completed", facts=0.2),
        ended(proposal(1, 8, 16.0, repeat=1), "completed", facts=0.4),
        ended(proposal(2, 32, 16.0), "completed", facts=0.5),
    ]
    found = heat_map(report_of(trials))
    assert isinstance(found, HeatMap)
    assert found.cells[8, "16"].value == pytest.approx(0.3)
    assert found.cells[8, "16"].how == "mean of 2"
    assert heat_map(report_of(trials[:1])) == "r and alpha have one value each"


def test_values_that_differ_in_their_last_digit_are_no_repeats_of_each_other() -> None:
    close = [ended(proposal(i, 8, 16.0 + i * 1e-9), "completed", facts=0.2 + i / 10) for i in range(2)]
    found = heat_map(report_of(close))
    assert isinstance(found, HeatMap)
    assert [cell.value for cell in found.cells.values()] == [0.2, 0.30000000000000004]
    assert len(compared([report_of(close)]).matched) == 3


def test_a_trial_that_trains_nothing_has_no_rank_and_no_baseline() -> None:
    specs = [TrialSpec.model_validate({"train": None, "model": {"id": name}}) for name in ("phi", "mistral")]
    trials = [
        ended(Proposal(str(i), spec, number=i, params={"model.id": spec.model.id}), "completed", facts=0.3)
        for i, spec in enumerate(specs)
    ]
    report = report_of(trials, baselines=[])
    assert [one.settings for one in report.rows] == [{"model.id": "phi"}, {"model.id": "mistral"}]
    assert [one.r for one in report.rows] == [None, None]
    assert heat_map(report) == "r and alpha have one value each"


def test_the_front_weighs_score_memory_and_time() -> None:
    trials = [
        ended(proposal(0, 8), "completed", facts=0.5),
        ended(proposal(1, 16), "completed", facts=0.4),  # worse in all three
        ended(proposal(2, 32), "completed", facts=0.6),
    ]
    assert [one.key for one in report_of(trials).trials if one.on_front] == ["0", "2"]


def test_a_loss_is_the_headline_where_it_is_the_objective_and_less_is_better() -> None:
    trials = [ended(proposal(0), "completed", loss=2.0), ended(proposal(1, 16), "completed", loss=1.0)]
    report = report_of(trials, objective_metric="train.loss", maximize=False)
    assert [one.headline for one in report.trials] == [2.0, 1.0]
    assert [one.on_front for one in report.trials] == [True, True]  # the second one is larger and slower


def test_curves_are_of_every_trial_and_leave_out_what_is_not_finite() -> None:
    made = {curve.key: curve for curve in curves(report_of())}
    assert made["1"].train == ((1, 3.0), (2, 0.5))
    assert made["2"].train == ((1, 3.0), (2, 90.0))
    assert (made["2"].completed, made["2"].label) == (False, "2 failed")


def test_failures_are_counted_by_class_and_facts_differ_by_trial() -> None:
    report = report_of()
    assert {kind: [one.key for one in rows] for kind, rows in report.failed.items()} == {"diverged": ["2"]}
    assert report.environment["torch"] == {"2.13.0": ("baseline", "0", "1", "2", "3", "4")}
    assert report.environment["device"]["H100"] == ("1",)
    assert "owner" not in report.facts


def test_what_cannot_be_told_from_the_best_is_named() -> None:
    trials = [
        ended(proposal(0, 8), "completed", facts=0.2),
        ended(proposal(1, 32), "completed", facts=0.9),
        ended(proposal(2, 64), "completed", facts=0.8),
        ended(proposal(3, 128), "failed", facts=0.9),
    ]
    answers = {**documents_by_key(), "2": [1.0] * 8 + [0.0] * 2, "3": [1.0] * 9 + [0.0]}
    made = build(record_of(trials), sweep_of("sampler: grid"), evidence_of(documents=documents(answers)))
    assert made.near_best == ("2",)
    assert summary(made).endswith("trial 1 (lora.r 32, lora.alpha 16). Within noise of it, trials 2.")
    assert report_of(trials).near_best == ()  # nothing is known of the documents of trial 2


def answers_of(*means: tuple[str, list[int], list[int]]) -> dict[str, dict[str, Documents]]:
    """Each trial's answers to two benchmarks of four and three documents."""
    return {
        key: {
            "facts": Documents(tuple(f"facts/f{i}" for i in range(4)), tuple(map(float, facts))),
            "rivers": Documents(tuple(f"rivers/r{i}" for i in range(3)), tuple(map(float, rivers))),
        }
        for key, facts, rivers in means
    }


def two_benchmarks(sweep_id: str = "demo-1", known: bool = True) -> SweepReport:
    found = answers_of(
        ("baseline", [0, 0, 0, 0], [0, 0, 0]), ("0", [1, 0, 1, 0], [0, 0, 1]), ("1", [1, 1, 1, 0], [1, 1, 1])
    )
    scores = {
        key: {task: sum(one.scores) / len(one.scores) for task, one in tasks.items()}
        for key, tasks in found.items()
    }
    trials = [ended(proposal(i, 8 * (i + 1)), "completed", **scores[str(i)]) for i in range(2)]
    base = ended(proposal(None), "completed", **scores["baseline"])
    evidence = evidence_of(documents=found if known else {})
    return build(record_of(trials, baselines=[base], sweep_id=sweep_id), sweep_of("sampler: grid"), evidence)


def test_the_mean_of_several_benchmarks_has_a_mark_too_where_the_documents_are_the_same() -> None:
    made = two_benchmarks()
    first = row(made, "0")
    assert first.mean_difference == pytest.approx(5 / 12)
    assert first.mean_paired is not None
    assert first.mean_paired.p_value == pytest.approx(2 * t.sf(5 / 7**0.5, df=5))
    assert score_text(first.mean_cell) == "0.417 (+0.417 ≈)"
    assert score_text(row(made, "1").mean_cell) == "0.875 (+0.875)"
    assert "paired t of means" in made.tests
    assert made.near_best == ("0",)
    assert f",{first.mean_paired.p_value!r}," in as_csv(compared([made]))


def test_a_mean_whose_documents_nobody_knows_has_no_mark_and_no_reason_of_its_own() -> None:
    first = row(two_benchmarks(known=False), "0")
    assert first.mean_paired is None
    assert "no evaluation.json" in first.mean_untested
    cells = two_benchmarks(known=False).untested
    assert not [name for names in cells.values() for name in names if name.endswith("mean")]


def test_means_stand_side_by_side_where_the_sweeps_have_the_same_benchmarks() -> None:
    made = compared([two_benchmarks(), two_benchmarks("other-1")])
    assert made.columns == ("facts", "rivers", "score.mean")
    sides = made.matched[1].sides
    cell = sides[1]["score.mean"].cell
    assert cell is not None
    assert (cell.difference, cell.within_noise) == (0.0, True)
    assert compared([two_benchmarks(), report_of()]).columns == ("facts", "rivers")


def test_a_sweep_without_a_completed_trial_says_so() -> None:
    report = report_of([ended(proposal(0), "failed", facts=0.9)])
    assert report.best is None
    assert summary(report) == "No trial of 1 completed: there is nothing to compare."


# --- side by side -----------------------------------------------------------------------------------


def other_sweep() -> SweepReport:
    trials = [
        ended(proposal(0, 32, 64.0), "completed", facts=1.0),
        ended(proposal(1, 8, 1.0), "failed", facts=0.7),
        ended(proposal(2, 8, 1.0, repeat=1), "completed", facts=0.4),
        ended(proposal(3, 8, 1.0, repeat=2), "completed", facts=0.6),
    ]
    return build(
        record_of(trials, sweep_id="other-1"),
        sweep_of("sampler: grid"),
        evidence_of(documents=documents({"baseline": [1] + [0] * 9, "0": [1] * 10})),
    )


def test_trials_with_the_same_settings_stand_side_by_side_however_they_were_written() -> None:
    made = compared([report_of(), other_sweep()])
    found = {(one.name, *one.settings.values()): one for one in made.matched}
    assert list(found) == [("baseline",), ("", "8", "1"), ("", "32", "64 (2*r)")]
    large = found["", "32", "64 (2*r)"]
    assert [side["facts"].mean for side in large.sides] == [0.9, 1.0]
    cell = large.sides[1]["facts"].cell
    assert cell is not None
    assert cell.difference == 1.0 - 0.9
    assert cell.within_noise
    small = found["", "8", "1"]
    assert small.sides[1]["facts"].mean == 0.5
    assert small.sides[1]["facts"].keys == ("2", "3")  # the failed one is in no mean
    assert small.sides[1]["facts"].cell is None


def test_settings_that_nobody_searched_and_that_differ_are_listed() -> None:
    spec = TrialSpec.model_validate({"optimizer": {"lr": 1e-3}, "evaluate": {"tasks": ["facts"]}})
    trial = ended(Proposal("0", spec, number=0, params={"lora.r": 8}), "completed", facts=0.6)
    made = compared([report_of(), report_of([trial], sweep_id="other-1")])
    assert made.differing == {"optimizer.lr": ("0.0003", "0.001")}
    assert made.environment == {"device": ("A100, H100", "A100")}
