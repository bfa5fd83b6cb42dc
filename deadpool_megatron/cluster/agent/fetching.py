"""Whom to ask for a shard, or for constants, next, and when to give it up. Pure: `Shards` does the asking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deadpool_megatron.vault import VaultError

_PATIENCE_S = 10.0  # for a shard whose holder cannot be reached; a holder that is gone ends the epoch sooner
_PAUSE_S = 0.05


class Attempts[Place]:
    """All holders at once, then the first alone; if a connection broke, the others one by one, then all that again.

    A connection that breaks says nothing of the copy. Nor does one complaint that it has arrived changed: the first
    holder is asked once more then. Any other error of that one is the outcome.

    Args:
        places: who holds the version; at least one.
        now: in seconds.
    """

    def __init__(self, places: Sequence[Place], now: float) -> None:
        self._places = list(places)
        self._end = now + _PATIENCE_S
        self._pause = _PAUSE_S
        self._again = False
        self._left: list[list[Place]] = []
        self.error: VaultError | None = None
        """What the first holder alone said last."""
        self.doubted = False
        """What the first holder alone has given has arrived changed."""
        self._round()

    def _round(self) -> None:
        first, *others = self._places
        self._left = [[first], *([other] for other in others)]
        if others:
            self._left.insert(0, self._places)

    @property
    def asked(self) -> list[Place]:
        """Whom to ask now: one, or several for a part each."""
        return self._left[0]

    def failed(self, err: VaultError, now: float) -> float | None:
        """Asking has failed. Seconds until the next attempt; None: it is given up, because of ``error``."""
        asked = self._left.pop(0)
        if len(asked) > 1:
            return 0.0
        if asked == [self._places[0]] and len(self._left) == len(self._places) - 1:
            self.error = err
            if err.changed and not self.doubted:
                self.doubted = True
                self._left.insert(0, asked)
                return 0.0
            if not err.broken:
                return None
        if self._left:
            return 0.0
        if now > self._end and self._again:
            return None
        self._again = True
        self._round()
        pause, self._pause = self._pause, min(2 * self._pause, 1.0)
        return pause


class Search[Place]:
    """All places, again and again for a while, until one has given what may be nowhere.

    Args:
        everybody: asked as well once one of the places may have it and cannot give it (its bytes have changed, or it
            cannot be reached).

    Attributes:
        left: who has not said yet that it does not have it.
    """

    def __init__(self, places: Iterable[Place], now: float, everybody: Iterable[Place] = ()) -> None:
        self.left = list(dict.fromkeys(places))
        self._more = [place for place in dict.fromkeys(everybody) if place not in self.left]
        self._end = now + _PATIENCE_S
        self._pause = 0.0

    def pause(self, now: float) -> float | None:
        """Seconds until all that are left are to be asked; None: it is given up."""
        if not self.left or now > self._end:
            return None
        pause, self._pause = self._pause, min(2 * self._pause, 1.0) or _PAUSE_S
        return pause

    def lacks(self, place: Place) -> None:
        """This one does not have it."""
        self.left.remove(place)

    def widen(self) -> None:
        """It is somewhere: ask everybody."""
        self.left += self._more
        self._more = []
