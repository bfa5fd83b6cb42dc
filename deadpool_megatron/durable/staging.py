"""Taking a committed version out of a vault, so that its slot is free again long before the disk has it."""

from __future__ import annotations

import mmap

import xxhash

from deadpool_megatron.vault import EMPTY, Arena, ChecksumMismatch, NotHeld, VaultError, Version

from .errors import DurableError

_COPY = 8 << 20


class Staging:
    """Memory for one coordinate's shard, made once and used for every drain.

    Args:
        rank: the coordinate.
        nbytes: room for unique state and small state together.
    """

    def __init__(self, rank: int, nbytes: int) -> None:
        self.rank = rank
        try:
            self._map = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        except (OSError, ValueError) as err:
            raise VaultError(f"no memory for the {nbytes} bytes that draining rank {rank} needs: {err}") from None
        self._view = memoryview(self._map)
        self.unique = self._view[:0]
        self.small = b""
        self._sums: list[int] = []
        self._chunk = 1

    @property
    def capacity(self) -> int:
        """Bytes there are."""
        return len(self._map)

    def take(self, path: str, version: Version) -> None:
        """Copy ``version`` out of the arena at ``path`` and compare the copy with the checksums of the capture.

        Raises NotHeld (the version is not there, or was overwritten while it was copied), ChecksumMismatch.
        """
        arena = Arena.attach(path)
        try:
            self.copy(arena, version)
        finally:
            arena.close()

    def copy(self, arena: Arena, version: Version) -> None:
        """As `take`, out of an arena of this process."""
        self.unique = self._view[:0]
        slot = arena.find(version)
        if slot is None:
            raise NotHeld(f"the vault does not hold version {tuple(version)} of rank {self.rank} any more")
        turn, nbytes = slot.turn, len(slot.unique)
        if nbytes > self.capacity:
            raise VaultError(f"the shard of rank {self.rank} has {nbytes} bytes, its staging {self.capacity}")
        small_bytes = slot.small_bytes
        small = bytes(slot.small[: 0 if small_bytes == EMPTY else small_bytes])
        sums = [int(word) for word in slot.sums]
        for at in range(0, nbytes, _COPY):
            self._view[at : min(nbytes, at + _COPY)] = slot.unique[at : min(nbytes, at + _COPY)]
        if slot.turn != turn or not slot.complete:
            raise NotHeld(f"version {tuple(version)} of rank {self.rank} was overwritten while it was copied")
        self._sums, self._chunk = sums, arena.chunk_bytes
        if changed := self._changed(self._view[:nbytes], small):
            raise ChecksumMismatch(f"{changed} of rank {self.rank}, {tuple(version)}, has changed in memory")
        self.unique, self.small = self._view[:nbytes], small

    def _changed(self, unique: memoryview, small: bytes) -> str:
        """What is not as it was captured; empty when all is."""
        if self._sums[0] != xxhash.xxh3_64_intdigest(small):
            return "the small state"
        for index, at in enumerate(range(0, len(unique), self._chunk)):
            if self._sums[1 + index] != xxhash.xxh3_64_intdigest(unique[at : at + self._chunk]):
                return f"chunk {index}"
        return ""

    def verify(self) -> None:
        """Whether the copy is still what was captured: a drain may hold it for long. Raises DurableError."""
        if changed := self._changed(self.unique, self.small):
            raise DurableError(f"{changed} of the copy of rank {self.rank} has changed while it was written")
