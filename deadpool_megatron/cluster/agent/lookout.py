"""A node's look around: is it cut off from the others, are its workers stuck, what is their pace?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.fence import Fence
from deadpool_megatron.cluster.agent.gaps import StallRule
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.recovery import NodeRecovery
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.agent.stuck import StuckWatch
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.agent.workers import Worker
from deadpool_megatron.cluster.link.awake import AwakeClock

LOOK_S = 0.25
_PACE_S = 2.0
_MANY_NODES = 128  # more tell their pace less often, so that the coordinator hears as many a second


def pace_every_s(active_nodes: int) -> float:
    """How often a node tells its pace, in seconds."""
    return _PACE_S * max(1.0, active_nodes / _MANY_NODES)


class Lookout:
    """Used by the agent's thread only.

    Args:
        fence: this node's doubt when it has lost the coordinator.
        send: sends a record to the coordinator.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        settings: AgentSettings,
        job: KnownJob,
        crew: Crew,
        recovery: NodeRecovery,
        processes: WorkerProcesses,
        fence: Fence,
        send: Callable[[r.AgentRecord], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job = job
        self._crew = crew
        self._recovery = recovery
        self._send = send
        self._fence = fence
        self._clock = AwakeClock(max(8 * LOOK_S, settings.config.lease / 2), clock)
        self._looks = settings.config.hang_floor > 0  # for workers that make no progress
        rule = StallRule(settings.config.hang_factor, settings.config.hang_floor, settings.config.hang_outside)
        self._stuck = StuckWatch(rule, settings.config.lease, processes, self._stalled)
        self._pace_s = pace_every_s(settings.active_nodes)
        self._due = self._pace_due = self._wait_due = 0.0
        self._wait_s = settings.config.lease / 2

    def look(self, connected: bool) -> str:
        """Call often. Why this node has to fence itself; empty when it has not. ``connected``: to the coordinator."""
        now = self._clock.now()
        if self._clock.stood_still():
            self.restart()  # if this node stood still, so did its workers
        if now < self._due:
            return ""
        self._due = now + LOOK_S
        if connected:
            self._fence.connected()
        elif self._fence.cut_off(self._job.vaults, now):
            return f"node {self._job.node} is cut off from the others and ends its workers"
        elif now >= self._wait_due:
            self._wait_due = now + self._wait_s
            for worker in self._crew.mine().values():
                if worker.waits(self._job.epoch) or not self._recovery.settled:
                    worker.send(r.KeepWaiting())
        if self._stuck.finish(now):
            return f"a stuck worker of node {self._job.node} cannot be killed"
        if not self._looks:
            return ""
        mine, epoch = self._crew.mine(), self._job.epoch
        # One that has finished waits for the others, for as long as their last checkpoint takes.
        mine = {rank: worker for rank, worker in mine.items() if worker.reached.get("finished", -1) != epoch}
        if self._job.declared is None or self._recovery.settled:  # a recovery's pace is another
            self._stuck.look(mine, now)
        if now >= self._pace_due:
            self._pace_due = now + self._pace_s
            paces = self._stuck.paces(mine)
            if paces:
                self._send(r.Pace(self._job.node, max(w.page.iteration for w in mine.values()), paces))
        return ""

    def _stalled(self, worker: Worker, record: r.Stalled) -> None:
        self._send(msgspec.structs.replace(record, epoch=self._job.epoch, node=self._job.node))

    def restart(self) -> None:
        """Ignore the gap that a recovery causes."""
        self._stuck.restart(self._clock.now())

    def answered(self, worker: Worker, record: r.Whereabouts) -> None:
        """A worker that was asked says where its training thread is."""
        self._stuck.answered(worker, record, self._clock.now())

    def end_stuck(self, record: r.EndStuck) -> None:
        """The coordinator has judged a worker: keep its stacks, then end it."""
        stuck = self._crew.mine().get(record.rank) if record.epoch == self._job.epoch else None
        if stuck is not None:
            self._stuck.end(stuck, self._clock.now())

    def keep_stacks(self, late: Iterable[Worker], end: bool) -> None:
        """The others wait for these workers: keep their stacks; ``end``: and end them."""
        for worker in late:
            if end:
                self._stuck.end(worker, self._clock.now())
            else:
                self._stuck.processes.keep_stacks(worker)
