"""When to copy how much: the shortest time to commit that training does not feel. Pure: times and bytes in, bytes out.

A generation is worth nothing until it is committed, so copying begins as soon as the generation opens and asks for
all the bandwidth there is. What holds it back:

* the backlog: what has been asked for and has not landed yet. A tick asks for no more than lands until the next tick
  does (by the bandwidth and the tick times of this run), so that small transfers of training itself, such as the loss
  on its way to the host, never wait behind more than one gap's worth of ours. The gaps of pipeline bubbles are the long
  ones, so they take the most;
* busy links: while parameters are gathered or gradients reduced, the copies would share links with them. Such ticks
  are passed over as long as the quiet ticks still to come can take everything that is left;
* a limit in bytes a second, if the user sets one;
* the end: what is left when the gate comes is copied there, and counted as a stall.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_NEW = 0.25  # weight of a new measurement in a running mean
_MARGIN = 1.25  # quiet ticks must be able to take this much more than what is left, or busy ones are used as well


@dataclass(slots=True)
class _Tick:
    """What is known of the n-th tick of an iteration."""

    gap_s: float
    busy: bool


@dataclass(slots=True)
class Pacing:
    """Decides at each tick. The first tick of an iteration (number 0) is the opening of the generation itself.

    Attributes:
        limit: bytes a second that copying may take at most; 0 for no limit.
        least: bytes asked for at a tick at least, if that many are left: less gains nothing and commits later.
        bandwidth: bytes a second that this run's copies reach; 0 while nothing has been measured.
        avoids: busy links can be avoided: quiet ticks make up most of an iteration.
    """

    limit: float = 0.0
    least: int = 4 << 20
    bandwidth: float = 0.0
    avoids: bool = False
    _known: list[_Tick] = field(default_factory=list)
    _opened: float = 0.0
    _last: float = 0.0
    _number: int = -1
    _asked: int = 0

    def begin(self, now: float) -> None:
        """A generation opens at ``now`` (seconds). `ask` for tick 0 follows."""
        self._opened = now
        self._number = -1
        self._asked = 0

    def ask(self, now: float, remaining: int, backlog: int, busy: bool) -> int:
        """Bytes to copy at this tick.

        Args:
            now: seconds.
            remaining: bytes not asked for yet.
            backlog: bytes asked for that have not landed.
            busy: training uses the links until the next tick.
        """
        self._learn(now, busy)
        if not remaining:
            return 0
        rate = self._rate()
        if not rate or self._number >= len(self._known):
            wanted = remaining if not rate else int(rate * self._usual_gap())  # nothing is known of this tick
        else:
            if busy and self._quiet_bytes() >= _MARGIN * (remaining + backlog):
                return 0
            wanted = int(rate * self._known[self._number].gap_s) - backlog
        wanted = max(wanted, self.least if not backlog else 0)
        if self.limit:
            until = now + (self._known[self._number].gap_s if self._number < len(self._known) else self._usual_gap())
            wanted = min(wanted, int(self.limit * (until - self._opened)) - self._asked)
        wanted = max(0, min(wanted, remaining))
        self._asked += wanted
        return wanted

    def close(self, now: float) -> None:
        """The gate: no tick comes after it in this iteration."""
        self._measure_gap(now)
        del self._known[self._number + 1 :]
        quiet = sum(tick.gap_s for tick in self._known if not tick.busy)
        self.avoids = 2 * quiet > sum(tick.gap_s for tick in self._known)

    def landed(self, nbytes: int, seconds: float) -> None:
        """``nbytes`` took ``seconds`` from the moment the engine could begin with them."""
        if seconds > 0 and nbytes:
            measured = nbytes / seconds
            self.bandwidth += (measured - self.bandwidth) * (_NEW if self.bandwidth else 1.0)

    def _learn(self, now: float, busy: bool) -> None:
        self._measure_gap(now)
        self._number += 1
        self._last = now
        if self._number < len(self._known):
            self._known[self._number].busy = busy

    def _measure_gap(self, now: float) -> None:
        """The tick before has lasted until ``now``."""
        if self._number < 0:
            return
        gap = now - self._last
        if self._number < len(self._known):
            tick = self._known[self._number]
            tick.gap_s += (gap - tick.gap_s) * _NEW
        else:
            self._known.append(_Tick(gap, False))

    def _rate(self) -> float:
        return min(self.bandwidth, self.limit) if self.limit else self.bandwidth

    def _usual_gap(self) -> float:
        gaps = [tick.gap_s for tick in self._known]
        return sum(gaps) / len(gaps) if gaps else 0.0

    def _quiet_bytes(self) -> float:
        """What the quiet ticks still to come can take."""
        return self._rate() * sum(tick.gap_s for tick in self._known[self._number + 1 :] if not tick.busy)
