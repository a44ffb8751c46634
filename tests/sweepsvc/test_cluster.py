"""Whether a cluster can carry a sweep, on machines that are folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from sweeps.errors import CannotStart
from sweeps.sweep import Sweep
from sweeps.sweepfile import load_sweep_text
from sweepsvc import cluster
from sweepsvc.home import Home
from sweepsvc.mirror import Storage
from sweepsvc.protocols import Node

T = TypeVar("T")

HERE, THERE = Node("1", "gpu-1", is_here=True), Node("2", "gpu-2", is_here=False)


class Machines:
    """Machines that answer by running the work here; `instead` is what one of them does in its place."""

    def __init__(self, *nodes: Node, **instead: Callable[..., object]) -> None:
        self._nodes = nodes
        self._instead = instead

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def on_each_node(self, work: Callable[..., T], *arguments: object) -> Mapping[Node, T]:
        return {
            node: self._instead.get(node.name.replace("-", "_"), work)(*arguments)  # type: ignore[misc]
            for node in self._nodes
        }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("SWEEPSVC_STUDY_URL", "postgresql+psycopg2://someone:secret@db/study")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setattr(cluster, "VISIBLE_SECONDS", 0.5)
    return Home(tmp_path / "shared" / "runs")


def sweep_with(tmp_path: Path, model: str) -> Sweep:
    text = f"name: demo\ntrial: {{model: {{id: {model}}}}}\nsearch: {{space: {{lora.r: [4, 8]}}}}\n"
    return load_sweep_text(text, "demo.yaml", base_dir=tmp_path, files_are_here=False)


def test_one_machine_needs_neither_servers_nor_a_shared_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    home = Home(tmp_path / "runs")
    assert cluster.check(sweep_with(tmp_path, "./model"), Machines(HERE), home) == []
    assert not home.path.exists()


def test_machines_that_share_everything_may_run_and_nothing_is_left(tmp_path: Path, home: Home) -> None:
    (tmp_path / "model").mkdir()
    assert cluster.check(sweep_with(tmp_path, "./model"), Machines(HERE, THERE), home) == []
    assert not home.path.exists()
    home.path.mkdir(parents=True)
    cluster.check(sweep_with(tmp_path, "org/model"), Machines(HERE, THERE), home)
    assert list(home.path.iterdir()) == []


def test_every_fault_is_told_at_once(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWEEPSVC_STUDY_URL")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////somewhere/mlflow.db")
    with pytest.raises(CannotStart) as raised:
        cluster.check(sweep_with(tmp_path, "./model"), Machines(HERE, THERE), home)
    text = str(raised.value)
    assert "the study must be a server's, got sqlite" in text
    assert "the tracker must be a server's, got sqlite:////somewhere/mlflow.db; set MLFLOW_TRACKING" in text
    assert text.count(f"got no {tmp_path / 'model'} on gpu-") == 2


def test_a_machine_beside_the_driver_s_is_enough_to_need_servers(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SWEEPSVC_STUDY_URL")
    with pytest.raises(CannotStart, match="SWEEPSVC_STUDY_URL"):
        cluster.check(sweep_with(tmp_path, "org/model"), Machines(THERE), home)


@pytest.mark.parametrize(
    ("elsewhere", "fault"),
    [
        (lambda probe, paths: cluster.look(Path("/nowhere/runs/.probe"), paths), "is not there"),
        (lambda probe, paths: cluster.look(_another(probe), paths), "is another folder there"),
    ],
)
def test_a_home_that_is_not_shared_is_refused(
    tmp_path: Path, home: Home, elsewhere: Callable[..., object], fault: str
) -> None:
    with pytest.raises(CannotStart, match=f"which {fault} on gpu-2; give a --home in a folder that all"):
        cluster.check(sweep_with(tmp_path, "org/model"), Machines(HERE, THERE, gpu_2=elsewhere), home)


def _another(probe: Path) -> Path:
    """A folder of the same name as the probe that only one machine has."""
    other = probe.parents[1] / "local" / "runs" / probe.name
    other.mkdir(parents=True)
    (other / "driver").write_text("an old one")
    return other


def test_versions_that_differ_are_told(tmp_path: Path, home: Home) -> None:
    def older(probe: Path, paths: Sequence[str]) -> cluster.Seen:
        seen = cluster.look(probe, paths)
        return cluster.Seen(seen.lacks, seen.fault, seen.left, {**seen.versions, "peft": "0.1"})

    notes = cluster.check(sweep_with(tmp_path, "org/model"), Machines(HERE, THERE, gpu_2=older), home)
    assert len(notes) == 1
    assert "different versions of peft" in notes[0]
    assert "0.1 on gpu-2" in notes[0]


def test_with_a_storage_the_machines_share_no_folder(tmp_path: Path, home: Home) -> None:
    bucket = tmp_path / "bucket"
    storing = Home(home.path, f"file://{bucket}")
    sweep = sweep_with(tmp_path, "org/model")
    assert cluster.check(sweep, Machines(HERE, THERE), storing) == []
    assert not home.path.exists()
    assert [file for file in bucket.rglob("*") if file.is_file()] == []
    assert cluster.check(sweep, Machines(HERE), storing) == [], "one machine tries it, too"

    def cut_off(storage: object, probe: str, paths: Sequence[str]) -> cluster.Seen:
        return cluster.look_into(Storage(f"file://{tmp_path}/another"), probe, paths)

    with pytest.raises(CannotStart, match=r"gpu-2: a worker must read what the driver writes in .*another"):
        cluster.check(sweep, Machines(HERE, THERE, gpu_2=cut_off), storing)


def test_a_storage_that_no_worker_writes_to_is_refused(tmp_path: Path, home: Home) -> None:
    def silent(storage: object, probe: str, paths: Sequence[str]) -> cluster.Seen:
        return cluster.Seen([], "", "", {})

    storing = Home(home.path, f"file://{tmp_path}/bucket")
    with pytest.raises(CannotStart, match="the driver must read what a worker writes"):
        cluster.check(sweep_with(tmp_path, "org/model"), Machines(THERE, gpu_2=silent), storing)
