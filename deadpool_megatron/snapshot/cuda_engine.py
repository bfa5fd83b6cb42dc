"""Copies from a CUDA device, on a side stream of their own, with no wait of the host.

    training thread  | begin: side waits for compute | copy: memcpyAsync, event | gate: compute waits for side
    side stream      |                               |  slices                  |
    publisher thread |                               |  event.synchronize() (no GIL) -> publish, complete

The gate is on the device: an event that the caller's stream waits for, before the first kernel that changes the state.
What that wait costs is measured on the device too, with a pair of timed events around it.

Written from the sources of torch and the CUDA runtime; tests/gpu runs it where there is a GPU.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

import torch

from deadpool_megatron.vault import Slot, SlotWriter, VaultError

from .engine import CopyError, CopyTotals, PinError, slot_views
from .plan import ShardPlan

_REGISTER_PORTABLE: Final = 1
# torch hands out 32 streams a priority, round and round. Communicators draw those of priority 0, or of the highest:
# on one of these a copy would wait for other ranks behind a collective. To a copy between device and host the priority
# itself makes no difference (CUDA's manual, cudaStreamCreateWithPriority).
_PRIORITY: Final = -1
_GATES: Final = 4  # gates whose device stall has not been read yet; read an iteration later, when they are long over


def _runtime() -> Any:
    return torch.cuda.cudart()


@dataclass(frozen=True, slots=True)
class _Landed:
    """What the publisher does once ``event`` has happened: publish ``end`` bytes, or complete the slot."""

    turn: int
    event: torch.cuda.Event
    end: int
    nbytes: int
    asked_at: float
    completes: bool


class CudaCopyEngine:
    """A `CopyEngine` for tensors on one CUDA device, and some on the host beside them.

    The arena is page-locked in place (cudaHostRegister), so that the copy engine of the device writes into the
    agent's shared memory directly and asynchronously. The memory is the agent's: it stays when this process dies.

    Args:
        device: the device of the tensors; None for the current one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.totals = CopyTotals()
        self._device = device or torch.device("cuda", torch.cuda.current_device())
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(priority=_PRIORITY)
        self._writer: SlotWriter | None = None
        self._sources: list[torch.Tensor] = []
        self._places: list[list[torch.Tensor]] = []
        self._ends: list[int] = []
        self._slot = 0
        self._turn = -1  # of the slot being copied; what the publisher finds of an older turn is void
        self._asked: tuple[int, int] = (0, 0)  # the last segments: `finish` follows, and one event serves both
        self._events: list[torch.cuda.Event] = []
        self._used = 0
        self._gates: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._gated = 0  # gates passed so far
        self._queue: queue.SimpleQueue[_Landed | threading.Event | None] = queue.SimpleQueue()
        self._last: torch.cuda.Event | None = None
        self._publisher: threading.Thread | None = None
        self._failure: BaseException | None = None  # from then on nothing is published, until `settle` tells
        self._registering: threading.Thread | None = None
        self._registered = 0  # address
        self._not_registered = ""

    def bind(self, plan: ShardPlan, writer: SlotWriter) -> None:
        """Make views and events, start the publisher, and begin to page-lock the arena.

        That takes seconds for a large one. A spare waits for its shard meanwhile, so it has a thread of its own; the
        first copy waits for it, and raises PinError.
        """
        self._writer = writer
        self._registering = threading.Thread(target=self._register, name="deadpool-register", daemon=True)
        self._registering.start()
        self._sources = [segment.tensor for segment in plan.segments]
        self._ends = [segment.end for segment in plan.segments]
        self._places = [slot_views(plan, slot) for slot in writer.arena.slots]
        # one event a copy call at most, and one for the end; made now, used again every generation
        self._events = [torch.cuda.Event(blocking=True) for _ in range(len(plan.segments) + 2)]
        self._gates = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_GATES)
        ]
        self._publisher = threading.Thread(target=self._publish, name="deadpool-publisher", daemon=True)
        self._publisher.start()

    def _register(self) -> None:
        assert self._writer is not None
        arena = self._writer.arena
        size = len(arena.view)
        torch.cuda.set_device(self._device)
        error = int(_runtime().cudaHostRegister(arena.address, size, _REGISTER_PORTABLE))
        if error:
            self._not_registered = (
                f"cannot page-lock the {size} bytes of {arena.path} (cudaHostRegister: {error}); "
                "raise the locked-memory limit (ulimit -l unlimited) on this node"
            )
        else:
            self._registered = arena.address

    def _until_registered(self) -> None:
        if self._registering is not None:
            self._registering.join()
            self._registering = None
        if self._not_registered:
            raise PinError(self._not_registered)

    def begin(self, slot: Slot) -> None:
        """See `CopyEngine.begin`. The side stream waits (on the device) for the last update of the tensors."""
        self._until_registered()
        self._slot, self._turn = slot.index, slot.turn
        self._asked, self._used, self._last = (0, 0), 0, None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, first: int, last: int) -> None:
        """See `CopyEngine.copy`. One call for all segments; returns once they are queued."""
        if first >= last:
            return
        with torch.no_grad(), torch.cuda.stream(self._stream):
            torch._foreach_copy_(self._places[self._slot][first:last], self._sources[first:last], non_blocking=True)
        if last == len(self._sources):
            self._asked = (first, last)
        else:
            self._record(first, last, False)

    def finish(self) -> None:
        """See `CopyEngine.finish`. Returns at once; the publisher completes the slot when the last copy has landed."""
        self._last = self._record(*self._asked, True)

    def gate(self) -> None:
        """See `CopyEngine.gate`. The caller's stream waits for the copies, on the device."""
        if self._last is None:
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last.query():
            self.totals.device_stall_s = 0.0
            return  # all has landed already: there is nothing to wait for
        before, after = self._gates[self._gated % _GATES]
        if self._gated >= _GATES and after.query():
            self.totals.device_stall_s = before.elapsed_time(after) / 1000.0
        before.record(stream)
        stream.wait_event(self._last)
        after.record(stream)
        self._gated += 1

    def _record(self, first: int, last: int, completes: bool) -> torch.cuda.Event:
        event = self._events[self._used]
        self._used += 1
        event.record(self._stream)
        before = self._ends[first - 1] if first else 0
        end = self._ends[last - 1] if last else 0
        self._queue.put(_Landed(self._turn, event, end, end - before, time.perf_counter(), completes))
        return event

    def give_up(self) -> None:
        self._turn = -1
        self._stream.synchronize()
        self._drain()
        if self._writer is not None:
            self._writer.abandon()

    def settle(self) -> None:
        """See `CopyEngine.settle`.

        Waits on the host only where the host has run ahead of copies that the compute stream waits for already.
        """
        if self._writer is not None and self._writer.slot is not None:
            self._drain()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise CopyError(f"copying a shard to the vault failed: {failure}") from failure

    def _drain(self) -> None:
        if self._publisher is not None and self._publisher.is_alive():
            reached = threading.Event()
            self._queue.put(reached)
            reached.wait()

    def restore(self, slot: Slot) -> None:
        """See `CopyEngine.restore`. Whatever stream writes to the tensors still, it does so before."""
        self._until_registered()
        torch.cuda.synchronize(self._device)
        with torch.no_grad(), torch.cuda.stream(self._stream):
            if self._sources:
                torch._foreach_copy_(self._sources, self._places[slot.index], non_blocking=True)
        self._stream.synchronize()

    def close(self) -> None:
        """End the publisher and unlock the arena's pages."""
        if self._publisher is not None:
            self._queue.put(None)
            self._publisher.join()
            self._publisher = None
        if self._registering is not None:
            self._registering.join()
        self._stream.synchronize()
        self._places.clear()
        self._sources = []
        if self._registered:
            _runtime().cudaHostUnregister(self._registered)
            self._registered = 0

    # ---- the publisher thread

    def _publish(self) -> None:
        """`event.synchronize` releases the GIL, so training is not held up."""
        torch.cuda.set_device(self._device)  # a new thread's is the first one
        landed_at = 0.0
        while True:
            landed = self._queue.get()
            if landed is None:
                return
            if isinstance(landed, threading.Event):
                landed.set()
                continue
            try:
                landed.event.synchronize()
                now = time.perf_counter()
                self.totals.landed_bytes += landed.nbytes
                self.totals.busy_s += now - max(landed_at, landed.asked_at)
                landed_at = now
                writer = self._writer
                if writer is None or landed.turn != self._turn or writer.slot is None or self._failure is not None:
                    continue
                if landed.completes:
                    writer.complete()
                    self.totals.complete_at = now
                else:
                    writer.publish(landed.end)
            except (RuntimeError, VaultError) as err:  # told to the training thread, which raises it in `settle`
                self._failure = err
