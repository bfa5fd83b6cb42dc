"""What one node sends to others and keeps for others: pure functions of groups, assignment and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.redundancy import Scheme, holders, stripes, words
from deadpool_megatron.cluster.records import Address, SlotAddress
from deadpool_megatron.vault import PartTo, Target, WordPlan, constants_of


def targets(
    node: int,
    groups: Sequence[Sequence[int]],
    scheme: Scheme,
    assignment: Sequence[SlotAddress],
    vaults: Mapping[int, Address],
) -> dict[int, list[Target]]:
    """By rank on ``node``, and by the holder of its constants, the vaults these go to.

    Constants are copied whole, with parity too: to the nodes that keep the stripe which begins with ``node``. No entry
    for a holder with a keeper that has no vault: it is gone, and the next epoch will say who comes instead.
    """
    ranks = placing.ranks_of(assignment, node).values()
    wanted: dict[int, list[tuple[int, PartTo | None]]] = {rank: [] for rank in ranks}
    for keeper in holders(groups, scheme).get(node, ()):
        for rank in ranks:
            wanted[rank].append((keeper, None))
    for word in words(groups, scheme, assignment):
        for part, rank in enumerate(word.ranks):
            if rank in wanted:
                wanted[rank] += [
                    (keeper, PartTo(id_, part, scheme.k)) for keeper, id_ in zip(word.keepers, word.ids, strict=True)
                ]
    for ward, keepers in _first(groups, scheme):
        if ward == node:
            wanted |= {constants_of(rank): [(keeper, None) for keeper in keepers] for rank in ranks}
    return {
        holder: [Target(vaults[keeper].host, vaults[keeper].port, part) for keeper, part in each]
        for holder, each in wanted.items()
        if all(keeper in vaults for keeper, _ in each)
    }


def _first(groups: Sequence[Sequence[int]], scheme: Scheme) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Each node, and the keepers of the stripe that begins with it."""
    return ((stripe.data[0], stripe.keepers) for stripe in stripes(groups, scheme))


def kept_for_others(
    node: int,
    groups: Sequence[Sequence[int]],
    scheme: Scheme,
    assignment: Sequence[SlotAddress],
    unique_bytes: Sequence[int],
    small_capacity: Sequence[int],
) -> tuple[dict[int, tuple[int, int]], dict[int, WordPlan], set[int]]:
    """What ``node`` keeps: by rank the sizes of a whole copy, by word a row of parity, and holders of constants.

    Args:
        unique_bytes: by rank, of its shard.
        small_capacity: by rank, the room for its small state in bytes.
    """
    wards = [ward for ward, keepers in holders(groups, scheme).items() if node in keepers]
    peers = {
        rank: (unique_bytes[rank], small_capacity[rank])
        for ward in wards
        for rank in placing.ranks_of(assignment, ward).values()
    }
    rows = {
        id_: WordPlan(
            word.ranks,
            row,
            tuple(unique_bytes[rank] for rank in word.ranks),
            tuple(small_capacity[rank] for rank in word.ranks),
        )
        for word in words(groups, scheme, assignment)
        for row, (keeper, id_) in enumerate(zip(word.keepers, word.ids, strict=True))
        if keeper == node
    }
    constants = {
        constants_of(rank)
        for ward, keepers in _first(groups, scheme)
        if node in keepers
        for rank in placing.ranks_of(assignment, ward).values()
    }
    return peers, rows, constants
