"""Taking a committed version out of a vault, so that its slot is free again long before the disk has it."""

from __future__ import annotations

import mmap

import xxhash

from deadpool_megatron.vault import EMPTY, Arena, ChecksumMismatch, NotHeld, VaultError, Version

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
        chunk = arena.chunk_bytes
        if sums[0] != xxhash.xxh3_64_intdigest(small):
            raise ChecksumMismatch(f"the small state of rank {self.rank}, {tuple(version)}, has changed in memory")
        for index, at in enumerate(range(0, nbytes, chunk)):
            if sums[1 + index] != xxhash.xxh3_64_intdigest(self._view[at : min(nbytes, at + chunk)]):
                raise ChecksumMismatch(f"chunk {index} of rank {self.rank}, {tuple(version)}, has changed in memory")
        self.unique, self.small = self._view[:nbytes], small
