"""A little memory of the vault's kind, for a worker to copy through: how a spare is checked."""

from __future__ import annotations

import mmap
import os
from typing import Final

NBYTES: Final = 1 << 20  # of each half


class Scratch:
    """Two halves of shared memory, the first one of random bytes; without a name, so that nothing is left of it.

    Args:
        directory: where the arenas are. Raises OSError when there is no room.

    Attributes:
        path: where another process of this user finds it, while this one lives.
    """

    def __init__(self, directory: str) -> None:
        try:
            self._fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:  # a file system without nameless files
            self._fd = os.memfd_create("deadpool-check", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._fd, 0, 2 * NBYTES)
            self._mapped = mmap.mmap(self._fd, 2 * NBYTES)
        except OSError:
            os.close(self._fd)
            raise
        self._mapped[:NBYTES] = os.urandom(NBYTES)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def copied(self) -> bool:
        """The second half is what the first one is."""
        return self._mapped[:NBYTES] == self._mapped[NBYTES:]

    def close(self) -> None:
        """Give it back, as soon as the other process does."""
        self._mapped.close()
        os.close(self._fd)
