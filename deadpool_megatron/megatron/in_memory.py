"""A generation of another number of replicas in the memory of the nodes that hold it: a `Source` for `OtherWidth`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.durable import Layout, Manifest, described
from deadpool_megatron.vault import Copies, Version, constants_of


class MemorySource:
    """As `durable.Source`, out of copies in vaults, of which only the chunks are sent that are wanted.

    Args:
        copies: where they are.
        generation: its number.
        coordinates: by rank.
    """

    manifest: Manifest | None = None

    def __init__(self, copies: Copies, generation: int, coordinates: Sequence[r.CoordinateInfo]) -> None:
        self._copies = copies
        self.generation, self.coordinates = generation, coordinates
        self.where = f"generation {generation} in memory"
        self._smalls: dict[int, tuple[bytes, Layout]] = {}

    def small(self, rank: int) -> bytes:
        """As `Source`; once a rank."""
        return self._described(rank)[0]

    def has_constants(self, rank: int) -> bool:
        """As `Source`."""
        return constants_of(rank) in self._copies.places

    def layout(self, holder: int) -> Layout:
        """As `Source`."""
        return self._described(holder)[1]

    def read(self, holder: int, ranges: Sequence[tuple[int, int]], take: Callable[[int, memoryview], None]) -> None:
        """As `Source`."""
        self._copies.read(holder, ranges, take)

    def not_fit(self, why: str) -> str:
        """As `Source`."""
        return f"{self.where} is not of this job: {why}"

    def close(self) -> None:
        """As `Source`."""
        self._copies.close()

    def _described(self, holder: int) -> tuple[bytes, Layout]:
        if holder not in self._smalls:
            self._smalls[holder] = described(self._copies.small(holder), f"the copy of holder {holder}")
        return self._smalls[holder]


def in_memory(file: str) -> MemorySource:
    """The generation whose shards are where ``file`` says (`InVaults`)."""
    told = msgspec.msgpack.decode(Path(file).read_bytes(), type=r.InVaults)
    places = {holder: [(at.host, at.port) for at in each] for holder, each in told.holders.items()}
    copies = Copies(told.secret, told.epoch, Version(told.base_epoch, told.generation), places)
    return MemorySource(copies, told.generation, told.coordinates)
