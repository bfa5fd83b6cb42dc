"""How bytes get from tensors into the open slot of the vault, and back."""

from __future__ import annotations

from typing import Protocol

import torch

from deadpool_megatron.vault import Slot, SlotWriter

from .plan import Segment, ShardPlan

__all__ = ["CopyEngine", "HostCopyEngine", "slot_views"]


class CopyEngine(Protocol):
    """Copies a plan's segments into the slot that the writer has opened, and publishes them there.

    One thread calls. Between `begin` and the end of `gate` the tensors must change only after the gate.
    """

    def bind(self, plan: ShardPlan, writer: SlotWriter) -> None:
        """Make everything that is made once: views of both slots, registrations. May block and allocate."""

    def begin(self, slot: Slot) -> None:
        """The writer has just opened ``slot``. Work on an earlier slot that was not gated is given up first."""

    def copy(self, first: int, last: int) -> None:
        """Copy segments [first, last) and publish them when they are there. Asynchronous engines return at once."""

    def finish(self) -> None:
        """The last copy has been queued: complete the slot when it is there. Returns at once."""

    def gate(self) -> None:
        """After `finish`: whatever the caller's stream does from now on happens after the copies. Blocks no host."""

    def give_up(self) -> None:
        """Leave the slot unfinished. Blocks until no copy writes to it any more."""

    def settle(self) -> None:
        """Block until every finished slot is complete."""

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


class HostCopyEngine:
    """For tensors in host memory: copies are synchronous and published at once."""

    def __init__(self) -> None:
        self._plan: ShardPlan | None = None
        self._writer: SlotWriter | None = None
        self._pairs: list[list[tuple[torch.Tensor, torch.Tensor, int]]] = []
        self._current: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def bind(self, plan: ShardPlan, writer: SlotWriter) -> None:
        """See `CopyEngine.bind`."""
        self._plan, self._writer = plan, writer
        self._pairs = [
            [
                (place, segment.tensor, segment.end)
                for place, segment in zip(slot_views(plan, slot), plan.segments, strict=True)
            ]
            for slot in writer.arena.slots
        ]

    def begin(self, slot: Slot) -> None:
        """See `CopyEngine.begin`."""
        self._current = self._pairs[slot.index]

    def copy(self, first: int, last: int) -> None:
        """See `CopyEngine.copy`. Blocks for the copy."""
        if first >= last:
            return
        with torch.no_grad():
            for place, source, _ in self._current[first:last]:
                place.copy_(source)
        if self._writer is not None:
            self._writer.publish(self._current[last - 1][2])

    def finish(self) -> None:
        """See `CopyEngine.finish`."""
        if self._writer is not None:
            self._writer.complete()

    def gate(self) -> None:
        """Nothing is ever outstanding."""

    def give_up(self) -> None:
        """See `CopyEngine.give_up`."""
        if self._writer is not None:
            self._writer.abandon()

    def settle(self) -> None:
        """Nothing is ever outstanding."""

    def restore(self, slot: Slot) -> None:
        """See `CopyEngine.restore`."""
        with torch.no_grad():
            for place, target, _ in self._pairs[slot.index]:
                target.copy_(place)

    def close(self) -> None:
        """Let go of the views of the slots."""
        self._pairs.clear()
        self._current = []
