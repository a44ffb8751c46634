"""The laws of proposing, whatever samples: the budget, `first`, repeats, dense numbers, no trial twice."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sweeps.errors import InvalidTrial
from sweeps.space import Picks, Resolved
from sweeps.sweep import Sweep
from sweepsvc.protocols import Proposal

VAIN_DRAWS = 3
"""Draws in a row that may repeat earlier trials until one that is new is picked at random."""

GIVE_UP_AFTER = 100
"""The same where the space cannot be listed: then the study ends."""

LONGEST_LIST = 10_000
"""Combinations. A larger space is never listed in search of an unseen trial: each takes about 0.1 ms."""


class Source(Protocol):
    """A sampler: it draws picks, and hears which of them came to nothing."""

    def draw(self) -> Picks:
        """Picks of the sampler's own choice, one for each path of the space."""

    def reject(self, why: Mapping[str, int | str]) -> None:
        """The last draw is no proposal: `duplicate_of` a trial number, or `invalid` for a reason."""


@dataclass(frozen=True)
class Asked:
    """A proposal with the picks that it stands for; `drawn` if those are the source's last draw."""

    proposal: Proposal
    picks: Picks
    drawn: bool = False


class Proposer:
    """Decides what is proposed next.

    First come the picks that need no sampler (`first`, and every combination of a grid), then what the
    source draws. Each distinct trial is followed by its repeats. A trial that equals an earlier one
    (`TrialSpec.digest`) is never proposed: r=8 with "2*r" and r=8 with 16 are one trial.

    `earlier` is what was proposed before, by another process, in the order of the numbers: it goes on behind
    that as if it had proposed all of it itself.
    """

    def __init__(self, sweep: Sweep, source: Source | None, earlier: Sequence[Asked] = ()) -> None:
        self._search = sweep.search
        self._sweep = sweep
        self._source = source if self._search.space and self._search.sampler != "grid" else None
        self._fixed = self._picks_without_a_sampler()
        self._shuffled: Iterator[Picks] | None = None
        self._repeats: deque[Asked] = deque()
        self._numbers: dict[str, int] = {}  # of every trial so far, by its digest
        self._next_number = 0
        self._distinct = 0
        self.ended_because = ""
        self._notes: dict[str, str] = {}
        self._take_over(earlier)

    def _take_over(self, earlier: Sequence[Asked]) -> None:
        for asked in earlier:
            assert asked.proposal.number is not None
            # Computed anew: a later version may have more fields, which a stored digest does not know.
            self._numbers[asked.proposal.spec.digest] = asked.proposal.number
            self._next_number = max(self._next_number, asked.proposal.number + 1)
        distinct = [asked for asked in earlier if not asked.proposal.repeat]
        self._distinct = len(distinct)
        for asked in distinct:
            made = asked.proposal
            resolved = Resolved(made.spec, dict(made.params), dict(made.rules))
            self._repeats.extend(Asked(repeat, asked.picks) for repeat in self._repeated(resolved))

    def next(self) -> Asked | None:
        """The next proposal; None when there is none left, and then `ended_because` says why."""
        if self._repeats:
            return self._repeats.popleft()
        if self.ended_because:  # an end is one: asking again would only have the sampler draw in vain again
            return None
        budget = self._search.trials
        if budget is not None and self._distinct >= budget:
            self.ended_because = f"search.trials is {budget}, and as many distinct trials are proposed"
            return None
        asked = self._first_accepted(self._fixed) or self._drawn()
        if asked is None:
            self.ended_because = self._exhausted()
        return asked

    def _picks_without_a_sampler(self) -> Iterator[Picks]:
        yield from self._search.first
        if self._source is None:
            yield from self._search.space.combinations()

    @property
    def _can_be_listed(self) -> bool:
        size = self._search.space.size
        return size is not None and (size <= LONGEST_LIST or self._source is None)

    def _first_accepted(self, listed: Iterable[Picks]) -> Asked | None:
        return next((asked for picks in listed if (asked := self._accepted(picks))), None)

    def _drawn(self) -> Asked | None:
        if self._source is None:
            return None
        for _ in range(VAIN_DRAWS if self._can_be_listed else GIVE_UP_AFTER):
            asked = self._accepted(self._source.draw(), self._source)
            if asked is not None:
                return asked
        return self._unseen() if self._can_be_listed else None

    def _unseen(self) -> Asked | None:
        """One of the trials not proposed yet, at random."""
        if self._shuffled is None:
            everything = list(self._search.space.combinations())
            random.Random(self._search.seed).shuffle(everything)
            self._shuffled = iter(everything)
            self._note_once(
                "unseen",
                f"{self._search.sampler}: {VAIN_DRAWS} draws in a row repeated earlier trials; "
                "whenever they do, a trial not proposed yet is picked at random",
            )
        return self._first_accepted(self._shuffled)

    def _accepted(self, picks: Picks, source: Source | None = None) -> Asked | None:
        """The proposal that `picks` make, or None where they make an earlier trial or no valid one."""
        try:
            resolved = self._sweep.resolve(picks)
        except InvalidTrial as error:
            self._note_once("invalid", f"picks that make no valid trial are left out, the first: {error}")
            self._reject(source, {"invalid": str(error)})
            return None
        earlier = self._numbers.get(resolved.spec.digest)
        if earlier is not None:
            self._reject(source, {"duplicate_of": earlier})
            return None
        self._distinct += 1
        asked = Asked(self._numbered(resolved), picks, drawn=source is not None)
        self._repeats.extend(Asked(repeat, picks) for repeat in self._repeated(resolved))
        return asked

    def _reject(self, source: Source | None, why: Mapping[str, int | str]) -> None:
        if source is not None:
            source.reject(why)

    def _repeated(self, resolved: Resolved) -> Iterator[Proposal]:
        """The same trial with other seeds, less those that were proposed for another reason."""
        for repeat in range(1, self._search.repeats):
            spec = self._sweep.repeated(resolved.spec, repeat)
            if spec.digest not in self._numbers:
                yield self._numbered(Resolved(spec, resolved.params, resolved.rules), repeat)

    def _numbered(self, resolved: Resolved, repeat: int = 0) -> Proposal:
        number, self._next_number = self._next_number, self._next_number + 1
        self._numbers[resolved.spec.digest] = number
        # As JSON gives them back, so that what is read equals what was asked.
        params = {
            path: list(value) if isinstance(value, tuple) else value
            for path, value in resolved.params.items()
        }
        return Proposal(str(number), resolved.spec, number, params, dict(resolved.rules), repeat)

    def _exhausted(self) -> str:
        if self._can_be_listed:
            return f"the space has {self._distinct} distinct trials, all proposed"
        return (
            f"{GIVE_UP_AFTER} draws in a row gave no new trial, {self._distinct} distinct trials are proposed"
        )

    def _note_once(self, subject: str, text: str) -> None:
        self._notes.setdefault(subject, text)

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made for the user, each with its reason."""
        return tuple(self._notes.values())


def baseline_proposals(sweep: Sweep) -> list[Proposal]:
    """The untouched bases to score: "baseline", or "baseline-0", "baseline-1", ... where there are more."""
    specs = sweep.baselines()
    keys = ["baseline"] if len(specs) == 1 else [f"baseline-{number}" for number in range(len(specs))]
    return [Proposal(key, spec) for key, spec in zip(keys, specs, strict=True)]
