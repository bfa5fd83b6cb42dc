"""A page of memory a worker and its agent share: the worker's progress, written on the hot path without a call.

=====  =======================================================================
word   what (64-bit signed)
=====  =======================================================================
0      mark: grows at every forward and backward pass and at every step's ends
1      1 inside of a training step, 0 outside
2      iteration
3      nanoseconds spent in forward passes of training
4      forward passes of training
=====  =======================================================================
"""

from __future__ import annotations

import mmap
import os

__all__ = ["PULSE_FD", "PulsePage"]

PULSE_FD = "DEADPOOL_PULSE_FD"
_BYTES = 4096


class PulsePage:
    """One worker's page. Aligned words are written and read whole; nothing is locked."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _BYTES)
        self.words = memoryview(self._map).cast("q")

    @classmethod
    def create(cls) -> PulsePage:
        """A new page of zeros, not inherited by children unless its ``fd`` is passed on."""
        fd = os.memfd_create("deadpool-pulse", os.MFD_CLOEXEC)
        os.ftruncate(fd, _BYTES)
        return cls(fd)

    @property
    def mark(self) -> int:
        """Grows while there is progress."""
        return self.words[0]

    @property
    def in_step(self) -> bool:
        """The worker is inside of a training step."""
        return bool(self.words[1])

    @property
    def iteration(self) -> int:
        """The iteration it is in."""
        return self.words[2]

    def beat(self) -> None:
        """Progress."""
        self.words[0] += 1

    def enter(self, iteration: int) -> None:
        """A training step begins."""
        self.words[2] = iteration
        self.words[1] = 1
        self.words[0] += 1

    def leave(self) -> None:
        """A training step is over."""
        self.words[1] = 0
        self.words[0] += 1

    def forward(self, nanoseconds: int) -> None:
        """A forward pass has taken this long."""
        self.words[3] += nanoseconds
        self.words[4] += 1

    def close(self) -> None:
        """Let go of the page."""
        self.words.release()
        self._map.close()
        os.close(self.fd)
