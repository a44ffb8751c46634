"""A trial that moves from one machine to another through a store: the worker's half, and the driver's."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.result import TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial.paths import TrialFolder
from sweepsvc.home import SweepFolder
from sweepsvc.protocols import Proposal
from sweepsvc.stored import TrialFiles
from sweepsvc.worker import Worker
from tests.scripted import COMPLETES, DIES, FAILS, HANGS


class Machine:
    """A worker's process on a machine of its own: its cache is no other machine's."""

    def __init__(self, folder: Path, url: str, patch: pytest.MonkeyPatch) -> None:
        self.cache = folder
        self._patch = patch
        self._enter()
        kept = {"sweep_id": "sweep-1", "stop": "", "storage": url}
        self._worker = Worker("tests.scripted:ScriptedTrials", None, False, 5.0, kept)

    def _enter(self) -> None:
        self._patch.setenv("SWEEPSVC_CACHE", str(self.cache))

    def begin(self, proposal: Proposal) -> None:
        self._enter()
        folder = f"/the/driver's/own/{proposal.key}"
        self._worker.begin({"spec": proposal.spec.model_dump_json(), "folder": folder})

    def step(self) -> dict[str, str]:
        self._enter()
        return self._worker.step()

    def run(self, proposal: Proposal) -> TrialResult:
        self.begin(proposal)
        while True:
            said = self.step()
            if "result" in said:
                return TrialResult.model_validate_json(said["result"])

    def leave(self) -> None:
        self._worker.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket"


@pytest.fixture
def machines(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Machine]]:
    before = signal.getsignal(signal.SIGTERM)
    made = [Machine(tmp_path / name, url, monkeypatch) for name in ("one", "two")]
    yield made
    for machine in made:
        machine.leave()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def files(tmp_path: Path, url: str) -> TrialFiles:
    return TrialFiles(SweepFolder(tmp_path / "home" / "sweep-1", url))


def proposal(kind: int) -> Proposal:
    return Proposal("7", TrialSpec.model_validate({"train": {"seed": kind}}), 7)


def test_what_a_worker_wrote_elsewhere_is_fetched_and_its_machine_left_clean(
    machines: list[Machine], files: TrialFiles
) -> None:
    trial = proposal(COMPLETES)
    assert machines[0].run(trial).outcome == "completed"
    machines[0].leave()
    assert not (machines[0].cache / "trials" / "sweep-1" / "7").exists()
    here = files.fetch(trial)
    result = here.read_result()
    assert result is not None
    assert result.outcome == "completed"
    assert here.is_final(trial.spec)


def test_a_trial_goes_on_elsewhere_from_its_checkpoint(
    machines: list[Machine], files: TrialFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweepsvc.mirror._PAUSE_PER_SECOND", 0.0)
    trial = proposal(HANGS)
    machines[0].begin(trial)
    machines[0].step()
    checkpoint = machines[0].cache / "trials" / "sweep-1" / "7" / "checkpoints" / "step-12"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state").write_text("a state")
    machines[0].step()  # with this report it is stored; then the machine is gone
    assert files.last_step(trial) == 12
    assert not (files.of(trial).checkpoints).exists(), "a driver needs no checkpoints"
    machines[1].begin(trial)
    machines[1].step()
    moved = machines[1].cache / "trials" / "sweep-1" / "7" / "checkpoints" / "step-12" / "state"
    assert moved.read_text() == "a state"
    (checkpoint / "state").write_text("what nobody waits for any more")
    said = machines[0].step()  # it lives on, cut off: it is told so, and ends
    assert "given up for lost" in said["result"]


def test_the_last_word_of_an_attempt_before_is_not_the_next_one_s(
    machines: list[Machine], files: TrialFiles, tmp_path: Path, url: str
) -> None:
    trial = proposal(FAILS)
    with pytest.raises(Exception, match="the loss must stay finite"):
        machines[0].run(trial)
    failed = files.fetch(trial).read_result()
    assert failed is not None
    assert failed.outcome == "failed"
    files.clear(trial)
    assert files.fetch(trial).read_result() is None, "the next worker has died before its first word"
    again = TrialFiles(SweepFolder(tmp_path / "home" / "sweep-1", url))
    assert again.fetch(trial).read_result() is None, "and so has the driver"
    with pytest.raises(Exception, match="the loss must stay finite"):
        machines[1].run(trial)


def test_a_trial_that_has_completed_is_not_cleared_and_one_can_begin_anew(
    machines: list[Machine], files: TrialFiles
) -> None:
    trial = proposal(COMPLETES)
    machines[0].run(trial)
    files.clear(trial)
    assert files.fetch(trial).is_final(trial.spec)
    files.forget(trial)
    assert files.fetch(trial).read_result() is None
    assert files.last_step(trial) == 0


def test_a_stop_reaches_workers_that_share_no_folder(
    machines: list[Machine], files: TrialFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweepsvc.mirror.STOP_SECONDS", 0.0)
    (files.of(proposal(HANGS)).path.parents[1]).mkdir(parents=True)
    machines[0].begin(proposal(HANGS))
    machines[0].step()
    files.ask_to_stop()
    for _ in range(200):
        said = machines[0].step()
        if "result" in said:
            break
    assert TrialResult.model_validate_json(said["result"]).outcome == "interrupted"
    files.forget_stop()
    assert machines[1].run(proposal(COMPLETES)).outcome == "completed"


def test_a_worker_that_is_closed_stores_what_it_has(machines: list[Machine], files: TrialFiles) -> None:
    trial = proposal(HANGS)
    machines[0].begin(trial)
    machines[0].step()
    folder = TrialFolder(machines[0].cache / "trials" / "sweep-1" / "7")
    folder.evaluation.write_text("{}")
    machines[0].leave()
    assert files.fetch(trial).evaluation.read_text() == "{}"


def test_without_a_storage_nothing_is_fetched(tmp_path: Path) -> None:
    files = TrialFiles(SweepFolder(tmp_path / "sweep-1"))
    trial = proposal(DIES)
    here = files.of(trial)
    here.write_result(TrialResult(outcome="interrupted"))
    assert files.fetch(trial).read_result() is not None
    files.clear(trial)
    assert files.fetch(trial).read_result() is None


def test_a_machine_without_the_sweep_s_folder_takes_no_trial(tmp_path: Path) -> None:
    kept = {"sweep_id": "sweep-1", "stop": str(tmp_path / "nowhere" / "stop"), "storage": ""}
    with pytest.raises(OSError, match=r"every machine must share the sweep's folder, got none at .*nowhere"):
        Worker("tests.scripted:ScriptedTrials", None, False, 5.0, kept)
