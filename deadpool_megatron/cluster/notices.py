"""Signals that say that the machines are wanted, from outside and between the processes of a job."""

from __future__ import annotations

import signal
from typing import Final

__all__ = ["INTERRUPT", "PREEMPT", "WARNINGS"]

# To the coordinator: end the job; the machines are wanted soon (to an agent: pass that on).
INTERRUPT: Final = signal.SIGRTMIN + 7
PREEMPT: Final = signal.SIGRTMIN + 6
# What batch systems are asked to send before the end of the time, to every process of a job: the machines are wanted
# soon. Nobody sends those two above by accident.
WARNINGS: Final = (signal.SIGUSR1, signal.SIGUSR2)
