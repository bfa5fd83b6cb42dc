"""Hub and Spoke over real sockets and processes: strangers are never heard, the dead and silent are soon noticed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from deadpool_megatron.cluster.link import Hub, Spoke, check_secret
from deadpool_megatron.cluster.ports import free_ports

SECRET = bytes(range(32))
LEASE_S = 1.0
ROOT = Path(__file__).resolve().parents[2]

_AGENT = """
    import sys
    from deadpool_megatron.cluster.link import Spoke
    spoke = Spoke(sys.argv[1], sys.argv[2], bytes(range(32)), float(sys.argv[3]))
    spoke.send(b"hello")
    while (packet := spoke.receive(60)) is not None:
        spoke.send(packet)
"""


class Room:
    """A hub and what it has heard."""

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self.lease_s = lease_s
        self.hub = Hub("127.0.0.1", 0, SECRET, lease_s)
        self.endpoint = f"127.0.0.1:{self.hub.port}"
        self.heard: list[tuple[bytes, bytes]] = []
        self.gone: list[bytes] = []
        self._agents: list[subprocess.Popen[bytes]] = []

    def serve(self, seconds: float, until: Callable[[], object] = lambda: False) -> float:
        """Serve until something is so, at most ``seconds``; returns how long it took."""
        start = time.monotonic()
        while not until() and (left := start + seconds - time.monotonic()) > 0:
            self.hub.wait(min(left, 0.05), lambda who, what: self.heard.append((who, what)), self.gone.append)
        return time.monotonic() - start

    def agent(self, name: str) -> subprocess.Popen[bytes]:
        """An agent's end in a process of its own, connected."""
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_AGENT), self.endpoint, name, str(self.lease_s)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self._agents.append(process)
        self.serve(60, lambda: (name.encode(), b"hello") in self.heard)
        assert (name.encode(), b"hello") in self.heard
        return process

    def close(self) -> None:
        """End the agents by their ids."""
        for process in self._agents:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        self.hub.close()


@pytest.fixture
def room() -> Iterator[Room]:
    each = Room()
    yield each
    each.close()


def test_packets_go_both_ways_in_order(room: Room) -> None:
    spoke = Spoke(room.endpoint, "node-3", SECRET, LEASE_S)
    for i in range(50):
        spoke.send(bytes([i]))
    room.serve(10, lambda: len(room.heard) == 50)
    assert room.heard == [(b"node-3", bytes([i])) for i in range(50)]
    room.hub.send(b"node-3", b"answer")
    assert spoke.receive(10) == b"answer" and spoke.receive(0) is None
    spoke.close()


def test_who_does_not_know_the_secret_is_never_heard(room: Room) -> None:
    stranger = Spoke(room.endpoint, "node-0", bytes(32), LEASE_S)
    stranger.send(b"let me in")
    # The client key alone (of the right job) with a wrong server key, and no encryption at all:
    plain: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    plain.setsockopt(zmq.LINGER, 0)
    plain.setsockopt(zmq.IDENTITY, b"node-0")
    plain.connect(f"tcp://{room.endpoint}")
    plain.send(b"let me in")
    friend = Spoke(room.endpoint, "node-1", SECRET, LEASE_S)
    friend.send(b"hello")
    room.serve(2)
    assert room.heard == [(b"node-1", b"hello")]
    room.hub.send(b"node-0", b"secret plan")
    assert stranger.receive(0.5) is None and not plain.poll(100)
    friend.close()
    plain.close()
    stranger.socket.setsockopt(zmq.LINGER, 0)
    stranger.socket.close()


def test_a_stranger_with_the_hubs_public_key_but_not_the_jobs_client_key_is_refused(room: Room) -> None:
    from deadpool_megatron.cluster import link

    server_public, _ = link._keypair(SECRET, "server")
    public, private = zmq.curve_keypair()
    stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.curve_serverkey, stranger.curve_publickey, stranger.curve_secretkey = server_public, public, private
    stranger.connect(f"tcp://{room.endpoint}")
    stranger.send(b"let me in")
    room.serve(2)
    assert room.heard == []
    stranger.close()


def test_a_killed_agent_is_noticed_in_less_than_half_a_second(room: Room) -> None:
    victim, _ = room.agent("node-0"), room.agent("node-1")
    victim.kill()
    took = room.serve(5, lambda: room.gone)
    assert room.gone == [b"node-0"] and took < 0.5


def test_a_frozen_agent_is_noticed_within_the_lease_and_a_healthy_one_is_not() -> None:
    lease_s = 3.0
    room = Room(lease_s)
    try:
        frozen, _ = room.agent("node-0"), room.agent("node-1")
        frozen.send_signal(signal.SIGSTOP)
        room.serve(0.4)
        frozen.send_signal(signal.SIGCONT)
        room.serve(lease_s)
        assert not room.gone, "a pause that a busy machine may make costs nothing"
        frozen.send_signal(signal.SIGSTOP)
        took = room.serve(10, lambda: room.gone)
        assert room.gone == [b"node-0"] and lease_s / 2 < took < lease_s + 0.3
        room.serve(2 * lease_s)
        assert room.gone == [b"node-0"]
    finally:
        room.close()


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc/self/timerslack_ns").exists(),
    reason="the kernel shows other threads' timer slack to root only, or not at all",
)
def test_the_thread_that_has_all_connections_is_woken_for_many_timers_at_once_and_no_other_thread_is_late() -> None:
    before = set(os.listdir("/proc/self/task"))
    lease_s = 5.0
    room = Room(lease_s)
    try:
        slack = {
            Path(f"/proc/self/task/{tid}/comm").read_text().strip(): int(Path(f"/proc/{tid}/timerslack_ns").read_text())
            for tid in set(os.listdir("/proc/self/task")) - before
        }
        assert slack["ZMQbg/IO/0"] == lease_s * 1e9 / 100
        assert int(Path("/proc/self/timerslack_ns").read_text()) < 1e6, "this one takes packets"
    finally:
        room.close()


def test_an_agent_that_leaves_in_order_is_gone_once_its_words_are_heard(room: Room) -> None:
    spoke = Spoke(room.endpoint, "node-7", SECRET, LEASE_S)
    spoke.send(b"last words")
    room.serve(10, lambda: room.heard)
    spoke.close()
    room.serve(5, lambda: room.gone)
    assert room.heard == [(b"node-7", b"last words")] and room.gone == [b"node-7"]


def test_a_record_for_who_is_not_there_is_dropped(room: Room) -> None:
    room.hub.send(b"node-9", b"anybody")


def test_a_secret_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 5 bytes, not 32"):
        check_secret(b"short")


def test_what_is_sent_the_moment_the_connection_is_up_is_not_lost(room: Room) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    refused = 0
    end = time.monotonic() + 60
    for i in range(100):
        spoke = Spoke(room.endpoint, f"node-{i}", SECRET, 5.0, context)
        while not (spoke.changed() and spoke.connected):
            spoke.receive()  # ZeroMQ has just looked for news, and does not again for a while
            assert time.monotonic() < end
        refused += not spoke.post(b"join")
        spoke.close(linger_ms=0)
    context.term()
    assert not refused


def test_a_port_that_is_taken_for_a_moment_is_waited_for() -> None:
    (port,) = free_ports(1)
    other = socket.create_server(("127.0.0.1", port))
    threading.Timer(0.5, other.close).start()
    start = time.monotonic()
    Hub("127.0.0.1", port, SECRET, LEASE_S, patience_s=30.0).close()
    assert 0.4 < time.monotonic() - start < 20
    with socket.create_server(("127.0.0.1", port)), pytest.raises(zmq.ZMQError, match="in use"):
        Hub("127.0.0.1", port, SECRET, LEASE_S, patience_s=0.1)


def test_free_ports_are_none_that_an_outgoing_connection_takes() -> None:
    ports = free_ports(20)
    taken = {port + more for port in ports for more in (0, 1)}
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(taken) == 40 and (first_outgoing < 20_100 or max(taken) < first_outgoing)
