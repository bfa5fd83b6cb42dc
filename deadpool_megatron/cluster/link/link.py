"""Authenticated message sockets between agents and the coordinator: ZeroMQ with CURVE, and signs of life.

Every key derives from the job's secret, so a peer that completes the CURVE handshake has proved that it belongs to the
job. From then on each packet is authenticated under its connection's own keys and count: who sits between can lose a
packet or end the connection, and can neither change a packet, repeat it, nor keep it for later. A node's silence,
noticed within the lease, and the end of its connection both reach the coordinator as one thing: the connection of that
node is gone.

Only an agent pings, ZeroMQ's thread in it, and hears the answers. The coordinator asks nobody: its kernel notes when
something has come over a connection (TCP_INFO), and what has been silent for too long it shuts down. A ping of its own
would double the packets, and ZeroMQ looks for the timer of each answer among those of all connections.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import hmac
import itertools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Final

import zmq
import zmq.auth.thread
from zmq.backend import Frame
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from deadpool_megatron.cluster.link.ports import once_free

SECRET_BYTES = 32
_NOBLOCK, _SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)  # (as enumerations they cost more than the calls)
_UP: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED
_AGAIN_S: Final = 0.1  # from the end of a connection that ZeroMQ does not try again to another try of ours
_SRCFD = int(zmq.SRCFD)
_send = zmq.backend.Socket.send  # (past the wrapper, as for what is received)
_LEAST_PATIENCE_S = 1.5
_BEAT = 0.25  # of its lease, from one ping of an agent to the next
_MOST_BEAT = 1 / 3  # of the hub's, which may be shorter than theirs by that much
_LOOKS = 32  # in the time within which a silent node is noticed
_TCP_INFO: Final = struct.Struct("=B51xI")  # state, and milliseconds since data came (linux/tcp.h)
_ESTABLISHED: Final = 1


def check_secret(secret: bytes) -> bytes:
    """The secret itself if it has the right length. Raises ValueError."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the job secret has {len(secret)} bytes, not {SECRET_BYTES}")
    return secret


def agent_identity(job_id: str, node: int) -> str:
    """The name of an agent's end. One of an earlier run with the same secret has another, and takes nobody's place."""
    return f"node-{node}@{job_id}"


def _keypair(secret: bytes, role: str) -> tuple[bytes, bytes]:
    private = z85.encode(hmac.new(check_secret(secret), b"deadpool-curve-" + role.encode(), hashlib.sha256).digest())
    return zmq.curve_public(private), private


def _unlimited(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Context[zmq.Socket[bytes]]:
    """Sockets of ``context`` that are made from now on queue any number of packets.

    At ZeroMQ's limit (1,000, and as many at the other end) a ROUTER drops and a DEALER refuses, and what is lost on a
    connection that stays is told to nobody again. What can queue is little: an agent sends some records an iteration
    and its coordinator a few an epoch, of some hundred bytes; ends that fall silent are cut off within the lease.
    Monitors have no limit either: ZeroMQ's thread, which has all connections, waits where one is full.
    """
    context.setsockopt(zmq.SNDHWM, 0)
    context.setsockopt(zmq.RCVHWM, 0)
    return context


def monitored(monitor: zmq.Socket[bytes]) -> Iterator[tuple[int, int]]:
    """What has become of connections since the last look, in order: each event and its descriptor."""
    while True:
        try:
            event = recv_monitor_message(monitor, zmq.NOBLOCK)
        except zmq.Again:
            return
        yield int(event["event"]), int(event["value"])


def _given_up(socket: zmq.Socket[bytes], within_s: float) -> None:
    """What has been sent and is not received in this time ends the connection, and what is left does soon after."""
    socket.setsockopt(zmq.TCP_MAXRT, max(200, int(within_s * 1000)))
    socket.setsockopt(zmq.LINGER, 1000)


def _silent_s(fd: int) -> float:
    """Seconds since something came over this connection; 0 for what is none (any more)."""
    try:
        # (of a known family: asking the kernel for it takes longer than the rest)
        each = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
        try:
            state, silent_ms = _TCP_INFO.unpack(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
        finally:
            each.detach()
    except (OSError, struct.error):
        return 0.0
    return silent_ms / 1e3 if state == _ESTABLISHED else 0.0


def _shut_down(fd: int, silent_s: float) -> None:
    """End a connection if it has been silent for so long. Another one may have its number meanwhile, so look again."""
    try:
        held = os.dup(fd)
    except OSError:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, held) as each, contextlib.suppress(OSError):
        if _silent_s(held) >= silent_s:
            each.shutdown(socket.SHUT_RDWR)


class _Authenticator(zmq.auth.thread.ThreadAuthenticator):
    """Gives each connection a name of its own, which every packet that comes over it carries (``User-Id``)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        super().__init__(context)
        self._count = itertools.count()

    def curve_user_id(self, client_public_key: bytes) -> str:
        """Called by the authenticator's thread for every handshake that it lets pass."""
        return str(next(self._count))


@dataclass(slots=True)
class _Connection:
    """One over which packets have come, ``seen`` first in that turn of its hub. ``name``: a number that grows."""

    name: int
    identity: bytes
    seen: int


class Hub:
    """The coordinator's end: one ROUTER socket, one connection an agent. One thread uses it."""

    def __init__(self, host: str, port: int, secret: bytes, lease_s: float, patience_s: float = 0.0) -> None:
        """``patience_s``: how long to wait for the port while it is in use. Raises zmq.ZMQError."""
        self._context = _unlimited(zmq.Context())
        self._auth = _Authenticator(self._context)
        self._auth.start()
        client_public, _ = _keypair(secret, "client")
        # Called by the authenticator's thread for every handshake: members have the one client key of the job.
        member = SimpleNamespace(callback=lambda domain, key: hmac.compare_digest(key, client_public))
        self._auth.configure_curve_callback(domain="*", credentials_provider=member)
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        public, private = _keypair(secret, "server")
        self.socket.curve_server = True
        self.socket.curve_publickey = public
        self.socket.curve_secretkey = private
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.look_s = lease_s / _LOOKS
        # (a very short lease may be passed, for a busy machine's sake)
        patient_s = max((1 - _MOST_BEAT) * lease_s - 2 * self.look_s, min(lease_s, _LEAST_PATIENCE_S))
        self.silence_s = _MOST_BEAT * lease_s + patient_s
        self._look_at = time.monotonic() + self.look_s
        self._due: list[tuple[float, int, int]] = []  # heap: when to look at which connection, by descriptor and name
        _given_up(self.socket, patient_s)
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        once_free(lambda: self.socket.bind(f"tcp://{host}:{port}"), patience_s)
        endpoint = self.socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.port = int(endpoint.decode().rsplit(":", 1)[1])
        self.refused = 0  # packets of several parts, or of nobody
        # By descriptor. The kernel gives the number of a closed one to the next connection, of the same node perhaps,
        # before we hear of the end, and over some nothing ever comes.
        self._connections: dict[int, _Connection] = {}
        self._open: dict[int, int] = {}  # by descriptor, the turn in which we heard that a connection has it now
        self._newest: dict[bytes, int] = {}  # by identity, the name of its newest connection
        self._turn = 0
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def wait(
        self,
        timeout_s: float,
        on_packet: Callable[[bytes, bytes], None],
        on_gone: Callable[[bytes], None],
    ) -> None:
        """Handle what arrives within ``timeout_s`` seconds; sooner back where connections are to be looked at.

        Args:
            on_packet: called with (identity, packet) for each packet.
            on_gone: called with the identity of each connection that ended or fell silent.
        """
        timeout_s = max(0.0, min(timeout_s, self._look_at - time.monotonic()))
        self._turn += 1
        ended: list[_Connection] = []
        ready = dict(self._poller.poll(int(timeout_s * 1000) + 1))
        # Packets first: what a node sent before it died still counts.
        receive, get = self.socket.recv, Frame.get
        while self.socket in ready:
            # (part by part, and past pyzmq's wrappers: with recv_multipart this takes four times as long)
            try:
                identity = receive(_NOBLOCK)
            except zmq.Again:
                break
            body = receive(copy=False)
            whole = True
            while body.more:  # (CURVE does not authenticate this flag)
                whole, body = False, receive(copy=False)
            # (names that begin with 0 are ZeroMQ's: of ends without one, or whose place a newer connection has taken)
            if not whole or identity.startswith(b"\0"):
                self.refused += 1
                continue
            fd, user = get(body, _SRCFD), get(body, "User-Id")
            assert isinstance(fd, int) and isinstance(user, str)
            known, name = self._connections.get(fd), int(user)
            if known is None or known.name != name:
                new = _Connection(name, identity, self._turn)
                self._newest[identity] = max(name, self._newest.get(identity, name))
                if known is not None and known.name > name:  # which is read before what was left of the one before
                    ended.append(new)
                else:
                    if known is not None:
                        ended.append(known)
                    self._connections[fd] = new
                    heapq.heappush(self._due, (time.monotonic() + self.silence_s, fd, name))
            on_packet(identity, body.bytes)
        # Always, also if there was none: that a connection begins is told when its first packet is there.
        ended += self._look_for_ends()
        for each in ended:
            if self._newest.get(each.identity) == each.name:
                del self._newest[each.identity]
                on_gone(each.identity)
        if (now := time.monotonic()) >= self._look_at:
            self._end_silent_ones(now)

    def _end_silent_ones(self, now: float) -> None:
        """What ends here is heard of as the end of any other connection."""
        self._look_at = now + self.look_s
        while self._due and self._due[0][0] <= now:
            _, fd, name = heapq.heappop(self._due)
            known = self._connections.get(fd)
            if known is None or known.name != name:
                continue  # it has ended
            if (silent_s := _silent_s(fd)) >= self.silence_s:
                _shut_down(fd, self.silence_s)
            heapq.heappush(self._due, (now + max(self.look_s, self.silence_s - silent_s), fd, name))

    def _look_for_ends(self) -> Iterator[_Connection]:
        """Connections whose descriptor none has any more, or another one has now.

        One that began in the turn in which a packet has come may be the packet's own, or one after it: then what comes
        next over it tells.
        """
        changed = set()
        for event, fd in monitored(self._monitor):
            changed.add(fd)
            if event == zmq.EVENT_ACCEPTED:
                self._open[fd] = self._turn
            else:
                self._open.pop(fd, None)
        for fd in changed & self._connections.keys():
            if self._open.get(fd, self._turn + 1) > self._connections[fd].seen:
                yield self._connections.pop(fd)

    def send(self, identity: bytes, packet: bytes) -> None:
        """Send to one agent; silently nothing when it is not connected (ROUTER drops)."""
        _send(self.socket, identity, _SNDMORE)
        _send(self.socket, packet)

    def farewell(self, to: Iterable[bytes], within_s: float, on_packet: Callable[[bytes, bytes], None]) -> None:
        """Last words are sent: handle what still comes until all of ``to`` have left, ``within_s`` seconds at most."""
        left, end = set(to), time.monotonic() + within_s
        while left and (rest := end - time.monotonic()) > 0:
            self.wait(min(0.2, rest), on_packet, left.discard)

    def close(self) -> None:
        """Give queued packets a second to leave, then close.

        What has left may still be lost: a spoke that finds its connection gone drops the packets it has not read yet
        (libzmq, session_base_t::reconnect of a ZMQ_IMMEDIATE socket). After last words comes `farewell`.
        """
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=1000)
        self._auth.stop()
        self._context.term()


class Spoke:
    """An agent's end (or a tool's): one DEALER socket to the coordinator. One thread uses it.

    Args:
        endpoint: HOST:PORT.
        context: shared with other ends, where one process has many; it stays when this one is closed.
    """

    def __init__(
        self,
        endpoint: str,
        identity: str,
        secret: bytes,
        lease_s: float,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self._own_context = context is None
        self._context = _unlimited(context or zmq.Context())
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, identity.encode())
        server_public, _ = _keypair(secret, "server")
        public, private = _keypair(secret, "client")
        self.socket.curve_serverkey = server_public
        self.socket.curve_publickey = public
        self.socket.curve_secretkey = private
        # A frozen coordinator costs nothing as long as nothing else fails. (HEARTBEAT_TTL would not do in the place of
        # what the hub does: any later packet takes it back, so that who freezes right after one is never missed.)
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, max(50, int(_BEAT * lease_s * 1000)))
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(200, int(1.5 * lease_s * 1000)))
        _given_up(self.socket, lease_s)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing waits for a connection: the other end may have a new state
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self.monitor = self.socket.get_monitor_socket(_UP | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
        self.connected = False
        self.ended = 0  # how often a connection has, that was up
        self._address = f"tcp://{endpoint}"
        self._given_up: float | None = None  # since when nobody tries to connect, as far as is known
        self.socket.connect(self._address)

    def changed(self) -> bool:
        """Look at the ``monitor`` socket: True when the connection has come up or gone since the last look."""
        news = False
        for event, _ in monitored(self.monitor):
            self._given_up = time.monotonic() if event == zmq.EVENT_DISCONNECTED else None
            if event == zmq.EVENT_CONNECT_RETRIED:
                continue
            news = True
            up = event == _UP
            self.ended += self.connected and not up
            self.connected = up
        return news

    def look(self) -> None:
        """Call often: connect again after nonsense, after which ZeroMQ does not (session_base_t::engine_error).

        Whoever has the coordinator's port while that is away may talk it: it is no reason to stay away for ever.
        """
        if self._given_up is not None and time.monotonic() - self._given_up > _AGAIN_S:
            self._given_up = None
            self.socket.disconnect(self._address)
            self.socket.connect(self._address)

    def send(self, packet: bytes, timeout_s: float = 10.0) -> bool:
        """Send one packet once the connection is up; False when it did not come up in time."""
        if not self.socket.poll(int(timeout_s * 1000), zmq.POLLOUT):
            return False
        return self.post(packet)

    def post(self, packet: bytes) -> bool:
        """Send one packet if the connection is up, else drop it: what counts is told again when it comes up.

        False when it was not up. (There is no other reason: see `_unlimited`.)
        """
        for _ in range(2):
            try:
                self.socket.send(packet, zmq.NOBLOCK)
                return True
            except zmq.Again:
                # Sending looks for news of connections once a millisecond only: one that has just come up, as the
                # monitor says, may not be known yet. Asking for the events always looks.
                self.socket.getsockopt(zmq.EVENTS)
        return False

    def receive(self, timeout_s: float = 0.0) -> bytes | None:
        """One packet, or None when none came within ``timeout_s`` seconds."""
        if timeout_s > 0:
            self.socket.poll(int(timeout_s * 1000))
        try:
            return self.socket.recv_multipart(zmq.NOBLOCK)[0]
        except zmq.Again:
            return None

    def close(self, linger_ms: int = 1000) -> None:
        """Give queued packets a second to leave, then close."""
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=linger_ms)
        if self._own_context:
            self._context.term()
