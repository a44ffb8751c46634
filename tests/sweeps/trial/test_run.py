"""One whole trial: what it leaves, how it fails, and that nothing which ran before it matters (law L3)."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sweeps.errors import EvaluationFailed
from sweeps.result import Progress, TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial import run as trial
from sweeps.trial.base import Resident, load_base
from sweeps.trial.evaluate import evaluate
from sweeps.trial.merge import merge
from sweeps.trial.paths import TrialFolder
from tests.tiny import changed, save_task, tiny_spec


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def spec(tiny_model_dir: Path, alpaca_rows_file: Path, task_dir: Path) -> TrialSpec:
    evaluate = {"evaluate.tasks": ["rivers"], "evaluate.task_dir": str(task_dir)}
    return tiny_spec(tiny_model_dir, alpaca_rows_file, **{"lora.dropout": 0.1, **evaluate})


def ran(
    spec: TrialSpec, folder: Path, resident: Resident | None = None
) -> tuple[TrialResult, list[Progress]]:
    reports = list(trial.run_trial(spec, resident or Resident(), folder))
    result = TrialFolder(folder).read_result()
    assert result is not None
    return result, reports


def test_a_trial_leaves_its_spec_its_result_its_scores_and_its_adapter(
    spec: TrialSpec, tmp_path: Path
) -> None:
    result, reports = ran(spec, tmp_path)
    assert result.outcome == "completed", result.failure
    files = TrialFolder(tmp_path)
    assert TrialSpec.model_validate_json(files.spec.read_text()) == spec
    assert json.loads(files.evaluation.read_text())
    adapter = load_file(files.adapter / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in adapter.values()) == result.trainable_params > 0
    config = json.loads((files.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (spec.lora.r, spec.lora.alpha)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    phases = list(dict.fromkeys(report.phase for report in reports))
    assert phases == ["loading", "training", "saving", "evaluating"]


def test_a_trial_on_a_prompt_of_ones_own_says_what_it_read_and_skipped(
    spec: TrialSpec, tmp_path: Path
) -> None:
    rows = [{"q": f"Where is {number}?", "a": "Here."} for number in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {"q": "Where?", "a": ""}]))
    data = {
        "path": str(tmp_path / "rows.json"),
        "held_out": 0.25,
        "prompt": "Q: {question}\nA: ",
        "columns": {"question": "q", "output": "a"},
        "on_bad_row": "skip",
    }
    sections = spec.model_dump(mode="json")
    own = TrialSpec.model_validate({**sections, "data": data, "evaluate": {"tasks": []}})
    result, _ = ran(own, tmp_path / "trial")
    assert result.outcome == "completed", result.failure
    [note] = [note for note in result.notes if note.startswith("data: ")]
    assert note == (
        "data: 9 rows to train on, 3 held out (split seed 42), 0 cut at max_length, 1 bad row skipped: "
        f"row 13 (a must not be empty) (digest {result.data_digest})"
    )


def test_a_result_has_every_number_under_its_stable_name(spec: TrialSpec, tmp_path: Path) -> None:
    result, _ = ran(spec, tmp_path)
    metrics = result.metrics()
    stable = {"score.rivers", "score.mean", "peak_memory_gb", "wall_seconds", "train_seconds", "eval_seconds"}
    assert metrics.keys() >= stable | {"tokens_per_second", "trainable_params", "train.loss", "eval.loss"}
    assert all(metrics[name] > 0 for name in stable - {"score.rivers", "score.mean"})
    assert metrics["wall_seconds"] >= metrics["train_seconds"] + metrics["eval_seconds"]
    assert result.scores["rivers"].stderr is not None
    announced = " ".join(result.notes)
    assert all(word in announced for word in ("dtype", "attention", "token budget", "digest"))
    assert result.environment["device"]
    assert TrialResult.model_validate_json(result.model_dump_json()) == result


def test_a_baseline_is_scored_without_training(spec: TrialSpec, tmp_path: Path) -> None:
    result, _ = ran(spec.untrained(), tmp_path)
    assert (result.outcome, result.steps, result.trainable_params) == ("completed", 0, 0)
    assert result.scores.keys() == {"rivers"}
    assert result.measured.tokens_per_second is None
    assert not TrialFolder(tmp_path).adapter.exists()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_law_l3_a_used_actor_gives_what_a_new_one_gives_bit_for_bit(
    spec: TrialSpec, tmp_path: Path, quantization: str
) -> None:
    spec = changed(spec, model__quantization=quantization)
    fresh, _ = ran(spec, tmp_path / "fresh")
    used = Resident()
    ran(
        changed(spec, lora__r=32, optimizer__name="sgd", lora__targets="qv", train__seed=1),
        tmp_path / "b",
        used,
    )
    ran(spec.untrained(), tmp_path / "c", used)
    failed, _ = ran(changed(spec, lora__targets=["nothing_like_it"]), tmp_path / "d", used)
    assert failed.outcome == "failed"
    torch.rand(7)
    again, _ = ran(spec, tmp_path / "again", used)

    assert again.scores == fresh.scores
    assert (again.train_loss, again.eval_loss) == (fresh.train_loss, fresh.eval_loss)
    first, second = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("fresh", "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_another_adapter(spec: TrialSpec, tmp_path: Path) -> None:
    resident = Resident()
    losses = {
        ran(changed(spec, train__seed=seed), tmp_path / str(seed), resident)[0].train_loss for seed in (1, 2)
    }
    assert len(losses) == 2


def test_a_diverged_trial_fails_by_that_name_and_keeps_what_it_cost(spec: TrialSpec, tmp_path: Path) -> None:
    spec = changed(spec, optimizer__name="sgd", optimizer__lr=1e30, lora__alpha=1e30)
    result, _ = ran(spec, tmp_path)
    assert (result.outcome, result.failure and result.failure.kind) == ("failed", "diverged")
    assert result.measured.wall_seconds > 0
    assert result.scores == {}


def test_bad_data_and_a_bad_model_fail_by_their_names(spec: TrialSpec, tmp_path: Path) -> None:
    resident = Resident()
    data, _ = ran(changed(spec, data__path="/none.json"), tmp_path / "a", resident)
    assert data.failure is not None
    assert data.failure.kind == "bad_data"
    model, _ = ran(changed(spec, model__id="/none"), tmp_path / "b", resident)
    assert model.failure is not None
    assert model.failure.kind == "bad_model"
    assert model.measured.peak_memory_gb is None


def test_an_evaluation_that_raises_fails_by_its_name_and_the_adapter_is_kept(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise EvaluationFailed("the benchmark rivers must give a score: ZeroDivisionError")

    monkeypatch.setattr(trial, "evaluate", broken)
    result, _ = ran(spec, tmp_path)
    assert result.failure is not None
    assert result.failure.kind == "evaluation_failed"
    assert result.train_loss is not None
    assert (TrialFolder(tmp_path).adapter / "adapter_model.safetensors").exists()


def test_a_benchmark_that_does_not_load_fails_before_the_training(spec: TrialSpec, tmp_path: Path) -> None:
    result, _ = ran(changed(spec, evaluate__tasks=["no_such_task"]), tmp_path)
    assert result.failure is not None
    assert result.failure.kind == "evaluation_failed"
    assert "no_such_task" in result.failure.message
    assert result.steps == 0


def test_what_was_not_foreseen_is_a_bug_with_its_traceback(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Iterator[Progress]:
        raise RuntimeError("a wire came loose")

    monkeypatch.setattr(trial, "finetune", broken)
    result, _ = ran(spec, tmp_path)
    assert result.failure is not None
    assert (result.failure.kind, result.failure.message) == ("bug", "RuntimeError: a wire came loose")
    assert "in broken" in result.failure.traceback


def test_torchs_own_out_of_memory_is_ours_wherever_it_comes_from(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trial, "attach", full)
    result, _ = ran(spec, tmp_path)
    assert result.failure is not None
    assert result.failure.kind == "out_of_memory"


def test_a_trial_that_is_closed_midway_is_interrupted_and_leaves_the_base_clean(
    spec: TrialSpec, tmp_path: Path
) -> None:
    resident = Resident()
    running = trial.run_trial(spec, resident, tmp_path)
    assert next(report for report in running if report.step > 0)
    running.close()
    result = TrialFolder(tmp_path).read_result()
    assert result is not None
    assert result.outcome == "interrupted"
    base = resident.get(spec.model)
    assert not [name for name, _ in base.model.named_parameters() if "lora" in name]


def test_an_old_result_does_not_outlive_the_start_of_a_new_attempt(spec: TrialSpec, tmp_path: Path) -> None:
    ran(spec.untrained(), tmp_path)
    running = trial.run_trial(spec, Resident(), tmp_path)
    next(running)
    assert TrialFolder(tmp_path).read_result() is None


# --- the adapter merged into the unquantised base ----------------------------------------------------


def loglikelihoods(folder: Path) -> Any:
    return json.loads((folder / "evaluation.json").read_text())["tasks"]["rivers"]["per_document"]


def merging(spec: TrialSpec, **fields: Any) -> TrialSpec:
    return changed(spec, model__quantization="nf4", evaluate__weights="merged", **fields)


def test_a_merged_trial_is_scored_in_the_unquantised_base_and_on_no_other_weights(
    spec: TrialSpec, tmp_path: Path
) -> None:
    result, reports = ran(merging(spec), tmp_path)
    assert result.outcome == "completed", result.failure
    base = load_base(spec.model)
    assert base.spec.quantization == "none"
    merge(base.model, tmp_path / "adapter")
    expected = evaluate(base.model, base.tokenizer, spec.evaluate)
    assert result.scores == expected.scores
    assert loglikelihoods(tmp_path) == expected.report["tasks"]["rivers"]["per_document"]
    beside, _ = ran(changed(merging(spec), evaluate__weights="trained"), tmp_path / "beside")
    assert loglikelihoods(tmp_path) != loglikelihoods(tmp_path / "beside")
    assert (result.train_loss, result.eval_loss) == (beside.train_loss, beside.eval_loss)
    assert [report.phase for report in reports[-3:]] == ["saving", "loading", "evaluating"]
    assert any("the adapter merged into it, set by evaluate.weights" in note for note in result.notes)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_law_l3_a_merged_trial_leaves_the_resident_base_as_it_was_and_frees_its_copy(
    quantization: str, spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []

    def watched(model: Any, folder: Path) -> None:
        copies.append(weakref.ref(model))
        merge(model, folder)

    monkeypatch.setattr(trial, "merge", watched)
    plain, used = changed(spec, model__quantization=quantization), Resident()
    merged = changed(plain, evaluate__weights="merged")
    fresh, _ = ran(plain, tmp_path / "fresh")
    first, _ = ran(merged, tmp_path / "first", used)
    resident = used.get(plain.model)
    again, _ = ran(plain, tmp_path / "again", used)
    second, _ = ran(merged, tmp_path / "second", used)
    assert used.get(plain.model) is resident
    assert [copy() for copy in copies] == [None, None]
    assert again.scores == fresh.scores
    assert second.scores == first.scores
    assert (again.train_loss, again.eval_loss) == (fresh.train_loss, fresh.eval_loss)
    assert loglikelihoods(tmp_path / "again") == loglikelihoods(tmp_path / "fresh")
    assert loglikelihoods(tmp_path / "second") == loglikelihoods(tmp_path / "first")


def test_the_baseline_of_merged_trials_is_the_unquantised_base(spec: TrialSpec, tmp_path: Path) -> None:
    baseline = merging(spec, model__double_quantization=True).untrained()
    assert baseline == spec.untrained()
    assert baseline.model.quantization == "none"
    plain, _ = ran(spec.untrained(), tmp_path / "plain")
    # as a trial of its own, `train: none`
    untrained = merging(spec).model_copy(update={"train": None})
    scored, _ = ran(untrained, tmp_path / "scored")
    assert scored.scores == plain.scores
    assert loglikelihoods(tmp_path / "scored") == loglikelihoods(tmp_path / "plain")


def test_memory_that_runs_out_in_merging_is_out_of_memory_with_a_remedy_and_the_adapter_is_kept(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trial, "merge", full)
    result, _ = ran(merging(spec), tmp_path)
    assert result.failure is not None
    assert result.failure.kind == "out_of_memory"
    assert "got 'CUDA out of memory. Tried to allocate 2.00 GiB.'" in result.failure.message
    assert result.failure.message.endswith("take a larger GPU, or say trained")
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_peak_of_a_merged_trial_is_that_of_its_training(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ballast = []

    def heavy(*arguments: Any) -> Any:
        ballast.append(torch.ones(600_000_000, dtype=torch.uint8))
        return evaluate(*arguments)

    monkeypatch.setattr(trial, "evaluate", heavy)
    result, _ = ran(merging(spec), tmp_path / "merged")
    ballast.clear()
    whole, _ = ran(changed(spec, model__quantization="nf4"), tmp_path / "trained")
    assert result.measured.peak_memory_gb is not None
    assert whole.measured.peak_memory_gb is not None
    assert result.measured.peak_memory_gb < whole.measured.peak_memory_gb - 0.4
    (told,) = [note for note in result.notes if note.startswith("scoring the merged copy took")]
    assert float(told.split(" GB")[0].split()[-1]) > result.measured.peak_memory_gb + 0.4
