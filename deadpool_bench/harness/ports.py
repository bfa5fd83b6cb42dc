"""Ports of this machine that stay free."""

from __future__ import annotations

import contextlib
import errno
import random
import socket

_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
_LOWEST, _USUAL = 20_000, 32_768  # above what services are usually given, below Linux' range


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now, nor on the one after each, and that no outgoing connection takes.

    (Where the kernel's range for those leaves room below it.) Raises OSError when there are not so many.
    """
    with open(_RANGE) as f:
        first_outgoing = int(f.read().split()[0])
    above = first_outgoing if first_outgoing > _LOWEST + 2 * count else _USUAL
    candidates = list(range(_LOWEST, above - 1, 2))
    random.SystemRandom().shuffle(candidates)
    found: list[int] = []
    while len(found) < count and candidates:
        port = candidates.pop()
        with contextlib.suppress(OSError):
            for each in (port, port + 1):
                socket.create_server(("127.0.0.1", each)).close()
            found.append(port)
    if len(found) == count:
        return found
    raise OSError(errno.EADDRINUSE, f"there are no {count} free ports from {_LOWEST} to {above}")
