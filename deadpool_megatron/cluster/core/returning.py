"""Agents that are to join, and agents that come back. Pure.

They come back to a coordinator that has started again or stood still, or over another connection::

    begin(nodes), also(node) .. each Join says which epoch its node was in .. all_back -> one epoch, or none

The end of a connection is not the end of a node: a reset, or one packet that was changed on its way, ends it too.

Until all are back, or given up, nothing is decided that somebody would not hear of: what asks for a new epoch is
remembered, and what is committed is counted once every holder of a coordinate is back.
"""

from __future__ import annotations

from collections.abc import Iterable

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Declare, Effect, Effects, EndIfFinished, Send, StartOver, Stop
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.observations import Observations
from deadpool_megatron.cluster.core.recoveries import Recoveries
from deadpool_megatron.cluster.core.start import Start
from deadpool_megatron.cluster.core.state import JobState


class Awaited:
    """Agents that are to come, each until a moment of its own."""

    def __init__(self) -> None:
        self._expected: dict[int, float] = {}  # until when

    def without(self, nodes: Iterable[int]) -> bool:
        """They have come, or are not awaited any more; True when one of them was."""
        return any([self._expected.pop(node, None) is not None for node in nodes])

    @property
    def due(self) -> float | None:
        """When the first of them is late; None when nobody is awaited."""
        return min(self._expected.values(), default=None)

    def late(self, now: float) -> set[int]:
        """Whose time is over."""
        return {node for node, until in self._expected.items() if now >= until}


class Arrivals(Awaited):
    """Who is still to join, at the start of the job and later.

    Args:
        join_s: seconds that an agent has to join.
    """

    def __init__(self, join_s: float) -> None:
        super().__init__()
        self._join_s = join_s
        self._begun = False

    def expect(self, nodes: Iterable[int], now: float) -> None:
        """These are to come from now on."""
        self._begun = True
        self._expected |= dict.fromkeys(nodes, now + self._join_s)

    @property
    def begun(self) -> bool:
        """Somebody was ever awaited: the time of those that begin with the job runs."""
        return self._begun

    def clear(self) -> None:
        """Nobody is awaited any more."""
        self._expected.clear()

    @property
    def why_late(self) -> str:
        """What is said of them."""
        return f"its agent has not joined within {self._join_s:g} s"


class Returning(Awaited):
    """Who is expected back. Without effect from the moment all are there or given up."""

    def __init__(self, state: JobState, recoveries: Recoveries, start: Start, seen: Observations) -> None:
        super().__init__()
        self._state = state
        self._recoveries = recoveries
        self._start = start
        self._seen = seen
        self._unsettled = ""
        self._was_away = False
        self._commits: list[r.Committed] | None = None
        """Reported while agents come back to a coordinator that has started again; None: they count at once."""

    # ---- who is expected

    def begin(self, nodes: Iterable[int], unsettled: str, until: float) -> None:
        """These agents were there, and have until then; ``unsettled``: what was under way already, may be empty."""
        self._expected = dict.fromkeys(nodes, until)
        self._unsettled = unsettled
        self._was_away = bool(self._expected)
        self._commits = [] if self._expected else None

    def also(self, node: int, until: float, stood_still: bool) -> None:
        """The connection of this one has ended; ``stood_still``: while nobody here could have heard it."""
        self._expected[node] = max(until, self._expected.get(node, until))
        self._was_away = self._was_away or stood_still

    @property
    def was_away(self) -> bool:
        """The coordinator itself was: whoever comes back may have missed what others have, too."""
        return self._was_away

    @property
    def why(self) -> str:
        """What is waited for, in words."""
        return "the coordinator has just come back" if self._was_away else "an agent connects again"

    @property
    def why_lost(self) -> str:
        """What became of who did not come."""
        return "its agent has not come back to the coordinator" if self._was_away else "its agent is gone or silent"

    @property
    def waits(self) -> bool:
        """Somebody is not back."""
        return bool(self._expected)

    def awaits(self, node: int) -> bool:
        """This one is not back."""
        return node in self._expected

    @property
    def owes(self) -> bool:
        """An epoch has to begin as soon as all are back."""
        return bool(self._expected and self._unsettled)

    def remember(self, unsettled: str) -> None:
        """Something that an epoch has to settle when all are back. The first is what is told."""
        self._unsettled = self._unsettled or unsettled

    def end(self) -> str:
        """Nobody is waited for any more. What an epoch has to settle."""
        unsettled, self._unsettled = self._unsettled, ""
        self._expected, self._was_away = {}, False
        return unsettled

    # ---- they come

    def back(self, record: r.Join, now: float) -> Effects:
        """The agent of a node is back, and the coordinator was away."""
        self.without({record.node})
        if self._recoveries.missed_by(record):
            self.remember(f"node {record.node} was in the middle of epoch {record.epoch}")
        if not self.waits:
            yield from self.all_back(now)
        else:
            yield from self._count_commits(now)

    def all_back(self, now: float) -> Effects:
        """All are there, or lost."""
        state, members, was_away = self._state, self._state.members, self._was_away
        prefix = "the coordinator was away and " if was_away else ""
        unsettled = self.end()
        epoch, lost = members.epoch, [node for node in members.active() if members.gone(node)]
        if state.end is not None:
            yield Stop(*state.end)
            return
        if state.phase is Phase.FINISHING:
            if was_away:
                yield Send(None, r.AllFinished(members.epoch))
            yield EndIfFinished()  # all may have left already
        elif state.phase is Phase.STARTING:
            if unsettled or lost:  # which a coordinator before this one may not have come to say
                yield StartOver(f"{prefix}{unsettled or f'node {lost[0]} was lost'}")
            elif was_away:
                yield from self._start.send_again()
        yield from self._count_commits(now)
        if members.epoch != epoch or state.phase is not Phase.RUNNING:
            return
        trains = self._recoveries.current is None
        if unsettled or lost or (self._recoveries.vacant and trains):
            why = unsettled or (f"node {lost[0]} was lost" if lost else "a worker died")
            yield Declare(f"{prefix}{why}")
        elif was_away and trains and self._start.placement_holds:
            yield self._start.placement()  # who heard it hears the same again
        yield EndIfFinished()

    # ---- commits meanwhile

    @property
    def defers_commits(self) -> bool:
        """What is committed, and what can never be, follows from what all say: an active agent is not back yet."""
        return self._commits is not None

    def committed(self, record: r.Committed, now: float) -> Iterable[Effect]:
        """A node of the current epoch has committed a generation."""
        if self._commits is not None:
            self._commits.append(record)
        elif record.epoch == self._state.members.epoch:
            training = self._state.phase is Phase.RUNNING and self._recoveries.current is None
            return self._seen.committed(record, now, training)
        return ()

    def _count_commits(self, now: float) -> Effects:
        if self._commits is not None and not any(map(self._state.members.holds, self._expected)):
            commits, self._commits = self._commits, None
            yield from self._seen.catch_up(None)
            for each in commits:
                yield from self.committed(each, now)
