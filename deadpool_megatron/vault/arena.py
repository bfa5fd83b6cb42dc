"""The shared memory of one rank in one vault: a file with a header and two slots (one for constants).

Created by the agent, mapped by agent and worker. Layout (64-bit little-endian words, native order; all offsets
are multiples of a page):

    page 0        header: identity and sizes | words the agent tells | the two slots' words
    then          checksum table of each slot (one xxh3_64 word for the small state and one per chunk)
    then          each slot: small-state capacity | unique bytes

Every word has one writer and is loaded and stored in order with the bytes it speaks of (`words`); checksum tables are
such bytes. No lock is shared between processes: one that dies at any point leaves nothing locked. A slot's data
belong to the version in ``begin`` when ``end`` says the same; while it is written, ``end`` is EMPTY. ``turn`` counts
how often the slot was opened; the agent says "complete" by storing the turn it has checked, so a slot that has been
opened again is incomplete with no further store.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import xxhash

from .errors import ChecksumMismatch, VaultError, VaultFull
from .leftovers import MAGIC, PAGE, is_left
from .memory import give_back, populated
from .version import CONSTANT, EMPTY, Version, is_constants, unpack
from .words import Words

Kind = Literal["own", "peer", "parity"]
KINDS: Final[tuple[Kind, ...]] = ("own", "peer", "parity")
_LAYOUT: Final = 1
# header words
_W_RANK, _W_KIND, _W_UNIQUE, _W_SMALL, _W_CHUNK, _W_TOTAL = range(2, 8)
_W_KEPT, _W_FLOOR, _W_EPOCH = 16, 17, 18
_W_BUSY: Final = 24  # on a cache line of its own: the worker's word
# slot words: one cache line the writer stores to, one the agent stores to
_W_SLOTS: Final = 32
_SLOT_WORDS: Final = 16
_S_TURN, _S_BEGIN, _S_END, _S_PUBLISHED, _S_SMALL = range(5)
_S_OWN_TURN, _S_PEER_TURN, _S_CHECKED, _S_CHECKED_TURN = range(8, 12)


@dataclass(frozen=True, slots=True)
class ArenaInfo:
    """What a worker needs to map its arena. For parity, ``rank`` is the word (see `stripes`)."""

    path: str
    rank: int
    kind: Kind
    unique_bytes: int
    small_capacity: int
    total_bytes: int

    @property
    def constant(self) -> bool:
        """It has one slot, for what never changes (`ConstantsWriter`)."""
        return _constant(self.rank, self.kind)


def _constant(rank: int, kind: Kind) -> bool:
    return kind != "parity" and is_constants(rank)


def _round(size: int) -> int:
    return -(-size // PAGE) * PAGE


_making: Final[dict[int, int]] = {}  # by descriptor, bytes of the arenas whose memory this process takes just now
_making_lock: Final = threading.Lock()


def free_bytes(directory: str) -> int:
    """Bytes that can really be had there, less what arenas that are being made still lack."""
    with _making_lock:
        return _free_bytes(directory)


def _free_bytes(directory: str) -> int:
    """What the file system allows, and what the machine's memory does; the lock of `_making` is held."""
    stat = os.statvfs(directory)
    free = stat.f_bavail * stat.f_frsize
    with open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                free = min(free, int(line.split()[1]) * 1024)
    return free - sum(max(0, total - 512 * os.fstat(fd).st_blocks) for fd, total in _making.items())


_GIVEN_UP = 1 << 63  # with the turn in ``own_turn``: checksummed once, and changed since


class _Word:
    """One 64-bit word of an arena or a slot, by its index."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, holder: Arena | Slot, owner: type[Arena | Slot] | None = None) -> int:
        return holder.words[self._index]

    def __set__(self, holder: Arena | Slot, value: int) -> None:
        holder.words[self._index] = value


class Slot:
    """One of an arena's slots. ``small`` and ``unique`` are writable views that live as long as the arena."""

    # stored by whoever writes the data: the worker (own arena) or the agent (peer arena, fetch)
    turn = _Word(_S_TURN)
    begin = _Word(_S_BEGIN)
    end = _Word(_S_END)
    published = _Word(_S_PUBLISHED)
    small_bytes = _Word(_S_SMALL)
    # stored by the agent
    own_turn = _Word(_S_OWN_TURN)
    peer_turn = _Word(_S_PEER_TURN)
    checked = _Word(_S_CHECKED)
    checked_turn = _Word(_S_CHECKED_TURN)

    def __init__(
        self,
        index: int,
        words: Words | memoryview[Any],
        sums: memoryview[Any],
        small: memoryview,
        unique: memoryview,
        chunk: int,
    ) -> None:
        self.index = index
        self.words = words
        self.sums = sums
        self.small = small
        self.unique = unique
        self.chunk_bytes = chunk
        self.chunks = -(-len(unique) // chunk)

    def reopen(self, version: int) -> None:
        """Begin to write packed ``version``: from here on the slot is incomplete, whatever happens."""
        self.end = EMPTY
        self.small_bytes = EMPTY
        self.published = 0
        self.begin = version
        self.turn += 1  # last: a reader that sees the new turn sees the new version

    def put_small(self, small: bytes) -> None:
        """Store the small state. Raises VaultError when it is larger than the arena's capacity for it."""
        if len(small) > len(self.small):
            raise VaultError(
                f"small state of {len(small)} bytes does not fit the {len(self.small)} bytes of the arena; "
                "ask for a larger small_capacity"
            )
        self.small[: len(small)] = small
        self.small_bytes = len(small)

    def seal(self) -> None:
        """The writer's last word: all bytes of the version are there."""
        self.end = self.begin

    @property
    def sealed(self) -> bool:
        """The writer has finished; the checksums may not be there yet."""
        begin: int = self.begin
        return begin != EMPTY and begin == self.end

    @property
    def complete(self) -> bool:
        """Written to the end and checksummed: this version can be given back."""
        turn = self.turn
        return self.sealed and self.own_turn == turn and self.turn == turn

    @property
    def version(self) -> Version | None:
        """The version in the slot, complete or not."""
        return unpack(self.begin)

    @property
    def damaged(self) -> bool:
        """What was written last has changed in memory: see `give_up`."""
        return self.own_turn == self.turn | _GIVEN_UP

    @property
    def pair(self) -> tuple[int, int]:
        """The begin and end words as `discipline` wants them: one that has changed in memory counts as unfinished."""
        return self.begin, EMPTY if self.damaged else self.end

    def chunk(self, index: int) -> memoryview:
        """Bytes of chunk ``index`` of the unique state."""
        start = index * self.chunk_bytes
        return self.unique[start : start + self.chunk_bytes]

    def published_chunks(self) -> int:
        """How many chunks the writer has finished."""
        published = min(self.published, len(self.unique))
        return self.chunks if published == len(self.unique) else published // self.chunk_bytes

    def mark_complete(self) -> None:
        """The agent has a verified checksum of everything in this turn."""
        self.own_turn = self.turn

    def sum_up(self, small_bytes: int) -> None:
        """Write the checksums of everything, of ``small_bytes`` bytes of small state. Blocks as `verify`."""
        self.sums[0] = xxhash.xxh3_64_intdigest(self.small[:small_bytes])
        for index in range(self.chunks):
            self.sums[1 + index] = xxhash.xxh3_64_intdigest(self.chunk(index))

    def give_up(self, turn: int) -> None:
        """What was written as ``turn`` has changed in memory: it is not held any more. By the agent.

        The writer learns it from the same word: else it would keep the slot for a commit that can never be.
        """
        if self.turn == turn:
            self.own_turn = turn | _GIVEN_UP

    def recheck(self) -> bool:
        """False if what is complete here is not what was written: it is given up then. By the agent; blocks."""
        turn = self.turn
        if not self.complete:
            return True
        try:
            self.verify()
        except ChecksumMismatch:
            if self.turn == turn:
                self.give_up(turn)
                return False
        return True

    def verify(self, small_bytes: int | None = None) -> None:
        """Compare all bytes with their checksums. Raises ChecksumMismatch. Blocks for the time of reading them."""
        version = self.version
        small = self.small[: self.small_bytes if small_bytes is None else small_bytes]
        if self.sums[0] != xxhash.xxh3_64_intdigest(small):
            raise ChecksumMismatch(f"small state of version {version} in slot {self.index} has changed in memory")
        for index in range(self.chunks):
            if self.sums[1 + index] != xxhash.xxh3_64_intdigest(self.chunk(index)):
                raise ChecksumMismatch(f"chunk {index} of {version} in slot {self.index} has changed in memory")


class Arena:
    """A mapped arena file. Make one with `create` (agent) or `attach` (worker).

    Attributes:
        kept: the newest globally committed version, packed; EMPTY when there is none. Stored by the agent.
        floor: nothing below this packed version, except ``kept``, will ever be committed. Stored by the agent.
        epoch: the job's; who opens a slot for an older one is refused. Stored by the agent.
        links_busy: not 0 while training uses the links between the nodes: senders stay out of the way. By the worker.
        view: all bytes.
        freed_bytes: of its memory that it has no more; see `end`.
    """

    kept = _Word(_W_KEPT)
    floor = _Word(_W_FLOOR)
    epoch = _Word(_W_EPOCH)
    links_busy = _Word(_W_BUSY)

    def __init__(self, path: str, memory: mmap.mmap | bytearray) -> None:
        self.path = path
        size = len(memory)
        self._map = memory
        self.view = memoryview(memory)
        self.words = words = self._words(0, PAGE)
        if size < PAGE or words[0] != MAGIC or words[1] != _LAYOUT or words[_W_TOTAL] != size:
            raise VaultError(f"{path} is not an arena of this DeadPool version")
        self.info = ArenaInfo(path, words[_W_RANK], KINDS[words[_W_KIND]], words[_W_UNIQUE], words[_W_SMALL], size)
        self.chunk_bytes: int = words[_W_CHUNK]
        self._count = 1 if self.info.constant else 2
        self.freed_bytes = 0
        self.slots = tuple(self._slot(i) for i in range(self._count))

    @staticmethod
    def size(rank: int, kind: Kind, unique_bytes: int, small_capacity: int, chunk_bytes: int) -> int:
        """Bytes of the file of an arena."""
        table = _round(8 * (1 + -(-unique_bytes // chunk_bytes)))
        return PAGE + (1 if _constant(rank, kind) else 2) * (table + _round(small_capacity) + _round(unique_bytes))

    @classmethod
    def create(
        cls, path: str, rank: int, kind: Kind, unique_bytes: int, small_capacity: int, chunk_bytes: int = 1 << 20
    ) -> Arena:
        """Make the file, all of its memory taken now so that no later store can fail.

        It appears under its name only when it is whole. Blocks for the time of clearing the memory (0.3 s a GiB);
        other threads run meanwhile.
        Raises VaultFull, or VaultError when a living job has an arena of that name.
        """
        if unique_bytes < 0 or small_capacity < 1 or chunk_bytes < PAGE:
            raise VaultError(
                f"cannot make an arena of {unique_bytes} + {small_capacity} bytes in chunks of {chunk_bytes}"
            )
        directory = os.path.dirname(path)
        total = cls.size(rank, kind, unique_bytes, small_capacity, chunk_bytes)
        hint = "give the node more shared memory (mount -o remount,size=... /dev/shm, or --shm-size of the container)"
        what = f"arena of rank {rank} ({kind}) needs {total} bytes in {directory}"
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            with _making_lock:
                free = _free_bytes(directory)
                if total > free:
                    raise VaultFull(f"{what} but {free} are there; {hint}")
                _making[fd] = total
            try:
                os.ftruncate(fd, total)
                populated(fd, total).close()  # first through a mapping: only that can ask for huge pages
                os.posix_fallocate(fd, 0, total)
            except OSError as err:
                raise VaultFull(f"{what} but {free} were there ({err}); {hint}") from None
            finally:
                with _making_lock:
                    del _making[fd]
            os.pwrite(fd, _header(rank, kind, unique_bytes, small_capacity, chunk_bytes, total), 0)
            fcntl.flock(fd, fcntl.LOCK_EX)  # as long as the arena is used here: see `is_left`
            _link(fd, path)
            arena = cls.attach(path)  # by its name, which tools then show for the mapping
        except BaseException:
            os.close(fd)
            raise
        weakref.finalize(arena, os.close, fd).atexit = False
        return arena

    @classmethod
    def attach(cls, path: str) -> Arena:
        """Map an arena that the agent made. Raises VaultError when there is none."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise VaultError(f"there is no arena {path}: the agent that owned it is gone") from None
        try:
            # populated now, so that the hot path takes no page faults
            return cls(path, populated(fd, os.fstat(fd).st_size))
        finally:
            os.close(fd)

    def _words(self, first: int, last: int) -> Words | memoryview[Any]:
        """Of these bytes; what no other process sees needs no fences."""
        view = self.view[first:last]
        return Words(view) if isinstance(self._map, mmap.mmap) else view.cast("Q")

    def _slot(self, index: int) -> Slot:
        info, chunk = self.info, self.chunk_bytes
        sums_words = 1 + -(-info.unique_bytes // chunk)
        table = _round(8 * sums_words)
        data, _ = self._data(index)
        unique = data + _round(info.small_capacity)
        base = _W_SLOTS + index * _SLOT_WORDS
        return Slot(
            index,
            self._words(8 * base, 8 * (base + _SLOT_WORDS)),
            self.view[PAGE + index * table :][: 8 * sums_words].cast("Q"),
            self.view[data : data + info.small_capacity],
            self.view[unique : unique + info.unique_bytes],
            chunk,
        )

    def _data(self, index: int) -> tuple[int, int]:
        """Where a slot's bytes begin, and how many there are, in whole pages."""
        info = self.info
        table = _round(8 * (1 + -(-info.unique_bytes // self.chunk_bytes)))
        size = _round(info.small_capacity) + _round(info.unique_bytes)
        return PAGE + self._count * table + index * size, size

    @property
    def mapped(self) -> bool:
        """It is a file's memory."""
        return isinstance(self._map, mmap.mmap)

    def end(self, slot: Slot) -> None:
        """The memory of a slot, for the life of the arena, is to be given back; by the agent.

        Its turn is over before its bytes are: who reads them finds that. Nobody may write to it any more.
        """
        slot.reopen(EMPTY)
        self.freed_bytes += self._data(slot.index)[1]

    def give_back(self, slot: Slot) -> None:
        """After `end`. Blocks for it."""
        if isinstance(self._map, mmap.mmap) and not give_back(self._map, *self._data(slot.index)):
            self.freed_bytes -= self._data(slot.index)[1]

    @property
    def address(self) -> int:
        """Where the mapping starts in this process (for registering it with a device). Page aligned."""
        import numpy as np

        return int(np.frombuffer(self.view, dtype=np.uint8).ctypes.data)

    def find(self, version: Version) -> Slot | None:
        """The slot that holds ``version`` completely."""
        word = version.pack()
        return next((slot for slot in self.slots if slot.begin == word and slot.complete), None)

    def close(self) -> None:
        """Unmap. While somebody still has a view (a tensor over a slot), the mapping lives on until that is gone."""
        for slot in self.slots:
            slot.words.release()
            for view in (slot.sums, slot.small, slot.unique):
                view.release()
        self.words.release()
        try:
            self.view.release()
            if isinstance(self._map, mmap.mmap):
                self._map.close()
        except BufferError:
            return

    def unlink(self) -> None:
        """Remove the file; mappings of it stay valid."""
        Path(self.path).unlink(missing_ok=True)


def _header(
    rank: int, kind: Kind, unique_bytes: int, small_capacity: int, chunk_bytes: int, total: int
) -> memoryview[Any]:
    """Page 0 of a new arena."""
    words = memoryview(bytearray(PAGE)).cast("Q")
    words[0], words[1], words[_W_TOTAL] = MAGIC, _LAYOUT, total
    words[_W_RANK], words[_W_KIND] = rank, KINDS.index(kind)
    words[_W_UNIQUE], words[_W_SMALL], words[_W_CHUNK] = unique_bytes, small_capacity, chunk_bytes
    words[_W_KEPT] = CONSTANT.pack() if _constant(rank, kind) else EMPTY
    for slot in range(2):
        base = _W_SLOTS + slot * _SLOT_WORDS
        words[base + _S_BEGIN] = words[base + _S_END] = words[base + _S_SMALL] = EMPTY
    return words


def _link(fd: int, path: str) -> None:
    """Give the nameless file its name, in the place of a dead agent's one."""
    # os.link follows the link of /proc only when it is given a directory (it calls link, not linkat, otherwise).
    directory = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            os.link(str(fd), path, src_dir_fd=directory, follow_symlinks=True)
        except FileExistsError:
            if not is_left(path):
                raise VaultError(f"{path} belongs to a living agent; use another job id") from None
            os.unlink(path)
            os.link(str(fd), path, src_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)
