"""A driver that is sent to a cluster: what goes there, what comes back, and what the driver makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sweeps.errors import CannotStart
from sweeps.sweepfile import load_sweep
from sweepsvc import remote, scheduler, session
from sweepsvc.cli import app
from sweepsvc.resume import Selection

TEXT = """\
name: demo
trial: {model: {id: /data/model}, train: {batch_size: 8, samples: 1024}}
search: {space: {lora.r: [4, 8]}}
"""


class Jobs:
    """A cluster that prints `said` and ends with `code`, and keeps what it was sent."""

    said: tuple[str, ...] = ("the driver is at wo", "rk on the cluster\ntrial 0 ", "completed\n")
    code: int = 3
    sent: dict[str, Any]

    def __init__(self, address: str) -> None:
        Jobs.sent = {"address": address}

    def submit(self, job: str, command: str, folder: Path) -> None:
        [file] = folder.iterdir()
        Jobs.sent |= {"job": job, "command": command, "file": file.name, "text": file.read_text()}

    def follow(self, job: str) -> Iterator[str]:
        yield from self.said

    def exit_code(self, job: str) -> int:
        return self.code


@pytest.fixture(autouse=True)
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Jobs]:
    monkeypatch.chdir(tmp_path)  # a driver changes to another folder
    monkeypatch.setattr(scheduler, "RayJobs", Jobs)
    monkeypatch.setattr(Jobs, "said", Jobs.said)
    monkeypatch.delenv("SWEEPSVC_HOME", raising=False)
    return Jobs


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(TEXT)
    return path


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, [*words], catch_exceptions=False)


def test_the_driver_s_words_and_its_exit_code_come_back(file: Path, jobs: type[Jobs]) -> None:
    done = invoke("launch", str(file), "--id", "demo-1", "--address", "http://head:8265")
    assert done.exit_code == 3
    assert "trial 0 completed" in done.output
    assert jobs.sent["address"] == "http://head:8265"
    assert jobs.sent["command"] == f"python -m sweepsvc drive {jobs.sent['file']}"
    assert jobs.sent["job"].startswith("launch-demo-1-")


def test_detached_it_ends_once_the_driver_is_at_work(file: Path, jobs: type[Jobs]) -> None:
    done = invoke("launch", str(file), "--id", "demo-1", "--detach")
    assert done.exit_code == 0
    assert jobs.sent["address"] == "auto"
    assert "trial 0" not in done.output
    assert "python -m sweepsvc watch demo-1" in done.output


def test_a_driver_that_cannot_start_ends_a_detached_command_too(
    file: Path, jobs: type[Jobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "said", ("the home must be shared\n",))
    monkeypatch.setattr(jobs, "code", 2)
    done = invoke("launch", str(file), "--detach")
    assert done.exit_code == 2
    assert "the home must be shared" in done.output


def test_what_is_sent_is_the_sweep_and_the_driver_reads_it_again(
    file: Path, tmp_path: Path, jobs: type[Jobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model lies on the cluster, so it is looked for there."""
    invoke("launch", str(file), "--id", "demo-1", "--detach", "--set", "lora.dropout=0.2", "--home", "/runs")
    errand = tmp_path / "errand.json"
    errand.write_text(jobs.sent["text"])
    launched: list[Any] = []
    monkeypatch.setattr(session, "launch", lambda *words: launched.extend(words))
    with pytest.raises(Exception, match="no such file or folder, looked for /data/model"):
        remote.drive(errand, lambda _: ())
    sent = json.loads(jobs.sent["text"])
    sent["errand"]["text"] = TEXT.replace("/data/model", str(tmp_path))
    errand.write_text(json.dumps(sent))
    remote.drive(errand, lambda _: ())
    sweep, home, sweep_id, joined = launched
    assert sweep.template["lora.dropout"] == 0.2
    assert (home.path, sweep_id, joined.address) == (Path("/runs"), "demo-1", "auto")


def test_a_resumption_is_sent_with_its_options(
    tmp_path: Path, jobs: type[Jobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPSVC_HOME", "/shared/runs")
    done = invoke("resume", "demo", "--failed", "--trial", "3", "--address", "ray://head:10001", "--detach")
    assert done.exit_code == 0
    errand = tmp_path / "errand.json"
    errand.write_text(jobs.sent["text"])
    resumed: list[Any] = []
    monkeypatch.setattr(session, "resume", lambda *words: resumed.extend(words))
    remote.drive(errand, lambda _: ())
    sweep_id, home, asked = resumed
    assert (sweep_id, home.path) == ("demo", Path("/shared/runs"))
    assert asked.selection == Selection(failed=True, trials=("3",))
    assert asked.cluster.address == "auto"


def test_a_driver_without_a_home_and_a_home_that_is_no_path_there_are_refused(
    file: Path, tmp_path: Path, jobs: type[Jobs]
) -> None:
    sweep = load_sweep(file, files_are_here=False)
    with pytest.raises(CannotStart, match=r"must be an absolute path there, got runs; leave --home"):
        remote.launch_errand(sweep, "demo-1", remote.Place(Path("runs")))
    invoke("launch", str(file), "--detach")
    errand = tmp_path / "errand.json"
    errand.write_text(jobs.sent["text"])
    with pytest.raises(CannotStart, match="must have a home in a folder that its machines share, got none"):
        remote.drive(errand, lambda _: ())


def test_faults_that_can_be_seen_here_send_nothing(file: Path, jobs: type[Jobs]) -> None:
    file.write_text(TEXT.replace("batch_size: 8", "batch_size: -8"))
    jobs.sent = {}
    with pytest.raises(Exception, match="batch_size"):
        invoke("launch", str(file), "--detach")
    assert jobs.sent == {}


def test_a_person_who_leaves_does_not_end_the_sweep(
    file: Path, jobs: type[Jobs], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def until_ctrl_c(self: Jobs, job: str) -> Iterator[str]:
        yield "trial 0 started\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", until_ctrl_c)
    errand = remote.launch_errand(load_sweep(file, files_are_here=False), "demo-1", remote.Place())
    assert remote.send(errand, "auto", detach=False) == remote.LEFT
    said = capsys.readouterr()
    assert "trial 0 started" in said.out
    assert "left; the sweep goes on" in said.err
    assert "python -m sweepsvc stop demo-1" in said.err
