"""From a durable generation into the vault of the node that runs a coordinate."""

from __future__ import annotations

from collections.abc import Callable

from deadpool_megatron.vault import Slot, Vault, VaultError, Version, store_shard

from .errors import DurableError
from .files import read_manifest, read_shard
from .format import Manifest, ShardHeader
from .store import open_store

__all__ = ["load_shards"]


def load_shards(
    vault: Vault,
    directory: str,
    name: str,
    versions: dict[int, Version],
    capacity: Callable[[int], int],
    loaded: Callable[[int, Manifest, str], None],
) -> None:
    """Bring coordinates of a durable generation into own arenas, each under the version given for its rank.

    Args:
        directory: the durable directory (``--deadpool-durable-dir``).
        name: the generation's directory below it.
        versions: by rank.
        capacity: bytes of room for the small state of an arena, given the bytes it has now.
        loaded: called after each rank with (rank, manifest, digest of its layout).

    Blocks for the disk. Raises DurableError, whatever was wrong; nothing half-read counts as held.
    """
    try:
        store = open_store(directory)
        manifest = read_manifest(store, name)
        for rank, version in versions.items():
            if rank >= manifest.world_size:
                raise DurableError(f"{name} has {manifest.world_size} ranks, none with number {rank}")
            shard = manifest.shards[rank]
            arena = vault.arena(rank, "own")
            if arena is not None and arena.find(version) is not None:
                loaded(rank, manifest, shard.layout)
                continue

            def fill(open_slot: Callable[[int, int], Slot]) -> int:
                slot: Slot | None = None

                def place(header: ShardHeader) -> tuple[memoryview, memoryview]:
                    nonlocal slot
                    room = capacity(header.small_bytes)
                    slot = open_slot(header.layout.unique_bytes, room)
                    if header.small_bytes > len(slot.small):
                        raise DurableError(f"the small state of rank {rank} does not fit its arena")  # noqa: B023
                    return slot.unique, slot.small[: header.small_bytes]

                return read_shard(store, name, shard, place).small_bytes  # noqa: B023

            store_shard(vault, rank, version, fill)
            loaded(rank, manifest, shard.layout)
    except (OSError, VaultError) as err:
        raise DurableError(f"{directory}/{name} cannot be read: {err}") from None
