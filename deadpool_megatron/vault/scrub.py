"""Slow reading of everything a vault keeps, so that memory that went bad is known before it is needed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import xxhash

from .arena import Kind, Slot
from .vault import Vault
from .version import Version

_log = logging.getLogger(__name__)
_REST_S = 1.0  # between two passes, and when there is nothing to read
_STEP_S = 0.05  # of reading before a pause


class Scrubber:
    """Compares complete slots with their checksums, one after the other, for ever; a thread of its own.

    A slot that has changed in memory counts as not held from then on: no recovery reads it, and the copies elsewhere
    serve. A slot that is written anew meanwhile is left alone.

    Args:
        vault: what is read.
        bytes_per_second: how fast.
        on_damage: called with (rank or word, kind, version) for each slot found changed; must not block.
        clock, wait: the time, and what waits for so many seconds unless it is to end, and says whether it is.
    """

    def __init__(
        self,
        vault: Vault,
        bytes_per_second: int,
        on_damage: Callable[[int, Kind, Version], None],
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._vault = vault
        self._rate = bytes_per_second
        self._on_damage = on_damage
        self._stopping = threading.Event()
        self._clock, self._wait = clock, wait or self._stopping.wait
        self._due = clock()
        self.passes = 0
        self._thread = threading.Thread(target=self._run, name="vault-scrub", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End within some milliseconds."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._wait(_REST_S):
            self._due = self._clock()
            for arena in self._vault.arenas():
                for slot in arena.slots:
                    self._scrub(arena.info.rank, arena.info.kind, slot)
                    if self._stopping.is_set():
                        return
            self.passes += 1

    def _scrub(self, rank: int, kind: Kind, slot: Slot) -> None:
        turn, version = slot.turn, slot.version
        if version is None or not slot.complete:
            return
        for entry in range(1 + slot.chunks):
            data = slot.small[: slot.small_bytes] if entry == 0 else slot.chunk(entry - 1)
            intact = xxhash.xxh3_64_intdigest(data) == slot.sums[entry]
            if slot.turn != turn or not slot.complete:
                return  # written anew
            if not intact:
                slot.give_up(turn)
                _log.error(
                    "%s copy of %d, version %s: entry %d has changed in memory; it is not used any more",
                    kind, rank, tuple(version), entry,
                )  # fmt: skip
                self._on_damage(rank, kind, version)
                return
            self._pace(len(data))
            if self._stopping.is_set():
                return

    def _pace(self, nbytes: int) -> None:
        self._due += nbytes / self._rate
        ahead = self._due - self._clock()
        if ahead > _STEP_S:
            self._wait(ahead)
