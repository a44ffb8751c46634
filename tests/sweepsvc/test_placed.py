"""What is placed at once, as machines come and go."""

from __future__ import annotations

from pathlib import Path

from sweeps.result import TrialResult
from sweeps.spec import TrialSpec
from sweepsvc.placed import Placed
from sweepsvc.protocols import Later, Proposal


class Waiting:
    """A conductor that always has one more, and counts how often it hears that there is no room."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.made = 0
        self.waited = 0
        self.ends: list[str] = []

    def next(self) -> Proposal:
        self.made += 1
        return Proposal(str(self.made - 1), TrialSpec(), self.made - 1)

    def waiting(self) -> None:
        self.waited += 1

    def ended(self, proposal: Proposal, result: TrialResult) -> None:
        self.ends.append(f"{proposal.key} {result.outcome}")

    def fetch(self, proposal: Proposal) -> None:
        """Nothing is elsewhere."""

    def folder(self, proposal: Proposal) -> Path:
        return self._folder / proposal.key


def test_no_more_is_placed_than_there_is_room_for(tmp_path: Path) -> None:
    room = [2]
    conductor = Waiting(tmp_path)
    placed = Placed(conductor, lambda: room[0])  # type: ignore[arg-type]  # only what is asked
    taken = [placed.take(name) for name in ("a", "b", "c")]
    assert [type(one) for one in taken] == [Proposal, Proposal, Later]
    assert (conductor.made, conductor.waited) == (2, 1)
    room[0] = 3  # a machine has joined
    assert isinstance(placed.take("c"), Proposal)
    room[0] = 1  # two have gone, with what ran on them
    for name in ("a", "b"):
        placed.end(name, TrialResult(outcome="interrupted"))
    assert isinstance(placed.take("d"), Later)
    placed.end("c", TrialResult(outcome="interrupted"))
    assert isinstance(placed.take("d"), Proposal)
    assert conductor.ends == ["0 interrupted", "1 interrupted", "2 interrupted"]
