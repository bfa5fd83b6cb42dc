"""How bytes get from tensors into the open slot of the vault, and back.

    training thread  | begin | copy copy ... | finish | ...           | gate: waits for what is left
    copier thread    |       |  slices, publish, ...  | complete      |

The host's engine copies a little at once where it stands, since waking a thread would cost more; larger slices go to
the copier thread, which runs while training waits for a peer. Copying releases the GIL. The copier has the priority of
training: a lesser one would be put aside while it holds the GIL.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from deadpool_megatron.vault import Slot, SlotWriter

from .plan import Segment, ShardPlan

COPIER: Final = "deadpool-copier"  # the thread that copies in the background
_INLINE: Final = 1 << 20  # bytes that are copied sooner than a thread is woken


class CopyError(RuntimeError):
    """Copying a shard into the vault failed in the background; the generation is not complete."""


class PinError(Exception):
    """The vault's memory cannot be page-locked. No RuntimeError: no peer has caused it, and it ends this worker."""


@dataclass(slots=True)
class CopyTotals:
    """What an engine has done since it was made. Written by its background thread, read by anybody.

    ``busy_s`` is the time something was under way, ``complete_at`` the clock when the last slot was complete,
    ``device_stall_s`` what a device's stream waited at the last gate (0 for the host's).
    """

    landed_bytes: int = 0
    busy_s: float = 0.0
    complete_at: float = 0.0
    device_stall_s: float = 0.0


class CopyEngine(Protocol):
    """Copies a plan's segments into the slot that the writer has opened, and publishes them there.

    One thread calls. Between `begin` and the end of `gate` the tensors must change only after the gate.
    """

    totals: CopyTotals

    def bind(self, plan: ShardPlan, writer: SlotWriter) -> None:
        """Make everything that is made once: views of both slots, registrations. May block and allocate. What a device
        needs longer for may go on beside; then `begin` and `restore` wait for it, and raise PinError."""

    def begin(self, slot: Slot) -> None:
        """The writer has just opened ``slot``. Work on an earlier slot that was not gated is given up first."""

    def copy(self, first: int, last: int) -> None:
        """Copy segments [first, last) and publish them when they are there. Returns at once."""

    def finish(self) -> None:
        """The last copy has been asked for: complete the slot when it is there. Returns at once."""

    def gate(self) -> None:
        """After `finish`: whatever the caller's stream does from now on happens after the copies.

        An engine for a device blocks no host; the host's waits until its copies have landed.
        """

    def give_up(self) -> None:
        """Leave the slot unfinished. Blocks until no copy writes to it any more."""

    def settle(self) -> None:
        """Block until every finished slot is complete. Raises CopyError for what the background thread met."""

    def restore(self, slot: Slot) -> None:
        """Copy a whole shard from ``slot`` into the tensors. Blocks until it is done."""

    def close(self) -> None:
        """Undo `bind`; the writer may be closed afterwards."""


def slot_views(plan: ShardPlan, slot: Slot) -> list[torch.Tensor]:
    """For each segment, its place in the slot: same dtype and shape as the segment's tensor, in shared memory."""
    if plan.nbytes == 0:
        return []
    flat = torch.frombuffer(slot.unique, dtype=torch.uint8)
    return [_place(flat, segment) for segment in plan.segments]


def _place(flat: torch.Tensor, segment: Segment) -> torch.Tensor:
    place = flat[segment.offset : segment.end]
    if segment.tensor.dtype == torch.uint8 and segment.tensor.dim() == 1:
        return place
    return place.view(segment.tensor.dtype).view(segment.tensor.shape)


@dataclass(frozen=True, slots=True)
class _Slice:
    """Segments [first, last) of the slot opened in ``turn``; the last one of a shard completes it."""

    turn: int
    index: int
    first: int
    last: int
    completes: bool


class HostCopyEngine:
    """For tensors in host memory. `totals.busy_s` is time of copying, on either thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.totals = CopyTotals()
        self._clock = clock
        self._writer: SlotWriter | None = None
        self._sources: list[torch.Tensor] = []
        self._places: list[list[torch.Tensor]] = []
        self._ends: list[int] = []
        self._queue: queue.SimpleQueue[_Slice | threading.Event | None] = queue.SimpleQueue()
        self._queued = 0  # slices given to the copier; written by the training thread
        self._done = 0  # slices it is through with; written by the copier thread
        self._index = 0
        self._turn = -1  # of the slot being copied; slices of an older turn are void
        self._rest: tuple[int, int] = (0, 0)  # the last segments: `finish` follows, and both go at once
        self._drained = threading.Event()
        self._failure: BaseException | None = None  # from then on nothing is copied or published, until `settle` tells
        self._thread: threading.Thread | None = None

    def bind(self, plan: ShardPlan, writer: SlotWriter) -> None:
        """See `CopyEngine.bind`. Starts the copier thread."""
        self._writer = writer
        self._sources = [segment.tensor for segment in plan.segments]
        self._ends = [segment.end for segment in plan.segments]
        self._places = [slot_views(plan, slot) for slot in writer.arena.slots]
        self._thread = threading.Thread(target=self._run, name=COPIER, daemon=True)
        self._thread.start()

    def begin(self, slot: Slot) -> None:
        self._index, self._turn, self._rest = slot.index, slot.turn, (0, 0)

    def copy(self, first: int, last: int) -> None:
        """See `CopyEngine.copy`. Less than a MiB is there when this returns, if nothing is under way."""
        if last == len(self._sources):
            self._rest = (first, last)
        elif first < last:
            self._hand(_Slice(self._turn, self._index, first, last, False))

    def finish(self) -> None:
        self._hand(_Slice(self._turn, self._index, *self._rest, True))
        self._rest = (0, 0)

    def gate(self) -> None:
        """See `CopyEngine.gate`. Waits for the copier thread."""
        self._drain()

    def give_up(self) -> None:
        self._turn = -1
        self._drain()
        if self._writer is not None:
            self._writer.abandon()

    def settle(self) -> None:
        self._drain()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise CopyError(f"copying a shard into the vault failed: {failure}") from failure

    def restore(self, slot: Slot) -> None:
        if self._sources:
            with torch.no_grad():
                torch._foreach_copy_(self._sources, self._places[slot.index])

    def close(self) -> None:
        """End the copier thread and let go of the views of the slots."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._places.clear()
        self._sources = []

    def _hand(self, work: _Slice) -> None:
        before = self._ends[work.first - 1] if work.first else 0
        small = work.first == work.last or self._ends[work.last - 1] - before < _INLINE
        if small and self._queued == self._done:
            self._do(work)
        else:
            self._queued += 1
            self._queue.put(work)

    def _drain(self) -> None:
        if self._queued != self._done and self._thread is not None and self._thread.is_alive():
            self._drained.clear()
            self._queue.put(self._drained)
            self._drained.wait()

    def _do(self, work: _Slice) -> None:
        writer, start = self._writer, self._clock()
        if writer is None or work.turn != self._turn or self._failure is not None:
            return
        before = self._ends[work.first - 1] if work.first else 0
        if work.first < work.last:
            with torch.no_grad():
                torch._foreach_copy_(
                    self._places[work.index][work.first : work.last], self._sources[work.first : work.last]
                )
            if work.turn != self._turn:
                return
        totals, now = self.totals, self._clock()
        if work.first < work.last:
            totals.landed_bytes += self._ends[work.last - 1] - before
            totals.busy_s += now - start
        if work.completes:
            writer.complete()
            totals.complete_at = now
        else:
            writer.publish(self._ends[work.last - 1])

    # ---- the copier thread

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            if work is None:
                return
            if isinstance(work, threading.Event):
                work.set()
                continue
            try:
                self._do(work)
            except (RuntimeError, ValueError) as err:  # (VaultError is one) told to the training thread by `settle`
                self._failure = err
            self._done += 1
