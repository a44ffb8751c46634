"""Files and folders appear whole, and a folder knows whose it is."""

from __future__ import annotations

import contextlib
from pathlib import Path

from sweeps.result import TrialResult
from sweeps.spec import LoraSpec, TrialSpec
from sweeps.trial.paths import TrialFolder, whole_folder

SPEC = TrialSpec()


def test_a_folder_whose_block_raises_leaves_the_one_before_and_no_draft(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a") as draft:
        (draft / "old").touch()
    with contextlib.suppress(ZeroDivisionError), whole_folder(tmp_path / "a") as draft:
        (draft / "new").touch()
        raise ZeroDivisionError
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/old"]


def test_only_a_result_of_the_same_trial_that_stands_is_final(tmp_path: Path) -> None:
    files = TrialFolder(tmp_path)
    assert not files.is_final(SPEC)
    files.write_result(TrialResult(outcome="completed"))
    assert not files.is_final(SPEC)  # whose it is, nobody knows
    files.write_spec(SPEC)
    assert files.is_final(SPEC)
    files.write_result(TrialResult(outcome="pruned"))
    assert files.is_final(SPEC)
    assert not files.is_final(SPEC.model_copy(update={"lora": LoraSpec(r=3)}))
    for outcome in ("failed", "interrupted"):
        files.write_result(TrialResult(outcome=outcome))
        assert not files.is_final(SPEC)
    files.result.write_text('{"outcome": "comp')
    assert not files.is_final(SPEC)


def test_forget_leaves_the_spec_and_what_is_not_ours(tmp_path: Path) -> None:
    files = TrialFolder(tmp_path)
    files.write_spec(SPEC)
    files.write_result(TrialResult(outcome="failed"))
    files.evaluation.touch()
    for folder in (files.adapter, files.checkpoints / "step-00000001"):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (tmp_path / "outbox").mkdir()
    files.forget()
    files.forget()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outbox", "spec.json"]
