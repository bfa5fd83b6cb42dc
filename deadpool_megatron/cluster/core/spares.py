"""Which spare takes the place of which node. Pure.

What counts, in this order:

1. one that has not failed its last check (`cluster.core.checks`), before one that has;
2. a machine that has not failed of late, before a *lemon*; of lemons the one that failed least;
3. one whose workers are parked, before one that still starts (for a node that is only moved, this comes first);
4. the NVLink domain of the node, where a tensor- or expert-parallel group spans nodes of that domain: what it sends
   has no other way that is as fast;
5. one that has rehearsed what the node does;
6. the failure domains of the node, so that nobody's copies have to move;
7. the lowest number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from deadpool_megatron.cluster.core.layout import Layout
from deadpool_megatron.cluster.core.members import Members
from deadpool_megatron.cluster.core.protection import Protection
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.domains import NVLINK, covered, whole


class Spares:
    """Chooses among the spares of one job."""

    def __init__(self, members: Members, layout: Layout, protection: Protection) -> None:
        self._members = members
        self._layout = layout
        self._protection = protection

    def for_lost(self, lost: Iterable[int], vacant: Iterable[int]) -> dict[int, int] | None:
        """Who takes over which ``lost`` node, and which node with a ``vacant`` slot; see `placing.refill`.

        A vacant slot is filled in place rather than by a spare that has failed its check.
        """
        members = self._members
        ready = [spare for spare in members.ready_spares() if not members.unfit(spare)]
        rest = [*members.cold_spares(), *(spare for spare in members.ready_spares() if members.unfit(spare))]
        return placing.refill(members.assignment, lost, vacant, ready, rest, self._prefer(lost, vacant))

    def for_move(self, node: int) -> int | None:
        """The parked spare that takes over a healthy node; None when there is none."""
        taken = placing.choose_spares([node], self._members.ready_spares(), self._prefer([node], (), moved=True))
        return taken[node] if taken is not None else None

    def for_start(self, lost: Iterable[int]) -> dict[int, int] | None:
        """The same before training has begun, when a spare is as good whose agent is still to come."""
        members = self._members
        spares = [*members.ready_spares(), *members.cold_spares(), *members.coming_spares()]
        return placing.choose_spares(lost, spares, self._prefer(lost, ()))

    def covered(self) -> list[str]:
        """How many losses of each domain spares of the same domain cover, and which whole ones, in words."""
        members = self._members
        labels = {node: known for node in members.present() if (known := self._protection.labels(node))}
        if not labels:
            return []
        trains, spares = frozenset(members.active()), frozenset(members.spares())
        lines = covered(labels, trains, spares)
        if self._protection.groups:
            uncopied = {kind: bad for kind, (_, bad) in self._protection.exact.domains.items()}
            lines += whole(labels, trains, spares, uncopied)
        return lines

    def _prefer(self, lost: Iterable[int], vacant: Iterable[int], moved: bool = False) -> placing.Preference:
        members, labels = self._members, self._protection.labels
        fit = members.rehearsed({*lost, *vacant})
        tied = {node: self._is_tied(node) for node in {*lost, *vacant}}

        def prefer(node: int, spare: int) -> tuple[int, ...]:
            own, others = labels(node), labels(spare)
            bad, cold = (int(members.unfit(spare)), members.failures(spare)), int(not members.parked(spare))
            first = (cold, *bad) if moved or members.nodes[node].role == "leaving" else (*bad, cold)
            apart = tied[node] and own[NVLINK] != others.get(NVLINK)
            return (*first, int(apart), int(spare not in fit.get(node, ())), _far(own, others))

        return prefer

    def apart(self, node: int, spare: int, ranks: Collection[int]) -> tuple[int, int]:
        """How little a spare suits a node of these ranks by their domains, NVLink's first; (0, 0): they are alike."""
        own, others = self._protection.labels(node), self._protection.labels(spare)
        if not own:
            return 0, 0
        tied = own.get(NVLINK) != others.get(NVLINK) and self._is_tied(node, ranks)
        return int(tied), _far(own, others)

    def _is_tied(self, node: int, ranks: Collection[int] | None = None) -> bool:
        """A tensor- or expert-parallel group spans this node and another one of its NVLink domain."""
        labels, assignment = self._protection.labels, self._members.assignment
        domain = labels(node).get(NVLINK)
        if domain is None:
            return False
        if not self._layout.coordinates:
            return True  # it may be, and nothing is lost by it
        mine = self._members.ranks_of(node) if ranks is None else ranks
        others = {assignment[peer].node for rank in mine for peer in self._layout.close_to(rank)}
        return any(labels(other).get(NVLINK) == domain for other in others - {node})


def _far(own: Mapping[str, str], others: Mapping[str, str]) -> int:
    """In how many of a node's failure domains a spare is not."""
    return sum(others.get(kind) != label for kind, label in own.items())
