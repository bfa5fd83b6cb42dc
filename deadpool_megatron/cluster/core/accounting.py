"""What the snapshots of a running job cost and are worth, from the coordinator's point of view. Pure.

A failure at a moment x of an iteration (0 to 1) costs x iterations if the generation opened with it is committed by
then, else one interval more. With c for the time to commit in iterations and a generation every K iterations, the
expected loss is K / 2 + c iterations.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from deadpool_megatron.cluster import records as r

_RECENT: Final = 64


@dataclass(slots=True)
class SnapshotAccount:
    """Feed it with what happens, in any order; times are seconds of one monotonic clock."""

    planned_bytes: int = 0
    expected_bytes: int = 0
    _began: dict[int, float] = field(default_factory=dict)
    _committed: dict[int, float] = field(default_factory=dict)
    _commit_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _iteration_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _interval: int = 1
    _last_generation: int | None = None
    _last: r.Iteration | None = None

    def registered(self, record: r.Registered) -> None:
        """A coordinate has planned its shard; once each."""
        self.planned_bytes += record.unique_bytes
        self.expected_bytes += record.expected_bytes

    def iterated(self, record: r.Iteration, now: float) -> float | None:
        """An iteration has ended; returns the seconds its generation took to be committed, None if it is not yet."""
        self._last = record
        self._iteration_s.append(record.seconds)
        self._began[record.iteration] = now - record.seconds
        return self._settle(record.iteration)

    def committed(self, generation: int, now: float) -> float | None:
        """A generation is committed; returns the seconds since it opened, None while that is not known."""
        if self._last_generation is not None and generation > self._last_generation:
            self._interval = generation - self._last_generation
        self._last_generation = generation
        self._committed[generation] = now
        return self._settle(generation)

    def forget(self) -> None:
        """A new epoch: what was under way is void."""
        self._began.clear()
        self._committed.clear()
        self._last_generation = None

    def _settle(self, generation: int) -> float | None:
        began, done = self._began.get(generation), self._committed.get(generation)
        for known in (self._began, self._committed):
            for old in [g for g in known if g < generation - _RECENT]:
                del known[old]
        if began is None or done is None:
            return None
        seconds = max(0.0, done - began)
        self._commit_s.append(seconds)
        return seconds

    def summary(self) -> dict[str, Any]:
        """For ``status.json``. Medians over the last iterations; None for what is not known yet."""
        last = self._last
        iteration_s = statistics.median(self._iteration_s) if self._iteration_s else None
        commit_s = statistics.median(self._commit_s) if self._commit_s else None
        share = commit_s / iteration_s if commit_s is not None and iteration_s else None
        lost = self._interval / 2 + share if share is not None else None
        return {
            "planned_bytes": self.planned_bytes,
            "expected_bytes": self.expected_bytes,
            "iteration_s": iteration_s,
            "commit_s": commit_s,
            "commit_share": share,
            "expected_lost_iterations": lost,
            "expected_lost_s": lost * iteration_s if lost is not None and iteration_s else None,
            "copied_bytes": last.copied_bytes if last else None,
            "sent_bytes": last.sent_bytes if last else None,
            "copy_bandwidth": last.copy_bandwidth if last else None,
            "send_bandwidth": last.send_bandwidth if last else None,
            "blocked_s": last.blocked_s if last else None,
            "stall_s": last.stall_s if last else None,
            "device_stall_s": last.device_stall_s if last else None,
            "skipped_generations": last.skipped_generations if last else None,
        }
