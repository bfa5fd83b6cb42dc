"""When to copy: opens a generation, spends a share of the copying at each tick, and closes before the first mutation.

open(epoch, g, small)   start of iteration g: small state captured, slot opened
tick() tick() tick()    between microbatches: some slices each, so that all is copied in the first half of the ticks
gate()                  before optimizer.step: the rest; nothing may change the tensors before it returns (on a
                        device: before the caller's stream gets past it)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from deadpool_megatron.vault import NotHeld, SlotWriter, VaultError, Version

from .engine import CopyEngine
from .plan import ShardPlan

__all__ = ["Pacing", "SnapshotStats", "Snapshotter"]


@dataclass(slots=True)
class Pacing:
    """How the copying of a shard is spread over the ticks of an iteration.

    Attributes:
        share: the part of an iteration's ticks in which all should be copied: early, since a failure before the commit
            costs an iteration more, and since the optimizer step must not wait.
        expected_ticks: ticks of an iteration; learned from the iteration before, 0 when not known yet.
        least: bytes copied at a tick at least, if that many are left: spreading less gains nothing and commits later.
    """

    share: float = 0.5
    expected_ticks: int = 0
    least: int = 4 << 20

    def budget(self, remaining: int, tick: int) -> int:
        """Bytes to copy at tick ``tick`` (from 0) when ``remaining`` are left; everything while ticks are unknown."""
        left = int(self.expected_ticks * self.share) - tick
        return remaining if left <= 1 else max(min(self.least, remaining), -(-remaining // left))


@dataclass(slots=True)
class SnapshotStats:
    """One iteration's account. Times are seconds of the training thread.

    ``tick_s`` is spent in ticks, ``stall_s`` in the gate, ``open_s`` in opening; ``skipped`` counts all generations
    skipped so far because no slot was free.
    """

    generation: int = -1
    copied_bytes: int = 0
    ticks: int = 0
    open_s: float = 0.0
    tick_s: float = 0.0
    stall_s: float = 0.0
    skipped: int = 0


class Snapshotter:
    """Takes one coordinate's generations and gives them back. Used by the training thread only.

    Args:
        plan: what to copy. Its size must be that of the arena.
        writer: the own arena.
        engine: how to copy.
        clock: for tests.
    """

    def __init__(
        self,
        plan: ShardPlan,
        writer: SlotWriter,
        engine: CopyEngine,
        pacing: Pacing | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if plan.nbytes != writer.unique_bytes:
            raise VaultError(
                f"the shard has {plan.nbytes} bytes but its arena {writer.unique_bytes}: ask for a new arena"
            )
        self._plan = plan
        self._writer = writer
        self._engine = engine
        self._pacing = pacing or Pacing()
        self._clock = clock
        self._ends = [segment.end for segment in plan.segments]
        self._next = self._last = len(self._ends)  # segments still to be copied: [next, last)
        self._open = False
        self._stats = SnapshotStats()
        engine.bind(plan, writer)

    @property
    def stats(self) -> SnapshotStats:
        """Of the iteration that was opened last; the next `open` begins a new record."""
        return self._stats

    @property
    def is_open(self) -> bool:
        """A generation is being taken."""
        return self._open

    def open(self, epoch: int, generation: int, small: bytes) -> bool:
        """Begin generation ``generation``; False when it is skipped (no slot is free), which costs nothing.

        A generation that was not gated is given up. Raises StaleEpoch, VaultError (small state too large).
        """
        start = self._clock()
        if self._open:
            self.give_up()
        self._engine.settle()
        slot = self._writer.open(epoch, generation, small)
        stats = SnapshotStats(generation, skipped=self._writer.skipped)
        if slot is not None:
            self._engine.begin(slot)
            self._open = True
            self._next = 0
            stats.copied_bytes = len(small)
            if not self._last:
                self._engine.finish()
        stats.open_s = self._clock() - start
        self._stats = stats
        return slot is not None

    def tick(self) -> None:
        """Copy the next slices, if any. Between two microbatches; the tensors hold still."""
        stats = self._stats
        stats.ticks += 1
        if self._next == self._last:
            return
        start = self._clock()
        done = self._ends[self._next - 1] if self._next else 0
        self._copy(done + self._pacing.budget(self._plan.nbytes - done, stats.ticks - 1))
        stats.tick_s += self._clock() - start

    def gate(self) -> None:
        """Copy the rest. After it the tensors may change. Without effect when no generation is open."""
        stats = self._stats
        if not self._open:
            return
        start = self._clock()
        if self._next < self._last:
            self._copy(self._plan.nbytes)
        self._engine.gate()
        self._open = False
        self._pacing.expected_ticks = stats.ticks
        stats.stall_s += self._clock() - start

    def give_up(self) -> None:
        """Leave the open generation unfinished (an abort). Blocks until no copy is under way."""
        if self._open:
            self._open = False
            self._next = self._last
            self._engine.give_up()

    def restore(self, version: Version) -> bytes:
        """Bring the tensors back to ``version`` from the own vault, verified; returns its small state.

        Blocks for the copy. Raises NotHeld, ChecksumMismatch; the tensors are untouched then.
        """
        self.give_up()
        self._engine.settle()
        small, _ = self._writer.read(version)
        slot = self._writer.arena.find(Version(*version))
        if slot is None:
            raise NotHeld(f"{tuple(version)} was overwritten while it was restored")
        self._engine.restore(slot)
        return small

    def close(self) -> None:
        """Give up what is open and let go of the arena's memory; the writer may be closed afterwards."""
        self.give_up()
        self._engine.close()

    def _copy(self, until: int) -> None:
        """Copy whole segments until byte ``until`` of the shard is reached; one segment at least."""
        first = self._next
        last = first + 1
        while last < self._last and self._ends[last - 1] < until:
            last += 1
        self._engine.copy(first, last)
        before = self._ends[first - 1] if first else 0
        self._stats.copied_bytes += self._ends[last - 1] - before
        self._next = last
        if last == self._last:
            self._engine.finish()  # at once, not at the gate: the commit begins when the last byte is there
