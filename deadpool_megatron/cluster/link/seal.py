"""Every control packet is sealed: who sent it, to whom, and when among the others, under a key of the job's secret.

ZeroMQ's CURVE proves membership and encrypts, connection by connection. The seal holds for the packet itself, so one
that was changed, cut, sent twice, kept from before, or meant for somebody else is refused wherever it turns up, and
counted. Pure: bytes in, bytes out.

    tag (16) | session (8) | number (8) | packet         tag = BLAKE2b, keyed, over direction, name and all the rest

A session is one end's life; its packets count upwards. An end takes each session of the other side once, and never
goes back to an older one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Final, Literal

_TAG: Final = 16
_HEAD: Final = _TAG + 16
_MOST_SESSIONS: Final = 1024  # remembered a name; a restart is a new one


class SealBroken(ValueError):
    """Bytes that no member of the job has just sent here. They are of no use."""


class Seal:
    """Seals what goes out and opens what comes in, for one end of the control links.

    Args:
        secret: the job's 32 bytes.
        end: which end this is; names are those of the agents' ends, on both.
    """

    def __init__(self, secret: bytes, end: Literal["coordinator", "agent"]) -> None:
        key = hmac.new(secret, b"deadpool control seal", hashlib.sha256).digest()
        self._keyed = hashlib.blake2b(key=key, digest_size=_TAG)  # copied for each packet: the key is taken in once
        self._out, self._in = (b"c", b"a") if end == "coordinator" else (b"a", b"c")
        self._session = os.urandom(8)
        self._sent = 0
        self._last: dict[bytes, tuple[bytes, int]] = {}
        self._past: dict[bytes, list[bytes]] = {}
        self.refused = 0

    def close(self, name: bytes, packet: bytes) -> bytes:
        """Seal a packet from or to the agent ``name``."""
        self._sent += 1
        head = self._session + self._sent.to_bytes(8, "big")
        return self._tag(self._out, name, head, packet) + head + packet

    def open(self, name: bytes, sealed: bytes) -> bytes:
        """The packet inside. Raises SealBroken, counts it, and remembers nothing of what is refused."""
        try:
            return self._opened(name, sealed)
        except SealBroken:
            self.refused += 1
            raise

    def _opened(self, name: bytes, sealed: bytes) -> bytes:
        head, packet = sealed[_TAG:_HEAD], sealed[_HEAD:]
        if len(sealed) < _HEAD or not hmac.compare_digest(sealed[:_TAG], self._tag(self._in, name, head, packet)):
            raise SealBroken(f"a packet of {len(sealed)} bytes was changed, or is not from a member of this job")
        session, number = head[:8], int.from_bytes(head[8:], "big")
        last = self._last.get(name)
        if last is not None and last[0] == session:
            if number <= last[1]:
                raise SealBroken(f"packet {number} came again")
        elif session in self._past.get(name, ()):
            raise SealBroken("a packet of an older life of its sender")
        elif last is not None:
            past = self._past.setdefault(name, [])
            past.append(last[0])
            del past[:-_MOST_SESSIONS]
        self._last[name] = (session, number)
        return packet

    def _tag(self, direction: bytes, name: bytes, head: bytes, packet: bytes) -> bytes:
        tag = self._keyed.copy()
        tag.update(b"".join((direction, len(name).to_bytes(2, "big"), name, head, packet)))
        return tag.digest()
