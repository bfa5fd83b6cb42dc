"""Clients of the rendezvous store (torch's TCPStore): idle for days between two recoveries, then needed at once.

What lies between may forget an idle connection without a word (cloud firewalls do after ten minutes), and torch neither
keeps it alive nor limits how long an answer takes over it: TCPStore sets neither SO_KEEPALIVE nor SO_RCVTIMEO, so that
``check`` and ``compare_set`` never return, whatever time-out the client has. (Seen with torch 2.11.)
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

from torch.distributed import Store, TCPStore

_IDLE_S: Final = 60  # well below what firewalls forget
_PROBE_S: Final = 10
_GONE_S: Final = 60  # without an answer to anything
ANSWERS_S: Final = 2.0


class StoreClients:
    """One client of a server that may start again, or move: call it for the client of today.

    Any thread uses it.

    Args:
        place: where the server is now.
        timeout_s: of each operation that waits for others.
    """

    def __init__(self, place: Callable[[], tuple[str, int]], timeout_s: float) -> None:
        self._place = place
        self._timeout_s = timeout_s
        self._client: tuple[tuple[str, int], Store] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> Store:
        """The client; a new one when the server has been started again or has moved, or does not answer over this one.

        Raises RuntimeError: no server answers.
        """
        with self._lock:
            here = self._place()
            if self._client is None or self._client[0] != here or not answers(self._client[1]):
                self._client = None
                self._client = here, self._connect(*here)
            return self._client[1]

    def connect(self) -> Store:
        """Another client, for who waits: a blocked wait blocks all users of its client. Raises RuntimeError."""
        return self._connect(*self._place())

    def _connect(self, host: str, port: int) -> Store:
        return keep_alive(TCPStore(host, port, None, False, timeout=timedelta(seconds=self._timeout_s)))


def own_client(store: Any) -> Any:
    """Another connection to the same server. Takes a millisecond, or seconds: TCPStore looks up names for each new
    connection, and a lost packet to the name server costs its time-out (5 s seen)."""
    try:
        return keep_alive(store.clone())
    except (NotImplementedError, AttributeError, RuntimeError):
        return store  # stores without connections (HashStore) have no clone


def answers(store: Any, within_s: float = ANSWERS_S) -> bool:
    """The server answers over this connection. What asks in vain is left behind."""
    ended, answered = threading.Event(), []

    def ask() -> None:
        with suppress(RuntimeError):  # the connection is gone with the server
            answered.append(store.check(["deadpool/alive"]))
        ended.set()

    threading.Thread(target=ask, name="deadpool-store-answers", daemon=True).start()
    return ended.wait(within_s) and bool(answered)


def keep_alive(store: Any) -> Any:
    """Have the kernel keep this store's connection known to what lies between, and end it when nobody answers.

    torch does not tell which socket it is: every connection of this process to that port is treated so.
    """
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed since, or no connection
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as each:
                peer = each.getpeername()
                if each.family in (socket.AF_INET, socket.AF_INET6) and peer[1] == store.port:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _GONE_S)
    return store
