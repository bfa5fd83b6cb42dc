"""Which generation a recovery goes on from: a pure function of what every node can give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deadpool_megatron.cluster.records import Offer, SlotAddress, Source

__all__ = ["Agreement", "NoCommonGeneration", "agree"]


class NoCommonGeneration(Exception):
    """No generation can be given by every coordinate. ``missing`` names the ranks of which nothing is left."""

    def __init__(self, missing: Sequence[int]) -> None:
        super().__init__(f"ranks without any copy: {list(missing)}" if missing else "no generation in common")
        self.missing = list(missing)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The newest generation every coordinate can have, and who gives the shard to the ranks that do not hold it."""

    generation: int
    sources: dict[int, Source]


def agree(
    assignment: Sequence[SlotAddress],
    offers: Mapping[int, Offer],
    refused: frozenset[tuple[int, int, int]] = frozenset(),
) -> Agreement:
    """Pick the newest generation in the intersection over all coordinates.

    Live state of generation g, an own copy and a peer copy all count the same: the run is deterministic, so they hold
    the same bytes.

    Args:
        assignment: the new assignment, by rank.
        offers: what each node can give, by node.
        refused: (rank, source node, generation) triples that turned out to be unreadable.

    Raises:
        NoCommonGeneration: redundancy is exceeded.
    """
    local: list[set[int]] = []
    remote: list[dict[int, list[Source]]] = []
    for rank, slot in enumerate(assignment):
        here = offers.get(slot.node)
        held: set[int] = set()
        if here is not None:
            live = here.live.get(rank)
            held.update(generation for _, generation in here.own.get(rank, ()))
            if live is not None:
                held.add(live)
        local.append({g for g in held if (rank, slot.node, g) not in refused})
        givers: dict[int, list[Source]] = {}
        for node in sorted(offers):
            offer = offers[node]
            newest: dict[int, int] = {}
            for epoch, g in (*offer.own.get(rank, ()), *offer.peer.get(rank, ())):
                newest[g] = max(epoch, newest.get(g, -1))
            for g, epoch in newest.items():
                if (rank, node, g) not in refused:
                    givers.setdefault(g, []).append(Source(node, epoch))
        remote.append(givers)
    available = [held | set(givers) for held, givers in zip(local, remote, strict=True)]
    common = set.intersection(*available) if available else set()
    if not common:
        raise NoCommonGeneration([rank for rank, gens in enumerate(available) if not gens])
    generation = max(common)
    sources: dict[int, Source] = {}
    for rank, givers in enumerate(remote):
        if generation not in local[rank]:
            # Several sources share the load by rank.
            sources[rank] = givers[generation][rank % len(givers[generation])]
    return Agreement(generation, sources)
