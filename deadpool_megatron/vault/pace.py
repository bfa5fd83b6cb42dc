"""How fast shards leave the node: as the user allows, and not beside training's own traffic. Accounts for it too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from .arena import Arena

_STEP_S: Final = 0.002  # how often a sender looks whether the links are quiet again
_PATIENCE_S: Final = 0.25  # links that are busy for longer are not waited for: the worker may be dead


class SendPace:
    """Shared by all senders of a node; every method from any thread.

    Args:
        limit: bytes a second that all senders together may reach; 0 for no limit.
        clock, sleep: for tests.
    """

    def __init__(
        self,
        limit: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limit = limit
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the limit allows the next byte
        self._sent: dict[int, tuple[int, float]] = {}

    @contextmanager
    def sending(self, arena: Arena, nbytes: int) -> Iterator[None]:
        """Around the sending of ``nbytes`` of the arena's shard. Waits first, a quarter of a second for busy links."""
        until = self._clock() + _PATIENCE_S
        while arena.links_busy and self._clock() < until:
            self._sleep(_STEP_S)
        if self._limit:
            with self._lock:
                start = max(self._free_at, self._clock())
                self._free_at = start + nbytes / self._limit
            self._sleep(max(0.0, start - self._clock()))
        begin = self._clock()
        yield
        with self._lock:
            so_far, seconds = self._sent.get(arena.info.rank, (0, 0.0))
            self._sent[arena.info.rank] = (so_far + nbytes, seconds + self._clock() - begin)

    def sent(self, rank: int) -> tuple[int, float]:
        """Bytes of a rank's shards sent since the start, to all who keep them, and the seconds that took."""
        with self._lock:
            return self._sent.get(rank, (0, 0.0))
