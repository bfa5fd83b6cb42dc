"""The protocol's promises hold in every order of crashes, cuts, planned moves, restarts and late messages.

Hypothesis drives the real Core, the real vaults and the real rule of the fence (`protocol_model`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadpool_megatron.cluster import Phase
from protocol_model import Cluster
from protocol_node import Node

_runs = itertools.count()
_COMMON = ("hear", "read", "fetch") * 6 + ("copy", "send", "step", "advance", "train") * 3
_RARE = ("die", "notice", "worker dies", "cut", "fence", "heal", "drain", "join", "crash", "reconnect", "reconnect")
_RARE += ("wait", "complain")
_WHICH = st.tuples(st.sampled_from(_COMMON + _RARE), st.integers(0, 7))
_SHAPES = ((3, 1, 1), (4, 1, 2), (5, 2, 1), (7, 3, 1), (4, 2, 1))
_EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "150"))


@settings(max_examples=_EXAMPLES, deadline=None, derandomize=True)
@pytest.mark.timeout(900)
@given(
    shape=st.sampled_from(_SHAPES),
    trained=st.integers(0, 3),
    steps=st.lists(_WHICH, min_size=10, max_size=200),
)
def test_no_order_of_events_loses_a_committed_generation_or_trains_a_coordinate_twice_or_hangs(
    shape: tuple[int, int, int], trained: int, steps: list[tuple[str, int]]
) -> None:
    cluster = Cluster(*shape, f"model{os.getpid()}-{next(_runs)}")
    try:
        if trained:
            cluster.settle()
            assert cluster.core.phase is Phase.RUNNING
            for _ in range(trained):
                cluster.train()
                cluster.settle()
        for what, which in steps:
            if cluster.ended is not None:
                break
            _happen(cluster, what, cluster.nodes[which % len(cluster.nodes)], which)
        cluster.crash_after = None
        cluster.settle()
        if cluster.ended is None and cluster.core.phase is Phase.RUNNING:
            _is_well(cluster)
    finally:
        cluster.close()


def _is_well(cluster: Cluster) -> None:
    """Every coordinate is on a node that lives and trains it, and the job commits again."""
    for rank, slot in enumerate(cluster.core.assignment):
        node = cluster.nodes[slot.node]
        assert node.alive and node.training and node.epoch == cluster.core.epoch and rank in node.ranks
    before = cluster.core.committed
    for _ in range(16):
        cluster.train()
        cluster.settle()
    assert cluster.core.committed > before, "nothing is committed any more"


def _happen(cluster: Cluster, what: str, node: Node, which: int) -> None:
    possible: dict[str, tuple[bool, Callable[[], None]]] = {
        "hear": (bool(node.outbox) and node.connected and not node.cut, lambda: cluster.hear(node)),
        "read": (bool(node.inbox) and node.alive, node.read),
        "fetch": (node.alive, lambda: cluster.fetch(node)),
        "copy": (node.alive, lambda: cluster.copy(node)),
        "send": (node.alive and node.training, lambda: cluster.send(node)),
        "step": (True, cluster.step),
        "advance": (True, lambda: cluster.advance(node)),
        "train": (True, cluster.train),
        "die": (node.alive, lambda: cluster.die(node)),
        "notice": (node.connected and (not node.alive or node.cut), lambda: cluster.notice(node)),
        "worker dies": (node.alive, lambda: cluster.worker_dies(node)),
        "cut": (node.alive, lambda: cluster.cut(node)),
        "fence": (node.alive and node.cut, lambda: cluster.fence(node)),
        "heal": (node.cut, lambda: cluster.heal(node)),
        "drain": (True, lambda: cluster.drain(node)),
        "join": (len(cluster.nodes) < 10, cluster.join),
        "crash": (bool(cluster.kept), lambda: setattr(cluster, "crash_after", which)),
        "reconnect": (True, lambda: cluster.reconnect(node)),
        "wait": (True, cluster.wait),
        "complain": (node.alive, lambda: cluster.complain(node)),
    }
    can, do = possible[what]
    if can:
        do()
