"""Rebuilding a lost shard from shares of other nodes, with a k+m redundancy.

Each part of the shard belongs to a word of its own. For each, k shares are streamed at the same time, parts of other
ranks' shards and rows of parity, decoded chunk by chunk into the own arena, and compared with the checksums that the
lost owner took when the bytes were captured. Parts are rebuilt in parallel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

from .arena import Slot
from .coder import Coder
from .errors import ChecksumMismatch, StaleEpoch, TransferFailed, VaultError, as_vault_error
from .frames import Fetch, Found
from .intake import Intake
from .stripes import PartOf, cut, parts_of
from .transfer import ask, finish, own_copy, own_slot, side_by_side
from .vault import Vault
from .version import Version
from .wire import Channel, Deadlines, connect


@dataclass(frozen=True, slots=True)
class Piece:
    """One share of a word, and where it is.

    Attributes:
        share: below k a part of rank ``holder``'s shard; from k on row share - k of the parity of word ``holder``.
        version: under which the node has it.
    """

    share: int
    holder: int
    version: Version
    node: int
    host: str
    port: int


class RebuildFailed(VaultError):
    """A share could not be had: ``node`` should have given it, and it is of ``holder`` (see `Piece`)."""

    def __init__(self, message: str, node: int, holder: int, because: VaultError | None = None) -> None:
        super().__init__(message)
        self.node = node
        self.holder = holder
        if because is not None:
            self.broken, self.changed, self.gone = because.broken, because.changed, because.gone


@dataclass(slots=True)
class _Stream:
    """A share on its way: its chunks come one after the other."""

    piece: Piece
    channel: Channel
    found: Found
    chunks: int
    last_bytes: int
    records: list[PartOf]
    at: int = 0

    def next(self, size: int) -> memoryview:
        """The next chunk, verified; empty when the part has no more."""
        if self.at >= self.chunks:
            return memoryview(b"")
        view = memoryview(bytearray(size if self.at < self.chunks - 1 else self.last_bytes))
        self.channel.fill(view)
        expected = self.found.sums[len(self.found.sums) - self.chunks + self.at]
        if xxhash.xxh3_64_intdigest(view) != expected:
            raise ChecksumMismatch(f"chunk {self.at} of a share of node {self.piece.node} arrived changed")
        self.at += 1
        return view


def rebuild(
    vault: Vault,
    secret: bytes,
    rank: int,
    epoch: int,
    version: Version,
    parts: Sequence[Sequence[Piece]],
    coder: Coder,
    deadlines: Deadlines | None = None,
    doubted: bool = False,
) -> int:
    """Rebuild ``version`` of ``rank``'s shard in its own arena here; returns its bytes.

    ``parts[i]`` are k shares of the word of part i, at least one of them parity. ``doubted``: some have arrived changed
    before, so who has them reads them first. Blocks for the transfer; to fail, some deadline without progress must have
    passed. Raises RebuildFailed, StaleEpoch, VaultFull.
    """
    if epoch < vault.epoch:
        raise StaleEpoch(f"rebuild of rank {rank} in epoch {epoch}, but node {vault.node} is in epoch {vault.epoch}")
    patience = deadlines or Deadlines()
    with vault.intakes.begin(rank, f"rank {rank}", epoch, 2 * patience.idle) as intake:
        held = own_copy(vault, rank, version)
        if held is not None:
            return len(held.unique) + held.small_bytes
        work = _Rebuild(intake, vault, secret, rank, epoch, coder, patience, doubted)
        try:
            first = work.open(parts[0])
            mine = record_of(first, rank)
            slot = own_slot(intake, vault, rank, version, mine.unique_bytes, mine.small_capacity)
            slot.small[: len(mine.small)] = mine.small
            slot.sums[0] = xxhash.xxh3_64_intdigest(mine.small)
            side_by_side("vault-rebuild", len(parts), lambda i: work.part(slot, i, parts[i], None if i else first))
            if work.failures:
                raise work.failures[0]
        finally:
            work.close()
        intake.check()
        finish(slot, len(mine.small))
        return len(slot.unique) + len(mine.small)


def record_of(streams: Sequence[Stream], rank: int) -> PartOf:
    """What a keeper of parity knows of the lost shard. Raises RebuildFailed."""
    for stream in streams:
        for record in stream.records:
            if record.rank == rank:
                return record
    first = streams[0].piece
    raise RebuildFailed(f"no share of node {first.node} and others knows rank {rank}", first.node, first.holder)


class _Rebuild:
    def __init__(
        self,
        intake: Intake,
        vault: Vault,
        secret: bytes,
        rank: int,
        epoch: int,
        coder: Coder,
        deadlines: Deadlines,
        doubted: bool,
    ) -> None:
        self._doubted = doubted
        self._intake = intake
        self._vault, self._secret, self._rank, self._epoch = vault, secret, rank, epoch
        self._coder, self._deadlines = coder, deadlines
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self.failures: list[VaultError] = []

    def open(self, pieces: Sequence[Piece]) -> list[_Stream]:
        """Ask for all shares of a word. Raises RebuildFailed."""
        return [self._opened(piece) for piece in pieces]

    def part(self, slot: Slot, part: int, pieces: Sequence[Piece], streams: list[_Stream] | None) -> None:
        """Rebuild one part of the shard into ``slot``; what goes wrong is noted in ``failures`` and ends the others."""
        try:
            self._part(slot, part, streams if streams is not None else self.open(pieces))
        except Exception as err:  # noqa: BLE001 - a part that nobody misses would be taken for whole
            with self._lock:
                self.failures.append(as_vault_error(err))
                for channel in self._channels:
                    channel.shut()

    def close(self) -> None:
        """Give all connections back."""
        with self._lock:
            for channel in self._channels:
                channel.close()

    def _opened(self, piece: Piece) -> _Stream:
        try:
            return self._open(piece)
        except VaultError as err:
            if err.own:
                raise
            why = f"share {piece.share} of node {piece.node}: {err}"
            raise RebuildFailed(why, piece.node, piece.holder, err) from None

    def _open(self, piece: Piece) -> _Stream:
        channel = connect(piece.host, piece.port, self._secret, self._deadlines, lambda: self._intake.is_cut)
        with self._lock:
            self._channels.append(channel)
        self._intake.add(channel.shut)
        k, parity = self._coder.k, piece.share >= self._coder.k
        part, parts = (0, 1) if parity else (piece.share, k)
        found = ask(
            channel, Fetch(self._epoch, piece.holder, *piece.version, part, parts, parity, doubted=self._doubted)
        )
        size = self._coder.chunk_bytes
        chunks = cut(-(-found.unique_bytes // size), part, parts)
        extra = 1 if part == 0 else 0
        if found.chunk_bytes != size or len(found.sums) != len(chunks) + extra:
            raise TransferFailed("the share that was sent is not of the size that was announced")
        records: list[PartOf] = []
        if extra:
            small = memoryview(bytearray(found.small_bytes))
            channel.fill(small)
            if xxhash.xxh3_64_intdigest(small) != found.sums[0]:
                raise ChecksumMismatch("the records of a share arrived changed")
            records = parts_of(bytes(small)) if parity else []
        last = min(size, found.unique_bytes - (chunks.stop - 1) * size) if chunks else 0
        return _Stream(piece, channel, found, len(chunks), last, records)

    def _part(self, slot: Slot, part: int, streams: Sequence[_Stream]) -> None:
        decode_part(self._coder, self._rank, slot, part, streams, self._intake.check)


class Stream(Protocol):
    """A share, chunk by chunk."""

    piece: Piece
    records: list[PartOf]

    def next(self, size: int) -> memoryview:
        """The next chunk of at most ``size`` bytes, verified; empty when the part has no more. Raises VaultError."""


def decode_part(
    coder: Coder, rank: int, slot: Slot, part: int, streams: Sequence[Stream], check: Callable[[], None]
) -> None:
    """Decode one part of ``rank``'s shard into ``slot``, chunk by chunk; ``check`` raises once it is over.

    Raises RebuildFailed, which names the node whose share is of no use.
    """
    mine = record_of(streams, rank)
    chunks = cut(slot.chunks, part, coder.k)
    if mine.unique_bytes != len(slot.unique) or len(mine.sums) != len(chunks):
        first = streams[0].piece
        raise RebuildFailed(f"the parity of part {part} is of another shard", first.node, first.holder)
    for index, expected in zip(chunks, mine.sums, strict=True):
        shares: dict[int, memoryview] = {}
        for stream in streams:
            try:
                shares[stream.piece.share] = stream.next(coder.chunk_bytes)
            except VaultError as err:
                piece = stream.piece
                why = f"share {piece.share} of node {piece.node}: {err}"
                raise RebuildFailed(why, piece.node, piece.holder, err) from None
        check()
        into = slot.chunk(index)
        into[:] = coder.rebuild(part, shares)[: len(into)]
        if xxhash.xxh3_64_intdigest(into) != expected:
            last = streams[-1].piece
            raise RebuildFailed(
                f"chunk {index} of rank {rank} was rebuilt wrong: its shares are not of one generation",
                last.node,
                last.holder,
            )
        slot.sums[1 + index] = expected
