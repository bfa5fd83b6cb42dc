"""How two agents talk about shards: proof of membership, then typed frames, with raw payload between them.

    server                                   client
      | -- magic, nonce_s (32) ------------->  |
      | <- nonce_c (32), HMAC(client, both) -- |      nothing is read or written before both proofs hold
      | -- HMAC(server, both) ------------->   |
      | <-- frame [payload] -----------------> |      frame = u32 length, msgpack of one of `frames`, tag (16)

Proofs are HMAC-SHA256 with the job's 32-byte secret over the role and both nonces. From them follows a key of the
connection, under which every frame has a tag over its direction, its number and its bytes: a frame that was changed,
left out, repeated or taken from elsewhere ends the connection. Frames are bounded, unknown tags, unknown fields and
values out of range are refused, and nothing is ever unpickled. Payload is covered by the checksums in the frames.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from .errors import (
    DeadlinePassed,
    GivenUp,
    Malformed,
    NotHeld,
    OwnFault,
    Refused,
    StaleEpoch,
    TransferFailed,
    VaultError,
)
from .frames import Frame, Refusal

_MAGIC: Final = b"DPVAULT3"
_NONCE: Final = 32
_TAG: Final = 16
MAX_FRAME: Final = 64 << 20  # the checksum table of a shard of 7 TB
_SEND: Final = 4 << 20
_LOOK: Final = 0.2  # seconds between two looks at whether we are to stop, while a connection is made


@dataclass(frozen=True, slots=True)
class Deadlines:
    """All of the transfers' times, in seconds.

    Attributes:
        connect: to reach the other agent and prove membership.
        idle: without a byte, while something is due, after which the other side counts as gone.
        backoff: first pause before a failed peer is tried again; doubles up to ``backoff_limit``.
        backoff_limit: longest pause between two tries.
        late: after an epoch has begun, in which something that was sent before it may still come.
    """

    connect: float = 5.0
    idle: float = 10.0
    backoff: float = 0.1
    backoff_limit: float = 2.0
    late: float = 10.0


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)
_length = struct.Struct("!I")


class Channel:
    """One proven connection. One thread reads, one writes; `shut` may come from any thread and wakes both.

    Args:
        key: of this connection, the same at both ends.
        server: which end this is.
    """

    def __init__(self, sock: socket.socket, deadlines: Deadlines, key: bytes, server: bool) -> None:
        self.sock = sock
        self.ended = False  # shut by this side
        self.idle = deadlines.idle
        self._key = key
        self._out, self._in = (b"s", b"c") if server else (b"c", b"s")
        self._sent = self._received = 0

    def _tag(self, direction: bytes, number: int, body: bytes | bytearray) -> bytes:
        head = direction + number.to_bytes(8, "big")
        return hashlib.blake2b(head + body, key=self._key, digest_size=_TAG).digest()

    def send(self, frame: Frame, *payload: memoryview) -> None:
        """Send a frame and its payload. Blocks; raises DeadlinePassed or TransferFailed."""
        body = _encoder.encode(frame)
        tag = self._tag(self._out, self._sent, body)
        self._sent += 1
        self.send_raw(memoryview(_length.pack(len(body)) + body + tag), socket.MSG_MORE if payload else 0)
        for view in payload:
            self.send_raw(view)

    def send_raw(self, view: memoryview, flags: int = 0) -> None:
        """Send payload that a frame has announced."""
        try:
            self.sock.settimeout(self.idle)
            # not sendall: its time-out is for everything, ours is for no progress
            while view:
                view = view[self.sock.send(view[:_SEND], flags) :]
        except TimeoutError:
            raise DeadlinePassed(f"the other agent took nothing for {self.idle:g} s") from None
        except OSError as err:
            raise TransferFailed(f"connection to the other agent lost: {err}") from None

    def receive(self, wait: bool = False) -> Frame:
        """The next frame. With ``wait`` it may take as long as the other side likes to begin one."""
        try:
            self.sock.settimeout(None if wait else self.idle)
            head = self.sock.recv(_length.size)
        except TimeoutError:
            raise DeadlinePassed(f"the other agent said nothing for {self.idle:g} s") from None
        except OSError as err:
            raise TransferFailed(f"connection to the other agent lost: {err}") from None
        if not head:
            raise TransferFailed("the other agent closed the connection")
        rest = bytearray(_length.size - len(head))
        self.fill(memoryview(rest))
        (length,) = _length.unpack(head + rest)
        if length > MAX_FRAME:
            raise Malformed(f"a frame of {length} bytes is larger than any of this protocol")
        body = bytearray(length)
        self.fill(memoryview(body))
        tag = bytearray(_TAG)
        self.fill(memoryview(tag))
        if not hmac.compare_digest(tag, self._tag(self._in, self._received, body)):
            raise Malformed(f"frame {self._received} was changed on its way, or is not the one that was due")
        self._received += 1
        try:
            frame: Frame = _decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as err:
            raise Malformed(f"malformed frame: {err}") from None
        return frame

    def fill(self, view: memoryview) -> None:
        """Receive exactly ``len(view)`` bytes of payload into ``view``."""
        try:
            self.sock.settimeout(self.idle)
            while view:
                got = self.sock.recv_into(view)
                if not got:
                    raise TransferFailed("the other agent closed the connection in the middle of a shard")
                view = view[got:]
        except TimeoutError:
            raise DeadlinePassed(f"the other agent sent nothing for {self.idle:g} s in the middle of a shard") from None
        except OSError as err:
            raise TransferFailed(f"connection to the other agent lost: {err}") from None

    def readable(self, seconds: float) -> bool:
        """Wait for something to read (or for the end of the connection) for a while, to the millisecond."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def shut(self) -> None:
        """Wake whoever reads or writes, with TransferFailed. Any thread."""
        self.ended = True
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # not connected any more

    def close(self) -> None:
        """Shut and give back the descriptor; by the thread that uses the channel."""
        self.shut()
        self.sock.close()


def raise_refusal(frame: Frame) -> None:
    """Raise what a Refusal says; any other frame passes."""
    if isinstance(frame, Refusal):
        if frame.code == "stale-epoch":
            raise StaleEpoch(frame.message)
        if frame.code == "given-up":
            raise GivenUp(frame.message)
        if frame.code == "not-held":
            raise NotHeld(frame.message)
        raise Refused(frame.message, frame.code)


def _tune(sock: socket.socket, deadlines: Deadlines) -> None:
    """A vanished peer is noticed in either role: the sender by TCP_USER_TIMEOUT, the receiver by keep-alives."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(deadlines.idle / 4)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(deadlines.idle / 4)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(deadlines.idle * 1000))


def _derived(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    """The proof of ``client`` or ``server``, or the key of the ``connection``."""
    return hmac.new(secret, b"deadpool vault " + role + nonces, hashlib.sha256).digest()


def check_secret(secret: bytes) -> bytes:
    """The secret itself if it is one. Raises VaultError."""
    if len(secret) != 32:
        raise VaultError(f"the job secret must be 32 bytes, not {len(secret)}")
    return secret


def _exactly(sock: socket.socket, count: int, end: float, stopped: Callable[[], bool] = lambda: False) -> bytes:
    """``count`` bytes of the proof; TimeoutError at ``end``, or soon after ``stopped``."""
    data = b""
    while len(data) < count:
        sock.settimeout(_LOOK)
        try:
            got = sock.recv(count - len(data))
        except TimeoutError:
            if stopped() or time.monotonic() > end:
                raise
            continue
        if not got:
            raise ConnectionResetError("closed before membership was proven")
        data += got
    return data


def accept(sock: socket.socket, secret: bytes, deadlines: Deadlines) -> Channel:
    """Server side of the proof. Raises Refused (not a member) or TransferFailed; the caller closes then."""
    try:
        _tune(sock, deadlines)
        end = time.monotonic() + deadlines.connect
        nonce = os.urandom(_NONCE)
        sock.settimeout(deadlines.connect)
        sock.sendall(_MAGIC + nonce)
        answer = _exactly(sock, _NONCE + 32, end)
        nonces = nonce + answer[:_NONCE]
        if not hmac.compare_digest(answer[_NONCE:], _derived(secret, b"client", nonces)):
            raise Refused("who connected does not know the job secret", "not-a-member")
        sock.sendall(_derived(secret, b"server", nonces))
    except OSError as err:
        raise TransferFailed(f"who connected did not prove membership: {err}") from None
    return Channel(sock, deadlines, _derived(secret, b"connection", nonces), True)


def connect(
    host: str, port: int, secret: bytes, deadlines: Deadlines, stopped: Callable[[], bool] = lambda: False
) -> Channel:
    """Reach an agent's vault and prove each other's membership.

    Looks at ``stopped`` five times a second. Raises DeadlinePassed, TransferFailed, OwnFault, or Refused (code
    "not-a-member").
    """
    end = time.monotonic() + deadlines.connect
    where = f"vault at {host}:{port}"
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    except OSError as err:  # no descriptor is left
        raise OwnFault(f"{where} cannot be reached: {err}") from None
    try:
        _tune(sock, deadlines)
        sock.setblocking(False)
        sock.connect_ex((host, port))
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while not poll.poll(int(_LOOK * 1000)):
            if stopped():
                raise TransferFailed(f"gave up connecting to the {where}: stopping")
            if time.monotonic() > end:
                raise DeadlinePassed(f"{where} cannot be reached within {deadlines.connect:g} s")
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise TransferFailed(f"{where} cannot be reached: {os.strerror(error)}")
        hello = _exactly(sock, len(_MAGIC) + _NONCE, end, stopped)
        if not hello.startswith(_MAGIC):
            raise TransferFailed(f"{where} is not a DeadPool vault of this version")
        mine = os.urandom(_NONCE)
        nonces = hello[len(_MAGIC) :] + mine
        sock.sendall(mine + _derived(secret, b"client", nonces))
        try:
            proof = _exactly(sock, 32, end, stopped)
        except ConnectionResetError:
            raise Refused(
                f"{where} does not accept our job secret: it belongs to another job", "not-a-member"
            ) from None
        if not hmac.compare_digest(proof, _derived(secret, b"server", nonces)):
            raise Refused(f"{where} does not know our job secret: it belongs to another job", "not-a-member")
    except TimeoutError:
        sock.close()
        raise DeadlinePassed(f"{where} did not prove its membership within {deadlines.connect:g} s") from None
    except OSError as err:
        sock.close()
        raise TransferFailed(f"{where} cannot be reached: {err}") from None
    except VaultError:
        sock.close()
        raise
    return Channel(sock, deadlines, _derived(secret, b"connection", nonces), False)
