"""Reading parts of shards out of other nodes' vaults: their small state, and ranges of their unique bytes."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Final

import xxhash

from .errors import ChecksumMismatch, Malformed, StaleEpoch, TransferFailed, Unreadable, VaultError
from .frames import MAX_RUNS, Fetch, Found, Sent
from .transfer import ask
from .version import Version
from .wire import Channel, Deadlines, check_secret, connect

_log = logging.getLogger(__name__)
_BATCH: Final = 64 << 20  # bytes of one request, of which no round trip is noticed
_MOST_OPEN: Final = 64  # connections of one reader: a rank looks at the shards of all replicas, which may be hundreds
_TRIES: Final = 2  # of each holder, without a chunk that is good between them

type _Place = tuple[str, int]


class Copies:
    """The copies of one version's shards, read from the memory of the nodes that hold them. For one thread.

    Nothing is taken before its chunk agrees with the holder's checksum. A holder that fails in any way (it is gone,
    says nothing within a deadline, does not hold the version, gives changed bytes) gives way to the next one, which
    goes on where it stopped; all are asked twice before a read fails. Takes memory for one chunk, and a small state.

    Args:
        secret: the job's 32 bytes.
        epoch: of the caller.
        version: what is read; of constants, the version that they were set aside with (see `Vault.find`).
        places: by rank, or holder of constants (`constants_of`), (host, port) of the vaults that hold it, best first.
    """

    def __init__(
        self,
        secret: bytes,
        epoch: int,
        version: Version,
        places: Mapping[int, Sequence[tuple[str, int]]],
        deadlines: Deadlines | None = None,
    ) -> None:
        self._secret = check_secret(secret)
        self._epoch = epoch
        self._version = Version(*version)
        self.places = {rank: tuple(dict.fromkeys((host, port) for host, port in at)) for rank, at in places.items()}
        self._deadlines = deadlines or Deadlines()
        self._channels: dict[_Place, Channel] = {}
        self._sizes: dict[int, tuple[int, int]] = {}  # by rank, its unique bytes and those of a chunk
        self._faults: Counter[_Place | tuple[int, _Place]] = Counter()  # of connections; of copies
        self._buffer = bytearray()

    def small(self, rank: int) -> bytes:
        """The small state of ``rank``. Blocks for the transfer.

        Raises Unreadable when no holder can give it, StaleEpoch when the job has gone on to a newer epoch.
        """
        small = b""
        for _, data in self._entries(rank, (0,)):
            small = bytes(data)
        return small

    def read(self, rank: int, ranges: Sequence[tuple[int, int]], take: Callable[[int, memoryview], None]) -> None:
        """Read ranges of the unique bytes of ``rank``; only the chunks that they touch are sent.

        Args:
            ranges: [begin, end) in bytes, ascending, not overlapping; empty ones are left out.
            take: called with the offset in the unique bytes and data, which is valid until it returns; in ascending
                order, with each wanted byte once. What it raises ends the read. One that takes longer than the
                holder's deadline costs a new connection.

        Blocks for the transfer. Raises as `small`, and VaultError for ranges that the shard has not got. What has been
        taken before stays good.
        """
        wanted, before = [], 0
        for begin, end in ranges:
            if not before <= begin <= end:
                raise VaultError(f"ranges of rank {rank} overlap or are not ascending at {begin}:{end}")
            before = end
            if begin < end:
                wanted.append((begin, end))
        if not wanted:
            return
        for _ in self._entries(rank, ()):
            pass  # tells the sizes
        unique_bytes, size = self._sizes[rank]
        if before > unique_bytes:
            raise VaultError(f"rank {rank} has {unique_bytes} unique bytes, and those up to {before} are wanted")
        chunks: list[int] = []
        for begin, end in wanted:
            chunks += range(max(begin // size, chunks[-1] + 1 if chunks else 0), -(-end // size))
        at = 0
        with closing(self._entries(rank, [1 + chunk for chunk in chunks])) as entries:
            for entry, data in entries:
                start = (entry - 1) * size
                stop = start + len(data)
                while at < len(wanted) and wanted[at][0] < stop:
                    begin, end = max(wanted[at][0], start), min(wanted[at][1], stop)
                    take(begin, data[begin - start : end - start])
                    if wanted[at][1] > stop:
                        break
                    at += 1

    def close(self) -> None:
        """End all connections."""
        for place in list(self._channels):
            self._disconnect(place)

    # ---- the holders, one after the other

    def _entries(self, rank: int, entries: Sequence[int]) -> Generator[tuple[int, memoryview]]:
        """Entries of the checksum table (ascending) and their bytes, verified; afterwards the sizes are known."""
        places = self.places.get(rank, ())
        tries: Counter[_Place] = Counter()
        reasons: dict[_Place, VaultError] = {}
        done = 0
        while done < len(entries) or rank not in self._sizes:
            left = [place for place in places if tries[place] < _TRIES]
            if not left:
                what = "; ".join(f"{host}:{port}: {reasons[host, port]}" for host, port in places)
                raise Unreadable(
                    f"no copy of rank {rank}, version {tuple(self._version)}, can be read: {what or 'nobody holds it'}",
                    reasons,
                )
            place = min(left, key=lambda one: (tries[one], self._faults[one] + self._faults[rank, one]))
            if tries[place]:
                time.sleep(self._deadlines.backoff)
            batch = MAX_RUNS if rank not in self._sizes else max(1, min(MAX_RUNS, _BATCH // self._sizes[rank][1]))
            try:
                with closing(self._sent(place, rank, entries[done : done + batch])) as sent:
                    for data in sent:
                        yield entries[done], data
                        done += 1
                        tries.clear()
            except StaleEpoch:
                raise  # nobody waits any more for what is read
            except VaultError as err:
                _log.warning("rank %d: the copy at %s:%d cannot be read: %s", rank, *place, err)
                tries[place] += 1
                reasons[place] = err
                self._faults[place if err.broken else (rank, place)] += 1

    def _sent(self, place: _Place, rank: int, entries: Sequence[int]) -> Generator[memoryview]:
        """What one holder sends for one request, verified. Ends the connection unless all of it has come."""
        channel = self._channel(place)
        whole = False
        try:
            found = ask(channel, Fetch(self._epoch, rank, *self._version, 0, 1, runs=_runs(entries)))
            unique_bytes, size = self._check(rank, found, len(entries))
            for entry, expected in zip(entries, found.sums, strict=True):
                start = (entry - 1) * size
                data = self._view(found.small_bytes if entry == 0 else min(size, unique_bytes - start))
                channel.fill(data)
                if xxhash.xxh3_64_intdigest(data) != expected:
                    raise ChecksumMismatch(f"entry {entry} of its table arrived changed")
                yield data.toreadonly()
            end = channel.receive()
            if not isinstance(end, Sent):
                raise Malformed(f"unexpected {type(end).__name__} frame after a shard")
            whole = True  # intact or not: all of it agrees with sums that were of this version
        finally:
            if not whole:
                self._disconnect(place)

    def _check(self, rank: int, found: Found, entries: int) -> tuple[int, int]:
        """Sizes of the shard as told. Raises TransferFailed when they cannot be."""
        sizes = found.unique_bytes, found.chunk_bytes
        if len(found.sums) != entries or found.chunk_bytes < 1 or found.small_bytes > found.small_capacity:
            raise TransferFailed("the shard that is sent is not what was asked for")
        if self._sizes.setdefault(rank, sizes) != sizes:
            raise VaultError(f"it has {sizes} bytes and bytes a chunk, and another copy has {self._sizes[rank]}")
        return sizes

    def _view(self, nbytes: int) -> memoryview:
        if len(self._buffer) < nbytes:
            self._buffer = bytearray(nbytes)
        return memoryview(self._buffer)[:nbytes]

    def _channel(self, place: _Place) -> Channel:
        channel = self._channels.pop(place, None) or connect(*place, self._secret, self._deadlines)
        self._channels[place] = channel  # the last one: who was not asked for longest is first
        if len(self._channels) > _MOST_OPEN:
            self._disconnect(next(iter(self._channels)))
        return channel

    def _disconnect(self, place: _Place) -> None:
        channel = self._channels.pop(place, None)
        if channel is not None:
            channel.close()


def _runs(entries: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending entries as runs [first, end)."""
    runs: list[tuple[int, int]] = []
    for entry in entries:
        if runs and runs[-1][1] == entry:
            runs[-1] = (runs[-1][0], entry + 1)
        else:
            runs.append((entry, entry + 1))
    return runs
