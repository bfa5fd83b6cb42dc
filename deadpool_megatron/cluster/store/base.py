"""What the control plane keeps outside of its processes, behind one small interface: keys, leases, watches.

A key has a value (bytes) and a *revision*, a number that grows with every write to the store; 0 stands for "not there".
Nobody but the coordinator writes what is decided, and each of its writes carries a `Guard`: the store refuses it when
the key of its leadership is not the one it was given any more. So a coordinator that was deposed, and does not know it,
changes nothing.

All times are seconds of the monotonic clock; nothing here looks at the time of day.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple


class StoreError(OSError):
    """The store does not answer, or refuses us. The message is one line for the user."""


class StoreDamaged(StoreError):
    """What was written last cannot be read, and never will be."""


class Deposed(StoreError):
    """A guarded write came from a coordinator whose leadership is over."""


class Entry(NamedTuple):
    """A key's value and the revision of the write that gave it."""

    value: bytes
    revision: int


class Guard(NamedTuple):
    """Only while ``key`` stands at ``revision``."""

    key: str
    revision: int


class Lease(ABC):
    """Keys written under it go when its holder does. Kept alive in the background until `close`."""

    lost: threading.Event
    """Set once the lease has ended, or can be known to have ended at the store, without the holder's will."""

    @abstractmethod
    def close(self) -> None:
        """Give it back: its keys are removed. Errors are ignored; then they go when the lease runs out."""


class Watch:
    """What happens to one key, in order; the newest state is never missed, older ones may be.

    The first thing to come is the state at the beginning.
    """

    def __init__(self) -> None:
        self._news: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._last: int | None = None
        self.closed = threading.Event()

    def changed(self, entry: Entry | None) -> None:
        """The key has this value now; None: it is gone. May be told again and again."""
        revision = entry.revision if entry is not None else 0
        if revision != self._last:
            self._last = revision
            self._news.put(entry)

    def next(self, timeout_s: float) -> Entry | None:
        """The next state; None when the key is not there. Raises TimeoutError when nothing happens in time."""
        try:
            return self._news.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None

    def close(self) -> None:
        """No more news; what runs in the background ends soon."""
        self.closed.set()


class Store(ABC):
    """The interface. Every call blocks for ``timeout_s`` of its implementation at most, then raises StoreError.

    Any thread may call.
    """

    def __init__(self) -> None:
        self._leases: list[Lease] = []
        self._closed = threading.Event()

    @abstractmethod
    def get(self, key: str) -> Entry | None:
        """The key's entry, as of now (never of an older time); None: it is not there."""

    @abstractmethod
    def put(self, values: Mapping[str, bytes], lease: Lease | None = None, guard: Guard | None = None) -> int:
        """Write all of these, or none; they are durable when this returns. Returns their revision. Raises Deposed."""

    @abstractmethod
    def compare_and_set(self, key: str, revision: int, value: bytes, lease: Lease | None = None) -> int:
        """Write the key if it stands at ``revision`` (0: if it is not there). Returns the new revision, 0 if not.

        ``value`` must differ from every other writer's, so that a write whose answer was lost can be told.
        """

    @abstractmethod
    def delete(self, prefix: str, guard: Guard | None = None) -> None:
        """Remove every key that begins so. Raises Deposed."""

    def lease(self, ttl_s: float) -> Lease:
        """A new lease, which ends at most about ``ttl_s`` seconds after its holder."""
        lease = self._grant(ttl_s)
        self._leases.append(lease)
        return lease

    def watch(self, key: str) -> Watch:
        """Follow one key."""
        watch = Watch()
        threading.Thread(target=self._follow, args=(key, watch), name=f"watch-{key}", daemon=True).start()
        return watch

    def close(self) -> None:
        """End what runs in the background; leases that are still held are given back."""
        self._closed.set()
        for lease in self._leases:
            lease.close()

    @abstractmethod
    def _grant(self, ttl_s: float) -> Lease:
        """One lease more."""

    @abstractmethod
    def _follow(self, key: str, watch: Watch) -> None:
        """Tell ``watch`` the key's states until it, or the store, is closed."""
