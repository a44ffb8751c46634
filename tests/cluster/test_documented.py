"""Every command of docs/cluster.md, as it is written there, on three Ray nodes of this machine."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from tests.cluster.conftest import Said, Team, WriteSweep
from tests.cluster.rays import DOCUMENT
from tests.waiting import until

pytestmark = pytest.mark.slow

COMMANDS = [
    line.strip()
    for block in re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
]


class Reader:
    """A person who types the page's commands, and strikes out those that have been typed."""

    def __init__(self, team: Team, file: str) -> None:
        self._team = team
        self._file = file
        self.left = [command for command in COMMANDS if command.startswith("python -m sweepsvc")]

    def types(self, words: str, **more: str) -> Said:
        [command] = [command for command in self.left if f" {words}" in command]
        self.left.remove(command)
        for name, real in (
            ("http://HEAD:8265", self._team.rays.client if words == "resume" else self._team.rays.dashboard),
            ("search_spaces/rank_alpha.yaml", self._file),
        ):
            command = command.replace(name, real)
        _, _, _, *arguments = shlex.split(command)
        return self._team.run(*arguments, more=more)


def test_a_reader_of_the_page_gets_what_it_says(team: Team, write_sweep: WriteSweep) -> None:
    others = {command for command in COMMANDS if not command.startswith("python")}
    assert {command.partition("=")[0] for command in others if command.startswith("export ")} == {
        "export SWEEPSVC_STUDY_URL",
        "export MLFLOW_TRACKING_URI",
        "export SWEEPSVC_HOME",
    }, "the fixture sets these"
    assert {command for command in others if command.startswith("ray ")} == team.rays.documented, (
        "the fixture starts the nodes with these"
    )
    reader = Reader(team, str(write_sweep(team, "page", steps=150, trials=2)))
    assert reader.types("launch search_spaces/rank_alpha.yaml --id mine").code == 0
    assert reader.types("status").code == 0
    assert "trial 1" in reader.types("logs mine")
    until(lambda: team.checkpoints("mine"), 300)
    assert reader.types("stop").code == 0
    stopped = json.loads(team.run("status", "mine", "--json"))
    assert stopped["state"] == "interrupted"
    resumed = reader.types("resume")
    assert resumed.code == 0, resumed
    assert re.search(r"trial \d from step \d+", resumed), resumed
    assert "mine: completed" in reader.types("watch")
    short = Reader(team, str(write_sweep(team, "short", steps=4, trials=1)))
    home = {"SWEEPSVC_HOME": str(team.home), "RAY_ADDRESS": team.rays.gcs}
    done = short.types("launch search_spaces/rank_alpha.yaml --address auto", **home)
    assert done.code == 0, done
    assert len(reader.left) == 1, reader.left  # this one, which another reader has typed
