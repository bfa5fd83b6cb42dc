"""From a durable generation into the vault of the node that runs a coordinate."""

from __future__ import annotations

import functools
from collections.abc import Callable

from deadpool_megatron.vault import CONSTANT, Slot, Vault, VaultError, Version, constants_of, own_copy, store_shard

from .errors import DurableError, NoRoom, Unreachable
from .files import find, read_constants, read_manifest, read_shard
from .format import Manifest, ShardHeader, trailer_of
from .store import Store


def load_shards(
    vault: Vault,
    store: Store,
    name: str,
    epoch: int,
    versions: dict[int, Version],
    capacity: Callable[[int], int],
    loaded: Callable[[int, Manifest, str], None],
) -> None:
    """Bring coordinates of a durable generation into own arenas, each under the version given for its rank.

    Args:
        store: the durable directory (``--deadpool-durable-dir``).
        name: the generation's directory in it.
        epoch: in which they were asked for; once it is over nothing of them is written.
        versions: by rank.
        capacity: bytes of room for the small state of an arena, given the bytes it has now.
        loaded: called after each rank, and each holder of constants, with (holder, manifest, digest of its layout).

    Blocks for the disk. Raises DurableError, Unreachable when it may pass, NoRoom; nothing half-read counts as held.
    """
    try:
        manifest = read_manifest(store, name)
        for rank, version in versions.items():
            if rank >= manifest.world_size:
                raise DurableError(f"{name} has {manifest.world_size} ranks, none with number {rank}")
            shard = manifest.shards[rank]
            if shard.constants is not None:
                read = functools.partial(read_constants, store, shard.constants)
                _load(vault, constants_of(rank), epoch, CONSTANT, capacity, read)
                loaded(constants_of(rank), manifest, shard.constants.layout)
            _load(vault, rank, epoch, version, capacity, functools.partial(read_shard, store, name, shard))
            loaded(rank, manifest, shard.layout)
    except (OSError, VaultError) as err:
        raise _kind(err)(f"{store.root}/{name} cannot be read: {err}") from None


def _kind(err: OSError | VaultError) -> type[DurableError]:
    if isinstance(err, VaultError):
        return Unreachable if err.broken else NoRoom if err.own else DurableError
    return DurableError if isinstance(err, FileNotFoundError) else Unreachable


def load_constants(vault: Vault, store: Store, rank: int, epoch: int, capacity: Callable[[int], int]) -> None:
    """What never changes of a rank, from the newest generation that has it; arguments as of `load_shards`.

    Blocks for the disk. Raises DurableError.
    """
    try:
        for manifest in find(store).complete:
            file = manifest.shards[rank].constants if rank < manifest.world_size else None
            if file is not None:
                _load(
                    vault, constants_of(rank), epoch, CONSTANT, capacity, functools.partial(read_constants, store, file)
                )
                return
    except (OSError, VaultError) as err:
        raise DurableError(f"{store.root} cannot be read: {err}") from None
    raise DurableError(f"{store.root} has none of rank {rank}")


def _load(
    vault: Vault,
    holder: int,
    epoch: int,
    version: Version,
    capacity: Callable[[int], int],
    read: Callable[[Callable[[ShardHeader], tuple[memoryview, memoryview]], Callable[[], None]], ShardHeader],
) -> None:
    if own_copy(vault, holder, version) is not None:
        return

    def fill(open_slot: Callable[[int, int], Slot], check: Callable[[], None]) -> int:
        trailer, rest = b"", memoryview(b"")

        def place(header: ShardHeader) -> tuple[memoryview, memoryview]:
            nonlocal trailer, rest
            # (a damaged file may have had memory of a wrong size made for it: nothing is in that)
            there = vault.arena(holder, "own")
            wrong = there is not None and there.info.unique_bytes != header.layout.unique_bytes
            if there is not None and wrong and not any(slot.complete for slot in there.slots):
                vault.drop(holder, "own")
            trailer = trailer_of(header.layout)
            nbytes = header.small_bytes + len(trailer)
            slot = open_slot(header.layout.unique_bytes, capacity(nbytes))
            if nbytes > len(slot.small):
                raise DurableError(f"the small state of rank {holder} does not fit its arena")
            rest = slot.small[header.small_bytes : nbytes]
            return slot.unique, slot.small[: header.small_bytes]

        small_bytes = read(place, check).small_bytes
        rest[:] = trailer
        return small_bytes + len(trailer)

    store_shard(vault, holder, epoch, version, fill)
