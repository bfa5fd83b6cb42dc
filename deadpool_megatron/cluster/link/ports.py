"""Ports of this machine: waiting for one that is taken for a moment, and choosing some that stay free."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import time
from collections.abc import Callable

import zmq

_LOOK_S = 0.05
_FIRST_S, _AGAIN_S = 2.0, 30.0
_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
_LOWEST, _USUAL = 20_000, 32_768  # above what services are usually given, below Linux' range


def patience_s(again: bool) -> float:
    """How long to wait for a port, in seconds. ``again``: others know it already, so no other one will do."""
    return _AGAIN_S if again else _FIRST_S


def once_free[T](listen: Callable[[], T], patience_s: float) -> T:
    """What ``listen`` returns, called again for ``patience_s`` seconds while the port is in use.

    Any outgoing connection of this machine may hold a port of the range that the kernel takes theirs from, for as long
    as it lives. Raises what ``listen`` raises: OSError or zmq.ZMQError.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            return listen()
        except (OSError, zmq.ZMQError) as err:
            if err.errno != errno.EADDRINUSE or time.monotonic() >= end:
                raise
        time.sleep(_LOOK_S)


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
