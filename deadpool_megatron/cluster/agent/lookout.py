"""A node's look around: is it cut off from the others, are its workers stuck (and at what), what is their pace?"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.fence import Fence
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.recovery import NodeRecovery
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.agent.workers import Worker
from deadpool_megatron.cluster.link.awake import AwakeClock

LOOK_S = 0.25
_PACE_S = 2.0
_MANY_NODES = 128  # more tell their pace less often, so that the coordinator hears as many a second
_GAPS = 256
_ANSWER_S = 2.0
_AGAIN_S = 5.0
_STACKS_S = 1.0
_UNKILLABLE_S = 10.0


def pace_every_s(active_nodes: int) -> float:
    """How often a node tells its pace, in seconds."""
    return _PACE_S * max(1.0, active_nodes / _MANY_NODES)


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


@dataclass(slots=True)
class _Look:
    pulse: Pulse
    query: int = 0
    asked: float | None = None
    reported: float = -_AGAIN_S
    stopped_since: float | None = None
    forwards: tuple[int, int] = (0, 0)


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
        self._processes = processes
        config = settings.config
        self._searches = config.hang_floor > 0  # for workers that make no progress
        self._rule = StallRule(config.hang_factor, config.hang_floor, config.hang_outside)
        self._lease = config.lease  # so long may a worker be stopped (SIGSTOP) before it counts as stuck
        self._looks: dict[int, _Look] = {}  # by process id
        self._ending: list[tuple[float, Worker]] = []
        self._queries = 0
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
        if self._finish(now):
            return f"a stuck worker of node {self._job.node} cannot be killed"
        if not self._searches:
            return ""
        mine, epoch = self._crew.mine(), self._job.epoch
        # One that has finished waits for the others, for as long as their last checkpoint takes.
        mine = {rank: worker for rank, worker in mine.items() if worker.reached.get("finished", -1) != epoch}
        if self._job.declared is None or self._recovery.settled:  # a recovery's pace is another
            for rank, worker in mine.items():
                self._look_at(rank, worker, now)
            for gone in self._looks.keys() - {w.pid for w in mine.values()}:
                del self._looks[gone]
        if now >= self._pace_due:
            self._pace_due = now + self._pace_s
            paces = self._paces(mine)
            if paces:
                self._send(r.Pace(self._job.node, max(w.page.iteration for w in mine.values()), paces))
        return ""

    def _look_at(self, rank: int, worker: Worker, now: float) -> None:
        """A few times a second, at each worker that holds a coordinate."""
        look = self._looks.get(worker.pid)
        if look is None:
            look = self._looks[worker.pid] = _Look(Pulse(self._rule, since=now))
        page = worker.page
        over = look.pulse.look(page.mark, page.in_step, now)
        if self._processes.is_stopped(worker):
            look.stopped_since = look.stopped_since or now
            if now - look.stopped_since > self._lease:
                self._report(worker, rank, look, "silent", now)
            return
        look.stopped_since = None
        if over < 0 or not worker.in_loop:
            look.asked = None
        elif look.asked is None:
            if now - look.reported >= _AGAIN_S:
                self._queries += 1
                look.query, look.asked = self._queries, now
                worker.send(r.Where(look.query))
        elif now - look.asked > _ANSWER_S:
            self._report(worker, rank, look, "silent", now)

    def answered(self, worker: Worker, record: r.Whereabouts) -> None:
        """A worker that was asked says where its training thread is."""
        now = self._clock.now()
        look = self._looks.get(worker.pid)
        if look is not None and look.asked is not None and look.query == record.query and worker.rank is not None:
            self._report(worker, worker.rank, look, "waiting" if record.waiting else "busy", now)

    def _report(self, worker: Worker, rank: int, look: _Look, state: r.Stall, now: float) -> None:
        look.asked = None
        if now - look.reported >= _AGAIN_S:
            look.reported = now
            seconds = now - look.pulse.since
            self._send(r.Stalled(self._job.epoch, self._job.node, rank, worker.page.iteration, seconds, state))

    def restart(self) -> None:
        """Ignore the gap that a recovery causes."""
        now = self._clock.now()
        for look in self._looks.values():
            look.pulse.restart(now)
            look.asked = None

    def _paces(self, workers: dict[int, Worker]) -> dict[int, float]:
        """Seconds a microbatch's forward pass took since the last call, by rank."""
        out: dict[int, float] = {}
        for rank, worker in workers.items():
            look = self._looks.get(worker.pid)
            if look is None:
                continue
            nanoseconds, count = worker.page.forwards
            if count > look.forwards[1]:
                out[rank] = (nanoseconds - look.forwards[0]) / (count - look.forwards[1]) / 1e9
            look.forwards = (nanoseconds, count)
        return out

    # ---- the end of a stuck worker

    def end_stuck(self, record: r.EndStuck) -> None:
        """The coordinator has judged a worker: keep its stacks, then end it."""
        stuck = self._crew.mine().get(record.rank) if record.epoch == self._job.epoch else None
        if stuck is not None:
            self._end(stuck)

    def keep_stacks(self, late: Iterable[Worker], end: bool) -> None:
        """The others wait for these workers: keep their stacks; ``end``: and end them."""
        for worker in late:
            if end:
                self._end(worker)
            else:
                self._processes.keep_stacks(worker)

    def _end(self, worker: Worker) -> None:
        """Keep the stacks of a stuck worker; it is killed a second later."""
        now = self._clock.now()
        self._processes.keep_stacks(worker)
        self._ending.append((now + _STACKS_S, worker))

    def _finish(self, now: float) -> bool:
        """Kill whose time has come. True when one does not die of it: the node cannot be saved then."""
        kept: list[tuple[float, Worker]] = []
        for due, worker in self._ending:
            if worker.exited:
                continue
            if now >= due:
                self._processes.kill(worker)
            if now >= due + _UNKILLABLE_S:
                return True
            kept.append((due, worker))
        self._ending = kept
        return False
