"""The worker's side of its own arena: write a shard between microbatches, read one back."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from .arena import Arena, Slot
from .discipline import choose
from .errors import NotHeld, StaleEpoch, VaultError
from .version import CONSTANT, EMPTY, Version, unpack


class SlotWriter:
    """Writes and reads the shards of one rank in the arena at ``path``.

    Used by one thread at a time. Nothing here waits, takes a lock, or allocates more than a few integers.

    Args:
        path: the arena, from the agent; or mapped already.
        doorbell: an eventfd the agent listens to, or None; written to after each step so that the agent sends what is
            there while the rest is still being written. Must be non-blocking.
    """

    def __init__(self, path: str | Arena, doorbell: int | None = None) -> None:
        self.arena = Arena.attach(path) if isinstance(path, str) else path
        self.skipped = 0
        self.slot: Slot | None = None  # that is being written
        self._doorbell = doorbell
        self._buffers = tuple(np.frombuffer(slot.unique, dtype=np.uint8) for slot in self.arena.slots)

    @property
    def unique_bytes(self) -> int:
        return self.arena.info.unique_bytes

    @property
    def buffer(self) -> npt.NDArray[np.uint8]:
        """The unique area of the open slot, uint8 [unique_bytes], valid until `complete` or the next `open`."""
        if self.slot is None:
            raise VaultError("no slot is open: call open() first")
        return self._buffers[self.slot.index]

    def open(self, epoch: int, generation: int, small: bytes) -> Slot | None:
        """Begin the shard of (epoch, generation) in a free slot and store its small state.

        A slot that was open is abandoned. Returns None, and counts ``skipped``, when neither slot may be overwritten
        (see `discipline`). Raises StaleEpoch when the job has gone on to a newer epoch.
        """
        self.slot = None
        arena = self.arena
        if epoch < arena.epoch:
            raise StaleEpoch(
                f"rank {arena.info.rank} would write in epoch {epoch} but the job is in epoch {arena.epoch}"
            )
        first, second = arena.slots
        word = Version(epoch, generation).pack()
        kept = arena.kept
        index = None
        if kept == EMPTY or word > kept:
            index = choose((first.pair, second.pair), word, kept, arena.floor)
        if index is None:
            self.skipped += 1
            return None
        slot = arena.slots[index]
        slot.reopen(word)
        slot.put_small(small)
        self.slot = slot
        return slot  # the agent is rung with the first bytes: waking it twice would cost training a switch

    @property
    def kept(self) -> Version | None:
        """The newest version the whole job has committed; None before the first."""
        return unpack(self.arena.kept)

    def publish(self, nbytes: int) -> None:
        """The first ``nbytes`` of the unique area are final; the agent may read them from now on."""
        slot = self.slot
        if slot is None or not slot.published <= nbytes <= len(slot.unique):
            raise VaultError(
                f"cannot publish {nbytes} bytes: no slot is open, or less than before, or more than it holds"
            )
        slot.published = nbytes
        self._ring()

    def complete(self) -> None:
        """All of the unique area is written; the version is whole. Closes the slot."""
        slot = self.slot
        if slot is None:
            raise VaultError("no slot is open: call open() first")
        slot.published = len(slot.unique)
        slot.seal()
        self.slot = None
        self._ring()

    def abandon(self) -> None:
        """Leave the open slot unfinished; it can never be given back."""
        self.slot = None

    def read(self, version: Version) -> tuple[bytes, memoryview]:
        """The small state (a copy) and the unique bytes (read-only, in place) of ``version``, verified.

        The view is valid until the slot is opened again. Raises NotHeld (also while the agent has not checksummed all
        of it yet) and ChecksumMismatch.
        """
        slot = self.arena.find(Version(*version))
        if slot is None:
            raise NotHeld(f"the own vault of rank {self.arena.info.rank} does not hold {tuple(version)} completely")
        slot.verify()
        if not slot.complete:
            raise NotHeld(f"{tuple(version)} of rank {self.arena.info.rank} was overwritten while it was read")
        return bytes(slot.small[: slot.small_bytes]), slot.unique.toreadonly()

    def close(self) -> None:
        """Unmap the arena. The buffers must not be used after that."""
        self.slot = None
        self._buffers = ()
        self.arena.close()

    def _ring(self) -> None:
        if self._doorbell is not None:
            try:
                os.eventfd_write(self._doorbell, 1)
            except BlockingIOError:
                return  # the count is full, so the agent has been rung anyway


class ConstantsWriter(SlotWriter):
    """The same for what never changes of the rank's state, such as frozen parameters: written once, sent once.

    Such constants are the shard of a holder of their own beside the rank (`constants_of`). Its arenas have one slot,
    and the version in it counts as kept for ever: it is never overwritten, and a keeper that lacks it is sent it first,
    by the rules that hold for every slot.
    """

    def begin(self, small: bytes = b"") -> Slot | None:
        """Open the slot; None when all is there already, checksummed. `publish` and `complete` follow."""
        if self.arena.find(CONSTANT) is not None:
            return None
        slot = self.slot = self.arena.slots[0]
        slot.reopen(CONSTANT.pack())
        slot.put_small(small)
        return slot
