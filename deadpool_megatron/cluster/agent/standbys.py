"""Processes that wait to take the place of a worker of their own node (``--deadpool-standby-workers``).

::

    training, calm --> start, one at a time --> parked --> the worker of its slot ends: it holds the slot's coordinate
         ^                                                                      |
         '----------------------- the recovery is over -------------------------'

One that ends before it was needed costs nothing. Another one is started, a few times; then none for an hour.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.agent.workers import Worker

CALM_S: Final = 2.0
"""So long a node has trained before it starts one: imports take processors from the iteration that is redone."""
_MOST_ENDS: Final = 3  # of one slot, in this time:
_ENDS_S: Final = 3600.0


class Standbys:
    """Those of one node. Used by the agent's thread only.

    Args:
        level: how far they are set up, as `DeadpoolConfig.standby_workers`.
        beside: processes of the node that hold no slot, of which these are some.

    Attributes:
        asked: there are to be any.
    """

    def __init__(self, job: KnownJob, processes: WorkerProcesses, level: str, beside: list[Worker]) -> None:
        self._job = job
        self._processes = processes
        self._level = level
        self.asked = level != "none"
        self._beside = beside
        self._ends: dict[int, list[float]] = {}  # by local index, when one ended since the last that took the slot
        self._now = 0.0  # at the last look
        self._calm_since: float | None = None

    def look(self, workers: Iterable[Worker], calm: bool, now: float) -> None:
        """Start one where one is missing; call often. ``calm``: the workers that hold coordinates here all train.

        One at a time, since all of them take memory bandwidth and processors from those that train.
        """
        self._now = now
        if not self.asked or not calm or not self._job.ranks:
            self._calm_since = None
            return
        self._calm_since = now if self._calm_since is None else self._calm_since
        mine = self._mine()
        if now - self._calm_since < CALM_S or any(not each.parked for each in mine):
            return
        there = {each.local for each in mine}
        for worker in workers:
            local = worker.local
            ends = self._recent_ends(local)
            wanted = local in self._job.ranks and local not in there and len(ends) < _MOST_ENDS
            if wanted and not self._processes.adopted(local):
                # Where a coordinate could not be set up ahead of time, the next one waits without.
                ahead = self._level == "coordinate" and not ends
                rehearses = self._job.ranks[local] if ahead else None
                self._beside.append(self._processes.start(local, None, rehearses, standby=True))
                return

    def ready(self, local: int) -> Worker | None:
        """The process that can take this slot now."""
        rank = self._job.ranks.get(local)
        for each in self._mine():
            fits = each.local == local and rank is not None and each.rehearses in (None, rank)
            if fits and each.parked and each.process.poll() is None:  # (it may have ended with the worker)
                return each
        return None

    def take(self, local: int) -> Worker | None:
        """The same, which holds the slot from now on."""
        worker = self.ready(local)
        if worker is not None:
            self._beside.remove(worker)
            self._ends.pop(local, None)
        return worker

    def pids(self) -> dict[int, int]:
        """By local index, those that can take their slot now."""
        return {local: worker.pid for local in sorted(self._job.ranks) if (worker := self.ready(local)) is not None}

    def left(self, worker: Worker, how: str) -> str:
        """One has ended by itself; what that means, in a line."""
        ends = self._ends[worker.local] = [*self._recent_ends(worker.local), self._now]
        more = len(ends) < _MOST_ENDS
        then = "another one is started" if more else f"none is started for an hour after {len(ends)} in a row"
        return f"the process that stood by for local worker {worker.local} has ended: {how}; {then}"

    def _recent_ends(self, local: int) -> list[float]:
        return [when for when in self._ends.get(local, ()) if self._now - when < _ENDS_S]

    def _mine(self) -> list[Worker]:
        return [each for each in self._beside if each.standby and not each.retired]
