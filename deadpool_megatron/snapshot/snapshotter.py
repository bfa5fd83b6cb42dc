"""When to copy: opens a generation, spends a share of the copying at each tick, and closes before the first mutation.

open(epoch, g, small)   start of iteration g: small state captured, slot opened, the first slices
tick() tick() tick()    between microbatches: further slices, as `Pacing` says
gate()                  before optimizer.step: the rest; nothing may change the tensors before it returns (on a
                        device: before the caller's stream gets past it)
"""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field

from deadpool_megatron import points
from deadpool_megatron.vault import NotHeld, SlotWriter, VaultError, Version

from .engine import CopyEngine
from .plan import ShardPlan

_NEW = 0.25  # weight of a new measurement in a running mean
_MARGIN = 1.25  # quiet ticks must be able to take this much more than what is left, or busy ones are used as well


@dataclass(slots=True)
class SnapshotStats:
    """One iteration's account. Times are seconds.

    ``open_s``, ``tick_s`` and ``gate_s`` are spent by the training thread, in opening, in ticks and at the gate. The
    gate's is the host's stall; ``device_stall_s`` is what a device's stream waited there. ``copied_s`` is from the
    opening until the shard was complete in the own slot (0 while it is not), ``bandwidth`` bytes a second while copies
    were under way. ``skipped`` counts all generations skipped so far because no slot was free.
    """

    generation: int = -1
    copied_bytes: int = 0
    ticks: int = 0
    open_s: float = 0.0
    tick_s: float = 0.0
    gate_s: float = 0.0
    device_stall_s: float = 0.0
    copied_s: float = 0.0
    bandwidth: float = 0.0
    skipped: int = 0


@dataclass(slots=True)
class _Tick:
    """What is known of the n-th tick of an iteration."""

    gap_s: float
    busy: bool


@dataclass(slots=True)
class Pacing:
    """When to copy how much: the shortest time to commit that training does not feel.

    Pure: times and bytes in, bytes out. A generation is worth nothing until it is committed, so copying begins as soon
    as the generation opens and asks for all the bandwidth there is. What holds it back:

    * the backlog: what has been asked for and has not landed yet. A tick asks for no more than lands until the next
      tick does (by the bandwidth and the tick times of this run), so that small transfers of training itself, such as
      the loss on its way to the host, never wait behind more than one gap's worth of ours. The gaps of pipeline bubbles
      are the long ones, so they take the most;
    * busy links: while parameters are gathered or gradients reduced, the copies would share links with them. Such ticks
      are passed over as long as the quiet ticks still to come can take everything that is left;
    * a limit in bytes a second, if the user sets one;
    * the end: what is left when the gate comes is copied there, and counted as a stall.

    Decides at each tick. The first tick of an iteration (number 0) is the opening of the generation itself.

    Attributes:
        limit: bytes a second that copying may take at most; 0 for no limit.
        least: bytes asked for at a tick at least, if that many are left: less gains nothing and commits later.
        bandwidth: bytes a second that this run's copies reach; 0 while nothing has been measured.
        avoids: busy links can be avoided: quiet ticks make up most of an iteration.
    """

    limit: float = 0.0
    least: int = 4 << 20
    bandwidth: float = 0.0
    avoids: bool = False
    _known: list[_Tick] = field(default_factory=list)
    _opened: float = 0.0
    _last: float = 0.0
    _number: int = -1
    _asked: int = 0

    def begin(self, now: float) -> None:
        """A generation opens at ``now`` (seconds). `ask` for tick 0 follows."""
        self._opened = now
        self._number = -1
        self._asked = 0

    def ask(self, now: float, remaining: int, backlog: int, busy: bool) -> int:
        """Bytes to copy at this tick.

        Args:
            now: seconds.
            remaining: bytes not asked for yet.
            backlog: bytes asked for that have not landed.
            busy: training uses the links until the next tick.
        """
        self._learn(now, busy)
        if not remaining:
            return 0
        rate = self._rate()
        if not rate or self._number >= len(self._known):
            wanted = remaining if not rate else int(rate * self._usual_gap())  # nothing is known of this tick
        else:
            if busy and self._quiet_bytes() >= _MARGIN * (remaining + backlog):
                return 0
            wanted = int(rate * self._known[self._number].gap_s) - backlog
        wanted = max(wanted, self.least if not backlog else 0)
        if self.limit:
            until = now + (self._known[self._number].gap_s if self._number < len(self._known) else self._usual_gap())
            wanted = min(wanted, int(self.limit * (until - self._opened)) - self._asked)
        wanted = max(0, min(wanted, remaining))
        self._asked += wanted
        return wanted

    def close(self, now: float) -> None:
        """The gate: no tick comes after it in this iteration."""
        self._measure_gap(now)
        del self._known[self._number + 1 :]
        quiet = sum(tick.gap_s for tick in self._known if not tick.busy)
        self.avoids = 2 * quiet > sum(tick.gap_s for tick in self._known)

    def landed(self, nbytes: int, seconds: float) -> None:
        """``nbytes`` took ``seconds`` from the moment the engine could begin with them."""
        if seconds > 0 and nbytes:
            measured = nbytes / seconds
            self.bandwidth += (measured - self.bandwidth) * (_NEW if self.bandwidth else 1.0)

    def _learn(self, now: float, busy: bool) -> None:
        self._measure_gap(now)
        self._number += 1
        self._last = now
        if self._number < len(self._known):
            self._known[self._number].busy = busy

    def _measure_gap(self, now: float) -> None:
        """The tick before has lasted until ``now``."""
        if self._number < 0:
            return
        gap = now - self._last
        if self._number < len(self._known):
            tick = self._known[self._number]
            tick.gap_s += (gap - tick.gap_s) * _NEW
        else:
            self._known.append(_Tick(gap, False))

    def _rate(self) -> float:
        return min(self.bandwidth, self.limit) if self.limit else self.bandwidth

    def _usual_gap(self) -> float:
        gaps = [tick.gap_s for tick in self._known]
        return sum(gaps) / len(gaps) if gaps else 0.0

    def _quiet_bytes(self) -> float:
        """What the quiet ticks still to come can take."""
        return self._rate() * sum(tick.gap_s for tick in self._known[self._number + 1 :] if not tick.busy)


class Snapshotter:
    """Takes one coordinate's generations and gives them back. Used by the training thread only.

    Args:
        plan: what to copy. Its size must be that of the arena.
        writer: the own arena.
        engine: how to copy.
    """

    def __init__(self, plan: ShardPlan, writer: SlotWriter, engine: CopyEngine, pacing: Pacing | None = None) -> None:
        if plan.nbytes != writer.unique_bytes:
            raise VaultError(
                f"the shard has {plan.nbytes} bytes but its arena {writer.unique_bytes}: ask for a new arena"
            )
        self._plan = plan
        self._writer = writer
        self._engine = engine
        self._pacing = pacing or Pacing()
        self._ends = [segment.end for segment in plan.segments]
        self._next = self._last = len(self._ends)  # segments still to be asked for: [next, last)
        self._asked = 0  # bytes of this generation asked for
        self._open = False
        self._said_busy = False
        self._opened_at = 0.0
        self._landed_before = self._busy_before = 0.0
        self.stats = SnapshotStats()  # of the iteration that was opened last; the next `open` begins a new record
        engine.bind(plan, writer)

    def open(self, epoch: int, generation: int, small: bytes, busy: bool = False) -> bool:
        """Begin generation ``generation``; False when it is skipped (no slot is free), which costs nothing.

        ``busy`` is that of `tick`. A generation that was not gated is given up. Raises StaleEpoch, VaultError (small
        state too large), CopyError.
        """
        start = time.perf_counter()
        if self._open:
            self.give_up()
        self._engine.settle()
        self._note_bandwidth()
        slot = self._writer.open(epoch, generation, small)
        stats = self.stats = SnapshotStats(generation, skipped=self._writer.skipped)
        if slot is not None:
            points.reach("slot.opened")
            self._engine.begin(slot)
            self._open = True
            self._next = self._asked = 0
            self._opened_at = start
            totals = self._engine.totals
            self._landed_before, self._busy_before = totals.landed_bytes, totals.busy_s
            stats.copied_bytes = len(small)
            self._pacing.begin(start)
            if not self._last:
                self._engine.finish()
            else:
                self._ask(start, busy)
        stats.open_s = time.perf_counter() - start
        return slot is not None

    def tick(self, busy: bool = False) -> None:
        """Copy the next slices, if any. Between two microbatches; the tensors hold still.

        ``busy``: training will use the links that copies go over until the next tick.
        """
        stats = self.stats
        stats.ticks += 1
        start = time.perf_counter()
        self._say_busy(busy and self._pacing.avoids)
        if not self._open:
            return
        self._ask(start, busy)
        stats.tick_s += time.perf_counter() - start

    def gate(self) -> None:
        """Copy the rest. After it the tensors may change. Without effect when no generation is open."""
        stats = self.stats
        self._say_busy(False)
        if not self._open:
            return
        start = time.perf_counter()
        self._pacing.close(start)
        if self._next < self._last:
            self._copy(self._plan.nbytes)
        self._engine.gate()
        self._open = False
        stats.gate_s = time.perf_counter() - start

    def account(self) -> SnapshotStats:
        """`stats` with what is known of the copies by now."""
        stats, totals = self.stats, self._engine.totals
        if totals.complete_at > self._opened_at:
            stats.copied_s = totals.complete_at - self._opened_at
        busy = totals.busy_s - self._busy_before
        stats.bandwidth = (totals.landed_bytes - self._landed_before) / busy if busy > 0 else 0.0
        stats.device_stall_s = totals.device_stall_s
        return stats

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

    def _say_busy(self, busy: bool) -> None:
        """Tell the agent's senders, when it has changed."""
        if busy != self._said_busy:
            self._said_busy = self._writer.arena.links_busy = busy

    def _note_bandwidth(self) -> None:
        totals = self._engine.totals
        self._pacing.landed(int(totals.landed_bytes - self._landed_before), totals.busy_s - self._busy_before)
        self._landed_before, self._busy_before = totals.landed_bytes, totals.busy_s

    def _ask(self, now: float, busy: bool) -> None:
        if self._next == self._last:
            self._pacing.ask(now, 0, 0, busy)  # it learns how long the ticks are
            return
        remaining = self._plan.nbytes - (self._ends[self._next - 1] if self._next else 0)
        backlog = max(0, self._asked - int(self._engine.totals.landed_bytes - self._landed_before))
        wanted = self._pacing.ask(now, remaining, backlog, busy)
        if wanted:
            self._copy(self._plan.nbytes - remaining + wanted)

    def _copy(self, until: int) -> None:
        """Copy whole segments until byte ``until`` of the shard is reached; one segment at least."""
        first = self._next
        last = min(self._last, 1 + max(first, bisect_left(self._ends, until)))
        self._next = last
        points.reach("slice.before")
        self._engine.copy(first, last)
        points.reach("slice.after")
        before = self._ends[first - 1] if first else 0
        self._asked += self._ends[last - 1] - before
        self.stats.copied_bytes += self._ends[last - 1] - before
        if last == self._last:
            points.reach("local.complete")
            self._engine.finish()  # at once, not at the gate: the commit begins when the last byte is there
