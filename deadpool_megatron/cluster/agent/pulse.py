"""A page of memory a worker and its agent share: the worker's progress, written on the hot path without a system call.

=====  =======================================================================
word   what
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

from deadpool_megatron.vault.words import Words

PULSE_FD = "DEADPOOL_PULSE_FD"
_BYTES = 4096


def shared_page(name: str) -> int:
    """The descriptor of a new page of zeros to share with processes that it is passed on to."""
    fd = os.memfd_create(f"deadpool-{name}", os.MFD_CLOEXEC)
    os.ftruncate(fd, _BYTES)
    return fd


class PulsePage:
    """One worker's page. Nothing is locked."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _BYTES)
        self._words = Words(memoryview(self._map))

    @classmethod
    def create(cls) -> PulsePage:
        """A new page of zeros, not inherited by children unless its ``fd`` is passed on."""
        return cls(shared_page("pulse"))

    @property
    def mark(self) -> int:
        """Grows while there is progress."""
        return self._words[0]

    @property
    def in_step(self) -> bool:
        """The worker is inside of a training step."""
        return bool(self._words[1])

    @property
    def iteration(self) -> int:
        """The iteration it is in."""
        return self._words[2]

    @property
    def forwards(self) -> tuple[int, int]:
        """Nanoseconds spent in forward passes of training, and how many there were."""
        return self._words[3], self._words[4]

    def beat(self) -> None:
        """Progress."""
        self._words.add(0, 1)

    def enter(self, iteration: int) -> None:
        """A training step begins."""
        self._words[2] = iteration
        self._words[1] = 1
        self._words.add(0, 1)

    def leave(self) -> None:
        """A training step is over."""
        self._words[1] = 0
        self._words.add(0, 1)

    def forward(self, nanoseconds: int) -> None:
        """A forward pass has taken this long."""
        self._words.add(3, nanoseconds)
        self._words.add(4, 1)

    def close(self) -> None:
        """Let go of the page."""
        self._words.release()
        self._map.close()
        os.close(self.fd)
