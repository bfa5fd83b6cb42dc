"""Which nodes stand together in a protection group: a pure function of coordinates and failure domains.

The members of a group protect each other, so they should not fail together: at most m of the k + m nodes of a stripe in
one rack, switch or power supply (then the loss of that whole domain is survived), as few as possible in one, and, where
the layout allows, no two coordinates of one TP, PP or DP group in it. (Nodes whose coordinates share a group wait for
each other all the time, and what goes wrong in a group, a bad collective or link, tends to take several of its
members.) Those three count in this order.

The search begins with groups dealt out in the order of the coordinates, exchanges two nodes as long as that makes it
better, and tries some other beginnings as long as anything is left to improve. It is deterministic. After a swap the
spare takes the place of the lost node, so that nobody else's shards move, unless that would put more of a stripe into
one domain than it can lose, and another exchange helps.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from deadpool_megatron.cluster.placement.redundancy import Scheme, stripes
from deadpool_megatron.cluster.records import CoordinateInfo, SlotAddress

Groups = tuple[tuple[int, ...], ...]
Labels = Mapping[int, Mapping[str, str]]
_EXCEEDED = 1_000_000  # one node more of a stripe in one domain than the stripe can lose
_TOGETHER = 1_000  # two nodes of a stripe in one domain
_OTHER_BEGINNINGS = 10
_SEED = 20261121
_MOST_JUDGED = 20_000  # groups looked at; bounds the search to about a second
_ENOUGH_JUDGED = 3_000  # no other beginning is tried after that


def parallel_groups(
    assignment: Sequence[SlotAddress], coordinates: Mapping[int, CoordinateInfo]
) -> dict[int, frozenset[tuple[object, ...]]]:
    """By node, the TP, PP and DP groups that have a member on it. Coordinates not known yet are in none."""
    out: dict[int, set[tuple[object, ...]]] = {}
    for rank, slot in enumerate(assignment):
        groups = out.setdefault(slot.node, set())
        c = coordinates.get(rank)
        if c is not None:
            groups.update((("tp", c.pp, c.dp, c.cp), ("pp", c.tp, c.dp, c.cp), ("dp", c.tp, c.pp)))
    return {node: frozenset(groups) for node, groups in out.items()}


def place(
    nodes: Sequence[int],
    scheme: Scheme,
    shared: Mapping[int, frozenset[tuple[object, ...]]] | None = None,
    labels: Labels | None = None,
) -> Groups:
    """Put active nodes into protection groups of k + m, or one more where they do not divide evenly.

    Args:
        nodes: the active nodes, in the order of their coordinates.
        shared: by node, what `parallel_groups` says.
        labels: by node, its label of each kind of failure domain.

    Returns:
        No group when there are fewer nodes than a stripe has: nothing is protected then.
    """
    if len(nodes) < scheme.size:
        return ()
    judge = _Judge(scheme, shared or {}, labels or {})
    count = len(nodes) // scheme.size
    best, least = _improved([list(nodes[first::count]) for first in range(count)], judge)
    shuffle = random.Random(_SEED)
    for _ in range(0 if count == 1 and len(nodes) == scheme.size else _OTHER_BEGINNINGS):
        if not least or judge.judged > _ENOUGH_JUDGED:
            break
        order = list(nodes)
        shuffle.shuffle(order)
        groups, total = _improved([order[first::count] for first in range(count)], judge)
        if total < least:
            best, least = groups, total
    return tuple(tuple(group) for group in best)


def replace(
    groups: Groups,
    taken_by: Mapping[int, int],
    scheme: Scheme,
    shared: Mapping[int, frozenset[tuple[object, ...]]] | None = None,
    labels: Labels | None = None,
) -> Groups:
    """The groups after swaps: each spare in the place of the node it replaces.

    Where that puts more of a stripe into one failure domain than it can lose, nodes are exchanged until it does not,
    if any exchange helps; what is exchanged has to be copied anew, so nothing less is a reason to.
    """
    after = [[taken_by.get(node, node) for node in group] for group in groups]
    if not labels:
        return tuple(tuple(group) for group in after)
    judge = _Judge(scheme, shared or {}, labels or {})
    if sum(judge.group(group) for group in after) >= _EXCEEDED:
        before = [list(group) for group in after]
        improved, total = _improved(after, judge, _EXCEEDED)
        if total // _EXCEEDED == sum(judge.group(group) for group in before) // _EXCEEDED:
            improved = before
        after = improved
    return tuple(tuple(group) for group in after)


class _Judge:
    """What is wrong with a group, as one number; what has been judged is remembered."""

    def __init__(self, scheme: Scheme, shared: Mapping[int, frozenset[tuple[object, ...]]], labels: Labels) -> None:
        self._scheme = scheme
        self._shared = shared
        kinds: dict[str, set[str]] = {}
        for of_node in labels.values():
            for kind, label in of_node.items():
                kinds.setdefault(kind, set()).add(label)
        useful = {kind for kind, known in kinds.items() if len(known) > 1}
        self._labels = {
            node: [(kind, label) for kind, label in of_node.items() if kind in useful]
            for node, of_node in labels.items()
        }
        self._known: dict[tuple[int, ...], int] = {}
        self.judged = 0
        self._pairs: dict[tuple[int, int], int] = {}

    def group(self, group: Sequence[int]) -> int:
        """The sum over the stripes of the group; a closed group's stripes all have the same nodes, so one counts."""
        closed = len(group) == self._scheme.size
        key = tuple(sorted(group)) if closed else tuple(group)
        known = self._known.get(key)
        if known is None:
            self.judged += 1
            each = [stripe.nodes for stripe in stripes([key], self._scheme)]
            known = self._known[key] = sum(self._stripe(nodes) for nodes in (each[:1] if closed else each))
        return known

    def _stripe(self, nodes: tuple[int, ...]) -> int:
        inside: dict[tuple[str, str], int] = {}
        for node in nodes:
            for domain in self._labels.get(node, ()):
                inside[domain] = inside.get(domain, 0) + 1
        bad = sum(_EXCEEDED * max(0, count - self._scheme.m) + _TOGETHER * (count - 1) for count in inside.values())
        for i, a in enumerate(nodes):
            bad += sum(self._pair(a, b) for b in nodes[i + 1 :])
        return bad

    def _pair(self, a: int, b: int) -> int:
        key = (a, b) if a < b else (b, a)
        known = self._pairs.get(key)
        if known is None:
            both = self._shared.get(a, frozenset()) & self._shared.get(b, frozenset())
            known = self._pairs[key] = len({kind[0] for kind in both})
        return known


def _improved(groups: list[list[int]], judge: _Judge, enough: int = 1) -> tuple[list[list[int]], int]:
    """Exchange two nodes at a time while the sum falls; stops below ``enough``. Changes and returns ``groups``."""
    bad = [judge.group(group) for group in groups]
    better = True
    while better and sum(bad) >= enough:
        better = False
        for a in sorted(range(len(groups)), key=lambda index: -bad[index]):
            if bad[a] and judge.judged <= _MOST_JUDGED and _exchange(groups, bad, a, judge):
                better = True
    return groups, sum(bad)


def _exchange(groups: list[list[int]], bad: list[int], a: int, judge: _Judge) -> bool:
    """The best exchange of a node of group ``a`` with any other place; False when none helps."""
    best: tuple[int, int, int, int, int, int] | None = None
    for i in range(len(groups[a])):
        for b in range(len(groups)):
            for j in range(len(groups[b])) if b != a else range(i + 1, len(groups[a])):
                _swap(groups, a, i, b, j)
                new_a, new_b = judge.group(groups[a]), judge.group(groups[b])
                _swap(groups, a, i, b, j)
                gain = bad[a] - new_a + (bad[b] - new_b if b != a else 0)
                if gain > 0 and (best is None or gain > best[0]):
                    best = (gain, i, b, j, new_a, new_b)
    if best is None:
        return False
    _, i, b, j, new_a, new_b = best
    _swap(groups, a, i, b, j)
    bad[b] = new_b
    bad[a] = new_a
    return True


def _swap(groups: list[list[int]], a: int, i: int, b: int, j: int) -> None:
    groups[a][i], groups[b][j] = groups[b][j], groups[a][i]
