"""A trial that is cut and resumed equals one that is not, bit for bit (law L2), and nothing is done twice."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sweeps.errors import EvaluationFailed, Interrupted, TrialError
from sweeps.result import Progress, TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial import adapter as adapters
from sweeps.trial import checkpoint as checkpoints
from sweeps.trial import evaluate as evaluation
from sweeps.trial import finetune as loop
from sweeps.trial import lock as locks
from sweeps.trial import paths
from sweeps.trial import run as trial
from sweeps.trial.base import Resident
from sweeps.trial.batches import MicroBatch
from sweeps.trial.budget import Choice, Room
from sweeps.trial.keeping import Keeping
from sweeps.trial.lock import FolderLock
from sweeps.trial.loss import ChunkedLoss
from sweeps.trial.paths import TrialFolder
from tests.tiny import changed, save_task, tiny_spec

STEPS = 6
EVERY_STEP = Keeping(checkpoint_minutes=0)


@pytest.fixture(scope="module")
def resident() -> Resident:
    """One for all tests here: law L3 says that it does not matter."""
    return Resident()


@pytest.fixture(scope="module")
def spec(tiny_model_dir: Path, alpaca_rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TrialSpec:
    """Six steps with dropout; neither reports nor held-out losses fall on every step."""
    folder = save_task(tmp_path_factory.mktemp("tasks"))
    return tiny_spec(
        tiny_model_dir,
        alpaca_rows_file,
        **{
            "lora.dropout": 0.2,
            "train.batch_size": 2,
            "train.samples": 2 * STEPS,
            "train.log_every": 4,
            "train.eval_every": 5,
        },
        **{"evaluate.tasks": ["rivers"], "evaluate.task_dir": str(folder), "optimizer.lr": 1e-2},
        **{"evaluate.limit": 4, "evaluate.batch_size": 4},
        **{"data.held_out": 0.1, "train.token_budget": 240},
    )


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, resident: Resident) -> Callable[[TrialSpec], Path]:
    """The folder of each trial as it is when nothing cuts it. Read only."""
    known: dict[str, Path] = {}

    def folder(spec: TrialSpec) -> Path:
        if spec.digest not in known:
            known[spec.digest] = tmp_path_factory.mktemp("uncut")
            assert attempt(spec, resident, known[spec.digest])[0].outcome == "completed"
        return known[spec.digest]

    return folder


class Counted:
    """How many steps were trained, in all attempts together."""

    def __init__(self) -> None:
        self.steps = 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    count, real = Counted(), loop._accumulate

    def accumulate(*arguments: Any) -> torch.Tensor:
        loss = real(*arguments)
        count.steps += 1
        return loss

    monkeypatch.setattr(loop, "_accumulate", accumulate)
    return count


def attempt(
    spec: TrialSpec, resident: Resident, folder: Path, keeping: Keeping = EVERY_STEP
) -> tuple[TrialResult, list[Progress]]:
    reports = list(trial.run_trial(spec, resident, folder, keeping))
    return result_of(folder), reports


def result_of(folder: Path) -> TrialResult:
    result = TrialFolder(folder).read_result()
    assert result is not None
    return result


def stopped_after(steps: int, minutes: float = 60.0) -> Keeping:
    """Asked to stop as soon as `steps` steps are done; asked twice before the first."""
    asked = iter(range(-2, 1000))
    return Keeping(minutes, lambda: next(asked) >= steps - 1)


def assert_equal(folder: Path, expected: Path) -> None:
    mine, theirs = result_of(folder), result_of(expected)
    assert mine.outcome == theirs.outcome == "completed", mine.failure
    for field in ("steps", "train_loss", "eval_loss", "data_digest", "trainable_params"):
        assert getattr(mine, field) == getattr(theirs, field), field
    assert mine.scores == theirs.scores
    assert mine.measured.trained_tokens == theirs.measured.trained_tokens
    assert (folder / "evaluation.json").read_text() == (expected / "evaluation.json").read_text()
    first, second = (load_file(place / "adapter/adapter_model.safetensors") for place in (folder, expected))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (folder / "checkpoints").exists()


def steps_kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# --- law L2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, STEPS + 1))
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_law_l2_stopped_after_any_step_and_resumed_equals_uncut(
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    counted: Counted,
    tmp_path: Path,
    optimizer: str,
    cut: int,
) -> None:
    spec = changed(spec, optimizer__name=optimizer)
    expected = uncut(spec)
    counted.steps = 0
    result, _ = attempt(spec, resident, tmp_path, stopped_after(cut))
    assert (result.outcome, result.steps, counted.steps) == ("interrupted", cut, cut)
    assert result.failure is None
    assert steps_kept(tmp_path) == [f"step-{cut:08d}"]
    resumed, reports = attempt(spec, resident, tmp_path)
    assert_equal(tmp_path, expected)
    assert counted.steps == STEPS
    note = f"resumed at step {cut} of {STEPS}, from the checkpoint of 20"
    assert any(note in text for text in resumed.notes)
    assert any(note in text for report in reports for text in report.notes)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_law_l2_killed_within_any_step_only_that_step_is_trained_again(
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    counted: Counted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:
    """Each attempt does one more step, and dies in the one after it."""
    spec = changed(spec, optimizer__name=optimizer)
    expected = uncut(spec)
    counted.steps = 0
    for died in range(1, STEPS):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "learning_rate", dying_at(died))
            with pytest.raises(SystemExit):
                attempt(spec, resident, tmp_path)
    attempt(spec, resident, tmp_path)
    assert_equal(tmp_path, expected)
    assert counted.steps == STEPS + STEPS - 1


def dying_at(step: int) -> Callable[..., float]:
    """A schedule in whose place the process dies, the gradient of the step being there already."""
    real = loop.learning_rate

    def rate(done: int, spec: TrialSpec) -> float:
        if done == step:
            raise SystemExit
        return real(done, spec)

    return rate


def test_law_l2_closed_at_every_report_equals_uncut(
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    counted: Counted,
    tmp_path: Path,
) -> None:
    spec = changed(spec, train__log_every=1)
    expected = uncut(spec)
    counted.steps = 0
    for step in range(1, STEPS + 1):
        running = trial.run_trial(spec, resident, tmp_path)
        assert next(report for report in running if report.train_loss is not None).step == step
        running.close()
        assert result_of(tmp_path).outcome == "interrupted"
    attempt(spec, resident, tmp_path)
    assert_equal(tmp_path, expected)
    assert counted.steps == STEPS


@pytest.mark.parametrize(
    "changes",
    [
        {"model__quantization": "nf4"},
        {"train__gradient_checkpointing": True, "train__clip_norm": 0.5, "train__sampling": "epochs"},
        {"lora__dtype": "bfloat16", "optimizer__name": "sgd", "optimizer__momentum": 0.0},
        {"model__quantization": "nf4", "lora__dora": True, "lora__r": 64, "lora__targets": ["down_proj"]}
        | {"optimizer__name": "adamw_8bit", "train__loss_weighting": "token", "schedule__name": "linear"},
    ],
    ids=str,
)
def test_law_l2_holds_for_other_settings_too(
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    spec = changed(spec, **changes)
    expected = uncut(spec)
    for cut in (2, 1):
        assert attempt(spec, resident, tmp_path, stopped_after(cut))[0].outcome == "interrupted"
    attempt(spec, resident, tmp_path)
    assert_equal(tmp_path, expected)


def test_law_l3_resumed_on_an_actor_that_did_other_things_in_between(
    spec: TrialSpec, resident: Resident, uncut: Callable[[TrialSpec], Path], tmp_path: Path
) -> None:
    used = Resident()
    attempt(spec, used, tmp_path / "trial", stopped_after(3))
    failed, _ = attempt(changed(spec, lora__targets=["nothing_like_it"]), used, tmp_path / "failed")
    assert failed.outcome == "failed"
    other = changed(spec, lora__r=32, optimizer__name="sgd", train__seed=3)
    assert attempt(other, used, tmp_path / "other")[0].outcome == "completed"
    attempt(spec, used, tmp_path / "trial")
    assert_equal(tmp_path / "trial", uncut(spec))


def test_a_resumed_trial_has_the_token_budget_that_it_began_with(
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempt(spec, resident, tmp_path, stopped_after(2))
    monkeypatch.setattr(trial, "choose_here", lambda *_: Choice(1, False, ("token budget 1: all is taken",)))
    result, _ = attempt(spec, resident, tmp_path)
    assert_equal(tmp_path, uncut(spec))
    assert [note for note in result.notes if "token budget" in note] == [
        "token budget 240: set by train.token_budget"
    ]


def test_a_resumed_trial_recomputes_activations_if_it_did_before(
    spec: TrialSpec, resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever memory is free by now."""
    spec, turned_on = changed(spec, train__gradient_checkpointing="auto"), []
    enable = adapters.Adapter.enable_gradient_checkpointing
    monkeypatch.setattr(
        adapters.Adapter,
        "enable_gradient_checkpointing",
        lambda adapter: (turned_on.append(1), enable(adapter)),
    )
    with monkeypatch.context() as patch:
        patch.setattr(Room, "on", lambda _: Room(1e6, on_cpu=True))
        attempt(spec, resident, tmp_path, stopped_after(2))
    result, _ = attempt(spec, resident, tmp_path)
    assert turned_on == [1, 1]
    said = [note for note in result.notes if note.startswith("gradient checkpointing")]
    assert len(said) == 1
    assert re.match(r"gradient checkpointing on: without it \d+ tokens fit, ", said[0])


def test_seconds_and_tokens_add_up_and_peaks_are_the_highest(
    spec: TrialSpec, resident: Resident, tmp_path: Path
) -> None:
    first, _ = attempt(spec, resident, tmp_path, stopped_after(3))
    path = tmp_path / "checkpoints/step-00000003"
    rewrite(path, measured={"wall_seconds": 1000.0, "load_seconds": 300.0, "peak_host_gb": 9000.0})
    second, reports = attempt(spec, resident, tmp_path)
    assert 1000 < second.measured.wall_seconds < 1100
    assert 300 < second.measured.load_seconds < 400
    assert second.measured.peak_host_gb == 9000
    assert second.measured.train_seconds > first.measured.train_seconds > 0
    rate = second.measured.trained_tokens / second.measured.train_seconds
    assert second.measured.tokens_per_second == pytest.approx(rate)
    assert [report.step for report in reports if report.phase == "training"] == [3, 4, 5, 6]


def rewrite(path: Path, **values: Any) -> None:
    """Change values in a checkpoint's state, with the manifest that belongs to it."""
    state = json.loads((path / "state.json").read_text())
    for name, value in values.items():
        state[name] = {**state[name], **value} if isinstance(value, dict) else value
    (path / "state.json").write_text(json.dumps(state))
    content = json.loads((path / "manifest.json").read_text())["content"]
    content["files"]["state.json"] = checkpoints._fingerprint(path / "state.json")
    manifest = {"sha256": checkpoints._digest(content), "content": content}
    (path / "manifest.json").write_text(json.dumps(manifest))


# --- what a folder holds ----------------------------------------------------------------------------


def test_a_completed_trial_is_never_run_again(spec: TrialSpec, resident: Resident, tmp_path: Path) -> None:
    attempt(spec, resident, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"}
    assert list(trial.run_trial(spec, resident, tmp_path)) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_of_another_trial_is_cleared_first(
    spec: TrialSpec, resident: Resident, uncut: Callable[[TrialSpec], Path], counted: Counted, tmp_path: Path
) -> None:
    attempt(changed(spec, lora__r=2), resident, tmp_path, stopped_after(3))
    expected = uncut(spec)
    counted.steps = 0
    result, _ = attempt(spec, resident, tmp_path)
    assert_equal(tmp_path, expected)
    assert counted.steps == STEPS
    assert not any("refused" in note for note in result.notes)


def test_two_checkpoints_are_kept_and_drafts_of_a_killed_process_are_removed(
    spec: TrialSpec, resident: Resident, tmp_path: Path
) -> None:
    attempt(spec, resident, tmp_path, stopped_after(4, minutes=0))
    assert steps_kept(tmp_path) == ["step-00000003", "step-00000004"]
    (tmp_path / "checkpoints/.step-00000005.0a").mkdir()
    (tmp_path / ".adapter.0a").mkdir()
    (tmp_path / ".result.json.0a").write_text("{")
    (tmp_path / ".others").write_text("not ours")
    attempt(spec, resident, tmp_path, stopped_after(1, minutes=0))
    assert steps_kept(tmp_path) == ["step-00000004", "step-00000005"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [".others"]


def test_a_trial_does_not_go_on_with_other_rows(
    spec: TrialSpec, resident: Resident, tmp_path: Path, alpaca_rows_file: Path
) -> None:
    rows = Path(shutil.copy(alpaca_rows_file, tmp_path / "rows.json"))
    spec, folder = changed(spec, data__path=str(rows)), tmp_path / "trial"
    attempt(spec, resident, folder, stopped_after(2))
    rows.write_text(rows.read_text().replace("Sarn", "Sorn"))
    result, _ = attempt(spec, resident, folder)
    assert result.failure is not None
    assert result.failure.kind == "bad_data"
    assert result.failure.message.endswith("put the data back, or `resume --from-scratch`")
    assert steps_kept(folder) == ["step-00000002"]
    TrialFolder(folder).forget()
    assert attempt(spec, resident, folder)[0].outcome == "completed"


# --- checkpoints that are not to be trusted ---------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def cut_at_four(spec: TrialSpec, resident: Resident, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial with checkpoints of the steps 3 and 4. Read only."""
    folder = tmp_path_factory.mktemp("cut")
    attempt(spec, resident, folder, stopped_after(4, minutes=0))
    return folder


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_used(
    cut_at_four: Path, tmp_path: Path, spec: TrialSpec, file: str, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(cut_at_four / "checkpoints", tmp_path / "checkpoints"))
    damage(folder / "step-00000004" / file)
    found, refused = checkpoints.Checkpoints(folder, spec.digest, "cpu").newest()
    assert found is not None
    assert found.step == 3
    assert len(refused) == 1
    assert refused[0].startswith("refused the checkpoint step-00000004: ")
    assert file in refused[0]


def test_a_trial_with_a_damaged_checkpoint_goes_on_from_the_one_before_and_says_so(
    cut_at_four: Path,
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    counted: Counted,
    tmp_path: Path,
) -> None:
    expected = uncut(spec)
    folder = Path(shutil.copytree(cut_at_four, tmp_path / "trial"))
    flip(folder / "checkpoints/step-00000004/tensors.safetensors")
    counted.steps = 0
    result, reports = attempt(spec, resident, folder)
    assert_equal(folder, expected)
    assert counted.steps == STEPS - 3
    refused = "refused the checkpoint step-00000004: tensors.safetensors must be as it was written"
    assert any(refused in note for note in result.notes)
    assert any(refused in note for report in reports for note in report.notes)


def test_where_every_checkpoint_is_refused_the_trial_begins_anew_and_says_so(
    cut_at_four: Path,
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    counted: Counted,
    tmp_path: Path,
) -> None:
    expected = uncut(spec)
    folder = Path(shutil.copytree(cut_at_four, tmp_path / "trial"))
    for state in folder.glob("checkpoints/*/state.json"):
        flip(state)
    counted.steps = 0
    result, _ = attempt(spec, resident, folder)
    assert_equal(folder, expected)
    assert counted.steps == STEPS
    assert "no checkpoint could be used: the trial begins anew" in result.notes


@pytest.mark.parametrize(
    ("digest", "device", "format_number", "why"),
    [
        ("0" * 16, "cpu", checkpoints.FORMAT, "its spec must be 0000000000000000, got "),
        (None, "cuda", checkpoints.FORMAT, "its device must be cuda, got cpu"),
        (None, "cpu", 99, f"its format must be 99, got {checkpoints.FORMAT}"),
    ],
)
def test_a_checkpoint_of_another_trial_device_or_format_is_refused(
    cut_at_four: Path,
    spec: TrialSpec,
    monkeypatch: pytest.MonkeyPatch,
    digest: str | None,
    device: str,
    format_number: int,
    why: str,
) -> None:
    monkeypatch.setattr(checkpoints, "FORMAT", format_number)
    kept = checkpoints.Checkpoints(cut_at_four / "checkpoints", digest or spec.digest, device)
    found, refused = kept.newest()
    assert found is None
    assert [why in text for text in refused] == [True, True, False]


# --- memory and losses ------------------------------------------------------------------------------


def short_of_memory(above: int, from_call: int) -> Callable[..., torch.Tensor]:
    """`ChunkedLoss.backward`, but from that call on more than `above` tokens at once do not fit."""
    real, calls = ChunkedLoss.backward, iter(range(1, 10_000))

    def backward(self: ChunkedLoss, batch: MicroBatch) -> torch.Tensor:
        if next(calls) >= from_call and batch.ids.numel() > above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, batch)

    return backward


def test_a_halved_token_budget_outlives_the_cut(
    spec: TrialSpec, resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = changed(spec, train__token_budget=1000)
    with monkeypatch.context() as patch:
        patch.setattr(ChunkedLoss, "backward", short_of_memory(240, from_call=3))
        assert attempt(spec, resident, tmp_path / "uncut")[0].outcome == "completed"
    with monkeypatch.context() as patch:
        patch.setattr(ChunkedLoss, "backward", short_of_memory(240, from_call=3))
        attempt(spec, resident, tmp_path / "cut", stopped_after(4))
    result, _ = attempt(spec, resident, tmp_path / "cut")  # memory is free again, and not taken
    assert_equal(tmp_path / "cut", tmp_path / "uncut")
    assert any(note.endswith("halved when memory ran out") for note in result.notes)


def test_one_row_that_never_fits_ends_a_resumed_trial_as_out_of_memory(
    spec: TrialSpec, resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(spec, resident, tmp_path, stopped_after(2))
    monkeypatch.setattr(ChunkedLoss, "backward", short_of_memory(1, from_call=1))
    result, _ = attempt(spec, resident, tmp_path)
    assert result.failure is not None
    assert result.failure.kind == "out_of_memory"
    assert "one row of" in result.failure.message
    assert result.steps == 2


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_loss_that_is_not_finite_ends_the_trial_wherever_the_cut_was(
    spec: TrialSpec, resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """NaN at step 2, of which the reports know at step 4."""
    real = loop._accumulate

    def accumulate(*arguments: Any) -> torch.Tensor:
        loss = real(*arguments)
        return loss * float("nan") if arguments[-1].step == 1 else loss

    monkeypatch.setattr(loop, "_accumulate", accumulate)
    attempt(spec, resident, tmp_path, stopped_after(cut))
    result, _ = attempt(spec, resident, tmp_path)
    assert result.failure is not None
    assert result.failure.kind == "diverged"
    assert "got nan at step 2" in result.failure.message


def test_a_loss_that_stays_high_is_counted_across_the_cut(
    spec: TrialSpec, resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = changed(spec, train__diverged_steps=4, train__log_every=1)
    real = loop._accumulate
    monkeypatch.setattr(
        loop, "_accumulate", lambda *given: real(*given) + (20.0 if given[-1].step >= 1 else 0.0)
    )
    attempt(spec, resident, tmp_path, stopped_after(3))
    result, _ = attempt(spec, resident, tmp_path)
    assert result.failure is not None
    assert "at step 5 after 4 steps above" in result.failure.message


# --- after the training -----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["trained", pytest.param("merged", marks=pytest.mark.slow)])
def test_an_evaluation_that_failed_is_all_that_is_done_again(
    weights: str,
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    counted: Counted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise EvaluationFailed("the benchmark rivers must give a score: ZeroDivisionError")

    spec = changed(spec, evaluate__weights=weights)
    expected = uncut(spec)
    counted.steps = 0
    with monkeypatch.context() as patch:
        patch.setattr(trial, "evaluate", broken)
        result, _ = attempt(spec, resident, tmp_path, Keeping(60))
    assert result.failure is not None
    assert (result.failure.kind, counted.steps) == ("evaluation_failed", STEPS)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert not [name for name in load_file(kept / "tensors.safetensors") if name.startswith("optimizer.")]
    attempt(spec, resident, tmp_path)
    assert_equal(tmp_path, expected)
    assert counted.steps == STEPS


def test_asked_to_stop_within_an_evaluation_it_leaves_a_clean_base_and_trains_no_step_again(
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    counted: Counted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = uncut(spec)
    counted.steps = 0
    batches = [0]
    real = evaluation._LiveModel._stop_if_asked

    def stop_if_asked(self: Any) -> None:
        batches[0] += 1
        real(self)

    monkeypatch.setattr(evaluation._LiveModel, "_stop_if_asked", stop_if_asked)
    result, _ = attempt(spec, resident, tmp_path, Keeping(60, lambda: batches[0] >= 2))
    assert (result.outcome, result.scores, batches[0]) == ("interrupted", {}, 2)
    model = resident.get(spec.model).model
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert not [module for module in model.modules() if module.training]
    attempt(spec, resident, tmp_path)
    assert_equal(tmp_path, expected)
    assert counted.steps == STEPS


def test_asked_to_stop_while_it_loads_a_trial_ends_before_its_first_step(
    spec: TrialSpec, resident: Resident, counted: Counted, tmp_path: Path
) -> None:
    result, reports = attempt(spec, resident, tmp_path, Keeping(should_stop=lambda: True))
    assert (result.outcome, result.steps, counted.steps) == ("interrupted", 0, 0)
    assert [report.phase for report in reports] == ["loading"]


# --- disks ------------------------------------------------------------------------------------------

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
NO_SPACE_IN_RUST = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [NO_SPACE, NO_SPACE_IN_RUST], ids=["python", "rust"])
def test_a_checkpoint_that_finds_no_space_is_noted_once_and_the_training_goes_on(
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    expected = uncut(spec)
    seen: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", failing(error))
        for report in trial.run_trial(spec, resident, tmp_path, EVERY_STEP):
            seen += (tmp_path / "checkpoints").glob("*")
            if report.step == 4 and report.train_loss is not None:
                assert [note for note in report.notes if "could not be written" in note]
    assert_equal(tmp_path, expected)
    assert seen == []
    notes = [note for note in result_of(tmp_path).notes if "could not be written" in note]
    assert notes == [
        "the checkpoint of step 1 could not be written: No space left on device; the training goes on, and "
        "the next ones are tried"
    ]


@pytest.mark.parametrize("error", [NO_SPACE, NO_SPACE_IN_RUST], ids=["python", "rust"])
def test_an_adapter_that_finds_no_space_is_a_full_disk_and_no_step_is_trained_again(
    spec: TrialSpec,
    resident: Resident,
    uncut: Callable[[TrialSpec], Path],
    counted: Counted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    expected = uncut(spec)
    counted.steps = 0
    with monkeypatch.context() as patch:
        patch.setattr(adapters.Adapter, "save", failing(error))
        result, _ = attempt(spec, resident, tmp_path)
    assert result.failure is not None
    assert result.failure.kind == "disk_full"
    assert "'No space left on device'" in result.failure.message
    assert str(tmp_path) in result.failure.message
    assert "free some space" in result.failure.message
    attempt(spec, resident, tmp_path)
    assert_equal(tmp_path, expected)
    assert counted.steps == STEPS


def test_a_result_that_cannot_be_written_is_raised_and_leaves_no_draft(
    spec: TrialSpec, resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = trial.run_trial(spec.untrained(), resident, tmp_path)
    next(running)
    monkeypatch.setattr(paths.os, "fsync", failing(NO_SPACE))
    with pytest.raises(OSError, match="No space left"):
        list(running)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "spec.json"]
    monkeypatch.undo()
    assert attempt(spec.untrained(), resident, tmp_path)[0].outcome == "completed"


# --- one process at a time --------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.02)


@pytest.mark.usefixtures("impatient")
def test_a_folder_in_use_is_waited_for_and_then_left_alone(
    spec: TrialSpec, resident: Resident, tmp_path: Path
) -> None:
    with FolderLock(tmp_path / "lock") as other:
        assert other.take()
        running = trial.run_trial(spec, resident, tmp_path)
        waiting = next(running)
        assert waiting.phase == "loading"
        assert f"for {other.holder}, which runs in {tmp_path}" in waiting.notes[0]
        with pytest.raises(TrialError, match=f"{other.holder} still runs in .* end it, and resume"):
            next(running)
        stopping = trial.run_trial(spec, resident, tmp_path, Keeping(should_stop=lambda: True))
        next(stopping)
        with pytest.raises(Interrupted):
            next(stopping)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


@pytest.mark.usefixtures("impatient")
def test_what_the_process_before_completed_is_not_run_again(
    spec: TrialSpec, resident: Resident, uncut: Callable[[TrialSpec], Path], tmp_path: Path
) -> None:
    with FolderLock(tmp_path / "lock") as other:
        other.take()
        running = trial.run_trial(spec, resident, tmp_path)
        next(running)
        shutil.copytree(uncut(spec), tmp_path, dirs_exist_ok=True)
    assert list(running) == []
    assert result_of(tmp_path) == result_of(uncut(spec))
