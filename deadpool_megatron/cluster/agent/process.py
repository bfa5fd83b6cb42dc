"""The agent's process, one a node: its loop, sockets and signals around `Agent`.

It starts and watches the workers, owns the vault, and speaks with the coordinator. One thread runs the loop; the
vault's threads report through a queue. Nothing here trains, and nothing here imports torch, so an agent starts in a
fraction of a second and wakes in milliseconds.
"""

from __future__ import annotations

import math
import os
import signal
import time

import zmq

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.agent import Agent
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.fence import Fence
from deadpool_megatron.cluster.agent.kernel_log import KernelLog
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.lookout import LOOK_S
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.agent.shards import Shards
from deadpool_megatron.cluster.agent.uplink import Uplink
from deadpool_megatron.cluster.agent.watch import Watch
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.notices import INTERRUPT, PREEMPT, WARNINGS
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.cluster.records.exits import Exit

_SAME_NOTICE_S = 5.0  # the batch system tells every process, and they tell each other


class AgentProcess:
    """Runs one node to the end of the job. `run` returns the exit code."""

    def __init__(self, settings: AgentSettings) -> None:
        self._s = settings
        self.serves = False  # what was asked for is there: whatever fails from now on is this node's loss
        self._terminated = False
        self._preempted = math.inf  # when the first notice came
        self._told_notice = False  # to the coordinator of today: it keeps none for one that comes after it
        scheme = Scheme.parse(settings.config.redundancy)
        self._job = KnownJob(settings.node, settings.active_nodes, settings.slots_per_node, scheme)
        self._poller = zmq.Poller()
        self._uplink = Uplink(settings, self._poller)
        self._shards = (
            Shards(
                settings.job_id,
                settings.node,
                settings.secret,
                settings.host,
                settings.shm_directory,
                scheme,
                settings.config.scrub_rate,
                settings.config.send_bandwidth,
                settings.config.host_memory,
                settings.config.transport,
            )
            if settings.config.deadpool
            else None
        )
        processes = WorkerProcesses(settings, self._job, self._poller, lambda: self._terminated)
        config = settings.config
        self._crew = Crew(self._job, processes, config.rehearsals, config.standby_workers)
        self._watch = Watch(
            settings.node,
            settings.job_id,
            settings.log_dir,
            self._shards.vault if self._shards else None,
            settings.metrics_port,
        )
        fence = Fence(settings.node, settings.config.lease)
        self._agent = Agent(
            settings, self._job, self._crew, processes, self._shards, self._watch, fence, self._uplink.post
        )
        if self._shards is not None:
            self._poller.register(self._shards.wake_fd, zmq.POLLIN)
        self._kernel_log = KernelLog(settings.kernel_log) if settings.kernel_log and settings.config.deadpool else None
        if self._kernel_log is not None and self._kernel_log.fd is not None:
            self._poller.register(self._kernel_log.fd, zmq.POLLIN)
        self._refusals: dict[str, int] = {}
        self._refusals_due = 0.0

    def run(self) -> int:
        """Start the workers, serve until told to stop, end everything."""
        agent = self._agent
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(INTERRUPT, self._on_end)
        for signum in (PREEMPT, *WARNINGS):
            signal.signal(signum, self._on_notice)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what Ctrl-C means
        self._crew.start(self._s.slots_per_node)
        self.serves = True
        try:
            while agent.code is None and not self._terminated:
                if self._preempted < math.inf and not self._told_notice and self._uplink.connected:
                    self._told_notice = True
                    agent.send(r.PreemptionNotice(self._s.node))
                self._step(self._poller.poll(int(LOOK_S * 1000) if self._s.config.deadpool else 1000))
                self._report_refusals()
        finally:
            self._crew.end(agent.code in (Exit.FENCED, Exit.PREEMPTED), told=agent.code is not None)
            agent.close()
            if self._shards is not None:
                self._shards.close()
            if self._kernel_log is not None:
                self._kernel_log.close()
            self._uplink.close()
            self._watch.close()
        return 128 + signal.SIGTERM if agent.code is None else agent.code

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._s.durable_dir and self._s.config.on_preempt and time.monotonic() < self._preempted + _SAME_NOTICE_S:
            self._on_notice(signum, frame)  # a later one ends this node
        else:
            self._terminated = True

    def _on_end(self, signum: int, frame: object) -> None:
        self._terminated = True

    def _on_notice(self, signum: int, frame: object) -> None:
        self._preempted = min(self._preempted, time.monotonic())  # told in the loop

    def _step(self, ready: list[tuple[object, int]]) -> None:
        agent, fds = self._agent, {fd for fd, _ in ready}
        if self._uplink.has_come_up(fds):
            agent.introduce()
            self._told_notice = False
        self._job.rendezvous = self._uplink.moved(fds) or self._job.rendezvous
        for told in self._uplink.records(fds):
            agent.from_coordinator(told)
        for worker in [*self._crew.workers.values(), *self._crew.beside]:
            if worker.doorbell in fds and worker.rank is not None and self._shards is not None:
                os.eventfd_read(worker.doorbell)
                agent.rang(worker)
            if worker.control.fileno() in fds or worker.pidfd in fds:
                for record in worker.receive():
                    agent.from_worker(worker, record)
            if worker.pidfd in fds and not worker.exited:
                agent.ended(worker)
        if self._shards is not None and self._shards.wake_fd in fds:
            os.eventfd_read(self._shards.wake_fd)
            while not self._shards.events.empty():
                agent.happened(self._shards.events.get())
        self._read_kernel_log(fds)
        self._uplink.follow()
        agent.look(self._uplink.connected)

    def _read_kernel_log(self, fds: set[object]) -> None:
        log = self._kernel_log
        if log is None or log.fd is None or log.fd not in fds:
            return
        fd = log.fd
        for xid in log.read():
            self._agent.sign(r.MachineSign(self._s.node, xid.xid, xid.device, xid.text, xid.after))
        if log.fd is None:
            self._poller.unregister(fd)

    def _report_refusals(self) -> None:
        """Once a second, if anything was refused since."""
        if time.monotonic() < self._refusals_due:
            return
        self._refusals_due = time.monotonic() + 1.0
        counts = dict(self._shards.server.refusals) if self._shards is not None else {}
        counts["malformed"] = self._uplink.malformed + sum(worker.refused for worker in self._crew.workers.values())
        if counts != self._refusals and any(counts.values()):
            self._agent.send(r.Refusals(self._s.node, counts))
        self._refusals = counts
