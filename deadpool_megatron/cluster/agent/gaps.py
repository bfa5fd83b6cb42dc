"""When a worker has made no progress for too long, by its own pace. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

_GAPS = 256


@dataclass(frozen=True, slots=True)
class StallRule:
    """When no progress is too long: ``factor`` times the longest gap of late, ``floor`` seconds at least.

    Outside of training steps (an evaluation's end, a checkpoint, the first iteration) gaps have no pace: ``outside``
    seconds then.
    """

    factor: float
    floor: float
    outside: float


@dataclass(slots=True)
class Pulse:
    """One worker's progress as its agent sees it: a mark that grows, looked at now and then."""

    rule: StallRule
    mark: int = -1
    since: float = 0.0
    in_step: bool = False
    _gaps: deque[float] = field(default_factory=lambda: deque(maxlen=_GAPS))

    def look(self, mark: int, in_step: bool, now: float) -> float:
        """The worker's mark is this now. Returns the seconds it has been over its limit; negative while it is not."""
        if mark != self.mark:
            if self.mark >= 0 and self.in_step and in_step:
                self._gaps.append(now - self.since)
            self.mark, self.since, self.in_step = mark, now, in_step
        return now - self.since - self.limit()

    def limit(self) -> float:
        """How long the current gap may last, in seconds."""
        if not self.in_step or len(self._gaps) < 8:
            return self.rule.outside
        return max(self.rule.floor, self.rule.factor * max(self._gaps))

    def restart(self, now: float) -> None:
        """A recovery has gone by: the gap that it made says nothing."""
        self.since, self.in_step = now, False
