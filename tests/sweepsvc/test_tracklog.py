"""The log of one trial for the tracker: what it gives back after a kill, and what a later attempt adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeps.result import Progress
from sweepsvc.plain import PlainStudy
from sweepsvc.protocols import Proposal, Report
from sweepsvc.tracklog import Ended, Mark, Replay, Started, TrackLog, read_reports
from tests.sweepsvc.samples import result_of, sweep_of


@pytest.fixture
def trial() -> Proposal:
    space = 'space: {lora.r: [8], lora.alpha: ["2*r"]}'
    proposal = PlainStudy(sweep_of(f"sampler: grid, {space}"), "sweep-1", {}).ask()
    assert proposal is not None
    return proposal


def report(step: int, **numbers: float) -> Report:
    return Report(Progress(phase="training", step=step, **numbers), 1_700_000_000_000 + step)


def test_what_was_appended_is_read_back_by_another_process(tmp_path: Path, trial: Proposal) -> None:
    said = [
        Started(trial, 1, 5),
        report(1, train_loss=float("inf"), lr=0.1 + 0.2),
        Ended(result_of("failed", train_loss=float("-inf")), 7),
    ]
    log = TrackLog(tmp_path)
    for entry in said:
        log.append(entry)
    assert list(TrackLog(tmp_path).history()) == said


def test_a_new_log_has_nothing_that_waits_and_a_log_without_a_mark_may_have_a_run(
    tmp_path: Path, trial: Proposal
) -> None:
    log = TrackLog(tmp_path)
    assert (log.waits, log.mark) == (False, Mark())
    log.append(Started(trial, 1, 5))
    assert log.waits
    assert not log.mark.maybe  # this process knows that it has opened none
    assert TrackLog(tmp_path).mark == Mark(maybe=True)


def test_what_was_delivered_waits_no_more_in_any_process(tmp_path: Path, trial: Proposal) -> None:
    log = TrackLog(tmp_path)
    log.append(Started(trial, 1, 5))
    log.append(report(1))
    log.delivered(Mark(log.waiting()[0].end, "run"))
    for one in (log, TrackLog(tmp_path)):
        assert [line.entry for line in one.waiting()] == [report(1)]
        assert list(one.heard()) == [Started(trial, 1, 5)]
    log.delivered(Mark(log.size, "run"))
    assert not TrackLog(tmp_path).waits


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("torn", [1, 30])
def test_a_line_is_whole_or_cut_off_wherever_its_writer_was_killed(
    tmp_path: Path, trial: Proposal, kept: int, torn: int
) -> None:
    log = TrackLog(tmp_path)
    said = [Started(trial, 1, 5), report(1), report(2)]
    for entry in said:
        log.append(entry)
    file = tmp_path / "tracking" / "log.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:kept]) + lines[kept][:torn])
    again = TrackLog(tmp_path)
    assert list(again.history()) == said[:kept]
    again.append(report(3))
    assert list(TrackLog(tmp_path).history()) == [*said[:kept], report(3)]


def test_a_mark_beyond_a_log_that_was_lost_hides_nothing_that_comes_now(
    tmp_path: Path, trial: Proposal
) -> None:
    log = TrackLog(tmp_path)
    log.append(Started(trial, 1, 5))
    log.delivered(Mark(log.size, "run"))
    (tmp_path / "tracking" / "log.jsonl").unlink()
    again = TrackLog(tmp_path)
    again.append(Started(trial, 2, 9))
    assert [line.entry for line in again.waiting()] == [Started(trial, 2, 9)]
    assert again.mark.run_id == "run"


def test_some_of_a_long_log_is_read_at_a_time_and_never_less_than_a_line(
    tmp_path: Path, trial: Proposal
) -> None:
    log = TrackLog(tmp_path)
    log.append(Started(trial, 1, 5))
    for step in range(4):
        log.append(report(step))
    assert [line.entry for line in log.waiting(at_most_bytes=1)] == [Started(trial, 1, 5)]
    assert len(log.waiting()) == 5


def test_only_a_later_attempt_repeats_and_only_what_was_reported_is_left_out(trial: Proposal) -> None:
    replay = Replay()
    replay.take(Started(trial, 1, 0))
    said = [report(2, train_loss=1.0), report(2, eval_loss=2.0), report(3, train_loss=3.0)]
    assert [replay.take(entry) for entry in said] == said
    replay.take(Started(trial, 2, 0))
    again = report(3, train_loss=3.0, eval_loss=4.0)
    assert replay.take(again) == report(3, eval_loss=4.0)
    assert replay.take(report(4, train_loss=5.0)) == report(4, train_loss=5.0)


def test_reading_reports_leaves_out_repeated_steps_and_a_torn_line_and_changes_nothing(
    tmp_path: Path, trial: Proposal
) -> None:
    log = TrackLog(tmp_path)
    assert read_reports(tmp_path) == []
    first, again, last = report(1, train_loss=2.0), report(1, train_loss=2.5), report(2, train_loss=1.0)
    for entry in (Started(trial, 1, 5), first, Started(trial, 2, 6), again, last):
        log.append(entry)
    file = tmp_path / "tracking" / "log.jsonl"
    file.write_bytes(file.read_bytes() + b'{"at_ms": 9, "wh')
    torn = file.read_bytes()
    heard = [(one.progress.step, one.progress.train_loss) for one in read_reports(tmp_path)]
    assert heard == [(1, 2.0), (1, None), (2, 1.0)]
    assert file.read_bytes() == torn
