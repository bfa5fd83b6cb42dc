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
    can give all of it; else some of it is live state alone, and what was committed before must stay.
    """

    generation: int
    sources: dict[int, Source]
    rebuilds: dict[int, list[list[Share]]] = field(default_factory=dict)
    held: bool = True


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
    local: list[dict[_Key, Source | None]] = []  # a source where not any version will do
    remote = _givers(len(assignment), offers, refused, repeatable)
    for rank, slot in enumerate(assignment):
        here = offers.get(slot.node)
        held: dict[_Key, Source | None] = {}
        if here is not None:
            doubted = {g for r, node, g, _, share in refused if (r, node, share) == (rank, slot.node, -1)}
            for epoch, g in sorted(here.own.get(rank, ())):
                if _usable(refused, rank, slot.node, g, epoch):
                    exact = g in doubted or not repeatable
                    held[_key(epoch, g, repeatable)] = Source(slot.node, epoch, []) if exact else None
            live = here.live.get(rank)
            if live is not None and live not in doubted:
                held[_key(here.live_epochs.get(rank, 0), live, repeatable)] = None
        local.append(held)
    shares = _Shares(offers, refused, words, repeatable)
    common: set[_Key] | None = None
    missing: list[int] = []
    for rank, (held, givers) in enumerate(zip(local, remote, strict=True)):
        available = held.keys() | givers.keys() | shares.known(rank)
        if not available:
            missing.append(rank)
        if common is None:
            common = available
        else:
            common &= available
    if not common:
        raise NoCommonGeneration(missing)
    key = max(common)
    sources: dict[int, Source] = {}
    rebuilds: dict[int, list[list[Share]]] = {}
    for rank, givers in enumerate(remote):
        if key in local[rank]:
            own = local[rank][key]
            if own is not None:
                sources[rank] = own
        elif key not in givers:
            rebuilds[rank] = shares.parts(rank, key)
        else:
            # Several sources share the load: each rank begins with another one, and fetches from all at once.
            node, epoch = first = givers[key][rank % len(givers[key])]
            same = [other for other, written in givers[key] if (other, written) != first and written == epoch]
            sources[rank] = Source(node, epoch, same)
    in_vaults = all(key in givers or shares.parts(rank, key) for rank, givers in enumerate(remote))
    return Agreement(key[1], sources, rebuilds, in_vaults)


def _key(epoch: int, generation: int, repeatable: bool) -> _Key:
    return (ANY_EPOCH if repeatable else epoch, generation)


def _usable(
    refused: frozenset[RefusedCopy], rank: int, node: int, generation: int, epoch: int, share: int = -1
) -> bool:
    return refused.isdisjoint((rank, node, generation, any_or_it, share) for any_or_it in (epoch, ANY_EPOCH))


def _givers(
    ranks: int, offers: Mapping[int, Offer], refused: frozenset[RefusedCopy], repeatable: bool
) -> list[dict[_Key, list[tuple[int, int]]]]:
    """By rank and key, the nodes whose vaults hold it and the epoch it was written in, lowest number first."""
    out: list[dict[_Key, list[tuple[int, int]]]] = [{} for _ in range(ranks)]
    for node in sorted(offers):
        offer = offers[node]
        newest: dict[tuple[int, _Key], int] = {}
        for held in (offer.own, offer.peer):
            for rank, versions in held.items():
                for epoch, g in versions:
                    if _usable(refused, rank, node, g, epoch):
                        key = _key(epoch, g, repeatable)
                        newest[rank, key] = max(epoch, newest.get((rank, key), -1))
        for (rank, key), epoch in newest.items():
            if rank < ranks:
                out[rank].setdefault(key, []).append((node, epoch))
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
