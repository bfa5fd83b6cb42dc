"""Agents come back to a coordinator that has started again, or that wakes after a standstill. Pure.

::

    begin(nodes), also(node) .. each Join says which epoch its node was in .. all_back -> one epoch, or none

Until all are back, or given up, nothing is decided that somebody would not hear of: what asks for a new epoch is
remembered, and what is committed is counted once every holder of a coordinate is back.
"""

from __future__ import annotations

from collections.abc import Iterable

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Declare, Effects, EndIfFinished, Lose, Send, StartOver, Stop
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.observations import Observations
from deadpool_megatron.cluster.core.recoveries import Recoveries
from deadpool_megatron.cluster.core.start import Start
from deadpool_megatron.cluster.core.state import JobState


class Returning:
    """Who is expected back. Without effect from the moment all are there or given up."""

    def __init__(self, state: JobState, recoveries: Recoveries, start: Start, seen: Observations) -> None:
        self._state = state
        self._recoveries = recoveries
        self._start = start
        self._seen = seen
        self._expected: set[int] = set()
        self._unsettled = ""
        self._until = 0.0
        self._commits: list[r.Committed] | None = None
        """Reported while agents come back to a coordinator that has started again; None: they count at once."""

    # ---- who is expected

    def begin(self, nodes: Iterable[int], unsettled: str, until: float) -> None:
        """These agents were there, and have until then; ``unsettled``: what was under way already, may be empty."""
        self._expected = set(nodes)
        self._unsettled = unsettled
        self._until = until
        self._commits = [] if self._expected else None

    def also(self, node: int, until: float) -> None:
        """The connection of this one ended while the coordinator stood still; it has until then to come back."""
        self._expected.add(node)
        self._until = until

    @property
    def waits(self) -> bool:
        """Somebody is not back."""
        return bool(self._expected)

    @property
    def due(self) -> float | None:
        """When those who are not back are given up; None when all are."""
        return self._until if self._expected else None

    def awaits(self, node: int) -> bool:
        """This one is not back."""
        return node in self._expected

    def without(self, nodes: Iterable[int]) -> None:
        """Back, or lost."""
        self._expected -= set(nodes)

    def remember(self, unsettled: str) -> None:
        """Something that an epoch has to settle when all are back. The first is what is told."""
        self._unsettled = self._unsettled or unsettled

    def end(self) -> tuple[set[int], str]:
        """Nobody is waited for any more. Who has not come back, and what an epoch has to settle."""
        missing, self._expected = self._expected, set()
        unsettled, self._unsettled = self._unsettled, ""
        return missing, unsettled

    # ---- they come

    def back(self, record: r.Join, now: float) -> Effects:
        """The agent of a node is back."""
        self.without({record.node})
        if self._recoveries.missed_by(record):
            self.remember(f"node {record.node} was in the middle of epoch {record.epoch}")
        if not self.waits:
            yield from self.all_back(now)
        else:
            yield from self._count_commits(now)

    def all_back(self, now: float) -> Effects:
        """All are there, or those who are not have had their time."""
        state, members = self._state, self._state.members
        missing, unsettled = self.end()
        epoch = members.epoch
        if state.end is not None:
            yield Stop(*state.end)
            return
        if missing:
            yield Lose(missing, "its agent has not come back to the coordinator")
        if state.phase is Phase.FINISHING:
            yield Send(None, r.AllFinished(members.epoch))
            yield EndIfFinished()  # all may have left already
        elif state.phase is Phase.STARTING:
            if unsettled and epoch == members.epoch:
                yield StartOver(f"the coordinator was away and {unsettled}")
            else:
                yield from self._start.send_again()
        yield from self._count_commits(now)
        if members.epoch != epoch or state.phase is not Phase.RUNNING:
            return
        trains = self._recoveries.current is None
        lost = [node for node in members.active() if members.gone(node)]
        if unsettled or lost or (self._recoveries.vacant and trains):
            why = unsettled or (f"node {lost[0]} was lost" if lost else "a worker died")
            yield Declare(f"the coordinator was away and {why}")
        elif trains and self._start.placement_holds:
            yield self._start.placement()  # who heard it hears the same again
        yield EndIfFinished()

    # ---- commits meanwhile

    @property
    def defers_commits(self) -> bool:
        """What is committed, and what can never be, follows from what all say: an active agent is not back yet."""
        return self._commits is not None

    def committed(self, record: r.Committed, now: float) -> Effects:
        """A node of the current epoch has committed a generation."""
        if self._commits is not None:
            self._commits.append(record)
        elif record.epoch == self._state.members.epoch:
            training = self._state.phase is Phase.RUNNING and self._recoveries.current is None
            yield from self._seen.committed(record, now, training)

    def _count_commits(self, now: float) -> Effects:
        if self._commits is not None and not any(map(self._state.members.holds, self._expected)):
            commits, self._commits = self._commits, None
            yield from self._seen.catch_up(None)
            for each in commits:
                yield from self.committed(each, now)
