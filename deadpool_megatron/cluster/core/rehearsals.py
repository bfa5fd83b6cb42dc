"""Which spare rehearses which coordinates: those of nodes that it would be taken for. Pure.

By domain first, as spares are taken (`cluster.core.spares`); then nodes that nobody rehearses, and the pipeline stages
that the fewest do. What a spare knows it keeps where it is as good. It changes when the job does: a spare is parked or
taken over, a node is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Effects, Persist, Send
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.placement import assignment as placing

type Near = Mapping[int, tuple[int, int]]


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
        self._stale = changed = False
        members, job = self._state.members, self._state.job
        slots = job.slots_per_node
        of: dict[int, list[int]] = {}  # by node, its ranks
        for rank, slot in enumerate(members.assignment):
            of.setdefault(slot.node, []).append(rank)
        for spare, nodes in self._plan(of, without).items():
            state, wanted = members.nodes[spare], frozenset(rank for node in nodes for rank in of[node])
            in_turn = placing.in_turn(spare, members.width_nodes, job.rehearsals)
            now = state.rehearses or {node * slots + local for node in in_turn for local in range(slots)}
            changed |= state.rehearses != wanted
            state.rehearses = wanted
            if wanted != now or spare in self._again:
                ranks: dict[int, list[int]] = {}
                for rank in (rank for node in nodes for rank in of[node]):
                    ranks.setdefault(members.assignment[rank].local, []).append(rank)
                state.unrehearsed = {}
                yield Send(spare, r.Rehearse(ranks))
        self._again.clear()
        if changed:
            yield Persist(("members",))

    def _plan(self, of: Mapping[int, list[int]], without: int | None) -> dict[int, list[int]]:
        """By spare, the nodes whose coordinates it rehearses. ``of``: the ranks of each node that trains."""
        members, job, stages = self._state.members, self._state.job, self._state.layout.stages
        count = min(job.rehearsals, len(of))
        stage = {node: stages.get(ranks[0], 0) for node, ranks in of.items()}
        nodes, by_stage = Counter[int](), Counter[int]()
        spares = [spare for spare in members.ready_spares() if spare != without]
        # who rehearses something already first, so that nobody else takes that up
        spares.sort(key=lambda spare: (members.unfit(spare), not members.nodes[spare].rehearses, spare))
        plan: dict[int, list[int]] = {}
        alike: dict[tuple[tuple[str, str], ...], Near] = {}  # by the domains of a spare
        least: dict[tuple[tuple[str, str], ...], tuple[int, int]] = {}
        for spare in spares:
            domains = tuple(sorted(self._state.protection.labels(spare).items()))
            if domains not in alike:
                alike[domains] = {node: self._state.spares.apart(node, spare, ranks) for node, ranks in of.items()}
                least[domains] = min(alike[domains].values())
            near = alike[domains]
            known = members.nodes[spare].rehearses | members.nodes[spare].rehearsed
            holders = dict.fromkeys(members.assignment[rank].node for rank in sorted(known))
            kept = [node for node in holders if known.issuperset(of[node])]

            turns = placing.in_turn(spare, members.width_nodes, job.rehearsals)  # it has begun with these
            begun = {*kept, *(members.assignment[node * job.slots_per_node].node for node in turns)}

            def worth(node: int, near: Near = near, begun: set[int] = begun) -> tuple[int, ...]:
                tied, far = near[node]
                return (tied, nodes[node], far, by_stage[stage[node]], int(node not in begun), of[node][0])

            # (nothing is worth more than these, and in a large job most spares have nothing else to do)
            mine = [node for node in kept if not nodes[node] and near[node] == least[domains]][:count]
            by_stage.update(stage[node] for node in mine)
            while len(mine) < count:
                mine.append(min((node for node in of if node not in mine), key=worth))
                by_stage[stage[mine[-1]]] += 1
            nodes.update(mine)
            plan[spare] = mine
        return plan
