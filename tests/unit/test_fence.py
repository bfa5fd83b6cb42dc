"""Who has lost the coordinator fences itself only when it reaches no majority, and not before its lease is over."""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count

import pytest

from deadpool_bench.harness.ports import free_ports
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.fence import Fence, on_smaller_side
from deadpool_megatron.cluster.link.reach import reached
from waiting import until

LEASE_S = 5.0


@pytest.fixture
def vaults() -> Iterator[dict[int, r.Address]]:
    """Of five nodes, of which 0, 1 and 2 are there."""
    with ExitStack() as stack:
        there = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [each.getsockname()[1] for each in there] + free_ports(2)
        yield {node: r.Address("127.0.0.1", port) for node, port in enumerate(ports)}


def asked(fence: Fence, vaults: dict[int, r.Address], now: float) -> bool:
    """What it says at a time when its lease is over: it asks, and decides when it has all answers."""
    assert not fence.cut_off(vaults, now), "nobody has answered yet"
    until(lambda: fence._reached is not None, "all answers")
    return fence.cut_off(vaults, now)


def test_nobody_is_asked_before_the_lease_is_over_and_a_connection_begins_it_anew(vaults: dict[int, r.Address]) -> None:
    fence = Fence(0, LEASE_S)
    for now in (100.0, 104.9):
        assert not fence.cut_off(vaults, now) and now < fence._ask_at == 105.0
    fence.connected()
    for now in (105.0, 109.9):
        assert not fence.cut_off(vaults, now) and now < fence._ask_at == 110.0
    assert not asked(fence, vaults, 110.0)


def test_who_reaches_a_majority_goes_on_and_asks_again_a_lease_later(vaults: dict[int, r.Address]) -> None:
    fence = Fence(0, LEASE_S)
    fence.cut_off(vaults, 100.0)
    assert not asked(fence, vaults, 105.0), "three of five, itself counted"
    assert not fence.cut_off(vaults, 110.9) and fence._ask_at == 111.0
    assert not asked(fence, vaults, 111.1)


def test_who_reaches_no_majority_fences_itself(vaults: dict[int, r.Address]) -> None:
    fence = Fence(3, LEASE_S)
    there = {node: vaults[node] for node in (0, 3, 4)}  # one that is there, and one that is not
    fence.cut_off(vaults, 100.0)
    assert not asked(fence, there, 105.0), "two of three"
    fence = Fence(3, LEASE_S)
    alone = {node: vaults[node] for node in (3, 4)}
    fence.cut_off(alone, 100.0)
    assert not asked(fence, alone, 105.0), "it may be a cut of a moment"
    assert not asked(fence, there, 106.0), "it was"
    assert not asked(fence, alone, 112.0)
    assert not asked(fence, alone, 113.0)
    assert asked(fence, alone, 114.5), "for half a lease"


def test_what_is_short_on_this_node_says_nothing_of_others(
    vaults: dict[int, r.Address], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [(vault.host, vault.port) for vault in vaults.values()]
    assert reached(places) == 3
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert reached(places) == 5, "nobody was asked"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    start, started = threading.Thread.start, count()

    def starts_two(thread: threading.Thread) -> None:
        if next(started) >= 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starts_two)
    assert reached(places[::-1]) == 3, "the two that are not there, and three that were not asked"
    fence = Fence(0, LEASE_S)
    fence.cut_off(vaults, 100.0)
    assert not fence.cut_off(vaults, 105.0) and fence._reached is None
    monkeypatch.undo()
    assert not asked(fence, vaults, 111.1), "again a lease later"


@pytest.mark.parametrize(("answered", "others", "fenced"), [(0, 0, False), (0, 1, True), (1, 2, False), (1, 3, True)])
def test_half_of_the_nodes_is_no_majority(answered: int, others: int, fenced: bool) -> None:
    assert on_smaller_side(answered, others) is fenced
