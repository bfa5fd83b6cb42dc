"""Ports and addresses of this machine."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable

import zmq

_LOOK_S = 0.05
_FIRST_S, _AGAIN_S = 2.0, 30.0


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


def address_towards(address: str) -> str:
    """The address of this machine that packets to ``address`` leave from; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])
