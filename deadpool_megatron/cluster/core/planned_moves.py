"""A node is taken away on request: all hold still after the same iteration, then a spare takes over. Pure.

::

    begin(node) -> Rehearse .. Rehearsed -> Hold(iteration) .. all NodeHeld -> declare .. an ordinary recovery, to which
                                                                   |           the node gives shards
                                                                   '-- the spare is gone: an epoch with the same nodes,
                                                                       the drain is called off

With ``--deadpool-rehearsals`` a spare sets up the coordinates of the node first, while training goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Declare, Effects, LetGo, Send, emit
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.recoveries import Recoveries
from deadpool_megatron.cluster.core.state import JobState

_HOLD_NOTICE_S = 0.5  # what a message to the slowest worker may take


@dataclass(slots=True)
class _Drain:
    node: int
    deadline: float
    rehearses: int | None = None  # the spare that is to know the node first, while that is waited for
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
    def due(self) -> float | None:
        """When `tick` has something to do; None when nothing is under way."""
        drain = self._drain
        if drain is None or (drain.rehearses is not None and not self._trains):
            return None
        return drain.deadline

    def begin(self, node: int, now: float) -> Effects:
        """A node is to be taken away. A spare may go at once."""
        if self._state.members.nodes[node].role == "spare":
            yield emit("left", node=node)
            yield LetGo(node)
            return
        members, job = self._state.members, self._state.job
        if job.rehearsals and not self._known(node):
            spare, ranks = members.ready_spares()[0], members.ranks_of(node)
            self._drain = _Drain(node, now + job.deadlines.build, spare)
            yield emit("rehearsing", node=spare, ranks=ranks)
            yield Send(spare, r.Rehearse({members.assignment[rank].local: rank for rank in ranks}))
        else:
            yield from self._hold(node, now)

    def rehearsed(self, record: r.Rehearsed, now: float) -> Effects:
        """A spare has set up coordinates, or cannot: the move goes on."""
        drain = self._drain
        if drain is None or drain.rehearses != record.node or not self._trains:
            return
        if record.why or self._known(drain.node):
            yield from self._hold(drain.node, now)

    @property
    def _trains(self) -> bool:
        """No recovery is under way, nor the end."""
        return self._state.phase is Phase.RUNNING and self._recoveries.current is None

    def _known(self, node: int) -> bool:
        """A spare has rehearsed all that the node does."""
        return bool(self._state.members.rehearsed([node]).get(node))

    def _hold(self, node: int, now: float) -> Effects:
        pace = self._state.progress.pace
        ahead = 2 + math.ceil(_HOLD_NOTICE_S / pace) if pace > 0 else 3
        iteration = self._state.progress.iteration + ahead
        self._drain = _Drain(node, now + self._state.job.deadlines.abort + ahead * pace)
        yield emit("leaving", node=node, iteration=iteration)
        yield Send(None, r.Hold(self._state.members.epoch, iteration))

    def held(self, record: r.NodeHeld) -> Effects:
        """A node of this epoch holds still."""
        drain = self._drain
        if drain is None or drain.rehearses is not None:  # who told everybody to hold still is gone, and nobody would
            yield Declare(f"node {record.node} holds still for a drain that was begun by another coordinator")
            return
        drain.held.add(record.node)
        # Who was past the boundary already is brought back by an ordinary recovery, at the cost of an iteration.
        if record.missed or drain.held >= set(self._state.members.active()):
            yield from self._move_out(drain)

    def tick(self, now: float) -> Effects:
        """Stop waiting for nodes that missed the hold deadline, or for a rehearsal that does not come."""
        drain = self._drain
        if drain is None or self.due is None or now < drain.deadline:
            return
        if drain.rehearses is None:
            yield from self._move_out(drain)
        elif not self._state.members.holds(drain.node):
            self._drain = None  # it has been lost, or has given way
        else:
            yield from self._hold(drain.node, now)

    def _move_out(self, drain: _Drain) -> Effects:
        self._drain = None
        if not self._state.members.ready_spares():
            # The node is healthy: to give it up without anybody in its place would end the job.
            cause = "no parked spare is left to take over"
            yield emit("stays", node=drain.node, cause=cause)
            yield Declare(f"node {drain.node} is not drained: {cause}")  # all go on from where they hold still
            return
        self._state.members.nodes[drain.node].role = "leaving"
        self._recoveries.helpers.add(drain.node)
        yield Declare(f"node {drain.node} is drained")

    def lost(self, nodes: set[int]) -> None:
        """These nodes are gone: nobody waits for a rehearsal there."""
        if self._drain is not None and self._drain.rehearses in nodes:
            self._drain.deadline = 0.0

    def forget(self, over: bool = False) -> None:
        """A new epoch, or the end (``over``): nobody holds still any more. A move that waits for a rehearsal goes on,
        with what there is then."""
        if self._drain is not None and self._drain.rehearses is not None and not over:
            self._drain.deadline = 0.0
        else:
            self._drain = None
