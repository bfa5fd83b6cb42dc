"""The store that needs nothing installed: two copies of all keys in a directory, locked for each use.

Several processes may use one directory, on one machine or over a shared file system with POSIX locks. A write goes over
the older copy, all keys in it, and is synced before the call returns: a writer that dies in the middle leaves the newer
copy as it is. ``lock`` has the revision that was acknowledged last, so a copy that was never finished, of which nobody
was told, differs from one that has been damaged since. A lease is a file that its holder keeps locked: the kernel ends
it with the process, so no clock is involved and a lease is never lost to a busy machine.

    copy: length (4) | CRC-32 (4) | msgpack of [revision, {key: [value, revision, lease]}]
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from deadpool_megatron.cluster.store.base import Deposed, Entry, Guard, Lease, Store, StoreDamaged, StoreError, Watch

_HEAD: Final = 8
_LOOK_S: Final = 0.05  # how often a watch looks; inotify does not see other machines


class _Kept(NamedTuple):
    value: bytes
    revision: int
    lease: str


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[int, dict[str, _Kept]])


class _FileLease(Lease):
    def __init__(self, path: Path) -> None:
        self.lost = threading.Event()
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


class EmbeddedStore(Store):
    """A store in a directory, made where it is missing. Raises StoreError when it cannot be."""

    def __init__(self, directory: str | Path, timeout_s: float = 10.0) -> None:
        super().__init__()
        self._directory = Path(directory)
        self._lock = self._directory / "lock"
        self._copies = [self._directory / f"copy.{i}" for i in range(2)]  # revision r is in copy r % 2
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()
        self._revision = 0
        self._entries: dict[str, _Kept] = {}
        if (self._directory / "journal").exists():
            raise StoreError(
                f"store in {directory}: an older version of DeadPool has written it; end its job with that version, or "
                "remove this directory to begin anew"
            )
        try:
            (self._directory / "leases").mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in (self._lock, *self._copies):
                if not path.exists():  # else the directory may have become read-only since
                    path.touch(mode=0o600)
        except OSError as err:
            raise StoreError(f"store in {directory}: {err.strerror}") from None

    # ---- the interface

    def get(self, key: str) -> Entry | None:
        with self._locked():
            kept = self._entries.get(key)
            return Entry(kept.value, kept.revision) if kept else None

    def put(self, values: Mapping[str, bytes], lease: Lease | None = None, guard: Guard | None = None) -> int:
        with self._locked() as lock:
            self._check(guard)
            return self._write(lock, self._with(values, lease))

    def compare_and_set(self, key: str, revision: int, value: bytes, lease: Lease | None = None) -> int:
        with self._locked() as lock:
            return self._write(lock, self._with({key: value}, lease)) if self._at(key) == revision else 0

    def delete(self, prefix: str, guard: Guard | None = None) -> None:
        with self._locked() as lock:
            self._check(guard)
            self._write(lock, {key: kept for key, kept in self._entries.items() if not key.startswith(prefix)})

    # ---- the copies

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Nobody else uses the store, and what it has is read; yields the descriptor of ``lock``."""
        end = time.monotonic() + self._timeout_s
        try:
            with self._mutex, open(self._lock, "r+b", 0) as lock:
                while not _try_lock(lock.fileno()):
                    if time.monotonic() >= end:
                        raise StoreError(
                            f"store in {self._directory}: locked by another process for {self._timeout_s:g} s"
                        )
                    time.sleep(0.001)  # held for the time of one write
                self._read(lock.fileno())
                yield lock.fileno()
        except StoreError:
            raise
        except OSError as err:
            raise StoreError(f"store in {self._directory}: {err.strerror or err}") from None

    def _read(self, lock: int) -> None:
        self._revision, entries = max(map(_read_copy, self._copies), key=lambda copy: copy[0])
        acknowledged = int.from_bytes(os.pread(lock, 8, 0), "big")
        if self._revision < acknowledged:
            raise StoreDamaged(
                f"store in {self._directory}: {self._copies[acknowledged % 2].name} is damaged, so what was decided "
                "last is lost; remove this directory and start the job again"
            )
        if self._revision > acknowledged:  # its writer died, maybe before this was on disk; others go on from it now
            self._acknowledge(lock, self._revision)
        self._entries = {key: kept for key, kept in entries.items() if not kept.lease or self._held(kept.lease)}

    def _write(self, lock: int, entries: dict[str, _Kept]) -> int:
        if entries != self._entries:
            body = _encoder.encode((self._revision + 1, entries))
            with open(self._copies[(self._revision + 1) % 2], "r+b") as copy:
                copy.write(len(body).to_bytes(4, "big") + zlib.crc32(body).to_bytes(4, "big") + body)
            self._acknowledge(lock, self._revision + 1)
            self._revision += 1
        return self._revision

    def _acknowledge(self, lock: int, revision: int) -> None:
        with open(self._copies[revision % 2], "r+b") as copy:
            os.fdatasync(copy.fileno())
        os.pwrite(lock, revision.to_bytes(8, "big"), 0)

    def _with(self, values: Mapping[str, bytes], lease: Lease | None) -> dict[str, _Kept]:
        assert lease is None or isinstance(lease, _FileLease)
        name = lease.path.name if lease is not None else ""
        return self._entries | {key: _Kept(value, self._revision + 1, name) for key, value in values.items()}

    # ---- leases, guards, watches

    def _grant(self, ttl_s: float) -> Lease:
        return _FileLease(self._directory / "leases" / f"{os.getpid()}-{os.urandom(6).hex()}")

    def _held(self, lease: str) -> bool:
        path = self._directory / "leases" / lease
        try:
            with open(path, "r+b") as file:
                if _try_lock(file.fileno()):
                    path.unlink(missing_ok=True)
                    return False
                return True
        except FileNotFoundError:
            return False

    def _at(self, key: str) -> int:
        return self._entries[key].revision if key in self._entries else 0

    def _check(self, guard: Guard | None) -> None:
        if guard is not None and self._at(guard.key) != guard.revision:
            raise Deposed(f"{guard.key} is not ours any more")

    def _follow(self, key: str, watch: Watch) -> None:
        while not (watch.closed.is_set() or self._closed.is_set()):
            with suppress(StoreError):  # a watch outlives that
                watch.changed(self.get(key))
            watch.closed.wait(_LOOK_S)


def _read_copy(path: Path) -> tuple[int, dict[str, _Kept]]:
    """The revision of a copy, and its keys; 0 when it is not whole."""
    data = path.read_bytes()
    length, check = (int.from_bytes(data[i : i + 4], "big") for i in (0, 4))
    body = data[_HEAD : _HEAD + length]
    return _decoder.decode(body) if len(body) == length > 0 and zlib.crc32(body) == check else (0, {})


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
