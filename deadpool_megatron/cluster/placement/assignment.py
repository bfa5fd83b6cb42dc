"""Which slot holds each coordinate, which spare takes over: pure functions.

Example, 3 nodes of 2 slots with 1 spare: ranks 0-3 live on nodes 0 and 1. Node 0 dies, node 2 is the spare::

    >>> first = initial(active_nodes=2, slots_per_node=2)
    >>> replace_nodes(first, {0: 2})  # doctest: +NORMALIZE_WHITESPACE
    [SlotAddress(node=2, local=0), SlotAddress(node=2, local=1),
     SlotAddress(node=1, local=0), SlotAddress(node=1, local=1)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from deadpool_megatron.cluster.records import SlotAddress

type Preference = Callable[[int, int], tuple[int, ...]]
"""Of a node and a spare for it: the smaller, the better the spare suits the node."""


def _as_they_come(node: int, spare: int) -> tuple[int, ...]:
    return ()


def initial(active_nodes: int, slots_per_node: int) -> list[SlotAddress]:
    """The assignment of epoch 0: rank ``node * slots_per_node + local``, as torchrun numbers ranks."""
    return [SlotAddress(node, local) for node in range(active_nodes) for local in range(slots_per_node)]


def in_turn(spare: int, active_nodes: int, count: int) -> list[int]:
    """The nodes of epoch 0 that a spare stands for where nothing tells them apart: each takes the next ``count``."""
    first = (spare - active_nodes) * count
    return [(first + i) % active_nodes for i in range(min(count, active_nodes))]


def nodes_of(assignment: Sequence[SlotAddress]) -> list[int]:
    """The nodes that hold a coordinate, each once, in the order of their first coordinate."""
    return list(dict.fromkeys(slot.node for slot in assignment))


def ranks_of(assignment: Sequence[SlotAddress], node: int) -> dict[int, int]:
    """Local index to rank for the coordinates on ``node``."""
    return {slot.local: rank for rank, slot in enumerate(assignment) if slot.node == node}


def choose_spares(
    lost: Iterable[int], spares: Sequence[int], prefer: Preference = _as_they_come
) -> dict[int, int] | None:
    """A spare for each lost node: the pairs that ``prefer`` puts first, of equals the first in order.

    None when there are too few. Example, spare 6 suits node 1 best::

        >>> choose_spares([0, 1], [5, 6, 7], lambda node, spare: ((node, spare) != (1, 6),))
        {0: 5, 1: 6}
    """
    lost = sorted(lost)
    if len(lost) > len(spares):
        return None
    pairs = sorted((prefer(node, spare), node, position) for node in lost for position, spare in enumerate(spares))
    taken: dict[int, int] = {}
    used: set[int] = set()
    for _, node, position in pairs:
        if node not in taken and position not in used:
            taken[node] = spares[position]
            used.add(position)
    return dict(sorted(taken.items()))


def refill(
    assignment: Sequence[SlotAddress],
    lost: Iterable[int],
    vacant: Iterable[int],
    ready: Sequence[int],
    cold: Sequence[int],
    prefer: Preference = _as_they_come,
) -> dict[int, int] | None:
    """Which node takes over which: by node that gives up its coordinates the spare that gets them.

    Lost nodes come first and take any spare, of those that ``prefer`` makes equal a parked one. A healthy node with a
    vacant slot (a worker of it died) gives way to a parked spare, which has the model within a second, and becomes a
    spare itself; without one it is not in the answer: it starts a process in the vacant slot, which takes a cold start.
    None when there are fewer spares than lost nodes.

    Example, node 1 is lost and a worker of node 0 has died, spares 4 (parked) and 5 (starting)::

        >>> refill(initial(2, 1), [1], [0], [4], [5])
        {1: 4}
    """
    active = set(nodes_of(assignment))
    gone = sorted(set(lost) & active)
    taken = choose_spares(gone, [*ready, *cold], prefer)
    if taken is None:
        return None
    left = [spare for spare in ready if spare not in taken.values()]
    half = sorted((set(vacant) & active) - set(gone))[: len(left)]
    return taken | (choose_spares(half, left, prefer) or {})


def replace_nodes(assignment: Sequence[SlotAddress], taken_by: Mapping[int, int]) -> list[SlotAddress]:
    """The assignment with each lost node's coordinates on its spare, local index for local index."""
    return [SlotAddress(taken_by[s.node], s.local) if s.node in taken_by else s for s in assignment]


def rescue(
    assignment: Sequence[SlotAddress],
    lost: Iterable[int],
    slots_per_node: int,
    spares: Iterable[int] = (),
    full: Iterable[tuple[int, int]] = (),
) -> list[SlotAddress] | None:
    """The assignment with the lost coordinates on spares and on extra slots of survivors, each where the fewest are.

    Only good for saving what there is: a survivor's devices hold two coordinates each. ``full`` are nodes, each with a
    rank whose shard it has no room for: they take nothing more, and such a rank goes elsewhere if it was to be there.
    None when nobody is left to take it.
    """
    gone, homeless = set(lost), set(full)
    extra = {node for node, _ in homeless}
    survivors = [node for node in nodes_of(assignment) if node not in gone]
    free = dict.fromkeys(survivors, slots_per_node) | dict.fromkeys(spares, 0)
    for slot in assignment:
        if slot.node in free:
            free[slot.node] = max(free[slot.node], slot.local + 1)
    free = {node: local for node, local in free.items() if node not in extra}
    if not free:
        return None
    out: list[SlotAddress] = []
    for rank, slot in enumerate(assignment):
        if slot.node in gone or (slot.node, rank) in homeless:
            node = min(free, key=free.__getitem__)
            slot = SlotAddress(node, free[node])
            free[node] += 1
        out.append(slot)
    return out


def nodes_for(width: int, replica: int, slots_per_node: int) -> int | None:
    """How many nodes so many replicas of ``replica`` ranks fill; None where they leave a part of one empty."""
    nodes, rest = divmod(width * replica, slots_per_node)
    return None if rest or not nodes else nodes


def resize(
    assignment: Sequence[SlotAddress],
    replicas: Mapping[int, int],
    there: Iterable[int],
    nodes: int,
    slots_per_node: int,
) -> list[SlotAddress] | None:
    """The assignment of fewer replicas, or more, on ``nodes`` of those that are ``there``; None where there are less.

    Replicas of which every node is there stay on their nodes, as many as there is room for; those that are broken give
    theirs, then nodes that had no coordinate. Nodes keep the order of their first coordinates.

    Args:
        assignment: the one before, by rank.
        replicas: by rank, which replica it is in; empty where that is not known.
        there: nodes that may hold coordinates, in the order in which those without one are taken.

    Example, TP1 x PP2 x DP3 on 6 nodes: with node 1 lost, replica 1 leaves, and its node 4 is free::

        >>> [s.node for s in resize(initial(6, 1), {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2}, [0, 2, 3, 4, 5], 4, 1)]
        [0, 2, 3, 5]
    """
    order = list(there)
    before = nodes_of([slot for slot in assignment if slot.local < slots_per_node])
    healthy = [node for node in before if node in order]
    healthy += [node for node in order if node not in healthy]
    if len(healthy) < nodes:
        return None
    of: dict[int, set[int]] = {}
    for rank, slot in enumerate(assignment):
        if rank in replicas:
            of.setdefault(replicas[rank], set()).add(slot.node if slot.local < slots_per_node else -1)
    taken: set[int] = set()
    for _, whole in sorted(of.items()):
        if whole <= set(healthy) and len(taken | whole) <= nodes:
            taken |= whole
    rest = [node for node in healthy if node not in taken]
    taken |= set(rest[: nodes - len(taken)])
    chosen = [node for node in healthy if node in taken]
    return [SlotAddress(node, local) for node in chosen for local in range(slots_per_node)]
