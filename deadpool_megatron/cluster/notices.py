"""Signals that say that the machines are wanted, from outside and between the processes of a job."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Final

# To the coordinator: end the job, as Ctrl-C does or as SIGTERM does; to an agent: end this node, whatever SIGTERM means
# to it. PREEMPT: the machines are wanted soon (an agent passes that on).
INTERRUPT: Final = signal.SIGRTMIN + 7
TERMINATE: Final = signal.SIGRTMIN + 5
PREEMPT: Final = signal.SIGRTMIN + 6
# What batch systems are asked to send before the end of the time, to every process of a job: the machines are wanted
# soon. Nobody sends those above by accident.
WARNINGS: Final = (signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A process that is started here meanwhile cannot be ended by a warning before it has called `ignored`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignored() -> None:
    """Warnings are for others: somebody else says what they mean for this process."""
    for signum in WARNINGS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WARNINGS)
