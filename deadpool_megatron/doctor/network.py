"""The part of `deadpool doctor` that takes several nodes: do they reach each other, how fast, and do clocks agree?

::

    node 0: meeting point (Hub)              every node, node 0 too (Spoke)
    ---------------------------              ------------------------------
                                   <-------  Here(node, address, port)
    all are here: clock of each    <------>  Ask / Clock
    round by round: Round(shift)   ------->  send to node + shift, receive from node - shift
                                   <-------  Speed(bytes a second)
    Result to all                  ------->

Messages go through the same authenticated link as the job's; the streams are accepted only after a digest keyed with
the secret. Nobody who lacks the secret can make a node send or receive.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from deadpool_megatron.cluster.link.link import Hub, Spoke
from deadpool_megatron.doctor.machine import Finding, State

_BLOCK: Final = 4 << 20
_LEASE_S: Final = 20.0
_CLOCK_S: Final = 0.1
_SLOW: Final = 0.5  # of the median link


class MeetingError(Exception):
    """The nodes did not come together; the message is one line."""


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class Here(_Message, frozen=True):
    node: int
    host: str
    port: int


class Ask(_Message, frozen=True):
    pass


class Clock(_Message, frozen=True):
    node: int
    unix_s: float


class Round(_Message, frozen=True):
    shift: int
    nbytes: int
    places: list[tuple[str, int]]


class Speed(_Message, frozen=True):
    node: int
    shift: int
    bytes_a_second: float
    error: str


class Result(_Message, frozen=True):
    lines: list[tuple[str, State, str, str]]


_to_hub = msgspec.msgpack.Decoder(Here | Clock | Speed)
_to_node = msgspec.msgpack.Decoder(Ask | Round | Result)


def _name(node: int) -> bytes:
    return f"doctor-{node}".encode()


def _token(secret: bytes, shift: int, sender: int) -> bytes:
    return hmac.new(secret, f"deadpool-doctor-{shift}-{sender}".encode(), hashlib.sha256).digest()


def host_meeting(
    host: str, port: int, nodes: int, secret: bytes, nbytes: int, deadline_s: float, announce: Callable[[int], None]
) -> None:
    """Hold the meeting of ``nodes`` nodes at ``host:port`` until every node has the result.

    ``announce`` gets the port once it listens (another than asked for when that was 0). Blocks up to ``deadline_s``.
    Raises MeetingError when a node stays away, OSError when the port is taken.
    """
    hub = Hub(host, port, secret, _LEASE_S)
    announce(hub.port)
    end = time.monotonic() + deadline_s
    inbox: list[Here | Clock | Speed] = []
    try:

        def collect[T: Here | Clock | Speed](what: str, kind: type[T]) -> dict[int, T]:
            known: dict[int, T] = {}
            while len(known) < nodes:
                left = end - time.monotonic()
                if left <= 0:
                    missing = sorted(set(range(nodes)) - set(known))
                    raise MeetingError(f"no {what} from node {', '.join(map(str, missing))} within {deadline_s:g} s")
                hub.wait(min(left, 0.5), lambda identity, packet: inbox.append(_to_hub.decode(packet)), lambda _: None)
                for message in inbox:
                    if isinstance(message, kind):
                        known[message.node] = message
                inbox[:] = [m for m in inbox if not isinstance(m, kind)]
            return known

        def tell(node: int, message: _Message) -> None:
            hub.send(_name(node), msgspec.msgpack.encode(message))

        here = collect("word", Here)
        lines = [Finding("nodes", "ok", f"{nodes} have met")]
        lines.append(_clocks(nodes, tell, lambda: collect("clock", Clock)))
        places = [(here[n].host, here[n].port) for n in range(nodes)]
        speeds: dict[tuple[int, int], Speed] = {}
        for shift in sorted({1, nodes // 2} - {0}) if nodes > 1 else []:
            for node in range(nodes):
                tell(node, Round(shift, nbytes, places))
            speeds |= {(n, (n + shift) % nodes): s for n, s in collect("measurement", Speed).items()}
        lines += _links(speeds)
        for node in range(nodes):
            tell(node, Result([(f.what, f.state, f.found, f.mend) for f in lines]))
        # who has the result leaves
        hub.farewell(map(_name, range(nodes)), end - time.monotonic(), lambda identity, packet: None)
    finally:
        hub.close()


def _clocks(nodes: int, tell: Callable[[int, _Message], None], collect: Callable[[], dict[int, Clock]]) -> Finding:
    """Compare every node's wall clock with the meeting point's: right to half a round trip."""
    asked = time.time()
    for node in range(nodes):
        tell(node, Ask())
    clocks = collect()
    answered = time.time()
    middle, half = (asked + answered) / 2, (answered - asked) / 2
    worst = max(clocks.values(), key=lambda c: abs(c.unix_s - middle))
    off = abs(worst.unix_s - middle)
    found = f"within {1e3 * max(off, half):.0f} ms of node 0's (measured to {1e3 * half:.0f} ms)"
    if off > max(_CLOCK_S, half):
        return Finding("clocks", "warn", f"node {worst.node} is {off:.2f} s off", "start chronyd on all nodes")
    return Finding("clocks", "ok", found)


def _links(speeds: dict[tuple[int, int], Speed]) -> list[Finding]:
    out: list[Finding] = []
    good = [s.bytes_a_second for s in speeds.values() if not s.error]
    for (a, b), s in sorted(speeds.items()):
        if s.error:
            out.append(
                Finding(f"node {a} -> node {b}", "fail", s.error, f"open TCP from node {a} to {b} (firewall, routes)")
            )
    if good:
        median = statistics.median(good)
        spread = f"{len(good)} links, each node sending at once: median {median / 1e9:.2f} GB/s, "
        out.append(Finding("network", "ok", f"{spread}{min(good) / 1e9:.2f} to {max(good) / 1e9:.2f}"))
        for (a, b), s in sorted(speeds.items()):
            if not s.error and s.bytes_a_second < _SLOW * median:
                found = f"{s.bytes_a_second / 1e9:.2f} GB/s, less than half of the median"
                out.append(Finding(f"node {a} -> node {b}", "warn", found, "ethtool <interface>; ip -s link"))
    return out


def join_meeting(endpoint: str, node: int, address: str, secret: bytes, deadline_s: float) -> list[Finding]:
    """Take part as ``node``; returns the result, the same on every node. Raises MeetingError.

    Args:
        endpoint: ``host:port`` of the meeting point.
        address: where the other nodes reach this one.
    """
    with socket.create_server((address, 0), backlog=64) as server:
        spoke = Spoke(endpoint, _name(node).decode(), secret, _LEASE_S)
        try:
            end = time.monotonic() + deadline_s
            # The meeting point may begin after this node: what cannot be sent in time gets no answer, either.
            spoke.send(msgspec.msgpack.encode(Here(node, address, server.getsockname()[1])), deadline_s)
            while True:
                packet = spoke.receive(max(0.0, end - time.monotonic()))
                if packet is None:
                    raise MeetingError(
                        f"no answer from {endpoint} within {deadline_s:g} s: is node 0 there, with the same secret?"
                    )
                message = _to_node.decode(packet)
                if isinstance(message, Ask):
                    spoke.send(msgspec.msgpack.encode(Clock(node, time.time())))
                elif isinstance(message, Round):
                    spoke.send(msgspec.msgpack.encode(_measure(message, node, server, secret)))
                else:
                    return [Finding(*line) for line in message.lines]
        finally:
            spoke.close()


def _measure(round_: Round, node: int, server: socket.socket, secret: bytes) -> Speed:
    """Send to the node ``shift`` further on while receiving from the one ``shift`` before."""
    nodes = len(round_.places)
    sender = (node - round_.shift) % nodes
    receiver = threading.Thread(target=_receive, args=(server, _token(secret, round_.shift, sender), round_.nbytes))
    receiver.start()
    try:
        block = memoryview(bytes(min(_BLOCK, round_.nbytes)))
        with socket.create_connection(round_.places[(node + round_.shift) % nodes], timeout=10.0) as out:
            out.sendall(_token(secret, round_.shift, node))
            start = time.perf_counter()
            left = round_.nbytes
            while left > 0:
                sent = min(left, len(block))
                out.sendall(block[:sent])
                left -= sent
            out.shutdown(socket.SHUT_WR)
            if out.recv(1) != b"\x01":
                return Speed(node, round_.shift, 0.0, "the stream was not accepted")
            return Speed(node, round_.shift, round_.nbytes / (time.perf_counter() - start), "")
    except OSError as err:
        return Speed(node, round_.shift, 0.0, f"{type(err).__name__}: {err}")
    finally:
        receiver.join(30.0)


def _receive(server: socket.socket, token: bytes, nbytes: int) -> None:
    server.settimeout(15.0)
    buffer = bytearray(_BLOCK)
    end = time.monotonic() + 30.0
    while time.monotonic() < end:
        try:
            stream, _ = server.accept()
        except OSError:
            return
        with stream:
            stream.settimeout(15.0)
            try:
                said = b""
                while len(said) < len(token) and (part := stream.recv(len(token) - len(said))):
                    said += part
                if not hmac.compare_digest(said, token):
                    continue  # somebody else: not one of ours
                left = nbytes
                while left > 0 and (got := stream.recv_into(buffer, min(left, len(buffer)))):
                    left -= got
                stream.sendall(b"\x01" if left == 0 else b"\x00")
            except OSError:
                continue
            return
