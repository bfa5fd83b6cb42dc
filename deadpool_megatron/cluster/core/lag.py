"""How far protection is behind training, and whether a person should know. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_COMMITS: Final = 3  # that may be missing: a generation is copied, sent and told of while the next ones are trained
_SECONDS: Final = 10.0  # of training that a loss would cost, below which it is nobody's concern


@dataclass(frozen=True, slots=True)
class Lag:
    """What a loss would cost now beside what it always costs.

    Args:
        iterations: ended since the committed generation began.
        seconds: since a generation was committed last.
        cause: what holds commits back, in words.
    """

    iterations: int
    seconds: float
    cause: str


class LagJudge:
    """Tells when commits fall behind, each time it is twice as much as before, and when they have caught up.

    Args:
        interval: iterations from one generation to the next.
    """

    def __init__(self, interval: int) -> None:
        self._limit = _COMMITS * interval + 2
        self._told = 0  # iterations behind when that was told last; 0: they are not
        self._committed: float | None = None
        self.lag: Lag | None = None

    def committed(self, now: float) -> bool:
        """A generation is committed; True when that ends a time of being behind."""
        behind, self.lag = self.lag is not None, None
        self._committed, self._told = now, 0
        return behind

    def iterated(self, iterations: int, cause: Callable[[], str], now: float) -> bool:
        """An iteration has ended, so many after the committed generation; True when a person should know of it."""
        if self._committed is None:
            self._committed = now
        seconds = now - self._committed
        if iterations <= self._limit or seconds < _SECONDS:
            return False
        self.lag = Lag(iterations, seconds, cause())
        if iterations < 2 * self._told:
            return False
        self._told = iterations
        return True
