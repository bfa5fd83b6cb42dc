"""How many copies or parity shares there are, on which nodes, and exactly which losses they survive: pure functions.

Nodes stand in protection groups; each group is a circle. A stripe begins at every node of it: its own shards and those
of the next k - 1 nodes are the data, the m nodes after them keep what protects them. With k = 1 that is plain copies
(a mirror), else Reed-Solomon parity. In a circle of k + m nodes, the usual size, every stripe spans the whole group::

    1+1, circle (0, 3):        stripe 0: data 0, copy on 3      stripe 3: data 3, copy on 0
    2+1, circle (0, 3, 5):     stripe 0: data 0 3, parity on 5  stripe 3: data 3 5, parity on 0   ...

A node is data in k stripes, so with k > 1 each of its shards is cut into k parts, one a stripe; and it keeps m / k of
a shard for each of its slots. A stripe gives back everything while k of its k + m nodes are left, so a set of lost
nodes is fatal exactly when some stripe has more than m of them. Groups keep such sets few: N / 2 pairs for a mirror,
where a ring through all nodes would have N.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

from deadpool_megatron.cluster.records import SlotAddress

_MOST_LISTED = 12
_MOST_NODES_OF_A_STRIPE = 32
_MOST_SETS, _SOME_SETS = 100_000, 1_000


@dataclass(frozen=True, slots=True)
class Scheme:
    """``k`` data shares and ``m`` copies (k = 1) or parity shares a stripe."""

    k: int = 1
    m: int = 1

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """``1``, ``2`` (copies on other nodes) or ``k+m`` (Reed-Solomon). Raises ValueError in one clear line."""
        found = re.fullmatch(r"(?:(\d{1,3})\+)?(\d{1,3})", text.strip())
        if found is None:
            raise ValueError(f"redundancy {text!r}: expected a number of copies, as in 1, or k+m, as in 4+2")
        k, m = int(found[1] or 1), int(found[2])
        if k < 1 or m < 1 or k + m > _MOST_NODES_OF_A_STRIPE:
            raise ValueError(
                f"redundancy {text!r}: k and m must be 1 or more, and a stripe {_MOST_NODES_OF_A_STRIPE} nodes at most"
            )
        return cls(k, m)

    @property
    def size(self) -> int:
        """Nodes of a stripe, which is the fewest that can train with this redundancy."""
        return self.k + self.m

    def fitting(self, nodes: int) -> Scheme:
        """What so many nodes can have of it: where they are fewer than a stripe, as many copies as go with them."""
        return self if self.size <= nodes else Scheme(1, max(1, min(self.m, nodes - 1)))

    @property
    def mirror(self) -> bool:
        """Plain copies, no parity."""
        return self.k == 1

    def __str__(self) -> str:
        return str(self.m) if self.mirror else f"{self.k}+{self.m}"


@dataclass(frozen=True, slots=True)
class Stripe:
    """Nodes in order: ``data[i]`` gives part i of its shards, ``keepers[j]`` keeps copy or parity j of all of them."""

    data: tuple[int, ...]
    keepers: tuple[int, ...]

    @property
    def nodes(self) -> tuple[int, ...]:
        """All of them."""
        return self.data + self.keepers


def stripes(groups: Iterable[Sequence[int]], scheme: Scheme) -> Iterator[Stripe]:
    """Every stripe of every group. Groups smaller than a stripe have none: they are not protected."""
    for group in groups:
        if len(group) < scheme.size:
            continue
        for first in range(len(group)):
            around = [group[(first + i) % len(group)] for i in range(scheme.size)]
            yield Stripe(tuple(around[: scheme.k]), tuple(around[scheme.k :]))


def holders(groups: Iterable[Sequence[int]], scheme: Scheme) -> dict[int, tuple[int, ...]]:
    """For a mirror: the nodes that keep the copies of each node's shards."""
    return {stripe.data[0]: stripe.keepers for stripe in stripes(groups, scheme)} if scheme.mirror else {}


@dataclass(frozen=True, slots=True)
class Word:
    """A stripe's share of one local index: rank ``ranks[i]`` gives part i, ``keepers[j]`` keeps row j of the parity.

    ``ids[j]`` names that row wherever it is kept. It follows from the ranks alone, so it stays through swaps.
    """

    ranks: tuple[int, ...]
    keepers: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """By row."""
        return tuple(
            int.from_bytes(hashlib.blake2b(repr((self.ranks, row)).encode(), digest_size=8).digest()) >> 2
            for row in range(len(self.keepers))
        )


def words(groups: Iterable[Sequence[int]], scheme: Scheme, assignment: Sequence[SlotAddress]) -> list[Word]:
    """With parity, every word: for each stripe one for each local index that all of its data nodes have."""
    if scheme.mirror:
        return []
    ranks: dict[int, dict[int, int]] = {}
    for rank, slot in enumerate(assignment):
        ranks.setdefault(slot.node, {})[slot.local] = rank
    out = []
    for stripe in stripes(groups, scheme):
        locals_ = set.intersection(*(set(ranks.get(node, ())) for node in stripe.data))
        out += [Word(tuple(ranks[node][local] for node in stripe.data), stripe.keepers) for local in sorted(locals_)]
    return out


def survives(lost: Collection[int], groups: Iterable[Sequence[int]], scheme: Scheme) -> bool:
    """Whether a committed generation can be given back in full once these nodes are lost at the same time."""
    gone = set(lost)
    grouped: set[int] = set()
    for stripe in stripes(groups, scheme):
        grouped.update(stripe.nodes)
        if len(gone.intersection(stripe.nodes)) > scheme.m:
            return False
    return gone <= grouped


def degree(groups: Iterable[Sequence[int]], scheme: Scheme, bare: Collection[int] = ()) -> int:
    """How many nodes, whichever they are, may be lost at once now; -1 when that is exceeded already.

    Args:
        bare: nodes whose vault does not hold (or does not surely hold) what the stripes want there yet.
    """
    missing = set(bare)
    worst = max((len(missing.intersection(stripe.nodes)) for stripe in stripes(groups, scheme)), default=scheme.m)
    return scheme.m - worst


@dataclass(frozen=True, slots=True)
class Tolerated:
    """Exactly what may be lost at once.

    Attributes:
        nodes: this many nodes, whichever they are.
        fatal: the sets of one node more that may not; a larger set may be lost if and only if none of them is in it.
            The first thousand, if there are more than a hundred thousand.
        count: how many there are.
        sets: how many sets of that size there are.
        domains: by kind of domain, how many there are, and those that may not be lost as a whole.
        unnamed: by kind of domain, the nodes of which nobody has said in which one they are.
    """

    nodes: int
    fatal: tuple[tuple[int, ...], ...]
    count: int
    sets: int
    domains: Mapping[str, tuple[int, tuple[str, ...]]]
    unnamed: Mapping[str, tuple[int, ...]]

    @property
    def sentence(self) -> str:
        """For people: ``any 1 node; any 2 nodes but these 2 pairs: 0+3, 1+2; any 1 rack``."""
        if self.nodes < 1:
            return "no node"
        parts = [f"any {self.nodes} node" + "s" * (self.nodes > 1)]
        more = self.nodes + 1
        if not self.count and self.sets:
            parts.append(f"any {more} nodes")
        elif self.count < self.sets:
            noun = {2: "pair", 3: "triple"}.get(more, "set")
            these = "this" if self.count == 1 else f"these {self.count}"
            listed = ", ".join("+".join(map(str, nodes)) for nodes in self.fatal[:_MOST_LISTED])
            rest = self.count - _MOST_LISTED
            listed += f" and {rest} more" if rest > 0 else ""
            parts.append(f"any {more} nodes but {these} {noun}{'s' * (self.count > 1)}: {listed}")
        for kind, (count, not_these) in self.domains.items():
            if len(not_these) == count:
                parts.append(f"no whole {kind}")
            else:
                parts.append(f"any 1 {kind}" + (f" but {', '.join(not_these[:_MOST_LISTED])}" if not_these else ""))
                if whose := self.unnamed.get(kind):
                    listed = ", ".join(map(str, whose[:_MOST_LISTED])) + " and more" * (len(whose) > _MOST_LISTED)
                    parts[-1] += f" (the {kind} of node{'s' * (len(whose) > 1)} {listed} is not known)"
        return "; ".join(parts)


def tolerated(
    groups: Sequence[Sequence[int]], scheme: Scheme, labels: Mapping[int, Mapping[str, str]] | None = None
) -> Tolerated:
    """The exact set of tolerated losses, for any number of nodes (the work grows with the stripes, not the subsets).

    Args:
        groups: the protection groups, of active nodes.
        labels: by node, its label of each kind of failure domain; only active nodes count.
    """
    every = list(stripes(groups, scheme))
    nodes = sorted({node for group in groups for node in group})
    if not every:
        return Tolerated(0, (), 0, 0, {}, {})
    count = sum(_fatal_sets(len(group), scheme) for group in groups)
    spans = sorted({tuple(sorted(stripe.nodes)) for stripe in every})
    those = (lost for span in spans for lost in combinations(span, scheme.m + 1))
    fatal = sorted(set(those if count <= _MOST_SETS else islice(those, _SOME_SETS)))
    domains, unnamed = {}, {}
    for kind, members in _domains(nodes, labels or {}).items():
        bad = tuple(label for label, inside in members.items() if not survives(inside, groups, scheme))
        domains[kind] = (len(members), bad)
        unnamed[kind] = tuple(sorted(set(nodes).difference(*members.values())))
    return Tolerated(scheme.m, tuple(fatal), count, math.comb(len(nodes), scheme.m + 1), domains, unnamed)


def _fatal_sets(nodes: int, scheme: Scheme) -> int:
    """How many sets of m + 1 nodes of a circle of ``nodes`` lie in one stripe, which is k + m neighbours of it.

    All but those whose distances around the circle are all too short for the rest to be one stripe. With m + 1
    distances of 1 to ``far``, which add up to the circle, each such set is counted once for each of its nodes.
    """
    lost, far = scheme.m + 1, nodes - scheme.size
    if far < 0:
        return 0
    spread: int = sum(
        (-1) ** long * math.comb(lost, long) * math.comb(nodes - long * far - 1, scheme.m)
        for long in range(lost + 1)
        if nodes - long * far > 0
    )
    return math.comb(nodes, lost) - nodes * spread // lost


def _domains(nodes: Iterable[int], labels: Mapping[int, Mapping[str, str]]) -> dict[str, dict[str, list[int]]]:
    """By kind and label the nodes inside. A kind with one label only says nothing, so it is left out."""
    out: dict[str, dict[str, list[int]]] = {}
    for node in nodes:
        for kind, label in labels.get(node, {}).items():
            out.setdefault(kind, {}).setdefault(label, []).append(node)
    return {kind: members for kind, members in out.items() if len(members) > 1}


@dataclass(frozen=True, slots=True)
class Cost:
    """Host memory of the node that needs most of it, and bytes the node that sends most sends an iteration."""

    memory_bytes: int
    network_bytes: int


def cost(scheme: Scheme, shard_bytes: int, slots_per_node: int) -> Cost:
    """What a redundancy costs a node, when every coordinate's shard has ``shard_bytes`` (unique and small state).

    Memory: two slots for each own shard, and two for each copy or parity share kept for others. Network: every byte of
    an own shard goes to m nodes, parity or not.
    """
    own = shard_bytes * slots_per_node
    return Cost(2 * own + 2 * scheme.m * -(-own // scheme.k), scheme.m * own)
