"""A clock that stands still while its process does: what nobody could hear is nobody's silence. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class AwakeClock:
    """Monotonic seconds in which this process ran.

    A process that was stopped, a virtual machine that was paused, a host that swapped: all of them look back on a gap
    in which deadlines passed and connections ended, without anybody having been late. So the gap does not count. Not
    thread-safe: one caller, who asks for the time at least every ``most_s`` seconds while it runs.

    Args:
        most_s: a longer gap between two looks means that the process did not run.
        clock: monotonic seconds, the gaps included.
    """

    def __init__(self, most_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_s = most_s
        self._clock = clock
        self._seen = clock()
        self._missed = 0.0
        self._untold = 0.0
        self._woke = -math.inf

    def now(self) -> float:
        """The time; it never goes back."""
        seen = self._clock()
        gap, self._seen = seen - self._seen, seen
        if gap > self._most_s:
            self._missed += gap
            self._untold += gap
            self._woke = seen - self._missed
        return seen - self._missed

    def stood_still(self) -> float:
        """Seconds that were left out since this was asked last."""
        untold, self._untold = self._untold, 0.0
        return untold

    def just_woke(self, within_s: float) -> bool:
        """The last gap ended less than ``within_s`` seconds ago."""
        return self.now() - self._woke < within_s
