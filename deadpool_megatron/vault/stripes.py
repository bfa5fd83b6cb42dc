"""Parity of shards of several nodes: how shards are cut, what a keeper of parity knows, and filling a slot with it.

A *word* is k ranks on k nodes, and m keepers: rank i gives part i of its shard's chunks, keeper j keeps row j of the
parity of those parts, chunk by chunk, in an arena of its own with two slots. Small states and checksums are a few
kilobytes, so every keeper has those of its parts whole: what is rebuilt is compared with the checksums of its owner.

The parts of a word come from k nodes, each at its own pace, and are added up as they come (`Coder.add`). A version is
complete when all k parts are in. A sender that is cut off goes on where it was: chunks are added whole or not at all.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import numpy as np
import xxhash

from .arena import Arena, Slot
from .coder import Coder
from .discipline import choose
from .errors import ChecksumMismatch, Refused, VaultError
from .version import EMPTY, Version

_CHUNK_WORDS = 10  # bytes of a checksum in a record, at most
_FIELDS = 128  # bytes of the rest of a record, at most


def cut(chunks: int, part: int, parts: int) -> range:
    """The chunks of part ``part`` of a shard with ``chunks`` chunks."""
    return range(chunks * part // parts, chunks * (part + 1) // parts)


@dataclass(frozen=True, slots=True)
class WordPlan:
    """One row of parity as it was planned. ``unique_bytes`` and ``small_capacity`` are those of ``ranks``, in order."""

    ranks: tuple[int, ...]
    row: int
    unique_bytes: tuple[int, ...]
    small_capacity: tuple[int, ...]

    def chunks(self, chunk_bytes: int) -> int:
        """Chunks of the longest part."""
        sizes = (-(-size // chunk_bytes) for size in self.unique_bytes)
        return max(len(cut(size, i, len(self.ranks))) for i, size in enumerate(sizes))

    def records_bytes(self, chunk_bytes: int) -> int:
        """Room for small states and checksums."""
        return sum(room + _CHUNK_WORDS * self.chunks(chunk_bytes) + _FIELDS for room in self.small_capacity)


Word64 = Annotated[int, msgspec.Meta(ge=0)]


class PartOf(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What a keeper knows of one part: its shard's sizes and small state, and the checksums of the part's chunks."""

    rank: int
    unique_bytes: int
    small_capacity: int
    small: bytes
    sums: list[Word64]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[PartOf])


def parts_of(small: bytes) -> list[PartOf]:
    """The records of a parity slot, in the order of the word's ranks. Raises VaultError."""
    try:
        return _decoder.decode(small)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise VaultError(f"the records of a parity share cannot be read: {err}") from None


@dataclass(slots=True)
class _Part:
    small: bytes | None = None
    sums: list[int] = field(default_factory=list)
    complete: bool = False


class Filling:
    """One version of one word's parity on its way into a slot. Thread-safe."""

    def __init__(self, plan: WordPlan, coder: Coder, slot: Slot, word: int, version: Version) -> None:
        self.version = version
        self._plan = plan
        self._coder = coder
        self.slot = slot
        self._word = word
        self._lock = threading.Lock()
        slot.reopen(version.pack())
        self._turn = slot.turn
        self._parity = np.frombuffer(slot.unique, dtype=np.uint8)
        self._parity[:] = 0
        self._parts = [_Part() for _ in plan.ranks]

    @property
    def current(self) -> bool:
        """Still the version that is being written into its slot."""
        return self.slot.turn == self._turn and not self.slot.sealed

    def entries(self, share: int) -> int:
        """How many entries part ``share`` has: the small state, then its chunks."""
        chunks = -(-self._plan.unique_bytes[share] // self._coder.chunk_bytes)
        return 1 + len(cut(chunks, share, self._coder.k))

    def entry_bytes(self, share: int, entry: int, small_bytes: int) -> int:
        """Bytes of entry ``entry`` of part ``share``."""
        if entry == 0:
            return small_bytes
        size = self._coder.chunk_bytes
        whole = self._plan.unique_bytes[share]
        chunk = cut(-(-whole // size), share, self._coder.k)[entry - 1]
        return min(size, whole - chunk * size)

    def done(self, share: int) -> int:
        """How many entries of part ``share`` are in."""
        part = self._parts[share]
        return 0 if part.small is None else 1 + len(part.sums)

    def add(self, share: int, entry: int, data: memoryview, expected: int) -> None:
        """Entry ``entry`` of part ``share`` has come. Raises ChecksumMismatch, or Refused when it is not wanted."""
        if xxhash.xxh3_64_intdigest(data) != expected:
            raise ChecksumMismatch(f"part {share}, entry {entry} of {tuple(self.version)} arrived changed")
        with self._lock:
            part = self._parts[share]
            if not self.current:
                raise Refused(f"{tuple(self.version)} of word {self._word:x} was given up here", "no-slot")
            if entry != self.done(share):
                raise Refused(f"part {share} of word {self._word:x}: entry {entry} is out of turn", "protocol")
            if entry == 0:
                part.small = bytes(data)
                return
            size = self._coder.chunk_bytes
            self._coder.add(self._parity[(entry - 1) * size : entry * size], self._plan.row, share, data)
            part.sums.append(expected)

    def complete(self, share: int) -> None:
        """Part ``share`` is in; with the last one the version is complete. Raises Refused."""
        with self._lock:
            if not self.current:
                raise Refused(f"{tuple(self.version)} of word {self._word:x} was given up here", "no-slot")
            if self.done(share) != self.entries(share):
                raise Refused(f"part {share} of word {self._word:x} ended too soon", "protocol")
            self._parts[share].complete = True
            if not all(part.complete for part in self._parts):
                return
            plan, slot = self._plan, self.slot
            records = _encoder.encode(
                [
                    PartOf(rank, unique, room, part.small or b"", part.sums)
                    for rank, unique, room, part in zip(
                        plan.ranks, plan.unique_bytes, plan.small_capacity, self._parts, strict=True
                    )
                ]
            )
            slot.put_small(records)
            slot.sum_up(len(records))
            slot.published = len(slot.unique)
            slot.mark_complete()
            slot.seal()


class Stripes:
    """The parity one node keeps: its plan, and what is being filled. Thread-safe."""

    def __init__(self, k: int, m: int, chunk_bytes: int) -> None:
        self.coder = Coder(k, m, chunk_bytes)
        self._lock = threading.Lock()
        self._plans: dict[int, WordPlan] = {}
        self._filling: dict[tuple[int, int], Filling] = {}

    def plan(self, words: dict[int, WordPlan]) -> None:
        """What this node keeps from now on, by word. What it kept before stays until it is dropped."""
        with self._lock:
            self._plans = dict(words)
            self._filling = {key: filling for key, filling in self._filling.items() if key[0] in words}

    @property
    def plans(self) -> dict[int, WordPlan]:
        with self._lock:
            return dict(self._plans)

    def planned(self, word: int) -> WordPlan:
        """Raises Refused when this node keeps nothing of that word."""
        with self._lock:
            plan = self._plans.get(word)
        if plan is None:
            raise Refused(f"parity of word {word:x} is not kept here", "not-planned")
        return plan

    def filling(self, arena: Arena, word: int, version: Version, kept: int, floor: int) -> Filling | None:
        """Where parts of ``version`` go; None when it is complete here. Raises Refused when no slot is free."""
        plan = self.planned(word)
        with self._lock:
            if arena.find(version) is not None:
                return None
            for slot in arena.slots:
                known = self._filling.get((word, slot.index))
                if known is not None and known.slot is slot and known.current and known.version == version:
                    return known
            index = _choose(arena, version.pack(), kept, floor)
            if index is None:
                raise Refused(f"no slot for {tuple(version)} of word {word:x} may be overwritten here", "no-slot")
            filling = Filling(plan, self.coder, arena.slots[index], word, version)
            self._filling[word, index] = filling
            return filling


def _choose(arena: Arena, new: int, kept: int, floor: int) -> int | None:
    """As `discipline.choose`, but a version that other parts still come for is given up last."""
    pairs = [slot.pair for slot in arena.slots]
    alive = [begin != EMPTY and begin != end and begin >= floor for begin, end in pairs]
    # to `choose` a version under way looks like a finished one above the floor: not free
    index = choose([(b, b) if a else (b, e) for (b, e), a in zip(pairs, alive, strict=True)], new, kept, floor)
    return choose(pairs, new, kept, floor) if index is None else index
