"""One node's vault: all arenas its agent owns. Thread-safe inside the agent; no network here."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import msgspec
import xxhash

from .arena import KINDS, Arena, ArenaInfo, Kind, Slot, free_bytes
from .errors import ChecksumMismatch, NotHeld, StaleEpoch, VaultError, VaultFull
from .intake import Intakes
from .leftovers import PREFIX
from .memory import on_numa_node
from .version import CONSTANT, EMPTY, Version

_SMALL_UNIT = 1 << 16


def small_capacity(small_bytes: int) -> int:
    """Room for a small state that has this size now and may grow."""
    return max(1, -(-2 * small_bytes // _SMALL_UNIT)) * _SMALL_UNIT


class Holding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One complete version of one rank's shard."""

    epoch: int
    generation: int
    kind: Kind


class Holdings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a vault can give back, by rank, oldest first."""

    ranks: dict[int, tuple[Holding, ...]]


class Vault:
    """The shards of one node: its own ranks' and those it keeps for others.

    Args:
        job_id: part of the file names; letters, digits, ``_``, ``.``, ``-``.
        node: number of the node, part of the file names (several agents may share a machine).
        directory: where the arenas are, a tmpfs.
        chunk_bytes: bytes per checksum.
        limit_bytes: of memory that all arenas together may take; 0 for what the machine has.
        create: makes an arena, as `Arena.create` does.

    Attributes:
        intakes: what is being brought into own arenas from elsewhere.
        epoch: in which this vault is; writes of older ones are refused.
        kept: the newest globally committed version known here, packed; EMPTY when there is none.
        floor: nothing below this packed version, except `kept`, will ever be committed.
        resized: how often coordinates have become others (`end_making`).
    """

    def __init__(
        self,
        job_id: str,
        node: int,
        directory: str = "/dev/shm",
        chunk_bytes: int = 1 << 20,
        limit_bytes: int = 0,
        create: Callable[[str, int, Kind, int, int, int], Arena] = Arena.create,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", job_id):
            raise VaultError(f"job id {job_id!r} may have only letters, digits, '_', '.', '-' (at most 100)")
        self.job_id = job_id
        self.node = node
        self.directory = directory
        self.chunk_bytes = chunk_bytes
        self.limit_bytes = limit_bytes
        self._create = create
        self._arenas: dict[tuple[int, Kind], Arena] = {}
        self._aside: dict[int, tuple[Arena, Slot]] = {}  # without files: others may have their names by now
        self._base: Version | None = None  # that is aside
        self._freeing: threading.Thread | None = None
        self._lock = threading.RLock()  # never while memory is cleared: the agent's loop takes it
        self._making: dict[tuple[int, Kind], threading.Lock] = {}
        self._reserved: dict[tuple[int, Kind], int] = {}  # bytes of those that are being made
        self._unwanted: set[tuple[int, Kind]] = set()  # of them, those that nobody waits for any more
        self._closed = False
        self._checking: dict[int, threading.Lock] = {}
        self.intakes = Intakes()
        self.epoch = 0
        self.kept = EMPTY
        self.floor = 0
        self.resized = 0
        self._pinned = False
        self._near: dict[int, int] = {}

    # ---- memory

    def set_near(self, rank: int, numa: int) -> None:
        """NUMA node for the own memory of ``rank`` that is made without naming one, as a spare's is; -1 for any."""
        self._near[rank] = numa

    def allocate_own(self, rank: int, unique_bytes: int, small_capacity: int, numa: int = -1) -> ArenaInfo:
        """The arena of a rank that runs here; made unless it is there, on NUMA node ``numa``, else that of `set_near`.

        One that is there stays, whatever room for a small state it has: who writes one looks. (Room follows from the
        size that the small state had, on disk or in a worker, when it was asked for.)

        Blocks for the clearing of the memory (0.3 s a GiB). Raises VaultFull; VaultError when the unique bytes differ.
        """
        near = numa if numa >= 0 else self._near.get(rank, -1)
        return self._allocate(rank, "own", unique_bytes, small_capacity, near).info

    def allocate_peer(self, rank: int, unique_bytes: int, small_capacity: int) -> ArenaInfo:
        """The arena in which this node keeps the shard of a rank that runs elsewhere; as `allocate_own`."""
        return self._allocate(rank, "peer", unique_bytes, small_capacity).info

    def allocate_parity(self, word: int, parity_bytes: int, records_bytes: int) -> ArenaInfo:
        """The arena of one row of parity; as `allocate_own`. ``records_bytes``: room for what belongs to its parts."""
        return self._allocate(word, "parity", parity_bytes, records_bytes).info

    def _allocate(self, rank: int, kind: Kind, unique_bytes: int, small_capacity: int, numa: int = -1) -> Arena:
        key = rank, kind
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                arena = self._arenas.get(key)
                if arena is None:
                    total = Arena.size(rank, kind, unique_bytes, small_capacity, self.chunk_bytes)
                    self._reserve(key, total)
            if arena is not None:
                have = (arena.info.unique_bytes, arena.info.small_capacity)
                if have[0] != unique_bytes or (kind == "parity" and have[1] != small_capacity):
                    raise VaultError(
                        f"rank {rank} has {kind} memory of {have[0]} + {have[1]} bytes here, not {unique_bytes} + "
                        f"{small_capacity}; drop it first if its shard has really changed"
                    )
                return arena
            try:
                path = f"{self.directory}/{PREFIX}{self.job_id}-{self.node}-{rank}-{kind}"
                with on_numa_node(numa):
                    arena = self._create(path, rank, kind, unique_bytes, small_capacity, self.chunk_bytes)
            finally:
                with self._lock:
                    del self._reserved[key]
                    unwanted = key in self._unwanted
                    self._unwanted.discard(key)
                    if arena is not None:
                        self._insert(key, arena, unwanted)
            return arena

    def _reserve(self, key: tuple[int, Kind], total: int) -> None:
        """``total`` bytes are this arena's now, before it is there. Raises VaultFull. Under the lock."""
        taken = self.bytes_allocated + sum(self._reserved.values())
        if self.limit_bytes and taken + total > self.limit_bytes:
            raise VaultFull(
                f"rank {key[0]} ({key[1]}) needs {total} bytes of node {self.node}'s memory, which has {taken} of the "
                f"{self.limit_bytes} in use that --deadpool-host-memory allows"
            )
        self._reserved[key] = total

    def lacks(self, nbytes: int) -> str:
        """Why all arenas together could not have ``nbytes``, in one line; empty: they could, as far as is known now."""
        if self.limit_bytes and nbytes > self.limit_bytes:
            return f"a node needs {nbytes} bytes for shards, and --deadpool-host-memory allows {self.limit_bytes}"
        free = free_bytes(self.directory) + self.bytes_allocated
        return f"a node needs {nbytes} bytes for shards, and {self.directory} has {free}" if nbytes > free else ""

    def end_making(self) -> None:
        """Coordinates are others now: memory that is being made for those before is dropped when it is there."""
        with self._lock:
            self.resized += 1
            self._unwanted |= self._reserved.keys()

    def _insert(self, key: tuple[int, Kind], arena: Arena, unwanted: bool) -> None:
        """What has been told while it was made holds for it, too. Under the lock."""
        if self._closed or unwanted:
            arena.unlink()
            why = "is closed" if self._closed else f"has no use for this memory of rank {key[0]} any more"
            raise VaultError(f"the vault of node {self.node} {why}")
        arena.epoch = self.epoch
        if not arena.info.constant:
            arena.kept, arena.floor = self.kept, self.floor
        self._arenas[key] = arena

    def arena(self, rank: int, kind: Kind) -> Arena | None:
        with self._lock:
            return self._arenas.get((rank, kind))

    def drop(self, rank: int, kind: Kind | None = None) -> None:
        """Give up the memory of a rank (of all kinds unless one is named).

        The file is gone at once, the memory as soon as no transfer and no worker uses it any more.
        """
        with self._lock:
            for each in KINDS if kind is None else (kind,):
                arena = self._arenas.pop((rank, each), None)
                if arena is not None:
                    arena.unlink()

    def arenas(self) -> list[Arena]:
        """All that there are now."""
        with self._lock:
            return list(self._arenas.values())

    @contextmanager
    def opening(self, arena: Arena) -> Iterator[bool]:
        """Whether ``arena`` is one of those there are now; in here it stays one. For what takes no time.

        Who opens a slot in the agent does it in here: one that is set aside must not change.
        """
        with self._lock:
            yield self._arenas.get((arena.info.rank, arena.info.kind)) is arena

    @property
    def bytes_allocated(self) -> int:
        """Of memory, also of what is aside."""
        with self._lock:
            arenas = [*self._arenas.values(), *(arena for arena, _ in self._aside.values())]
            return sum(arena.info.total_bytes - arena.freed_bytes for arena in arenas)

    def close(self) -> None:
        """Drop everything, also what is aside and what is still being made."""
        with self._lock:
            self._closed = True
            for rank, kind in list(self._arenas):
                self.drop(rank, kind)
        self.let_go()

    # ---- the base of a job that begins anew with other coordinates

    def set_aside(self, base: Version, written: int) -> dict[int, tuple[Kind, ...]]:
        """Keep what is complete here of a generation until `let_go`, out of the way of all else; drop all other memory.

        What is aside is found (`find`) as ``base`` and served, never written again, and no holding; its rank may get
        new memory. A base that is aside already stays as it is and nothing is added, since what has been made since is
        of other coordinates; another base takes its place. Of an own and a peer copy the own one stays. Constants of
        any holder are aside with it.

        Args:
            base: under which it is found: its generation, and the epoch in which it was chosen.
            written: the epoch of the versions; -1: whichever a rank has of that generation, of no later epoch.

        Tell the new epoch before. Returns `aside`.
        """
        base = Version(*base)
        gone: list[Arena] = []
        with self._lock:
            self.end_making()
            if self._base != base:
                gone += (arena for arena, _ in self._aside.values())
                self._base = base
                self._aside = {}
                for kind in ("own", "peer"):
                    for (rank, each), arena in self._arenas.items():
                        if each == kind and rank not in self._aside and (slot := _held_fast(arena, base, written)):
                            self._aside[rank] = arena, slot
            stays = {id(slot) for _, slot in self._aside.values()}
            for arena in self._arenas.values():
                arena.unlink()
            gone += self._arenas.values()
            self._arenas.clear()
        self._free([(arena, slot) for arena in gone for slot in arena.slots if id(slot) not in stays])
        return self.aside

    @property
    def aside(self) -> dict[int, tuple[Kind, ...]]:
        """By rank (or holder of constants), the kinds of complete copies that `set_aside` keeps."""
        with self._lock:
            return {rank: (arena.info.kind,) for rank, (arena, slot) in sorted(self._aside.items()) if slot.complete}

    def let_go(self) -> None:
        """Free what is aside; who still reads it finds that it is over."""
        with self._lock:
            gone, self._aside, self._base = self._aside, {}, None
        self._free(list(gone.values()))

    def thin_out(self, holders: Collection[int]) -> bool:
        """Free what is aside of these, which others have too. Waits until all that is given back is free.

        Whether there was anything to free.
        """
        with self._lock:
            gone = [self._aside.pop(holder) for holder in holders if holder in self._aside]
            frees = bool(gone) or (self._freeing is not None and self._freeing.is_alive())
        self._free(gone)
        self.freed()
        return frees

    def _free(self, slots: list[tuple[Arena, Slot]]) -> None:
        """Give memory back: it counts as free at once. In a thread, since that takes 0.1 s a GiB."""
        with self._lock:
            for arena, slot in slots:
                arena.end(slot)
            if any(arena.mapped for arena, _ in slots):
                work = partial(_give_back, slots, self._freeing)
                self._freeing = threading.Thread(target=work, name="vault-free", daemon=True)
                self._freeing.start()

    def freed(self) -> None:
        """Wait for all that is given back to be free."""
        if self._freeing is not None:
            self._freeing.join()

    # ---- what the coordinator tells

    def set_epoch(self, epoch: int) -> None:
        """The job is in ``epoch`` now: only the newest globally committed version of older ones is still kept."""
        with self._lock:
            if epoch < self.epoch:
                raise StaleEpoch(f"the vault of node {self.node} is in epoch {self.epoch}, not {epoch}")
            self.epoch = epoch
            self._pinned = False
            for arena in self._arenas.values():
                arena.epoch = epoch
            self.learn(self.kept, Version(epoch, 0).pack())
        self.intakes.end_before(epoch)

    def set_committed(self, epoch: int, generation: int) -> None:
        """The whole job has committed this version. Older news is without effect."""
        word = Version(epoch, generation).pack()
        self.learn(word, word)

    def set_floor(self, epoch: int, generation: int) -> None:
        """Nothing below this version, except the newest committed one, will ever be committed. Never goes back."""
        self.learn(EMPTY, Version(epoch, generation).pack())

    def learn(self, kept: int, floor: int) -> None:
        """Take packed ``kept`` and ``floor`` from who may know better; both only ever go forward."""
        with self._lock:
            if kept != EMPTY and (self.kept == EMPTY or kept > self.kept):
                self.kept = kept
            self.floor = max(self.floor, floor)
            for (_, kind), arena in self._arenas.items():
                if arena.info.constant or (self._pinned and kind == "own"):
                    continue
                arena.kept = self.kept  # before the floor, so that no worker sees the old one unprotected
                arena.floor = self.floor

    def pin(self) -> None:
        """Own slots that hold something now stay until `unpin` (or the next epoch), whatever is committed meanwhile.

        What the workers are told of commits is held back, so they skip generations rather than overwrite.
        """
        with self._lock:
            self._pinned = True

    def unpin(self) -> None:
        """Commits count again, those of the meantime at once."""
        with self._lock:
            self._pinned = False
            self.learn(EMPTY, 0)

    # ---- what there is

    def holdings(self) -> Holdings:
        """All complete versions, by rank; constants are none. Does not read the data: restore and fetch verify them."""
        with self._lock:
            ranks: dict[int, list[Holding]] = {}
            for (rank, kind), arena in self._arenas.items():
                if arena.info.constant:
                    continue
                held = ranks.setdefault(rank, [])
                for slot in arena.slots:
                    version = slot.version
                    if version is not None and slot.complete:
                        held.append(Holding(version.epoch, version.generation, kind))
        order = lambda one: (one.epoch, one.generation, one.kind)  # noqa: E731
        return Holdings({rank: tuple(sorted(held, key=order)) for rank, held in ranks.items()})

    def find(self, rank: int, version: Version, kinds: tuple[Kind, ...] = ("own", "peer")) -> tuple[Arena, Slot]:
        """The arena and slot with a complete copy. Raises NotHeld; ChecksumMismatch of constants that have changed.

        What is aside comes last, and constants that are aside are found under the base: under CONSTANT are those of the
        present coordinates, which have the same numbers.
        """
        changed = False
        with self._lock:
            for kind in kinds:
                arena = self._arenas.get((rank, kind))
                slot = arena.find(version) if arena is not None else None
                if arena is not None and slot is not None:
                    return arena, slot
                changed |= arena is not None and arena.info.constant and arena.slots[0].damaged
            aside = self._aside.get(rank) if version == self._base else None
            if aside is not None and aside[1].complete and aside[0].info.kind in kinds:
                return aside
        if changed:  # so that who asks knows that there are any
            raise ChecksumMismatch(f"constants of holder {rank} have changed in the memory of node {self.node}")
        raise NotHeld(f"the vault of node {self.node} does not hold version {tuple(version)} of rank {rank} completely")

    def checking(self, rank: int) -> threading.Lock:
        """Held while the own arena of ``rank`` is checksummed; who opens one of its slots in the agent takes it too."""
        with self._lock:
            return self._checking.setdefault(rank, threading.Lock())

    def checksum(self, rank: int, limit: int | None = None) -> bool:
        """Checksum what the worker of ``rank`` has published since the last call; True when there was something new.

        Marks a slot complete when the worker has finished it and all of it is summed. Blocks for reading the new
        bytes (some 10 GB/s), at most ``limit`` chunks of each slot. Call it before `holdings` to have everything
        a dead worker left counted. Any thread.
        """
        arena = self.arena(rank, "own")
        if arena is None:
            return False
        with self.checking(rank):
            return any([_checksum(slot, limit) for slot in arena.slots])


def _give_back(slots: list[tuple[Arena, Slot]], before: threading.Thread | None) -> None:
    while slots:  # one after the other is forgotten, so that its mapping goes too
        arena, slot = slots.pop()
        arena.give_back(slot)
    if before is not None:
        before.join()


def _held_fast(arena: Arena, base: Version, written: int) -> Slot | None:
    """The slot with what belongs to ``base``, complete: then no worker that still has it mapped can open one any more.

    Arguments as of `Vault.set_aside`.
    """
    found: Version | None = None
    for slot in arena.slots:
        version = slot.version
        if version is None or not slot.complete:
            continue
        fits = version.generation == base.generation and version.epoch <= base.epoch
        if version == CONSTANT if arena.info.constant else fits and written in (-1, version.epoch):
            found = version if found is None or version.pack() == arena.kept else found
    if found is None:
        return None
    arena.kept = found.pack()
    arena.epoch = EMPTY  # later than any
    return arena.find(found)


def _checksum(slot: Slot, limit: int | None) -> bool:
    """One slot's part of `Vault.checksum`. ``checked`` counts entries of the table: the small state, then chunks."""
    turn = slot.turn
    if slot.small_bytes == EMPTY or slot.begin == EMPTY or slot.own_turn == turn or slot.damaged:
        return False
    if slot.checked_turn != turn:
        slot.checked = 0
        slot.checked_turn = turn
    before = slot.checked
    if before == 0:
        slot.sums[0] = xxhash.xxh3_64_intdigest(slot.small[: slot.small_bytes])
        slot.checked = 1
    last = slot.published_chunks()
    if limit is not None:
        last = min(last, slot.checked - 1 + limit)
    for index in range(slot.checked - 1, last):
        slot.sums[1 + index] = xxhash.xxh3_64_intdigest(slot.chunk(index))
        if slot.turn != turn:
            return True  # opened again under our hands: what was summed is void
        slot.checked = 2 + index
    if slot.checked == 1 + slot.chunks and slot.sealed and slot.turn == turn:
        slot.own_turn = turn
        return True
    return slot.checked > before
