"""A little memory of the vault's kind, for a worker to copy through: how a spare is checked."""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress
from typing import Final

from .leftovers import MAGIC, PAGE

NBYTES: Final = 1 << 20  # of each half


class Scratch:
    """A file of a page and two halves, the first one of random bytes.

    The page is that of an arena without anything in it, and the agent holds a lock on the file: if it is killed, this
    is cleared away with its arenas (`leftovers`).

    Args:
        path: where it is to be, beside the arenas. Raises OSError when there is no room.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with suppress(FileNotFoundError):
            os.unlink(path)
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._fd, 0, PAGE + 2 * NBYTES)
            self._mapped = mmap.mmap(self._fd, PAGE + 2 * NBYTES)
        except OSError:
            self._end()
            raise
        self._mapped[:8] = MAGIC.to_bytes(8, "little")
        self._mapped[PAGE : PAGE + NBYTES] = os.urandom(NBYTES)

    @staticmethod
    def halves(file: memoryview) -> tuple[memoryview, memoryview]:
        """The two halves of such a file's bytes."""
        return file[PAGE : PAGE + NBYTES], file[PAGE + NBYTES :]

    @property
    def copied(self) -> bool:
        """The second half is what the first one is."""
        return self._mapped[PAGE : PAGE + NBYTES] == self._mapped[PAGE + NBYTES :]

    def close(self) -> None:
        """Give it back, as soon as the other process does."""
        self._mapped.close()
        self._end()

    def _end(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        os.close(self._fd)
