"""How the job is protected now: groups, what they survive, and what is still missing after a swap. Pure.

A node that has just taken over coordinates is *bare*: its vault may not hold yet what the groups want there. It counts
as lost already in the degree of protection until every active node has said that its shards are where they belong
(`covered`), or until a generation is committed, which says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.groups import Groups, parallel_groups, place, replace
from deadpool_megatron.cluster.placement.redundancy import Scheme, Tolerated, Word, cost, degree, tolerated, words
from deadpool_megatron.cluster.records import CoordinateInfo, SlotAddress

_COMPARED = ("1", "2", "4+1", "4+2")


def in_words(placed: Mapping[str, Any]) -> list[str]:
    """The lines that are printed at start, from the fields of the event ``placed``."""
    lines = [f"a committed generation survives the loss of {placed['tolerated']}"]
    for i, one in enumerate(placed["costs"]):
        lines.append(
            f"redundancy {one['redundancy']}: {_size(one['memory_bytes'])} of memory a node, "
            f"{_size(one['network_bytes'])} sent by a node an iteration" + ("" if i else " (in use)")
        )
    return lines


def _size(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}" if unit != "bytes" else f"{count} bytes"


class Protection:
    """The coordinator's account of redundancy.

    Args:
        redundancy: as ``--deadpool-redundancy``.
        labels: by node, its label of each kind of failure domain.
    """

    def __init__(self, redundancy: str = "1", labels: Mapping[int, Mapping[str, str]] | None = None) -> None:
        self._wanted = self.scheme = Scheme.parse(redundancy)
        self.groups: Groups = ()
        self._exact: Tolerated | None = None
        self._labels = {node: dict(of_node) for node, of_node in (labels or {}).items()}
        self.covers = "no node"
        self._words: dict[tuple[int, ...], Word] = {}
        self._now: dict[tuple[int, ...], Word] = {}  # those of them that the groups of today have
        self._nodes: list[int] = []
        self._bare: set[int] = set()
        self._covered: set[int] = set()
        self._shard_bytes = 0
        self._slots_per_node = 1
        self._alone = False  # one node trains

    def label(self, node: int, labels: Mapping[str, str]) -> None:
        """What a node says of its own failure domains; what the user said comes first."""
        if labels:
            self._labels[node] = {**labels, **self._labels.get(node, {})}
            self._exact = None

    def labels(self, node: int) -> Mapping[str, str]:
        """The failure domains of a node, by kind."""
        return self._labels.get(node, {})

    def succeeds(self, node: int, was: int | None) -> None:
        """``node`` is the machine of the lost node ``was``, if of any: its failure domains are the same."""
        if was is not None:
            self.label(node, self.labels(was))

    def begin(
        self,
        assignment: Sequence[SlotAddress],
        coordinates: Mapping[int, CoordinateInfo],
        shard_bytes: int,
        slots_per_node: int,
        placed: Mapping[str, Any] | None = None,
    ) -> Groups:
        """Training is about to begin: place everything.

        Args:
            shard_bytes: of the largest shard, small state included.
            placed: from `dump`, as it was placed already (a coordinator that starts again).
        """
        self._nodes = placing.nodes_of(assignment)
        self.scheme, self._alone = self._wanted.fitting(len(self._nodes)), len(self._nodes) == 1
        self._shard_bytes, self._slots_per_node = shard_bytes, slots_per_node
        if placed is None:
            self._words = {}
            self.groups = place(self._nodes, self.scheme, parallel_groups(assignment, coordinates), self._labels)
        else:
            self.groups = tuple(tuple(group) for group in placed["groups"])
            self._words = {tuple(ranks): Word(tuple(ranks), tuple(keepers)) for ranks, keepers in placed["words"]}
        self._decided(assignment)
        self._bare, self._covered = set(self._nodes), set()
        return self.groups

    def alone(self, assignment: Sequence[SlotAddress]) -> None:
        """One node trains, so that nothing is protected."""
        self._nodes, self._words, self._bare, self._covered = placing.nodes_of(assignment), {}, set(), set()
        self.groups, self.scheme, self.covers, self._alone = (), self._wanted.fitting(1), "no node", True
        self._decided(assignment)

    @property
    def told(self) -> list[list[int]]:
        """The groups as agents are told of them: a node that trains alone keeps its own copies."""
        return [list(group) for group in self.groups] or ([self._nodes * 2] if self._alone else [])

    def moved(
        self, assignment: Sequence[SlotAddress], coordinates: Mapping[int, CoordinateInfo], one_to_one: bool = True
    ) -> Groups:
        """A new epoch: spares took lost nodes' places. Not ``one_to_one``: survivors hold lost coordinates too."""
        nodes = placing.nodes_of(assignment)
        self._alone, trains = one_to_one and len(nodes) == 1, one_to_one
        one_to_one = one_to_one and len(nodes) == len(self._nodes) and bool(self.groups)
        # (not in the way of a recovery where nothing depends on it)
        shared = parallel_groups(assignment, coordinates) if self._labels or not one_to_one else {}
        before = self.groups
        if one_to_one:
            taken_by = {old: new for old, new in zip(self._nodes, nodes, strict=True) if old != new}
            self.groups = replace(before, taken_by, self.scheme, shared, self._labels)
            stayed = {tuple(taken_by.get(node, node) for node in group) for group in before}
            self._bare |= {node for group in self.groups if group not in stayed for node in group}
        else:
            # (where a node has several nodes' ranks there is no parity)
            placed = self.scheme.mirror or (trains and not self._alone)
            self.groups = place(nodes, self.scheme, shared, self._labels) if placed else ()
        self._bare = (self._bare | (set(nodes) - set(self._nodes))) & set(nodes)
        self._nodes = nodes
        self._covered = set()
        self._decided(assignment)
        return self.groups

    def dump(self) -> dict[str, Any]:
        """What a coordinator that starts again cannot work out, as JSON types."""
        older = [[word.ranks, word.keepers] for ranks, word in self._words.items() if ranks not in self._now]
        return {"groups": self.groups, "words": older}

    def _decided(self, assignment: Sequence[SlotAddress]) -> None:
        self._exact = None
        self._now = {word.ranks: word for word in words(self.groups, self.scheme, assignment)}
        self._words |= self._now

    @property
    def exact(self) -> Tolerated:
        """What may be lost at once when everything is in its place; looked up when somebody asks."""
        if self._exact is None:
            self._exact = tolerated(self.groups, self.scheme, self._labels)
        return self._exact

    @property
    def words(self) -> list[Word]:
        """Every word under which something may be kept, those of older placements included."""
        return list(self._words.values())

    def covered(self, node: int) -> bool:
        """A node's shards of the generation that is kept are where they belong; True when that was the last one."""
        self._covered.add(node)
        if self._bare and self._covered >= set(self._nodes):
            return self.committed()
        return False

    def damaged(self, node: int) -> None:
        """Something in a node's vault has changed in memory: until the next commit it counts as lost."""
        if node in self._nodes:
            self._bare.add(node)
            self._covered.discard(node)

    def committed(self) -> bool:
        """A generation of this epoch is committed; True when that ends a time of less protection."""
        was, self._bare = bool(self._bare), set()
        self._words = dict(self._now)  # of older placements nothing is needed any more
        self.covers = self.exact.sentence  # what could be lost from here on, for who has lost more
        return was

    @property
    def degree(self) -> int:
        """How many nodes, whichever they are, may be lost now."""
        return max(0, degree(self.groups, self.scheme, self._bare)) if self.groups else 0

    def costs(self) -> list[dict[str, Any]]:
        """Memory and network bytes of the redundancy chosen, first, and of others for comparison."""
        chosen = str(self.scheme)
        out = []
        for text in (chosen, *(other for other in _COMPARED if other != chosen)):
            scheme = Scheme.parse(text)
            if scheme.size <= len(self._nodes):
                one = cost(scheme, self._shard_bytes, self._slots_per_node)
                out.append({"redundancy": text, "memory_bytes": one.memory_bytes, "network_bytes": one.network_bytes})
        return out

    def status(self) -> dict[str, Any]:
        """For ``status.json``."""
        return {
            "redundancy": str(self.scheme),
            "survives_now": self.degree,
            "survives_when_full": self.scheme.m if self.groups else 0,
            "full": bool(self.groups) and not self._bare,
            "not_covered_yet": sorted(self._bare),
            "groups": [list(group) for group in self.groups],
            "tolerated": self.exact.sentence,
            "fatal": [list(nodes) for nodes in self.exact.fatal],
        }
