"""Which spare rehearses which coordinates: those of nodes that it would be taken for. Pure.

By domain first, as spares are taken (`cluster.core.spares`); then nodes that nobody rehearses, and the pipeline stages
that the fewest do. What a spare knows it keeps where it is as good. It changes when the job does: a spare is parked or
taken over, a node is lost.
"""

from __future__ import annotations

from collections import Counter

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Effects, Persist, Send
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.placement import assignment as placing


class Rehearsals:
    """The rehearsals of one job's spares."""

    def __init__(self, state: JobState) -> None:
        self._state = state
        self._stale = bool(state.job.rehearsals)
        self._again: set[int] = set()

    @property
    def due(self) -> float | None:
        """When `tick` has something to do in a job that trains."""
        return 0.0 if self._stale else None

    def changed(self) -> None:
        """A spare is parked, or the nodes of the job are others."""
        self._stale = bool(self._state.job.rehearsals)

    def again(self, node: int) -> None:
        """What a spare was told may have been lost with its connection."""
        if self._state.members.nodes[node].role == "spare":
            self._again.add(node)
            self.changed()

    def tick(self, without: int | None) -> Effects:
        """Tell spares what to rehearse from now on; but for one that does so for a planned move."""
        if not self._stale:
            return
        self._stale = False
        changed = False
        for spare, nodes in self._plan(without).items():
            members, job = self._state.members, self._state.job
            state, wanted = members.nodes[spare], frozenset(rank for node in nodes for rank in members.ranks_of(node))
            in_turn = placing.in_turn(spare, job.active_nodes, job.rehearsals)
            slots = job.slots_per_node
            now = state.rehearses or {node * slots + local for node in in_turn for local in range(slots)}
            changed |= state.rehearses != wanted
            state.rehearses = wanted
            if wanted != now or spare in self._again:
                ranks: dict[int, list[int]] = {}
                for rank in (rank for node in nodes for rank in members.ranks_of(node)):
                    ranks.setdefault(members.assignment[rank].local, []).append(rank)
                yield Send(spare, r.Rehearse(ranks))
        self._again.clear()
        if changed:
            yield Persist(("members",))

    def _plan(self, without: int | None) -> dict[int, list[int]]:
        """By spare, the nodes whose coordinates it rehearses."""
        members, stages = self._state.members, self._state.layout.stages
        active = members.active()
        of = {node: frozenset(members.ranks_of(node)) for node in active}
        stage = {node: min((stages[rank] for rank in of[node] if rank in stages), default=0) for node in active}
        nodes, by_stage = Counter[int](), Counter[int]()
        spares = [spare for spare in members.ready_spares() if spare != without]
        # who rehearses something already first, so that nobody else takes that up
        spares.sort(key=lambda spare: (members.unfit(spare), not members.nodes[spare].rehearses, spare))
        plan: dict[int, list[int]] = {}
        for spare in spares:
            kept = members.nodes[spare].rehearses | members.nodes[spare].rehearsed
            near = {node: self._state.spares.apart(node, spare) for node in active}
            plan[spare] = mine = []
            for _ in range(min(self._state.job.rehearsals, len(active))):
                best = min(
                    (node for node in active if node not in mine),
                    key=lambda n: (near[n][0], nodes[n], near[n][1], not of[n] <= kept, by_stage[stage[n]], min(of[n])),
                )
                mine.append(best)
                nodes[best] += 1
                by_stage[stage[best]] += 1
        return plan
