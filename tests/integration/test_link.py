"""Hub and Spoke over real sockets and processes: strangers are never heard, the dead and silent are soon noticed."""

from __future__ import annotations

import contextlib
import itertools
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

from deadpool_bench.harness.ports import free_ports
from deadpool_megatron.cluster.link import link
from deadpool_megatron.cluster.link.link import Hub, Spoke, check_secret
from middleman import Middleman
from waiting import until

SECRET = bytes(range(32))
LEASE_S = 60.0  # silence is not noticed in these tests, but in the one that is about it
ROOT = Path(__file__).resolve().parents[2]

_AGENT = """
    import sys
    from deadpool_megatron.cluster.link.link import Spoke
    spoke = Spoke(sys.argv[1], sys.argv[2], bytes(range(32)), float(sys.argv[3]))
    spoke.send(b"hello")
    while (packet := spoke.receive(600)) is not None:
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

    def serve(self, until: Callable[[], object]) -> None:
        """Serve until something is so."""
        while not until():
            self.hub.wait(0.05, lambda who, what: self.heard.append((who, what)), self.gone.append)

    def serve_for(self, seconds: float) -> None:
        """Serve so long, to see that something does not happen."""
        end = time.monotonic() + seconds
        self.serve(lambda: time.monotonic() > end)

    def answers(self, name: str, word: bytes) -> None:
        """Until an agent has heard a word and said it."""
        self.hub.send(name.encode(), word)
        self.serve(lambda: (name.encode(), word) in self.heard)

    def agent(self, name: str) -> subprocess.Popen[bytes]:
        """An agent's end in a process of its own, connected."""
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_AGENT), self.endpoint, name, str(self.lease_s)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self._agents.append(process)
        self.serve(lambda: (name.encode(), b"hello") in self.heard)
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


def test_no_packet_is_lost_because_the_other_end_is_busy(room: Room) -> None:
    spoke, many, packet = Spoke(room.endpoint, "node-3", SECRET, LEASE_S), 30_000, bytes(200)
    assert spoke.send(b"hello")
    room.serve(lambda: room.heard)
    assert all([spoke.post(packet) for _ in range(many)])
    room.serve(lambda: len(room.heard) == 1 + many)
    for _ in range(many):
        room.hub.send(b"node-3", packet)
    for _ in range(many):
        assert spoke.receive(60) == packet
    spoke.close()


def test_any_number_of_connections_may_come_and_go_while_nobody_looks(room: Room) -> None:
    for _ in range(1500):
        socket.create_connection(("127.0.0.1", room.hub.port)).close()
    spoke = Spoke(room.endpoint, "node-3", SECRET, LEASE_S)
    assert spoke.send(b"hello", 60)
    room.serve(lambda: room.heard)
    spoke.close()


def test_packets_go_both_ways_in_order(room: Room) -> None:
    spoke = Spoke(room.endpoint, "node-3", SECRET, LEASE_S)
    for i in range(50):
        spoke.send(bytes([i]))
    room.serve(lambda: len(room.heard) >= 50)
    assert room.heard == [(b"node-3", bytes([i])) for i in range(50)]
    room.hub.send(b"node-3", b"answer")
    assert spoke.receive(60) == b"answer" and spoke.receive(0) is None
    spoke.close()


def test_who_does_not_know_the_secret_is_never_heard(room: Room) -> None:
    stranger = Spoke(room.endpoint, "node-0", bytes(32), LEASE_S)
    stranger.send(b"let me in")
    # The client key alone (of the right job) with a wrong server key, and no encryption at all:
    plain: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    plain.setsockopt(zmq.LINGER, 0)
    plain.setsockopt(zmq.IDENTITY, b"node-0")
    plain.connect(f"tcp://{room.endpoint}")
    with contextlib.suppress(zmq.Again):  # refused before it could send
        plain.send(b"let me in", zmq.NOBLOCK)
    friend = Spoke(room.endpoint, "node-1", SECRET, LEASE_S)
    friend.send(b"hello", 60)
    room.serve(lambda: room.heard)
    room.serve_for(1)
    assert room.heard == [(b"node-1", b"hello")]
    room.hub.send(b"node-0", b"secret plan")
    assert stranger.receive(0.5) is None and not plain.poll(100)
    friend.close()
    plain.close()
    stranger.socket.setsockopt(zmq.LINGER, 0)
    stranger.socket.close()


def test_a_member_without_a_name_is_not_heard(room: Room) -> None:
    """Nor is what is left of a connection whose place a newer one has taken: ZeroMQ takes its name away."""
    nameless: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    nameless.setsockopt(zmq.LINGER, 0)
    nameless.curve_serverkey, _ = link._keypair(SECRET, "server")
    nameless.curve_publickey, nameless.curve_secretkey = link._keypair(SECRET, "client")
    nameless.connect(f"tcp://{room.endpoint}")
    nameless.send(b"hello")
    room.serve(lambda: room.hub.refused)
    nameless.close()
    friend = Spoke(room.endpoint, "node-1", SECRET, LEASE_S)
    friend.send(b"hello")
    room.serve(lambda: room.heard)
    friend.close()
    room.serve(lambda: room.gone)
    assert room.heard == [(b"node-1", b"hello")] and room.gone == [b"node-1"]


def test_a_stranger_with_the_hubs_public_key_but_not_the_jobs_client_key_is_refused(room: Room) -> None:
    server_public, _ = link._keypair(SECRET, "server")
    public, private = zmq.curve_keypair()
    stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.curve_serverkey, stranger.curve_publickey, stranger.curve_secretkey = server_public, public, private
    stranger.connect(f"tcp://{room.endpoint}")
    with contextlib.suppress(zmq.Again):
        stranger.send(b"let me in", zmq.NOBLOCK)
    room.serve_for(2)
    assert room.heard == []
    stranger.close()


_MEDDLING = (
    *("flipped", "marked as a part", "marked as a command", "cut", "twice", "late", "repeated"),
    *("of an older connection", "noise", "reflected"),
)


@pytest.mark.parametrize("way", ["to hub", "to agent"])
def test_who_sits_between_can_neither_change_nor_repeat_nor_keep_for_later_what_is_said(room: Room, way: str) -> None:
    """Each packet is heard once at most, as it was sent, and in order, over all connections of an agent."""
    between = Middleman(room.hub.port)
    numbers = itertools.count(1)
    answers: list[bytes] = []

    def talk(spoke: Spoke, enough: Callable[[], object]) -> None:
        while not enough():
            word = b"%d" % next(numbers)
            spoke.post(word)
            room.hub.send(b"node-1", word)
            room.hub.wait(0.002, lambda who, what: room.heard.append((who, what)), room.gone.append)
            while (answer := spoke.receive()) is not None:
                answers.append(answer)

    try:
        for how in _MEDDLING * 4:
            # A new one each time: ZeroMQ does not connect again after nonsense.
            spoke = Spoke(f"127.0.0.1:{between.port}", "node-1", SECRET, LEASE_S)
            before = len(room.heard), len(answers)
            talk(spoke, lambda before=before: len(room.heard) > before[0] and len(answers) > before[1])
            between.meddle(way, how)
            talk(spoke, lambda: between.meddled)
            last = next(numbers)
            talk(spoke, lambda last=last: next(numbers) > last + 20)  # what follows, on the same connection
            between.hang_up()
            spoke.close(linger_ms=0)
        assert {who for who, _ in room.heard} == {b"node-1"}
        for words in ([word for _, word in room.heard], answers):
            said = list(map(int, words))
            assert said == sorted(set(said)) and words == [b"%d" % number for number in said]
    finally:
        between.close()


def test_nonsense_from_who_has_the_coordinators_port_for_a_while_keeps_no_agent_away_for_ever() -> None:
    """ZeroMQ connects again after a broken connection, and not after one over which nonsense came."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        spoke = Spoke(f"127.0.0.1:{port}", "node-1", SECRET, LEASE_S)
        with other.accept()[0] as connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100))
            until(spoke.changed, "the end of that connection")
    hub = Hub("127.0.0.1", port, SECRET, LEASE_S, patience_s=60.0)

    def up() -> bool:
        spoke.look()
        spoke.changed()
        hub.wait(0.01, lambda who, what: None, lambda who: None)
        return spoke.connected

    try:
        until(up, "another connection")
    finally:
        spoke.close(linger_ms=0)
        hub.close()


def test_a_killed_agent_is_noticed_by_the_end_of_its_connection_and_not_by_its_silence() -> None:
    room = Room(3600.0)
    try:
        victim, _ = room.agent("node-0"), room.agent("node-1")
        victim.kill()
        room.serve(lambda: room.gone)
        room.answers("node-1", b"well")
        assert room.gone == [b"node-0"]
    finally:
        room.close()


@pytest.mark.parametrize("lease_s", [5.0, 10.0, 60.0])
def test_a_node_that_falls_silent_at_any_moment_is_missed_within_the_lease_but_not_within_half_of_it(
    lease_s: float,
) -> None:
    """Right after a ping it is missed last. The coordinator's end pings nobody: it looks at what has come."""
    hub = Hub("127.0.0.1", 0, SECRET, lease_s)
    spoke = Spoke(f"127.0.0.1:{hub.port}", "node-1", SECRET, lease_s * 4 / 3)  # as agents' ends (`core.ABSENCE`)
    try:
        assert hub.socket.getsockopt(zmq.HEARTBEAT_IVL) == 0
        beat_s = spoke.socket.getsockopt(zmq.HEARTBEAT_IVL) / 1e3
        assert lease_s / 2 < hub.silence_s - beat_s and hub.silence_s + 2 * hub.look_s <= lease_s + 0.002
    finally:
        spoke.close(linger_ms=0)
        hub.close()


def test_a_frozen_agent_is_noticed_and_one_that_only_paused_or_is_healthy_is_not() -> None:
    lease_s = 6.0
    room = Room(lease_s)
    try:
        frozen, _ = room.agent("node-0"), room.agent("node-1")
        frozen.send_signal(signal.SIGSTOP)
        room.serve_for(0.4)
        frozen.send_signal(signal.SIGCONT)
        room.answers("node-0", b"back")
        assert not room.gone, "a pause that a busy machine may make costs nothing"
        frozen.send_signal(signal.SIGSTOP)
        room.serve(lambda: room.gone)
        room.answers("node-1", b"well")
        assert room.gone == [b"node-0"]
    finally:
        room.close()


def test_an_agent_that_leaves_in_order_is_gone_once_its_words_are_heard(room: Room) -> None:
    spoke = Spoke(room.endpoint, "node-7", SECRET, LEASE_S)
    spoke.send(b"last words")
    room.serve(lambda: room.heard)
    spoke.close()
    room.serve(lambda: room.gone)
    assert room.heard == [(b"node-7", b"last words")] and room.gone == [b"node-7"]


def test_an_agent_that_has_come_back_before_its_end_is_heard_of_is_not_gone(room: Room) -> None:
    """Its new connection has the descriptor of the old one: told apart by descriptor and name, it would be lost."""
    for _ in range(5):  # the end that is heard of may be the old connection's or the new one's, with either next
        spoke = Spoke(room.endpoint, "node-1", SECRET, LEASE_S)
        assert spoke.send(b"hello", 60)
        spoke.close()
    spoke = Spoke(room.endpoint, "node-1", SECRET, LEASE_S)
    assert spoke.send(b"I am here", 60)
    room.serve(lambda: (b"node-1", b"I am here") in room.heard)
    room.serve_for(1)
    assert room.gone == []
    spoke.close()
    room.serve(lambda: room.gone)
    assert room.gone == [b"node-1"]


def test_the_end_of_who_has_the_descriptor_of_a_tool_that_has_just_left_is_heard_of(room: Room) -> None:
    """The tool's words, its end, and the next connection, over which nothing has come yet, are seen in one turn."""
    for number in range(3):
        tool = Spoke(room.endpoint, f"tool-{number}", SECRET, LEASE_S)
        assert tool.send(b"a question", 60)
        tool.close()
        time.sleep(0.2)  # until its descriptor is free
        spoke = Spoke(room.endpoint, f"node-{number}", SECRET, LEASE_S)
        while not spoke.connected:
            spoke.changed()
        room.serve(lambda: len(room.heard) == 2 * number + 1)  # noqa: B023
        assert spoke.send(b"I am here", 60)
        room.serve(lambda: len(room.heard) == 2 * number + 2)  # noqa: B023
        spoke.close()
        room.serve(lambda: len(room.gone) == 2 * number + 2)  # noqa: B023
    assert room.gone == [name for number in range(3) for name in (f"tool-{number}".encode(), f"node-{number}".encode())]


def test_a_record_for_who_is_not_there_is_dropped(room: Room) -> None:
    room.hub.send(b"node-9", b"anybody")


def test_a_secret_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 5 bytes, not 32"):
        check_secret(b"short")


def test_what_is_sent_the_moment_the_connection_is_up_is_not_lost(room: Room) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    refused = 0
    for i in range(100):
        spoke = Spoke(room.endpoint, f"node-{i}", SECRET, LEASE_S, context)
        while not (spoke.changed() and spoke.connected):
            spoke.receive()  # ZeroMQ has just looked for news, and does not again for a while
        refused += not spoke.post(b"join")
        spoke.close(linger_ms=0)
    context.term()
    assert not refused


def test_a_port_that_is_taken_for_a_moment_is_waited_for() -> None:
    (port,) = free_ports(1)
    other = socket.create_server(("127.0.0.1", port))
    threading.Timer(0.5, other.close).start()
    Hub("127.0.0.1", port, SECRET, LEASE_S, patience_s=3600.0).close()
    assert other.fileno() == -1
    with socket.create_server(("127.0.0.1", port)), pytest.raises(zmq.ZMQError, match="in use"):
        Hub("127.0.0.1", port, SECRET, LEASE_S, patience_s=0.1)


def test_free_ports_are_none_that_an_outgoing_connection_takes() -> None:
    ports = free_ports(20)
    taken = {port + more for port in ports for more in (0, 1)}
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(taken) == 40 and (first_outgoing < 20_100 or max(taken) < first_outgoing)
