"""A clock for limits of tests, which does not judge a machine by what else it has to do.

It measures what a test's processes do, not the hour: while their threads wait for a processor it goes slower, by the
share of the time that they got. A test that stands still, or is busy for ever, comes to its limit; one that is only
slow does not.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

__all__ = ["CLOCK", "FairClock", "tree"]

_SAMPLE_S = 2.0
# Seconds of a processor in each sample that count as used: who sleeps is not starved by what little he waits for.
_IDLE_S = 0.01


class FairClock:
    """Seconds as they would pass if every thread of this process and of all below it had a processor to itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._at = time.monotonic()
        self._seen: dict[str, tuple[int, int]] = {}

    def seconds(self) -> float:
        """Since some moment; never goes back. Looks at the processes every two seconds at most."""
        with self._lock:
            now = time.monotonic()
            if (passed := now - self._at) >= _SAMPLE_S:
                self._at = now
                ran, waited = self._sample()
                self._seconds += passed * (ran + _IDLE_S) / (ran + waited + _IDLE_S)
            return self._seconds

    def _sample(self) -> tuple[float, float]:
        """Seconds that all threads have run, and waited for a processor, since the last sample."""
        seen: dict[str, tuple[int, int]] = {}
        for pid in tree(os.getpid()):
            with contextlib.suppress(OSError):  # it has just ended
                for thread in os.listdir(f"/proc/{pid}/task"):
                    with contextlib.suppress(OSError, ValueError):
                        ran, waited, _ = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()
                        seen[thread] = int(ran), int(waited)
        before, self._seen = self._seen, seen
        deltas = [(a[0] - b[0], a[1] - b[1]) for t, a in seen.items() for b in [before.get(t, (0, 0))] if a >= b]
        return sum(d[0] for d in deltas) / 1e9, sum(max(0, d[1]) for d in deltas) / 1e9


def tree(root: int) -> list[int]:
    """The ids of a process and of all below it that live now."""
    children: dict[int, list[int]] = {}
    names: list[str] = []
    with contextlib.suppress(OSError):  # a test may have left no descriptor for it
        names = os.listdir("/proc")
    for name in names:
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    out = [root]
    for pid in out:  # grows
        out += children.get(pid, [])
    return out


CLOCK = FairClock()
