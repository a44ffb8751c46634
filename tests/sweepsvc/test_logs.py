"""What is known of one trial, from its study and its tracker."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from sweeps.errors import CannotStart
from sweeps.result import Failure, TrialResult
from sweepsvc import cli, logs
from sweepsvc.home import Home
from sweepsvc.logs import Telling, reports
from sweepsvc.owner import this_process
from sweepsvc.plain import PlainStudy
from sweepsvc.protocols import Point, RunHistory, SweepRecord, TrialRecord
from sweepsvc.study import open_study
from tests.sweepsvc.samples import result_of, sweep_of

ROOT = Path(__file__).parents[2]
SPACE = 'space: {lora.r: [8, 32], lora.alpha: ["2*r", 1]}'


class Tracker:
    """One run's history, or none that answers."""

    def __init__(self, history: RunHistory) -> None:
        self.run = history
        self.trouble = ""
        self.histories = 0

    def newest(self, run_id: str) -> Mapping[str, Point] | None:
        if self.trouble:
            raise CannotStart(self.trouble)
        return {name: curve[-1] for name, curve in self.run.curves.items()}

    def history(self, run_id: str) -> RunHistory | None:
        self.histories += 1
        return self.run


def curve(*values: float, first: int = 1, at_ms: int = 10_000) -> list[Point]:
    return [Point(step, at_ms + 1_000 * step, value) for step, value in enumerate(values, first)]


RUN = RunHistory(
    5_000,
    {
        "train.loss": [*curve(3.0, 2.0), Point(2, 99_000, 2.0)],
        "eval.loss": [Point(2, 12_500, 2.5)],
        "lr": curve(1e-3, 5e-4),
        "tokens_per_second": [*curve(800.0, 810.0), Point(2, 99_000, 805.0)],
        "wall_seconds": [Point(2, 99_000, 94.0)],
    },
)


@pytest.fixture
def study() -> PlainStudy:
    return PlainStudy(sweep_of(f"sampler: grid, {SPACE}", "baseline: true"), "demo-1", {})


def told(trial: TrialRecord, tracker: Tracker, is_driven: bool = True) -> list[str]:
    said: list[str] = []
    telling = Telling(tracker, said.append)
    telling.begin(trial)
    telling.end(trial, is_driven)
    return said


def began(study: PlainStudy, *setbacks: str) -> TrialRecord:
    proposal = study.ask()
    assert proposal is not None
    study.started(proposal)
    study.tracked(proposal.key, "run-0")
    for why in setbacks:
        study.setback(proposal, why)
        study.started(proposal)
    return study.read().trials[-1]


def test_a_trial_that_failed_is_told_from_its_parameters_to_its_traceback(study: PlainStudy) -> None:
    trial = began(study, "process_lost: the worker is gone")
    result = result_of("failed").model_copy(update={"notes": ("dtype float32: the device is a CPU",)})
    study.tell(trial.proposal, result)
    assert told(study.read().trials[0], Tracker(RUN)) == [
        "trial 0 (lora.r=8, lora.alpha=2*r): failed, 2 attempts",
        "  lora.r = 8",
        "  lora.alpha = 16 (2*r)",
        "  evaluate.tasks = blimp_causative",
        "an attempt came to nothing: process_lost: the worker is gone",
        "1970-01-01 00:00:05 UTC  started",
        "1970-01-01 00:00:11 UTC  training step 1/390  loss 3.0000  800 tokens/s  lr 0.001",
        "1970-01-01 00:00:12 UTC  training step 2/390  loss 2.0000  held-out 2.5000  810 tokens/s  lr 0.0005",
        "note: dtype float32: the device is a CPU",
        "trial 0 (lora.r=8, lora.alpha=2*r) failed: diverged: the loss is nan",
        "Traceback ...\nDiverged: the loss is nan",
    ]


def test_the_first_of_two_numbers_of_a_step_stands_and_final_ones_are_no_step() -> None:
    resumed = RunHistory(
        5_000,
        {
            "train.loss": [*curve(3.0, 2.0), Point(2, 50_000, 2.0), *curve(9.0, 1.0, first=2, at_ms=60_000)],
            "wall_seconds": [Point(2, 50_000, 40.0)],
        },
    )
    merged = reports(resumed, 4)
    assert [(one.progress.step, one.progress.train_loss, one.at_ms) for one in merged] == [
        (1, 3.0, 11_000),
        (2, 2.0, 12_000),
        (3, 1.0, 63_000),
    ]
    running = TrialRecord(began(PlainStudy(sweep_of(f"sampler: grid, {SPACE}"), "a", {})).proposal, "running")
    lines = [text for _, text in logs._timeline(resumed, running)]
    assert lines[2] == "an attempt ended, 40 s of work so far"
    assert len(lines) == 4


def test_a_trial_that_has_not_begun_and_one_that_was_cut_say_so(study: PlainStudy) -> None:
    assert study.ask() is not None
    waiting = study.read().trials[0]
    assert told(waiting, Tracker(RUN))[-1] == "trial 0 (lora.r=8, lora.alpha=2*r) has not begun"
    cut = replace(began(study), state="interrupted")
    assert told(cut, Tracker(RUN), is_driven=False)[-1].endswith(
        "was cut off with its driver; `resume` goes on with it"
    )


def test_a_baseline_has_no_parameters_of_a_training(study: PlainStudy) -> None:
    study.baselines()
    lines = told(study.read().baselines[0], Tracker(RUN))
    assert lines[:2] == ["baseline: waiting", "  evaluate.tasks = blimp_causative"]


def test_what_was_said_is_not_said_again_and_a_tracker_that_is_away_is_said_once(study: PlainStudy) -> None:
    trial = began(study)
    tracker = Tracker(RunHistory(5_000, {"train.loss": curve(3.0)}))
    tracker.trouble = "refused"
    said: list[str] = []
    telling = Telling(tracker, said.append)
    for _ in range(2):
        telling.go_on(trial)
    assert said == ["the tracker does not answer, its part is left out: refused"]
    tracker.trouble = ""
    for _ in range(3):
        telling.go_on(trial)
    assert tracker.histories == 1  # nothing new: it is not read whole
    tracker.run = RunHistory(5_000, {"train.loss": curve(3.0, 2.0)})
    telling.go_on(trial)
    assert [line.rpartition("UTC  ")[2] for line in said[1:]] == [
        "the tracker answers again",
        "started",
        "training step 1/390  loss 3.0000",
        "training step 2/390  loss 2.0000",
    ]


def test_following_ends_with_the_trial(study: PlainStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = began(study)
    monkeypatch.setattr("sweepsvc.logs.time.sleep", lambda seconds: None)

    class Studies:
        """A study that is away once, then has the trial's end."""

        readings = 0

        def read(self) -> SweepRecord:
            self.readings += 1
            if self.readings == 2:
                raise CannotStart("the study database must be reachable")
            if self.readings == 4:
                study.tell(trial.proposal, result_of("completed", 0.5))
            return replace(study.read(), owner=this_process())

    studies = Studies()
    said: list[str] = []
    telling = Telling(Tracker(RUN), said.append)
    record = logs._followed(studies, telling, studies.read(), "0")
    telling.end(record.trials[0], is_driven=True)
    assert studies.readings == 4
    assert [line.partition(":")[0] for line in said if "UTC" not in line] == [
        "the study does not answer, it is asked again until it does",
        "the study answers again",
        "trial 0 (lora.r=8, lora.alpha=2*r) completed",
    ]


def test_secrets_in_a_failure_are_not_shown(study: PlainStudy) -> None:
    trial = began(study, "download_failed: https://me:secret@hub")
    failure = Failure(kind="bug", message="token=secret", traceback="at https://me:secret@hub")
    study.tell(
        trial.proposal, TrialResult(outcome="failed", failure=failure, notes=("see ://me:secret@hub",))
    )
    assert not any("secret" in line for line in told(study.read().trials[0], Tracker(RUN)))


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with `mine-1`: one trial completed, one failed, one was cut."""
    monkeypatch.chdir(tmp_path)
    for name in ("SWEEPSVC_HOME", "SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    home = Home()
    sweep = sweep_of(f"sampler: grid, {SPACE}", "baseline: true")
    study = open_study(sweep, "mine-1", home.study_url, {"owner": this_process()})
    study.baselines()
    for result in (result_of("completed", 0.5), result_of("failed"), result_of("completed", 0.75)):
        proposal = study.ask()
        assert proposal is not None
        study.started(proposal)
        study.tell(proposal, result)
    assert study.ask() is not None
    study.close("interrupted")
    return home


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sweepsvc", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_without_a_trial_the_failed_ones_are_shown_and_which_there_are(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "logs", "mine") == 0
    assert capsys.readouterr().out.splitlines() == [
        "trial 1 (lora.r=8, lora.alpha=1) failed: diverged: the loss is nan",
        "Traceback ...",
        "Diverged: the loss is nan",
        "one trial from its start: --trial N, with N one of baseline, 0 to 3",
    ]


def test_where_none_failed_the_trials_are_counted(study: PlainStudy) -> None:
    began(study)
    assert list(logs.failures(study.read())) == [
        "no trial of demo-1 has failed: 1 running",
        "one trial from its start: --trial N, with N one of 0",
    ]


def test_one_trial_is_shown_and_nothing_is_made(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("0", "3", "baseline"):
        assert run(monkeypatch, "logs", "mine", "--trial", key, "--follow") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "trial 0 (lora.r=8, lora.alpha=2*r) completed: blimp_causative 0.500 ± 0.010, 3 s" in lines
    assert "trial 3 (lora.r=32, lora.alpha=1) has not begun" in lines
    assert lines[-1] == "baseline has not begun"
    assert [path.name for path in home.path.iterdir()] == ["study.db"]


def test_an_unknown_trial_is_bad_input_with_those_there_are(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "logs", "mine", "--trial", "17") == 2
    assert capsys.readouterr().err == (
        "--trial must name a trial of the sweep, got 17; it has baseline, 0 to 3\n"
    )
    assert run(monkeypatch, "logs", "mine", "-f") == 2
    assert "--follow goes with one trial" in capsys.readouterr().err


def test_every_command_of_the_page_about_following_runs(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/following.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    commands = [line.partition("#")[0].split() for block in blocks for line in block.splitlines()]
    commands = [words for words in commands if words[:3] == ["python", "-m", "sweepsvc"]]
    assert {words[3] for words in commands} == {"status", "watch", "logs"}
    assert len(commands) >= 5
    for words in commands:
        assert run(monkeypatch, *words[3:]) == (4 if words[3] == "watch" else 0), words
        assert "mine-1" in capsys.readouterr().out or words[3] == "logs"
