"""A completed trial as a folder: what plain libraries read out of it, and when there is none."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweeps.errors import BadModel, CannotStart, OutOfMemory
from sweeps.result import TrialResult
from sweeps.spec import FIELDS, TrialSpec
from sweeps.trial.base import Resident, load_base
from sweeps.trial.generate import generate
from sweeps.trial.merge import merge
from sweeps.trial.paths import TrialFolder
from sweeps.trial.run import run_trial
from sweepsvc import cli, recorder
from sweepsvc import export as exporting
from sweepsvc.export import Asked, Exported, export
from sweepsvc.home import Home
from sweepsvc.protocols import Proposal, SweepRecord, TrialRecord
from tests.sweepsvc.samples import result_of
from tests.tiny import save_task, tiny_spec

IDS = torch.arange(3, 43).view(4, 10)
INSTRUCTION = "Which river flows through Brask?"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model.eval()(input_ids=IDS).logits
    return output


def plain(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def spec(
    tiny_tied_model_dir: Path, alpaca_rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrialSpec:
    """nf4 and a tied head: what is exported differs from what was trained on in both."""
    task_dir = save_task(tmp_path_factory.mktemp("tasks"))
    fields = {
        "model.quantization": "nf4",
        "evaluate.tasks": ["rivers"],
        "evaluate.task_dir": str(task_dir),
        "optimizer.lr": 0.02,
    }
    return tiny_spec(tiny_tied_model_dir, alpaca_rows_file, **fields)


@pytest.fixture(scope="module")
def home(spec: TrialSpec, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home in which trial 1 of the sweep was really run, and so was the baseline."""
    made = Home(tmp_path_factory.mktemp("home"))
    resident = Resident()
    for key, one in {"1": spec, "baseline": spec.untrained()}.items():
        for _ in run_trial(one, resident, made.sweep("demo-1").path / "trials" / key):
            pass
    return made


@pytest.fixture(scope="module")
def record(home: Home, spec: TrialSpec) -> SweepRecord:
    """Trial 1 is the best; 0 diverged, 2 was pruned, 3 is running, 4 completed and was never here."""

    def trial(number: int | None, result: TrialResult | None) -> TrialRecord:
        key = "baseline" if number is None else str(number)
        params = {} if number is None else {"lora.alpha": 8.0}
        one = spec.untrained() if number is None else spec
        proposal = Proposal(key, one, number, params, {"lora.alpha": "2*r"} if params else {})
        state = result.outcome if result else "running"
        value = result.mean_score if result and result.outcome == "completed" else None
        return TrialRecord(proposal, state, 1, result, value)

    def ran(key: str) -> TrialResult:
        result = TrialFolder(home.sweep("demo-1").path / "trials" / key).read_result()
        assert result is not None
        assert result.outcome == "completed", result.failure
        return result

    trials = [
        trial(0, result_of("failed")),
        trial(1, ran("1")),
        trial(2, result_of("pruned", 0.9)),
        trial(3, None),
        trial(4, result_of("completed", 0.0)),
    ]
    facts = {"git_commit": "0123abc"}
    return SweepRecord("demo-1", "running", "score.mean", True, [trial(None, ran("baseline"))], trials, facts)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where to export to; nothing else may be left beside it."""
    yield tmp_path / "out"
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


@pytest.fixture(scope="module")
def adapter(record: SweepRecord, home: Home, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(record, home, Asked(tmp_path_factory.mktemp("adapter") / "out"))


@pytest.fixture(scope="module")
def merged(record: SweepRecord, home: Home, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(record, home, Asked(tmp_path_factory.mktemp("merged") / "out", 1, merge=True))


# --- what is in the folder --------------------------------------------------------------------------


def test_plain_peft_reads_the_exported_adapter_on_the_base_it_was_trained_on(
    adapter: Exported, home: Home, spec: TrialSpec
) -> None:
    bases = [load_base(spec.model).model for _ in range(2)]
    untouched = logits(bases[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        exported = logits(PeftModel.from_pretrained(bases[0], adapter.folder))
        trained = logits(PeftModel.from_pretrained(bases[1], home.sweep("demo-1").path / "trials/1/adapter"))
    assert torch.equal(exported, trained)
    assert not torch.equal(exported, untouched)


def test_plain_transformers_reads_the_merged_model_equal_to_the_adapter_on_the_unquantised_base(
    adapter: Exported, merged: Exported, spec: TrialSpec
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        beside = logits(PeftModel.from_pretrained(plain(spec.model.id), adapter.folder))
    alone = plain(merged.folder)
    torch.testing.assert_close(logits(alone), beside, rtol=1e-4, atol=1e-5)
    assert (logits(alone) - logits(plain(spec.model.id))).abs().max() > 0.01
    assert torch.equal(
        alone.get_input_embeddings().weight, plain(spec.model.id).get_input_embeddings().weight
    )
    reckoned = plain(spec.model.id)
    merge(reckoned, adapter.folder)
    assert torch.equal(logits(alone), logits(reckoned))
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    assert (
        tokenizer(INSTRUCTION).input_ids
        == AutoTokenizer.from_pretrained(spec.model.id)(INSTRUCTION).input_ids
    )


def test_a_folder_holds_files_that_all_can_read_and_nothing_that_is_unpickled(
    adapter: Exported, merged: Exported, spec: TrialSpec
) -> None:
    names = {path.name for path in adapter.folder.iterdir()}
    assert names == {"README.md", "spec.json", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in merged.folder.iterdir()} >= {"README.md", "spec.json", "model.safetensors"}
    assert not (merged.folder / "adapter_config.json").exists()
    for file in (*adapter.folder.iterdir(), *merged.folder.iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file
        assert file.suffix in (".md", ".json", ".safetensors", ".jinja"), file
    assert TrialSpec.model_validate_json((adapter.folder / "spec.json").read_text()) == spec


def test_the_card_has_scores_with_errors_the_baseline_every_setting_and_how_it_was_made(
    adapter: Exported, record: SweepRecord, spec: TrialSpec
) -> None:
    card = (adapter.folder / "README.md").read_text()
    score, before = (
        one.result.scores["rivers"] for one in (record.trials[1], record.baselines[0]) if one.result
    )
    numbers = [f"{one.value:.3f} ± {one.stderr:.3f}" for one in (score, before)]
    assert f"| rivers | acc | {numbers[0]} | {numbers[1]} | 12 |" in card
    assert all(f"| `{path}` |" in card for path in FIELDS)
    assert "| `lora.alpha` | 8 (2*r) |" in card
    assert f"| base model | {spec.model.id} |" in card
    assert "trained on the base in 4 bits (nf4)" in card
    assert "0123abc" in card
    assert "torch " in card
    result = record.trials[1].result
    assert result is not None
    assert all(f"- {note}" in card for note in result.notes)
    assert f"{result.trainable_params:,}" in card
    assert "sweepsvc export demo-1 --trial 1 -o" in card


def test_the_card_of_a_merged_model_says_that_the_scores_are_of_the_quantised_one(merged: Exported) -> None:
    card = (merged.folder / "README.md").read_text()
    assert "The merged weights in this folder are rounded otherwise, and were not scored." in card
    assert "library_name: transformers" in card
    assert re.search(r"- merged: dtype float32: set by model.dtype", card)
    assert " --merge" in card


def test_the_card_of_a_trial_that_was_scored_merged_says_so(
    record: SweepRecord, home: Home, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = record.trials[1]
    spec = trial.proposal.spec
    evaluate = spec.evaluate.model_copy(update={"weights": "merged"})
    scored_merged = replace(trial.proposal, spec=spec.model_copy(update={"evaluate": evaluate}))
    monkeypatch.setattr(TrialFolder, "is_final", lambda *_: True)
    other = replace(record, trials=[replace(trial, proposal=scored_merged)])
    export(other, home, Asked(out, 1))
    card = (out / "README.md").read_text()
    assert "Scored was the unquantised base with the adapter merged into it." in card
    assert "On a base in 4 bits the adapter may score otherwise." in card
    assert "The sweep has no score of the untouched base model." in card  # that of nf4 is not its baseline


def test_the_export_says_what_it_made_and_how_to_try_it(adapter: Exported, merged: Exported) -> None:
    first, *_, last = adapter.lines()
    assert first.startswith("trial 1 (lora.alpha=2*r): the adapter, ")
    assert last == f"try it:  python -m sweepsvc generate {adapter.folder} --prompt ..."
    assert "dtype float32: set by model.dtype" in merged.lines()


# --- when there is none -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (0, r"only a completed trial.*got trial 0 of demo-1, which is failed \(diverged: the loss is nan\)"),
        (2, r"which is pruned; it was stopped early; name another"),
        (3, r"which is running; wait for it"),
        (9, r"must name a trial of demo-1 \(0 to 4\), got 9"),
        (4, r"must hold the adapter that it ended with, got .*demo-1/trials/4 without it; give the --home"),
    ],
)
def test_only_a_completed_trial_with_its_adapter_is_exported(
    number: int, told: str, record: SweepRecord, home: Home, out: Path
) -> None:
    with pytest.raises(CannotStart, match=told):
        export(record, home, Asked(out, number))
    assert not out.exists()


def test_a_folder_of_another_trial_is_not_taken_for_this_ones(
    record: SweepRecord, home: Home, out: Path
) -> None:
    trial = record.trials[1]
    spec = trial.proposal.spec
    other = replace(
        trial.proposal, spec=spec.model_copy(update={"lora": spec.lora.model_copy(update={"r": 5})})
    )
    with pytest.raises(CannotStart, match="must hold the adapter that it ended with"):
        export(replace(record, trials=[replace(trial, proposal=other)]), home, Asked(out, 1))


def test_a_trial_without_training_has_nothing_to_export(record: SweepRecord, home: Home, out: Path) -> None:
    untrained = replace(record.trials[1].proposal, spec=record.trials[1].proposal.spec.untrained())
    with pytest.raises(CannotStart, match="only what was trained"):
        export(replace(record, trials=[replace(record.trials[1], proposal=untrained)]), home, Asked(out, 1))


def test_the_best_of_none_is_an_error(record: SweepRecord, home: Home, out: Path) -> None:
    with pytest.raises(CannotStart, match=r"2 trials, none of them completed with a score\.mean"):
        export(replace(record, trials=[record.trials[0], record.trials[3]]), home, Asked(out))


def test_the_best_is_by_the_sweeps_objective(record: SweepRecord) -> None:
    worst = replace(record.trials[4], value=-1.0)
    trials = [*record.trials[:4], worst]
    assert exporting.best(replace(record, trials=trials)) is record.trials[1]
    assert exporting.best(replace(record, trials=trials, maximize=False)) is worst


def test_a_folder_with_files_in_it_is_left_alone(record: SweepRecord, home: Home, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(CannotStart, match=r"new or empty folder, got .*out, which has files in it"):
        export(record, home, Asked(out))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_file_or_a_place_that_cannot_be_made_is_refused(record: SweepRecord, home: Home, out: Path) -> None:
    out.write_text("mine")
    with pytest.raises(CannotStart, match="which is a file"):
        export(record, home, Asked(out))
    with pytest.raises(CannotStart, match=r"got .*out/beneath, and .*out is a file"):
        export(record, home, Asked(out / "beneath"))
    assert out.read_text() == "mine"


def test_an_empty_folder_is_filled(record: SweepRecord, home: Home, out: Path) -> None:
    out.mkdir()
    export(record, home, Asked(out))
    assert (out / "README.md").exists()


def test_files_that_come_into_the_folder_meanwhile_are_kept(
    record: SweepRecord, home: Home, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporting.card_text

    def while_somebody_writes(card: Any) -> str:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        return write(card)

    monkeypatch.setattr(exporting, "card_text", while_somebody_writes)
    with pytest.raises(CannotStart, match="which has files in it"):
        export(record, home, Asked(out))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            (OutOfMemory, "got 'CUDA out of memory'; free the"),
        ),
        (OSError(28, "No space left on device"), (CannotStart, "No space left on device; name another")),
        (BadModel("the model x must load"), (BadModel, "the model x must load")),
        (KeyboardInterrupt(), (KeyboardInterrupt, "^$")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_stops_it_leaves_no_folder(
    error: BaseException,
    ours: tuple[type[BaseException], str],
    record: SweepRecord,
    home: Home,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(model: Any, folder: Path) -> None:
        raise error

    monkeypatch.setattr("sweeps.trial.merge.merge", fails)
    kind, told = ours
    with pytest.raises(kind, match=told):
        export(record, home, Asked(out, 1, merge=True))
    assert not out.exists()


# --- the registry (MLflow's own: test_recorder.py) ----------------------------------------------------


@dataclass
class Registry:
    """Takes the place of MLflow's; what it was asked, and which files it saw."""

    asked: list[tuple[Any, ...]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)

    def check(self, uri: str, run_id: str, name: str) -> None:
        self.asked.append((uri, run_id, name))

    def register(self, uri: str, run_id: str, folder: Path, name: str, card: str, tags: Any) -> str:
        self.asked.append((uri, run_id, name, card, tags))
        self.files = {file.name for file in folder.iterdir()}
        return "7"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry()
    monkeypatch.setattr(recorder, "check_registry", made.check)
    monkeypatch.setattr(recorder, "register_model", made.register)
    return made


def with_run(record: SweepRecord) -> SweepRecord:
    return replace(record, trials=[replace(trial, mlflow_run_id="run-1") for trial in record.trials])


def test_the_whole_folder_is_registered_with_the_trials_run(
    record: SweepRecord, home: Home, out: Path, spec: TrialSpec, registry: Registry
) -> None:
    made = export(with_run(record), home, Asked(out, 1, register="rivers"))
    assert "registered in MLflow as rivers, version 7" in made.lines()
    tags = {"sweep_id": "demo-1", "trial": "1", "kind": "adapter", "base_model": spec.model.id}
    card = (out / "README.md").read_text()
    where = (home.tracking_uri, "run-1", "rivers")
    assert registry.asked == [where, (*where, card, tags)]
    assert registry.files == {file.name for file in out.iterdir()}


def test_a_trial_without_a_run_in_the_tracker_is_not_registered(
    record: SweepRecord, home: Home, out: Path, registry: Registry
) -> None:
    with pytest.raises(CannotStart, match=r"got trial 1 without one; make .* whole first: sync demo-1"):
        export(record, home, Asked(out, 1, register="rivers"))
    assert registry.asked == []
    assert not out.exists()


def test_a_registry_that_refuses_before_or_after_leaves_no_folder(
    record: SweepRecord, home: Home, out: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise CannotStart("the MLflow store must be reachable")

    for part in ("register_model", "check_registry"):
        monkeypatch.setattr(recorder, part, refuses)
        with pytest.raises(CannotStart, match="the MLflow store"):
            export(with_run(record), home, Asked(out, 1, register="rivers"))
        assert not out.exists()
    assert len(registry.asked) == 1


# --- the commands -----------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sweepsvc", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("choice", [[], ["--best", "--trial", "1"]], ids=["neither", "both"])
def test_exactly_one_of_best_and_trial_is_needed(
    choice: list[str], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "export", "demo-1", "-o", str(out), *choice) == 2
    assert "exactly one of --best and --trial N must be given" in capsys.readouterr().err


def test_the_commands_export_a_trial_and_ask_it(
    record: SweepRecord,
    home: Home,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sweepsvc.study.load_record", lambda sweep, url: record)
    arguments = ["export", "demo-1", "--best", "-o", str(out), "--home", str(home.path)]
    assert run(monkeypatch, *arguments) == 0
    assert str(out) in capsys.readouterr().out
    assert run(monkeypatch, *arguments) == 2
    assert "which has files in it" in capsys.readouterr().err
    assert run(monkeypatch, "generate", str(out), "--prompt", INSTRUCTION, "--max-tokens", "4") == 0
    assert capsys.readouterr().out == generate(out, INSTRUCTION, 4) + "\n"


def test_sigterm_leaves_no_draft(
    record: SweepRecord, home: Home, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweepsvc.study.load_record", lambda sweep, url: record)
    monkeypatch.setattr(exporting, "card_text", lambda card: os.kill(os.getpid(), signal.SIGTERM))
    assert run(monkeypatch, "export", "demo-1", "--best", "-o", str(out), "--home", str(home.path)) == 4
    assert not out.exists()


def test_generate_says_what_is_no_exported_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "generate", str(tmp_path), "--prompt", "x") == 2
    assert "a folder that `export` made is needed" in capsys.readouterr().err
    assert json.dumps(capsys.readouterr().out) == '""'
