"""The agent's look at its workers: who makes no progress, and what the stuck one was doing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.gaps import Pulse, StallRule
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.agent.workers import Worker

_ANSWER_S = 2.0
_AGAIN_S = 5.0
_STACKS_S = 1.0
_UNKILLABLE_S = 10.0


@dataclass(slots=True)
class _Look:
    pulse: Pulse
    query: int = 0
    asked: float | None = None
    reported: float = -_AGAIN_S
    stopped_since: float | None = None
    forwards: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class StuckWatch:
    """Looks at the pulse of each worker. One thread.

    Args:
        rule: when no progress is too long.
        lease: seconds a worker may be stopped (SIGSTOP) before it counts as stuck.
        tell: called with `Stalled` records (their node and epoch are filled in by the agent).
    """

    rule: StallRule
    lease: float
    processes: WorkerProcesses
    tell: Callable[[Worker, r.Stalled], None]
    _looks: dict[int, _Look] = field(default_factory=dict)
    _ending: list[tuple[float, Worker]] = field(default_factory=list)
    _queries: int = 0

    def look(self, workers: dict[int, Worker], now: float) -> None:
        """Call a few times a second with the workers that hold coordinates, by rank."""
        for rank, worker in workers.items():
            self._look_at(rank, worker, now)
        for gone in self._looks.keys() - {w.pid for w in workers.values()}:
            del self._looks[gone]

    def _look_at(self, rank: int, worker: Worker, now: float) -> None:
        look = self._looks.get(worker.pid)
        if look is None:
            look = self._looks[worker.pid] = _Look(Pulse(self.rule, since=now))
        page = worker.page
        over = look.pulse.look(page.mark, page.in_step, now)
        if self.processes.is_stopped(worker):
            look.stopped_since = look.stopped_since or now
            if now - look.stopped_since > self.lease:
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

    def answered(self, worker: Worker, record: r.Whereabouts, now: float) -> None:
        """A worker's watcher thread says where its training thread is."""
        look = self._looks.get(worker.pid)
        if look is not None and look.asked is not None and look.query == record.query and worker.rank is not None:
            self._report(worker, worker.rank, look, "waiting" if record.waiting else "busy", now)

    def _report(self, worker: Worker, rank: int, look: _Look, state: r.Stall, now: float) -> None:
        look.asked = None
        if now - look.reported >= _AGAIN_S:
            look.reported = now
            seconds = now - look.pulse.since
            self.tell(worker, r.Stalled(0, 0, rank, worker.page.iteration, seconds, state))

    def restart(self, now: float) -> None:
        """Ignore the gap that a recovery causes."""
        for look in self._looks.values():
            look.pulse.restart(now)
            look.asked = None

    def paces(self, workers: dict[int, Worker]) -> dict[int, float]:
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

    def end(self, worker: Worker, now: float) -> None:
        """Keep the stacks of a stuck worker; it is killed a second later."""
        self.processes.keep_stacks(worker)
        self._ending.append((now + _STACKS_S, worker))

    def finish(self, now: float) -> bool:
        """Kill whose time has come. True when one does not die of it: the node cannot be saved then."""
        kept: list[tuple[float, Worker]] = []
        for due, worker in self._ending:
            if worker.exited:
                continue
            if now >= due:
                self.processes.kill(worker)
            if now >= due + _UNKILLABLE_S:
                return True
            kept.append((due, worker))
        self._ending = kept
        return False
