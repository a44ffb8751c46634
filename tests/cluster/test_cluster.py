"""A sweep over three Ray nodes with Postgres and an MLflow server, from a machine that is none of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.cluster.conftest import Team, WriteSweep
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("a cluster")]


def status(team: Team, sweep_id: str) -> dict[str, Any]:
    said = team.run("status", sweep_id, "--json")
    assert said.code == 0, said
    found: dict[str, Any] = json.loads(said)
    return found


def runs(team: Team, monkeypatch: pytest.MonkeyPatch, sweep_id: str) -> list[Any]:
    """What the tracker has of the sweep."""
    for name, value in team.mlflow.client_environment.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(team.mlflow.url)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.sweep_id = '{sweep_id}'"))


def test_a_node_is_lost_and_every_trial_ends_once(
    team: Team, write_sweep: WriteSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is a job on the head, and the command that sent it has long ended."""
    file = write_sweep(team, "lost", steps=160, trials=4)
    said = team.run("launch", str(file), "--id", "lost-1", "--address", team.rays.dashboard, "--detach")
    assert said.code == 0, said
    assert "it goes on without this command" in said
    assert team.postgres.passwords["study"] not in said
    until(lambda: len(team.checkpoints("lost-1")) >= 3, 300)  # all three nodes have one under way
    team.rays.nodes["two"].kill()
    watched = team.run("watch", "lost-1")
    assert watched.code == 0, watched
    found = status(team, "lost-1")
    assert found["state"] == "completed"
    everything = [*found["baselines"], *found["trials"]]
    assert [trial["number"] for trial in found["trials"]] == [*range(4)]
    assert {trial["state"] for trial in everything} == {"completed"}
    moved = [trial for trial in everything if trial["attempts"] > 1]
    assert len(moved) == 1, "the node that was lost had one trial"
    recorded = runs(team, monkeypatch, "lost-1")
    assert sorted(run.data.tags.get("trial", "the sweep") for run in recorded) == [
        *map(str, range(4)),
        "baseline",
        "the sweep",
    ]
    assert {run.info.status for run in recorded} == {"FINISHED"}
    results = {run.data.tags.get("trial"): run.data.metrics for run in recorded}
    for trial in found["trials"]:
        assert results[str(trial["number"])]["score.rivers"] == trial["scores"]["rivers"]
    key = str(moved[0]["number"]) if moved[0]["number"] is not None else "baseline"
    told = team.run("logs", "lost-1", "--trial", key)
    assert "process_lost" in told
    if key != "baseline":
        assert re.search(r"resumed at step \d+ of 160", told), told
    team.rays.add("three")
    team.rays.wait_for(3)


def test_two_sweeps_at_once_do_not_disturb_each_other(
    team: Team, write_sweep: WriteSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ["--address", team.rays.dashboard]
    files = {name: write_sweep(team, name, steps=8, trials=2) for name in ("left", "right")}
    begun = [team.start("launch", str(file), "--id", name, *address) for name, file in files.items()]
    for command in begun:
        said = command.wait()
        assert said.code == 0, said
    for name in files:
        found = status(team, name)
        assert [trial["state"] for trial in found["trials"]] == ["completed"] * 2
        assert [trial["attempts"] for trial in found["trials"]] == [1, 1]
        names = sorted(run.data.tags.get("trial", "the sweep") for run in runs(team, monkeypatch, name))
        assert names == ["0", "1", "baseline", "the sweep"]
    scores = [[trial["scores"] for trial in status(team, name)["trials"]] for name in files]
    assert scores[0] == scores[1], "the same trials, whatever runs beside them"


def test_one_kind_of_gpu_is_kept_to(team: Team, write_sweep: WriteSweep) -> None:
    """A node says what it has, as Ray finds it out on a machine with GPUs."""
    team.rays.add("kind", kind="T4")
    team.rays.wait_for(4)
    file = write_sweep(team, "kind", steps=4, trials=2, resources=", accelerator: T4")
    said = team.run("launch", str(file), "--id", "kind-1", "--address", team.rays.dashboard)
    assert said.code == 0, said
    started = [line for line in said.splitlines() if line.endswith(" started")]
    ended = [line for line in said.splitlines() if "completed:" in line]
    order = [line for line in said.splitlines() if line in (*started, *ended)]
    assert [line in started for line in order] == [True, False] * 3, "one at a time: there is one such node"
    team.rays.nodes["kind"].kill()
    team.rays.wait_for(3)


def test_a_machine_that_has_just_gone_keeps_no_sweep_from_starting(
    team: Team, write_sweep: WriteSweep
) -> None:
    """Ray takes it for alive for some 15 seconds more."""
    alive = team.rays.count_alive()
    team.rays.add("gone")
    team.rays.wait_for(alive + 1)
    team.rays.nodes["gone"].kill()
    assert team.rays.count_alive() == alive + 1
    file = write_sweep(team, "gone", steps=4, trials=1)
    said = team.run("launch", str(file), "--id", "gone-1", "--address", team.rays.dashboard)
    assert said.code == 0, said
    team.rays.wait_for(alive)


def test_a_cluster_that_cannot_carry_a_sweep_is_refused_before_anything_starts(
    team: Team, write_sweep: WriteSweep
) -> None:
    file = write_sweep(team, "refused", steps=4)
    address = ["--address", team.rays.dashboard]
    elsewhere = team.run(
        "launch", str(file), *address, "--set", "model.id=/nowhere/model", "--id", "refused-1", "--detach"
    )
    assert elsewhere.code == 2, elsewhere
    assert "/nowhere/model" in elsewhere
    wanting = team.run(
        "launch", str(file), *address, "--set", "resources.accelerator=H100", "--id", "refused-1"
    )
    assert wanting.code == 2, wanting
    assert "accelerator_type:H100" in wanting
    again = team.run("status", "refused-1")
    assert again.code == 2, again
    assert not (team.home / "refused-1").exists()
