"""How fast a drain may go: spread over the time there is until the next one, so that training does not feel it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Sleeps so that ``total`` bytes take about ``seconds``; 0 seconds: as fast as it goes.

    A slow disk never makes it wait longer: what was late already is not waited for again.

    Args:
        keep_waiting: looked at between sleeps of a tenth of a second; False ends the wait at once.
    """

    def __init__(
        self,
        total: int,
        seconds: float,
        keep_waiting: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._total = max(1, total)
        self._seconds = seconds
        self._keep_waiting = keep_waiting
        self._clock = clock
        self._sleep = sleep
        self._start = clock()
        self._done = 0

    def moved(self, nbytes: int) -> None:
        """``nbytes`` more are written: wait until it is time for the next ones."""
        self._done += nbytes
        due = self._start + self._seconds * min(1.0, self._done / self._total)
        while self._keep_waiting():
            left = due - self._clock()
            if left <= 0:
                return
            self._sleep(min(left, 0.1))
