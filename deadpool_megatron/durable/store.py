"""Where durable generations lie: a directory, or whatever fsspec has a driver for.

In a directory a file is written under a temporary name, fsynced, then renamed, and the directory is fsynced. An object
store has no names to change: an object appears whole when its upload is closed, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from .errors import DurableError

_SYNC_BYTES = 64 << 20


class Writing(Protocol):
    """One file that is being written; it appears under its name with `commit`, and never after `abort`."""

    def write(self, data: memoryview | bytes) -> None:
        """Add bytes. May block for the disk or the network. Raises OSError."""

    def commit(self) -> None:
        """All bytes are on stable storage and the file has its name. Raises OSError."""

    def abort(self) -> None:
        """Leave nothing behind, as far as that can be had; never takes away what another writing has made."""


class Reading(Protocol):
    """One file that is being read."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes, at most so many; none at the end. Raises OSError."""

    def close(self) -> None:
        """Give it back."""


class Store(Protocol):
    """One durable directory. Names are ``directory/file``. Everything may block, and raise OSError."""

    root: str

    def check(self) -> None:
        """Raises DurableError when the root is not there."""

    def create(self, name: str) -> Writing:
        """Begin a file; its directory is made when it is missing, the root never is."""

    def open(self, name: str) -> Reading:
        """Read a file. Raises FileNotFoundError."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""

    def directories(self) -> list[str]:
        """Names of the directories below the root; none when it is not there."""

    def files(self) -> list[str]:
        """Names of the files in the root itself, likewise."""

    def claim(self, name: str, data: bytes) -> bool:
        """Make a small file in the root; False when there is one of that name: one of several callers makes it."""

    def overwrite(self, name: str, data: bytes) -> None:
        """Give a file that `claim` made other content of the same length. Raises FileNotFoundError."""

    def remove_file(self, name: str) -> None:
        """Remove a file for good; nothing happens when there is none."""

    def remove(self, directory: str) -> None:
        """Remove a directory and all in it."""


def open_store(url: str) -> Store:
    """The store at ``url``: a path, or what fsspec understands (``s3://bucket/runs``). Raises DurableError."""
    if "://" not in url or url.startswith("file://"):
        return LocalStore(url.removeprefix("file://"))
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as err:
        raise DurableError(f"--deadpool-durable-dir {url}: {err}") from None
    return ObjectStore(system, root, url)


# ---- a directory


class LocalStore:
    """A directory of this machine's, or a shared file system's."""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).absolute())

    def _path(self, name: str) -> Path:
        return Path(self.root) / name

    def check(self) -> None:
        """Raises DurableError when the root is not there: a mount that is gone must not become a directory."""
        if not os.path.isdir(self.root):
            raise DurableError(f"--deadpool-durable-dir {self.root} is not there (any more)")
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise DurableError(f"--deadpool-durable-dir {self.root} cannot be written to")

    def create(self, name: str) -> _LocalWriting:
        path = self._path(name)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path.parent)
        return _LocalWriting(path)

    def open(self, name: str) -> Reading:
        return open(self._path(name), "rb", buffering=0)

    def size(self, name: str) -> int | None:
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            return None

    def directories(self) -> list[str]:
        return self._names(os.DirEntry.is_dir)

    def files(self) -> list[str]:
        return self._names(os.DirEntry.is_file)

    def _names(self, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
        if not os.path.isdir(self.root):
            return []
        with os.scandir(self.root) as entries:
            return sorted(e.name for e in entries if wanted(e))

    def claim(self, name: str, data: bytes) -> bool:
        """The server of a shared file system decides who is first (open(2): O_EXCL, from NFS 3 on)."""
        try:
            fd = os.open(self._path(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        _write_synced(fd, data)
        _sync_directory(Path(self.root))
        return True

    def overwrite(self, name: str, data: bytes) -> None:
        """In place: whoever has seen the file on another host asks for its content, not for its name, anew."""
        _write_synced(os.open(self._path(name), os.O_WRONLY | os.O_CLOEXEC), data)

    def remove_file(self, name: str) -> None:
        path = self._path(name)
        if path.exists():
            path.unlink()
            _sync_directory(path.parent)

    def remove(self, directory: str) -> None:
        shutil.rmtree(self._path(directory), ignore_errors=False)


class _LocalWriting:
    def __init__(self, path: Path) -> None:
        self._path = path
        # Nobody else's: of a shared directory processes of several containers may have one id.
        self._temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._unsynced = 0

    def write(self, data: memoryview | bytes) -> None:
        """Add bytes; every 64 MiB they are brought to the disk, so that the page cache holds no more than that."""
        view = memoryview(data)
        while view:
            done = os.write(self._fd, view)
            view = view[done:]
            self._unsynced += done
        if self._unsynced >= _SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)  # nobody reads it soon: training needs the memory
        self._unsynced = 0

    def commit(self) -> None:
        """fsync, rename, fsync of the directory."""
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(self._fd)
        self._fd = -1
        os.rename(self._temporary, self._path)
        _sync_directory(self._path.parent)

    def abort(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def _write_synced(fd: int, data: bytes) -> None:
    try:
        os.pwrite(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- anything else


@contextlib.contextmanager
def _as_os_errors(url: str) -> Iterator[None]:
    """Drivers raise what their client libraries raise; here, at the border to them, all of it becomes OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as err:
        raise OSError(f"{url}: {type(err).__name__}: {err}") from err


class ObjectStore:
    """A store that fsspec has a driver for. Objects appear whole at the end of their upload."""

    def __init__(self, system: Any, root: str, url: str) -> None:
        self._fs = system
        self._base = root.rstrip("/")
        self.root = url.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def check(self) -> None:
        """Raises DurableError when the store cannot be reached. Object stores have no empty directories to look for."""
        try:
            with _as_os_errors(self.root):
                self._fs.exists(self._base)
        except OSError as err:
            raise DurableError(f"--deadpool-durable-dir {self.root} cannot be reached: {err}") from None

    def create(self, name: str) -> _ObjectWriting:
        with _as_os_errors(self.root):
            self._fs.makedirs(self._path(name).rsplit("/", 1)[0], exist_ok=True)
            return _ObjectWriting(self._fs, self._path(name), self.root)

    def open(self, name: str) -> Reading:
        with _as_os_errors(self.root):
            return _ObjectReading(self._fs.open(self._path(name), "rb"), self.root)

    def size(self, name: str) -> int | None:
        with _as_os_errors(self.root):
            try:
                return int(self._fs.size(self._path(name)))
            except FileNotFoundError:
                return None

    def directories(self) -> list[str]:
        return self._names("directory")

    def _names(self, kind: str) -> list[str]:
        with _as_os_errors(self.root):
            try:
                found = self._fs.ls(self._base, detail=True)
            except FileNotFoundError:
                return []
            return sorted(e["name"].rstrip("/").rsplit("/", 1)[1] for e in found if e["type"] == kind)

    def files(self) -> list[str]:
        return self._names("file")

    def claim(self, name: str, data: bytes) -> bool:
        """With a condition on the upload where the driver has one; else two who ask at once may both be told True."""
        with _as_os_errors(self.root):
            if self._fs.exists(self._path(name)):
                return False
            self._fs.makedirs(self._base, exist_ok=True)
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

    def overwrite(self, name: str, data: bytes) -> None:
        with _as_os_errors(self.root):
            if not self._fs.exists(self._path(name)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            self._fs.pipe_file(self._path(name), data)

    def remove_file(self, name: str) -> None:
        with _as_os_errors(self.root), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove(self, directory: str) -> None:
        with _as_os_errors(self.root):
            self._fs.rm(self._path(directory), recursive=True)


class _ObjectReading:
    """What a driver raises in the middle of a file is an OSError too."""

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def read(self, size: int = -1, /) -> bytes:
        """See `Reading`."""
        with _as_os_errors(self._url):
            data: bytes = self._file.read(size)
            return data

    def close(self) -> None:
        """See `Reading`."""
        with _as_os_errors(self._url):
            self._file.close()


class _ObjectWriting:
    def __init__(self, system: Any, path: str, url: str) -> None:
        self._fs = system
        self._path = path
        self._url = url
        self._file = system.open(path, "wb")

    def write(self, data: memoryview | bytes) -> None:
        """Add bytes; the driver sends them in parts of its own size."""
        with _as_os_errors(self._url):
            self._file.write(bytes(data))

    def commit(self) -> None:
        with _as_os_errors(self._url):
            self._file.close()

    def abort(self) -> None:
        """Give the upload up, and remove nothing: what has the name may be another writing's, and whole."""
        from fsspec.spec import AbstractBufferedFile

        uploads = isinstance(self._file, AbstractBufferedFile)  # others write under the name at once
        with contextlib.suppress(OSError), _as_os_errors(self._url):
            if uploads:
                self._file.discard()
            else:
                self._file.close()
        if uploads:
            self._file.closed = True  # or its destructor would end the upload with what there is
