"""Copies from a CUDA device, on a side stream, with no wait of the host.

    training thread  | begin: side waits for compute | copy: memcpyAsync, event | gate: compute waits for side
    side stream      |                               |  slices                  |
    publisher thread |                               |  event.synchronize() (no GIL) -> publish, complete

Written for a machine with a GPU; has not been run on one yet.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import Any

import torch

from deadpool_megatron.vault import Slot, SlotWriter

from .engine import slot_views
from .plan import ShardPlan

__all__ = ["CudaCopyEngine", "CudaCopyError"]

_REGISTER_PORTABLE = 1


def _runtime() -> Any:
    return torch.cuda.cudart()


class CudaCopyError(RuntimeError):
    """The CUDA runtime refused something the copy engine needs."""


@dataclass(frozen=True, slots=True)
class _Landed:
    """What the publisher does once ``event`` has happened: publish ``end`` bytes, or with None complete the slot."""

    turn: int
    event: torch.cuda.Event
    end: int | None


class CudaCopyEngine:
    """A `CopyEngine` for tensors on one CUDA device.

    The arena is page-locked in place (cudaHostRegister), so that the copy engine of the device writes into the
    agent's shared memory directly and asynchronously. The memory is the agent's: it stays when this process dies.

    Args:
        device: the device of the tensors; None for the current one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cuda", torch.cuda.current_device())
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(priority=0)  # 0 is CUDA's lowest
        self._writer: SlotWriter | None = None
        self._pairs: list[list[tuple[torch.Tensor, torch.Tensor, int]]] = []
        self._current: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._events: list[torch.cuda.Event] = []
        self._used = 0
        self._turn = 0  # of the slot being copied; what the publisher finds of an older turn is void
        self._queue: queue.SimpleQueue[_Landed | threading.Event | None] = queue.SimpleQueue()
        self._last: torch.cuda.Event | None = None
        self._publisher: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._registered = 0

    def bind(self, plan: ShardPlan, writer: SlotWriter) -> None:
        """Page-lock the arena, make the views of the slots and start the publisher. Raises CudaCopyError."""
        self._writer = writer
        address, size = writer.arena.address, len(writer.arena.view)
        with torch.cuda.device(self._device):
            error = _runtime().cudaHostRegister(address, size, _REGISTER_PORTABLE)
        if int(error) != 0:
            raise CudaCopyError(
                f"cannot page-lock the {size} bytes of {writer.arena.path} (cudaHostRegister: {error}); "
                "raise the locked-memory limit (ulimit -l unlimited) on this node"
            )
        self._registered = address
        self._pairs = [
            [
                (place, segment.tensor, segment.end)
                for place, segment in zip(slot_views(plan, slot), plan.segments, strict=True)
            ]
            for slot in writer.arena.slots
        ]
        # one event a copy call at most, and one for the gate; made now, used again every generation
        self._events = [torch.cuda.Event(blocking=True) for _ in range(len(plan.segments) + 1)]
        self._publisher = threading.Thread(target=self._publish, name="deadpool-publisher", daemon=True)
        self._publisher.start()

    def begin(self, slot: Slot) -> None:
        """See `CopyEngine.begin`. The side stream waits (on the device) for the last update of the tensors.

        Waits on the host for the generation before only if its copies have not landed yet, which the gate has made
        the compute stream wait for already.
        """
        self._raise_failure()
        self._current = self._pairs[slot.index]
        self._turn = slot.turn
        self._used = 0
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, first: int, last: int) -> None:
        """See `CopyEngine.copy`. Returns once the copies are queued."""
        if first >= last:
            return
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for place, source, _ in self._current[first:last]:
                place.copy_(source, non_blocking=True)
        self._landed(self._current[last - 1][2])

    def finish(self) -> None:
        """See `CopyEngine.finish`. Returns at once; the publisher completes the slot when the last copy has landed."""
        self._last = self._landed(None)

    def gate(self) -> None:
        """See `CopyEngine.gate`. The caller's stream waits for the copies, on the device."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)

    def _landed(self, end: int | None) -> torch.cuda.Event:
        event = self._events[self._used]
        self._used += 1
        event.record(self._stream)
        self._queue.put(_Landed(self._turn, event, end))
        return event

    def give_up(self) -> None:
        """See `CopyEngine.give_up`."""
        self._turn = -1
        self._stream.synchronize()
        self._drain()
        if self._writer is not None:
            self._writer.abandon()

    def settle(self) -> None:
        """See `CopyEngine.settle`. Raises what the publisher met."""
        self._drain()
        self._raise_failure()

    def _drain(self) -> None:
        if self._publisher is not None and self._publisher.is_alive():
            reached = threading.Event()
            self._queue.put(reached)
            reached.wait()

    def restore(self, slot: Slot) -> None:
        """See `CopyEngine.restore`."""
        with torch.no_grad(), torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            for place, target, _ in self._pairs[slot.index]:
                target.copy_(place, non_blocking=True)
        self._stream.synchronize()

    def close(self) -> None:
        """End the publisher and unlock the arena's pages."""
        if self._publisher is not None:
            self._queue.put(None)
            self._publisher.join()
            self._publisher = None
        self._stream.synchronize()
        self._pairs.clear()
        self._current = []
        if self._registered:
            _runtime().cudaHostUnregister(self._registered)
            self._registered = 0

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise CudaCopyError(f"copying a shard to the vault failed: {failure}") from failure

    def _publish(self) -> None:
        """The publisher thread. `event.synchronize` releases the GIL, so training is not held up."""
        while True:
            landed = self._queue.get()
            if landed is None:
                return
            if isinstance(landed, threading.Event):
                landed.set()
                continue
            try:
                landed.event.synchronize()
                writer = self._writer
                if writer is None or landed.turn != self._turn or writer.slot is None:
                    continue
                if landed.end is None:
                    writer.complete()
                else:
                    writer.publish(landed.end)
            except RuntimeError as err:  # CUDA and vault errors alike: told to the training thread, which ends the slot
                self._failure = err
