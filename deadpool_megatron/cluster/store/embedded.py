"""The store that needs nothing installed: a journal in a directory, locked for each use.

Several processes may use one directory, on one machine or over a shared file system with POSIX locks. A write is a
frame at the end of ``journal``, synced before the call returns; everybody else reads on from where it stopped. A lease
is a file that its holder keeps locked: the kernel ends it with the process, so no clock is involved and a lease is
never lost to a busy machine.

    frame: length (4) | CRC-32 (4) | msgpack of [revision, [[key, value or nil, lease], ...]]
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from deadpool_megatron.cluster.store.base import Deposed, Entry, Guard, Lease, Store, StoreError, Watch

_HEAD: Final = 8
_LOOK_S: Final = 0.05  # how often a watch looks; inotify does not see other machines
_COMPACT_BYTES: Final = 8 << 20

_encoder = msgspec.msgpack.Encoder()
_Change = tuple[str, bytes | None, str]
_decoder = msgspec.msgpack.Decoder(tuple[int, list[_Change]])


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
        self._journal = self._directory / "journal"
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()
        self._entries: dict[str, tuple[Entry, str]] = {}
        self._revision = 0
        self._position = self._inode = self._live = 0
        try:
            (self._directory / "leases").mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as err:
            raise StoreError(f"store in {directory}: {err.strerror}") from None

    # ---- the interface

    def get(self, key: str) -> Entry | None:
        with self._locked() as fd:
            self._drop_ended(fd, [key])
            found = self._entries.get(key)
            return found[0] if found else None

    def put(self, values: Mapping[str, bytes], lease: Lease | None = None, guard: Guard | None = None) -> int:
        with self._locked() as fd:
            self._check(fd, guard)
            return self._write(fd, [(key, value, self._name(lease)) for key, value in values.items()])

    def compare_and_set(self, key: str, revision: int, value: bytes, lease: Lease | None = None) -> int:
        with self._locked() as fd:
            self._drop_ended(fd, [key])
            found = self._entries.get(key)
            if (found[0].revision if found else 0) != revision:
                return 0
            return self._write(fd, [(key, value, self._name(lease))])

    def delete(self, prefix: str, guard: Guard | None = None) -> None:
        with self._locked() as fd:
            self._check(fd, guard)
            self._write(fd, [(key, None, "") for key in self._entries if key.startswith(prefix)])

    # ---- for the base

    def _grant(self, ttl_s: float) -> Lease:
        return _FileLease(self._directory / "leases" / f"{os.getpid()}-{os.urandom(6).hex()}")

    # ---- the journal

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The journal, locked and read to its end; yields its descriptor."""
        end = time.monotonic() + self._timeout_s
        with self._mutex:
            fd = -1
            try:
                while True:
                    fd = os.open(self._journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                    self._lock(fd, end)
                    if _inode(self._journal) == os.fstat(fd).st_ino:
                        break
                    os.close(fd)  # somebody has put a compacted one in its place
                self._read(fd)
                yield fd
            except StoreError:
                raise
            except OSError as err:
                raise StoreError(f"store in {self._directory}: {err.strerror or err}") from None
            finally:
                if fd >= 0:
                    os.close(fd)

    def _lock(self, fd: int, end: float) -> None:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise StoreError(
                        f"store in {self._directory}: locked by another process for {self._timeout_s:g} s"
                    ) from None
                time.sleep(0.001)  # held for the time of one write

    def _read(self, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        if inode != self._inode:
            self._entries, self._revision, self._position, self._inode = {}, 0, 0, inode
        data = os.pread(fd, max(0, os.fstat(fd).st_size - self._position), self._position)
        at = 0
        while at + _HEAD <= len(data):
            length, check = (int.from_bytes(data[at + i : at + i + 4], "big") for i in (0, 4))
            body = data[at + _HEAD : at + _HEAD + length]
            if len(body) < length or (zlib.crc32(body) != check and at + _HEAD + length == len(data)):
                break
            if zlib.crc32(body) != check:
                raise StoreError(f"{self._journal} is damaged {self._position + at} bytes from its begin")
            self._apply(*_decoder.decode(body))
            at += _HEAD + length
        self._position += at
        if at < len(data):
            os.ftruncate(fd, self._position)  # a writer died in the middle: nobody was told of that write

    def _apply(self, revision: int, changes: list[_Change]) -> None:
        self._revision = revision
        for key, value, lease in changes:
            if value is None:
                self._entries.pop(key, None)
            else:
                self._entries[key] = (Entry(value, revision), lease)

    def _write(self, fd: int, changes: list[_Change]) -> int:
        if not changes:
            return self._revision
        frame = _frame(self._revision + 1, changes)
        _write_all(fd, frame)
        os.fdatasync(fd)
        self._position += len(frame)
        self._apply(self._revision + 1, changes)
        if self._position > _COMPACT_BYTES:
            self._compact()
        return self._revision

    def _compact(self) -> None:
        """A new journal with what is live only, in place of this one; revisions stay."""
        new = self._directory / f"journal.{os.getpid()}"
        by_revision = sorted(self._entries.items(), key=lambda item: item[1][0].revision)
        frames = [_frame(e.revision, [(key, e.value, lease)]) for key, (e, lease) in by_revision]
        if sum(map(len, frames)) > _COMPACT_BYTES // 2:
            return
        if not by_revision or by_revision[-1][1][0].revision < self._revision:
            frames.append(_frame(self._revision, []))
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, b"".join(frames))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, self._journal)

    # ---- leases, guards, watches

    def _name(self, lease: Lease | None) -> str:
        assert lease is None or isinstance(lease, _FileLease)
        return lease.path.name if lease is not None else ""

    def _drop_ended(self, fd: int, keys: list[str]) -> None:
        """Remove those of ``keys`` whose lease has ended."""
        ended: list[_Change] = []
        for key in keys:
            found = self._entries.get(key)
            if found and found[1] and not self._held(found[1]):
                ended.append((key, None, ""))
        self._write(fd, ended)

    def _held(self, lease: str) -> bool:
        try:
            fd = os.open(self._directory / "leases" / lease, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            (self._directory / "leases" / lease).unlink(missing_ok=True)
            return False
        finally:
            os.close(fd)

    def _check(self, fd: int, guard: Guard | None) -> None:
        if guard is None:
            return
        self._drop_ended(fd, [guard.key])
        found = self._entries.get(guard.key)
        if found is None or found[0].revision != guard.revision:
            raise Deposed(f"{guard.key} is not ours any more")

    def _follow(self, key: str, watch: Watch) -> None:
        last: int | None = None
        while not (watch.closed.is_set() or self._closed.is_set()):
            watch.closed.wait(0 if last is None else _LOOK_S)
            try:
                entry = self.get(key)
            except StoreError:
                continue  # a watch outlives that
            now = entry.revision if entry else 0
            if now != last:
                last = now
                watch.told(entry)


def _frame(revision: int, changes: list[_Change]) -> bytes:
    body = _encoder.encode((revision, changes))
    return len(body).to_bytes(4, "big") + zlib.crc32(body).to_bytes(4, "big") + body


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1
