"""A node is taken away on request: all hold still after the same iteration, then a spare takes over. Pure.

::

    begin(node) -> Rehearse .. Rehearsed -> Hold(iteration) .. all NodeHeld -> declare .. an ordinary recovery, to which
                                                                   |           the node gives shards
                                                                   '-- the spare is gone: an epoch with the same nodes,
                                                                       the drain is called off

With ``--deadpool-rehearsals`` a spare sets up the coordinates of the node first, while training goes on. Where a
recovery or another coordinator comes between, or the spare starts again, the move begins anew as soon as it can: once
accepted it ends with the event ``left``, or with one that says why not (``stays``; or its node is lost).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Declare, Effects, LetGo, Persist, Send, emit
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.recoveries import Recoveries
from deadpool_megatron.cluster.core.state import JobState

_HOLD_NOTICE_S = 0.5  # what a message to the slowest worker may take
_HOLD_LATE_S = 2.0  # after the first node, until all hold still or do not


@dataclass(slots=True)
class _Drain:
    """``deadline`` 0: there is something to do as soon as the job trains."""

    node: int
    deadline: float = 0.0
    asked: bool = False  # a spare to rehearse the node; one that does not is not waited for again
    rehearses: int | None = None  # that spare, while it is waited for
    iteration: int | None = None  # at whose begin all were told to hold still
    holds: bool = False  # they were, or do so already
    held: set[int] = field(default_factory=set)


class Drains:
    """The drains of one job, one after the other."""

    def __init__(self, state: JobState, recoveries: Recoveries) -> None:
        self._state = state
        self._recoveries = recoveries
        self._drain: _Drain | None = None

    @property
    def node(self) -> int | None:
        """The node that is to be taken away, until its place is given to another one."""
        return self._drain.node if self._drain is not None else None

    @property
    def rehearses(self) -> int | None:
        """The spare that sets up what the node does, while it is waited for."""
        return self._drain.rehearses if self._drain is not None else None

    @property
    def due(self) -> float | None:
        """When `tick` has something to do; None when nothing is under way, or has to wait."""
        drain = self._drain
        if drain is None or not self._trains:
            return None
        waits = not drain.holds and not drain.deadline and self._spare_starts(drain)
        return None if waits else drain.deadline

    def begin(self, node: int, now: float) -> Effects:
        """A node is to be taken away. A spare may go at once."""
        self._drain = _Drain(node)
        yield from self._go_on(self._drain, now)
        yield Persist(("now",))

    def rehearsed(self, record: r.Rehearsed) -> None:
        """A spare has set up coordinates, or cannot: the move goes on, with the next `tick`."""
        drain = self._drain
        if drain is None or drain.rehearses != record.node or not self._trains:
            return
        if record.why or self._known(drain.node):
            drain.rehearses, drain.deadline = None, 0.0

    def again(self, node: int) -> Effects:
        """That all are to hold still may have been lost with this node's connection."""
        drain = self._drain
        if drain is not None and drain.holds and drain.iteration is not None:
            yield Send(node, r.Hold(self._state.members.epoch, drain.iteration))

    @property
    def _trains(self) -> bool:
        """No recovery is under way, nor the end."""
        return self._state.phase is Phase.RUNNING and self._recoveries.current is None

    def _known(self, node: int) -> bool:
        """A spare has rehearsed all that the node does."""
        return bool(self._state.members.rehearsed([node]).get(node))

    def _spare_starts(self, drain: _Drain) -> bool:
        """No spare can take over yet, but one will."""
        members = self._state.members
        if members.ready_spares() or not members.holds(drain.node):
            return False
        return bool(members.cold_spares() or members.coming_spares())

    def _go_on(self, drain: _Drain, now: float) -> Effects:
        state, node = self._state, drain.node
        members, job = state.members, state.job
        if members.nodes[node].role == "spare":  # it may have given way to one
            self._drain = None
            yield emit("left", node=node)
            yield LetGo(node)
        elif not members.ready_spares():
            yield from self.call_off("no parked spare is left to take over")
        elif job.rehearsals and not drain.asked and not self._known(node):
            spare, ranks = state.spares.for_move(node), members.ranks_of(node)
            assert spare is not None  # one is parked
            drain.asked, drain.rehearses, drain.deadline = True, spare, now + job.deadlines.build
            yield emit("rehearsing", node=spare, ranks=ranks)
            members.nodes[spare].rehearses, members.nodes[spare].unrehearsed = frozenset(ranks), {}
            yield Send(spare, r.Rehearse({members.assignment[rank].local: [rank] for rank in ranks}))
        else:
            yield from self._hold(drain, now)

    def _hold(self, drain: _Drain, now: float) -> Effects:
        pace = self._state.progress.pace
        ahead = 2 + math.ceil(_HOLD_NOTICE_S / pace) if pace > 0 else 3
        drain.iteration, drain.rehearses, drain.holds = self._state.progress.reached + ahead, None, True
        drain.deadline = now + self._state.job.deadlines.abort + ahead * pace
        yield emit("leaving", node=drain.node, iteration=drain.iteration)
        yield Send(None, r.Hold(self._state.members.epoch, drain.iteration))

    def held(self, record: r.NodeHeld, now: float) -> Effects:
        """A node of this epoch holds still; `tick` may have something to do."""
        drain = self._drain
        if drain is None:  # who told everybody to is gone, and nobody else would
            yield Declare(f"node {record.node} holds still for a drain that was begun by another coordinator")
            return
        drain.held.add(record.node)
        # Who was past the boundary already is brought back by an ordinary recovery, at the cost of an iteration. Some
        # may be so where a coordinator before this one has told another boundary.
        another = record.missed or record.iteration != drain.iteration
        if another or drain.held >= set(self._state.members.active()):
            drain.holds, drain.deadline = True, 0.0
        else:  # who heard of it too late waits for this one in the step after the boundary, and never gets there
            drain.deadline = min(drain.deadline, now + 2 * self._state.progress.pace + _HOLD_LATE_S)

    def tick(self, now: float) -> Effects:
        """Go on, where that was not possible before; stop waiting for nodes that missed the hold deadline, or for a
        rehearsal that does not come."""
        drain = self._drain
        if drain is None or self.due is None or now < drain.deadline:
            return
        if drain.holds:
            yield from self._move_out(drain)
        else:
            yield from self._go_on(drain, now)

    def _move_out(self, drain: _Drain) -> Effects:
        members = self._state.members
        if self._spare_starts(drain):  # again, perhaps: all go on from where they hold still, and it is waited for
            yield Declare(f"node {drain.node} is not drained yet: its spare is starting")
        elif not members.ready_spares():
            # The node is healthy: to give it up without anybody in its place would end the job.
            cause = "no parked spare is left to take over"
            yield from self.call_off(cause)
            yield Declare(f"node {drain.node} is not drained: {cause}")
        else:
            self._drain = None
            members.nodes[drain.node].role = "leaving"
            self._recoveries.helpers.add(drain.node)
            yield Declare(f"node {drain.node} is drained")

    @property
    def state(self) -> str:
        """What the drain under way waits for, in words; empty when there is none."""
        drain = self._drain
        if drain is None:
            return ""
        if not self._trains:
            return "waits until the job trains"
        if drain.holds:
            return f"all hold still at iteration {drain.iteration}"
        if drain.rehearses is not None:
            return f"node {drain.rehearses} sets up what it does"
        return "waits for a spare that is starting" if self._spare_starts(drain) else "begins"

    def cancel(self, node: int) -> Effects:
        """The user wants the node that is being drained to stay; who holds still for it is set free."""
        assert self._drain is not None and self._drain.node == node
        holds = self._drain.holds and self._trains
        cause = "the drain was cancelled"
        yield from self.call_off(cause)
        if holds:
            yield Declare(f"node {node} is not drained: {cause}")

    def call_off(self, cause: str) -> Effects:
        """Whoever is to be taken away stays."""
        if self._drain is not None:
            yield emit("stays", node=self._drain.node, cause=cause)
            self._drain = None
            yield Persist(("now",))

    def lost(self, nodes: set[int]) -> None:
        """These nodes are gone: there is nothing left to drain, or nobody waits for a rehearsal there."""
        if self._drain is None:
            return
        if self._drain.node in nodes:
            self._drain = None
        elif self._drain.rehearses in nodes:
            self._drain.rehearses, self._drain.deadline = None, 0.0

    def forget(self) -> None:
        """A new epoch: nobody holds still any more, and the move begins again with what there is then."""
        if self._drain is not None:
            self._drain = _Drain(self._drain.node, asked=self._drain.asked)

    def ended(self) -> None:
        """The job is over."""
        self._drain = None

    # ---- a coordinator that starts again

    def dump(self) -> int | None:
        """The node, as JSON types."""
        return self.node

    def load(self, kept: int | None) -> None:
        """The opposite. What was under way begins again once all agents are back."""
        if kept is not None:
            self._drain = _Drain(kept)
