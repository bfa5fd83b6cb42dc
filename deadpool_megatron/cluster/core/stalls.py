"""Who is stuck and who only waits for it; who is slow. Judgements on what agents report."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping

from deadpool_megatron.cluster import records as r

SETTLE_S = 3.0
FRESH_S = 15.0
_HEEDED_S = 30.0  # who has been named is ended by then, or its node has left: else its agent has not heard of it


class StallJudge:
    """One epoch's account of ranks without progress.

    Who waits inside a communication waits for somebody else; the one that does not is stuck. What looks "busy" may wait
    on a device, so it is judged only when others had time to report: when more than half of all ranks are busy, it is
    the communication that is stuck. The same holds when every rank waits. Who is "silent" needs no such comparison, and
    is what the busy ones wait for, be it one rank or all of a node.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._reports: dict[int, tuple[r.Stall, float]] = {}
        self._judged: dict[int, float] = {}  # by rank that was named, when
        self.due: float | None = None

    def report(self, record: r.Stalled, now: float) -> None:
        """A rank makes no progress; repeated every few seconds while that is so."""
        self._reports[record.rank] = (record.state, now)
        if self._to_judge(record.rank, now) and record.state == "silent":
            self.due = now
        elif self._to_judge(record.rank, now) and self.due is None and record.state != "waiting":
            self.due = now + SETTLE_S
        elif len(self._fresh(now)) == self._world_size:
            self.due = now

    def verdict(self, now: float) -> tuple[list[int], bool]:
        """(ranks that are stuck and not yet named, whether the communication itself is stuck)."""
        self.due = None
        fresh = self._fresh(now)
        silent, busy = (sorted(n for n, state in fresh.items() if state == kind) for kind in ("silent", "busy"))
        guilty = silent or busy
        if len(guilty) > self._world_size // 2 or (not guilty and len(fresh) == self._world_size):
            return [], True
        named = [rank for rank in guilty if self._to_judge(rank, now)]
        self._judged |= dict.fromkeys(named, now)
        return named, False

    def _to_judge(self, rank: int, now: float) -> bool:
        return now >= self._judged.get(rank, -math.inf) + _HEEDED_S

    def _fresh(self, now: float) -> dict[int, r.Stall]:
        return {rank: state for rank, (state, at) in self._reports.items() if now - at < FRESH_S}


class StragglerJudge:
    """Finds nodes that are slower than those that do the same work: their peers of the same pipeline stage.

    A node is a straggler when the forward pass of one of its ranks takes ``factor`` times the lower median of the
    others of its stage in every report of ``lasting_s`` seconds: an alarm about a moment's load is false.
    """

    def __init__(self, factor: float = 1.5, lasting_s: float = 28.0) -> None:
        self._factor = factor
        self._lasting_s = lasting_s
        self._latest: dict[int, tuple[int, float]] = {}  # by rank, its stage and seconds
        self._sorted: dict[int, list[float]] = {}  # by stage
        self._slow_since: dict[int, float] = {}
        self.named: dict[int, float] = {}

    def report(
        self, node: int, forward_s: Mapping[int, float], stage_of: Mapping[int, int], now: float
    ) -> float | None:
        """A node's seconds a microbatch, by rank. Returns how many times slower it is when it becomes a straggler."""
        for rank, seconds in forward_s.items():
            self._take_out(rank)
            if (stage := stage_of.get(rank)) is not None and seconds > 0:
                self._latest[rank] = stage, seconds
                insort(self._sorted.setdefault(stage, []), seconds)
        ratio = max((self._ratio(rank) for rank in forward_s), default=1.0)
        if ratio < self._factor:
            self._slow_since.pop(node, None)
            self.named.pop(node, None)
            return None
        if now - self._slow_since.setdefault(node, now) < self._lasting_s or node in self.named:
            return None
        self.named[node] = ratio
        return ratio

    def forget(self, ranks: Iterable[int]) -> None:
        """These coordinates have moved."""
        for rank in ranks:
            self._take_out(rank)
        self._slow_since.clear()
        self.named.clear()

    def _take_out(self, rank: int) -> None:
        known = self._latest.pop(rank, None)
        if known is not None:
            of_stage = self._sorted[known[0]]
            del of_stage[bisect_left(of_stage, known[1])]

    def _ratio(self, rank: int) -> float:
        """How many times slower than the lower median of the others of its stage."""
        known = self._latest.get(rank)
        if known is None:
            return 1.0
        stage, seconds = known
        of_stage = self._sorted[stage]
        if len(of_stage) < 2:
            return 1.0
        middle = (len(of_stage) - 2) // 2
        return seconds / of_stage[middle if middle < bisect_left(of_stage, seconds) else middle + 1]
