"""The connection to the rendezvous store is idle for days, then needed at once: real TCPStores, somebody in between."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch.distributed as dist

from deadpool_megatron.comm import StoreClients
from deadpool_megatron.comm.store_clients import answers, own_client
from middleman import Middleman


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


@pytest.fixture
def between(server: dist.TCPStore) -> Iterator[Middleman]:
    middleman = Middleman(server.port)
    yield middleman
    middleman.close()


def _kept_alive(port: int) -> list[tuple[int, int]]:
    """Of this process's connections to a port: are they kept alive, and after how many idle seconds."""
    out = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as each:
            if each.getpeername()[1] == port:
                idle = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                out.append((each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), idle))
    return out


def test_connections_are_kept_alive(server: dist.TCPStore) -> None:
    """Cloud firewalls forget who was idle for ten minutes, without a word."""
    bare = dist.TCPStore("127.0.0.1", server.port, None, False)
    assert any(not alive for alive, _ in _kept_alive(server.port)), "torch does it now, and we need not"
    del bare
    clients = StoreClients(lambda: ("127.0.0.1", server.port), 5.0)
    client = own_client(clients())
    client.set("key", "value")
    kept = _kept_alive(server.port)
    assert len(kept) >= 2 and all(alive and idle < 600 for alive, idle in kept)


def test_a_connection_that_was_dropped_without_a_word_is_replaced(server: dist.TCPStore, between: Middleman) -> None:
    clients = StoreClients(lambda: ("127.0.0.1", between.port), 5.0)
    client = clients()
    assert clients() is client and answers(client)
    between.drop()
    another = clients()
    assert another is not client
    another.set("key", "value")
    assert server.get("key") == b"value"


def test_a_server_that_starts_again_or_moves_has_a_new_client(server: dist.TCPStore) -> None:
    other = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    ports = iter([server.port, other.port])
    clients = StoreClients(lambda: ("127.0.0.1", next(ports)), 5.0)
    before = clients()
    after = clients()
    assert after is not before
    after.set("key", "value")
    assert other.check(["key"]) and not server.check(["key"])
