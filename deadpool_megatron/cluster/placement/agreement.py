"""Which generation a recovery goes on from: a pure function of what every node can give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from deadpool_megatron.cluster.placement.redundancy import Word
from deadpool_megatron.cluster.records import Offer, Share, SlotAddress, Source

RefusedCopy = tuple[int, int, int, int, int]
"""A copy that turned out to be of no use: rank, node, generation, the epoch it was written in, and -1; or not that, but
a share to rebuild it from, and the rank whose part, or the word whose parity, that share is."""
ANY_EPOCH: Final = -1
"""All the versions of the generation that the node has, as it is not known which one was meant."""
_Key = tuple[int, int]  # epoch (ANY_EPOCH where generations of all epochs are the same) and generation, newest last


class NoCommonGeneration(Exception):
    """No generation can be given by every coordinate. ``missing`` names the ranks of which nothing is left."""

    def __init__(self, missing: Sequence[int]) -> None:
        super().__init__(f"ranks without any copy: {list(missing)}" if missing else "no generation in common")
        self.missing = list(missing)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The newest generation every coordinate can have, and who gives the shard to the ranks that do not hold it.

    ``rebuilds``: by rank that nobody holds whole, by part of its shard, k shares to rebuild it from. ``held``: vaults
    can give all of it; else some of it is live state alone, and what was committed before must stay. ``epoch``: in
    which it was written; ANY_EPOCH: it is the same, whenever that was.
    """

    generation: int
    sources: dict[int, Source]
    rebuilds: dict[int, list[list[Share]]] = field(default_factory=dict)
    held: bool = True
    epoch: int = ANY_EPOCH


def agree(
    assignment: Sequence[SlotAddress],
    offers: Mapping[int, Offer],
    refused: frozenset[RefusedCopy] = frozenset(),
    words: Iterable[Word] = (),
    repeatable: bool = True,
) -> Agreement:
    """Pick the newest generation in the intersection over all coordinates.

    Where the run is repeatable, live state of generation g, an own copy and a peer copy all count the same, whichever
    epoch they are of: they hold the same bytes. Else only what is of one epoch fits together.

    Args:
        assignment: the new assignment, by rank.
        offers: what each node can give, by node.
        refused: copies that turned out to be unreadable. Another version of the same generation may be good.
        words: with parity, all words under which something may be kept.
        repeatable: training the same generation once more gives the same bits.

    Raises:
        NoCommonGeneration: redundancy is exceeded.
    """
    ranks = len(assignment)
    shares = _Shares(offers, refused, words, repeatable)
    vaults = _in_vaults(offers, refused, repeatable)
    live = _live(assignment, offers, refused, repeatable)
    known: set[int] = set().union(*vaults.values(), *live.values())
    rebuilt = {rank: shares.known(rank) for rank in range(ranks)} if shares.any else {}
    keys = vaults.keys() | live.keys() | set().union(*rebuilt.values())
    key = next((each for each in sorted(keys, reverse=True) if _has_all(each, ranks, vaults, live, rebuilt)), None)
    if key is None:
        raise NoCommonGeneration([rank for rank in range(ranks) if rank not in known and not rebuilt.get(rank)])
    sources, lacking = _own(key, assignment, offers, refused, live.get(key, set()), repeatable)
    rebuilds: dict[int, list[list[Share]]] = {}
    givers = _givers(key, lacking, offers, refused, repeatable)
    for rank in lacking:
        if rank not in givers:
            rebuilds[rank] = shares.parts(rank, key)
        else:
            # Several sources share the load: each rank begins with another one, and fetches from all at once.
            node, epoch = first = givers[rank][rank % len(givers[rank])]
            same = [other for other, written in givers[rank] if (other, written) != first and written == epoch]
            sources[rank] = Source(node, epoch, same)
    held = vaults.get(key, set())
    in_vaults = all(rank in held or shares.parts(rank, key) for rank in range(ranks))
    return Agreement(key[1], dict(sorted(sources.items())), rebuilds, in_vaults, key[0])


def _key(epoch: int, generation: int, repeatable: bool) -> _Key:
    return (ANY_EPOCH if repeatable else epoch, generation)


def _usable(
    refused: frozenset[RefusedCopy], rank: int, node: int, generation: int, epoch: int, share: int = -1
) -> bool:
    return not refused or refused.isdisjoint(
        (rank, node, generation, any_or_it, share) for any_or_it in (epoch, ANY_EPOCH)
    )


def _has_all(
    key: _Key,
    ranks: int,
    vaults: Mapping[_Key, set[int]],
    live: Mapping[_Key, set[int]],
    rebuilt: Mapping[int, set[_Key]],
) -> bool:
    """Every coordinate can have it."""
    there = vaults.get(key, set()) | live.get(key, set())
    return all(rank in there or key in rebuilt.get(rank, ()) for rank in range(ranks))


def _in_vaults(offers: Mapping[int, Offer], refused: frozenset[RefusedCopy], repeatable: bool) -> dict[_Key, set[int]]:
    """By key, the ranks of which some vault holds it whole. What most ranks have is the same, and is looked at once."""
    out: dict[_Key, set[int]] = {}
    doubted = {rank for rank, *_ in refused}
    for node, offer in offers.items():
        for held in (offer.own, offer.peer):
            last: Sequence[tuple[int, int]] = ()
            sets: list[set[int]] = []
            for rank, versions in held.items():
                if rank in doubted:
                    good = (v for v in versions if _usable(refused, rank, node, v[1], v[0]))
                    for epoch, g in good:
                        out.setdefault(_key(epoch, g, repeatable), set()).add(rank)
                    continue
                if versions != last:
                    last = versions
                    sets = [out.setdefault(_key(epoch, g, repeatable), set()) for epoch, g in versions]
                for each in sets:
                    each.add(rank)
    return out


def _live(
    assignment: Sequence[SlotAddress], offers: Mapping[int, Offer], refused: frozenset[RefusedCopy], repeatable: bool
) -> dict[_Key, set[int]]:
    """By key, the ranks whose workers hold it."""
    out: dict[_Key, set[int]] = {}
    doubted = {(rank, node, g) for rank, node, g, _, share in refused if share == -1}
    last: _Key | None = None
    ranks: set[int] = set()
    for node, offer in offers.items():
        for rank, g in offer.live.items():
            if g is None or assignment[rank].node != node or (doubted and (rank, node, g) in doubted):
                continue
            key = (ANY_EPOCH, g) if repeatable else (offer.live_epochs.get(rank, 0), g)
            if key != last:
                last, ranks = key, out.setdefault(key, set())
            ranks.add(rank)
    return out


def _own(
    key: _Key,
    assignment: Sequence[SlotAddress],
    offers: Mapping[int, Offer],
    refused: frozenset[RefusedCopy],
    live: set[int],
    repeatable: bool,
) -> tuple[dict[int, Source], list[int]]:
    """By rank that has it in its own vault and nowhere else, which version where not any will do; and who has none."""
    sources: dict[int, Source] = {}
    lacking: list[int] = []
    for rank, slot in enumerate(assignment):
        if rank in live:
            continue
        here = offers.get(slot.node)
        good = [
            epoch
            for epoch, g in (here.own.get(rank, ()) if here is not None else ())
            if _key(epoch, g, repeatable) == key and _usable(refused, rank, slot.node, g, epoch)
        ]
        if not good:
            lacking.append(rank)
        elif not repeatable or any((rank, slot.node, key[1], -1) == (r, n, g, share) for r, n, g, _, share in refused):
            sources[rank] = Source(slot.node, max(good), [])
    return sources, lacking


def _givers(
    key: _Key, lacking: Iterable[int], offers: Mapping[int, Offer], refused: frozenset[RefusedCopy], repeatable: bool
) -> dict[int, list[tuple[int, int]]]:
    """By rank, the nodes whose vaults hold it and the epoch it was written in, lowest number first."""
    out: dict[int, list[tuple[int, int]]] = {}
    wanted = set(lacking)
    for node in sorted(offers) if wanted else ():
        newest: dict[int, int] = {}
        for held in (offers[node].own, offers[node].peer):
            for rank in wanted & held.keys():
                for epoch, g in held[rank]:
                    if _key(epoch, g, repeatable) == key and _usable(refused, rank, node, g, epoch):
                        newest[rank] = max(epoch, newest.get(rank, -1))
        for rank, epoch in newest.items():
            out.setdefault(rank, []).append((node, epoch))
    return out


class _Shares:
    """What the vaults hold of each word."""

    def __init__(
        self, offers: Mapping[int, Offer], refused: frozenset[RefusedCopy], words: Iterable[Word], repeatable: bool
    ) -> None:
        self._refused = refused
        self._words: dict[int, dict[int, list[Word]]] = {}  # by rank and part
        for word in words:
            for part, rank in enumerate(word.ranks):
                self._words.setdefault(rank, {}).setdefault(part, []).append(word)
        self.any = bool(self._words)
        # by (is parity, rank or word) and key: by node the epochs it was written in
        self._held: dict[tuple[bool, int], dict[_Key, dict[int, list[int]]]] = {}
        for node in sorted(offers) if self._words else ():
            for parity, versions in ((False, offers[node].own), (True, offers[node].parity)):
                for holder, held in versions.items():
                    for epoch, generation in held:
                        of_holder = self._held.setdefault((parity, holder), {})
                        nodes = of_holder.setdefault(_key(epoch, generation, repeatable), {})
                        nodes.setdefault(node, []).append(epoch)

    def known(self, rank: int) -> set[_Key]:
        """Of what all parts of ``rank``'s shard can be rebuilt."""
        if rank not in self._words:
            return set()
        known = {
            key
            for of_part in self._words.get(rank, {}).values()
            for word in of_part
            for id_ in word.ids
            for key in self._held.get((True, id_), ())
        }
        return {key for key in known if self.parts(rank, key)}

    def parts(self, rank: int, key: _Key) -> list[list[Share]]:
        """For each part k shares; empty when one part cannot be rebuilt."""
        of_rank = self._words.get(rank, {})
        out: list[list[Share]] = []
        for part in range(max(of_rank, default=-1) + 1):
            known = (self._of(word, part, rank, key) for word in of_rank.get(part, ()))
            best = next((shares for shares in known if shares), None)
            if best is None:
                return []
            out.append(best)
        return out

    def _of(self, word: Word, part: int, rank: int, key: _Key) -> list[Share]:
        """Shares of a word that give back ``part``: parts of other ranks first, then parity."""
        k = len(word.ranks)
        wanted = [(i, False, other) for i, other in enumerate(word.ranks) if i != part]
        wanted += [(k + row, True, id_) for row, id_ in enumerate(word.ids)]
        out: list[Share] = []
        for share, parity, holder in wanted:
            for node, epochs in self._held.get((parity, holder), {}).get(key, {}).items():
                good = [epoch for epoch in epochs if _usable(self._refused, rank, node, key[1], epoch, holder)]
                if good and len(out) < k:
                    out.append(Share(share, holder, node, max(good)))
                    break
        return out if len(out) == k else []
