"""Who is the coordinator, and where: one leader a job, elected through the store.

::

    campaign: `leader` is not there?  compare-and-set, under a lease        -> revision = the term
    the coordinator of that term      every write guarded by `leader` at that revision
    it listens                        `coordinator` = where (guarded too)   -> agents that lost the last one find it
    lease over, or given back         `leader` goes                         -> others campaign, not all at once

Whoever holds the leadership starts the coordinator as a child and starts it again when a signal ends it, within one
term. Agents look at the store only while they have no coordinator, so in failure-free time a job of any size costs the
store one lease.
"""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable
from typing import Final

import msgspec

from deadpool_megatron.cluster.store import Guard, Lease, Store, StoreError

LEADER: Final = "leader"
PLACE: Final = "coordinator"
STATE: Final = "core/"
_SPREAD_S: Final = 0.001  # a node: candidates do not all ask at once
_MOST_SPREAD_S: Final = 2.0


class Place(msgspec.Struct, frozen=True):
    """Where the coordinator of a term listens, and the rendezvous store of the process groups beside it."""

    host: str
    port: int
    store_port: int
    term: int
    job_id: str


def known_place(store: Store) -> Place | None:
    """Where the coordinator was when one last said so. Raises StoreError."""
    entry = store.get(PLACE)
    return _place(entry.value) if entry is not None else None


def _place(value: bytes) -> Place | None:
    try:
        return msgspec.msgpack.decode(value, type=Place)
    except msgspec.MsgspecError:
        return None


class Leadership:
    """One candidate. ``ttl_s``: seconds after which a leader that has fallen silent is deposed."""

    def __init__(self, store: Store, ttl_s: float) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._lease: Lease | None = None
        self._name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}".encode()
        self.guard: Guard | None = None

    @property
    def lost(self) -> bool:
        """The leadership this candidate had may be somebody else's now."""
        return self._lease is not None and self._lease.lost.is_set()

    def take(self) -> Guard | None:
        """Become the leader if there is none. Raises StoreError."""
        self.resign()
        lease, revision = self._store.lease(self._ttl_s), 0
        try:
            revision = self._store.compare_and_set(LEADER, 0, self._name + os.urandom(4).hex().encode(), lease)
        finally:
            if not revision:
                lease.close()
        if revision:
            self._lease, self.guard = lease, Guard(LEADER, revision)
        return self.guard

    def campaign(self, candidates: int, given_up: Callable[[], bool]) -> Guard | None:
        """Wait until there is no leader, then try to become it; None once ``given_up``, or somebody else has won.

        Blocks. ``candidates``: how many may be trying; the more, the longer each waits at random before it asks.
        """
        watch = self._store.watch(LEADER)
        wait = 0.2
        try:
            seen = False
            while not given_up():
                try:
                    entry = watch.next(wait)
                except TimeoutError:
                    if not seen:
                        continue
                else:
                    seen = entry is None
                    wait = random.uniform(0.0, min(_MOST_SPREAD_S, candidates * _SPREAD_S)) if seen else 0.2
                    continue
                try:
                    if guard := self.take():
                        return guard
                except StoreError:
                    pass  # it does not answer: later
                wait = 0.5
        finally:
            watch.close()
        return None

    def resign(self) -> None:
        """Give it back."""
        if self._lease is not None:
            self._lease.close()
        self._lease = self.guard = None


class Follower:
    """Looks for the coordinator's new place in the background, once asked to; for one that is gone.

    ``fd`` becomes readable when `found` has something.
    """

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self._open_store = open_store
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._found: Place | None = None
        self._stop: threading.Event | None = None

    def look(self, known: tuple[str, int]) -> None:
        """The coordinator at this address and port is gone: look for another one."""
        if self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=(known, self._stop), name="deadpool-follower", daemon=True).start()

    def found(self) -> Place | None:
        """The newest place that was found since, if any."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return None
        place, self._found = self._found, None
        return place

    def rest(self) -> None:
        """There is a connection again."""
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def _run(self, known: tuple[str, int], stop: threading.Event) -> None:
        store: Store | None = None
        while not stop.is_set():
            try:
                store = store or self._open_store()
                watch = store.watch(PLACE)
            except (StoreError, ValueError):
                stop.wait(1.0)
                continue
            while not stop.is_set():
                try:
                    entry = watch.next(0.5)
                except TimeoutError:
                    continue
                place = _place(entry.value) if entry is not None else None
                if place is not None and (place.host, place.port) != known and not stop.is_set():
                    known = (place.host, place.port)
                    self._found = place
                    os.eventfd_write(self.fd, 1)
            watch.close()
        if store is not None:
            store.close()
