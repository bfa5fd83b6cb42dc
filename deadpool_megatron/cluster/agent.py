"""The agent: one process a node. Starts and watches the workers, owns the vault, speaks with the coordinator.

::

    coordinator  <-- Uplink -->  Agent: the loop, who is told what  <-- Crew -->  workers
                                   KnownJob       epoch, assignment, tables (pure)
                                   NodeRecovery   this node's part in a recovery
                                   Upkeep         what the vault sends, keeps and frees  -->  vault (Shards)
                                   Commits        what this node has committed (pure)
                                   Lookout        is it cut off, is a worker stuck
                                   Faults         what tests have strike it

One thread runs the loop; the vault's threads report through a queue. Nothing here trains, and nothing here imports
torch, so an agent starts in a fraction of a second and wakes in milliseconds.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time

import msgspec
import zmq

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.adoption import AdoptedProcess
from deadpool_megatron.cluster.commits import Commits
from deadpool_megatron.cluster.crew import Crew
from deadpool_megatron.cluster.domains import slurm_labels
from deadpool_megatron.cluster.draining import DurableNews, Loaded, NodeDurability
from deadpool_megatron.cluster.exits import Exit
from deadpool_megatron.cluster.faults import Faults
from deadpool_megatron.cluster.known import KnownJob
from deadpool_megatron.cluster.lookout import LOOK_S, Lookout
from deadpool_megatron.cluster.node_recovery import NodeRecovery
from deadpool_megatron.cluster.notices import PREEMPT, WARNINGS
from deadpool_megatron.cluster.redundancy import Scheme
from deadpool_megatron.cluster.settings import AgentSettings
from deadpool_megatron.cluster.shards import (
    Damaged,
    FetchDone,
    RankCommitted,
    Reserved,
    ReserveFailed,
    Shards,
    ShardsEvent,
)
from deadpool_megatron.cluster.upkeep import Upkeep
from deadpool_megatron.cluster.uplink import Uplink
from deadpool_megatron.cluster.watch import Watch
from deadpool_megatron.cluster.workers import Worker
from deadpool_megatron.durable import Done, Staged
from deadpool_megatron.vault import is_constants, numa_nodes

__all__ = ["Agent"]

_SAME_NOTICE_S = 5.0  # the batch system tells every process, and they tell each other


class Agent:
    """Runs one node to the end of the job. `run` returns the exit code."""

    def __init__(self, settings: AgentSettings) -> None:
        self._s = settings
        self._code: int | None = None
        self._terminated = False
        self._preempted = math.inf  # when the first notice came
        scheme = Scheme.parse(settings.redundancy)
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
                settings.scrub_rate,
                settings.send_bandwidth,
                settings.host_memory,
                settings.transport,
            )
            if settings.deadpool
            else None
        )
        self._crew = Crew(settings, self._job, self._poller, lambda: self._terminated)
        self._faults = Faults(settings.node, self._crew, self._shards)
        self._watch = Watch(
            settings.node,
            settings.job_id,
            settings.log_dir,
            self._shards.vault if self._shards else None,
            settings.metrics_port,
        )
        self._durable = (
            NodeDurability(settings.node, settings.durable_dir, settings.job_id, self._shards, self._send)
            if self._shards is not None and settings.durable_dir
            else None
        )
        self._commits = Commits(self._job)
        self._upkeep: Upkeep | None = None
        self._recovery: NodeRecovery | None = None
        self._lookout: Lookout | None = None
        if self._shards is not None:
            self._upkeep = Upkeep(self._job, self._shards, self._durable)
            self._recovery = NodeRecovery(self._job, self._crew, self._shards, self._upkeep, self._faults, self._send)
            self._lookout = Lookout(settings, self._job, self._crew, self._recovery, self._send)
            self._poller.register(self._shards.wake_fd, zmq.POLLIN)
        self._hashes: list[r.StateHash] = []
        self._refusals: dict[str, int] = {}
        self._refusals_due = 0.0

    # ---- the loop

    def run(self) -> int:
        """Start the workers, serve until told to stop, end everything."""
        signal.signal(signal.SIGTERM, self._on_signal)
        for signum in (PREEMPT, *WARNINGS):
            signal.signal(signum, self._on_notice)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what Ctrl-C means
        self._crew.start()
        told = False
        try:
            while self._code is None and not self._terminated:
                if self._preempted < math.inf and not told and self._uplink.connected:
                    told = True
                    self._send(r.PreemptionNotice(self._s.node))
                self._step(self._poller.poll(int(LOOK_S * 1000) if self._s.deadpool else 1000))
                self._tell_refusals()
        finally:
            self._crew.end(self._code in (Exit.FENCED, Exit.PREEMPTED), told=self._code is not None)
            if self._durable is not None:
                self._durable.close()
            if self._shards is not None:
                self._shards.close()
            self._uplink.close()
            self._watch.close()
        return 128 + signal.SIGTERM if self._code is None else self._code

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._s.on_preempt and time.monotonic() < self._preempted + _SAME_NOTICE_S:
            self._on_notice(signum, frame)  # a later one ends this node
        else:
            self._terminated = True

    def _on_notice(self, signum: int, frame: object) -> None:
        self._preempted = min(self._preempted, time.monotonic())  # told in the loop

    def _step(self, ready: list[tuple[object, int]]) -> None:
        fds = {fd for fd, _ in ready}
        if self._uplink.has_come_up(fds):
            self._introduce()
        self._job.rendezvous = self._uplink.moved(fds) or self._job.rendezvous
        for told in self._uplink.records(fds):
            self._from_coordinator(told)
            self._watch.heard(told, len(self._job.ranks))
        for worker in list(self._crew.workers.values()):
            if worker.doorbell in fds and worker.rank is not None and self._shards is not None:
                os.eventfd_read(worker.doorbell)
                self._shards.rang(worker.rank)
                self._watch.rang(worker.rank)
            if worker.control.fileno() in fds or worker.pidfd in fds:
                for record in worker.hear():
                    self._from_worker(worker, record)
            if worker.pidfd in fds and not worker.exited:
                self._ended(worker)
        if self._shards is not None and self._shards.wake_fd in fds:
            os.eventfd_read(self._shards.wake_fd)
            while not self._shards.events.empty():
                self._from_shards(self._shards.events.get())
        self._uplink.follow()
        if self._lookout is not None and (why := self._lookout.look(self._uplink.connected)):
            print(f"deadpool: {why}", file=sys.stderr)
            self._code = Exit.FENCED

    def _tell_refusals(self) -> None:
        """Once a second, if anything was refused since."""
        if time.monotonic() < self._refusals_due:
            return
        self._refusals_due = time.monotonic() + 1.0
        counts = dict(self._shards.server.refusals) if self._shards is not None else {}
        counts["unsealed"] = self._uplink.unsealed
        counts["malformed"] = self._uplink.malformed + sum(worker.refused for worker in self._crew.workers.values())
        if counts != self._refusals and any(counts.values()):
            self._send(r.Refusals(self._s.node, counts))
        self._refusals = counts

    def _send(self, record: r.AgentRecord) -> None:
        points.reach_record("agent", record)
        self._uplink.post(r.encode(record))
        self._watch.sent(record)

    def _introduce(self) -> None:
        """The connection to the coordinator is up, for the first time or again: tell all that it may not know."""
        node, workers = self._s.node, self._crew.workers
        self._send(
            r.Join(
                node,
                os.getpid(),
                self._s.host,
                self._shards.server.port if self._shards else 0,
                [worker.pid for _, worker in sorted(workers.items())],
                slurm_labels(os.environ),
                self._job.epoch,
                self._recovery is None or self._recovery.settled,
                not self._s.adopt,
            )
        )
        for worker in workers.values():
            if worker.parked and worker.rank is None and not worker.exited:
                self._send(r.WorkerReady(node, worker.local, worker.pid))
            if worker.registered is not None:
                self._send(worker.registered)
            if worker.exited and worker.exit_code is not None:
                exited = r.WorkerExited(node, worker.local, worker.rank, worker.pid, worker.exit_code, self._job.epoch)
                self._send(exited)
        if self._commits.last is not None:
            self._send(self._commits.last)  # without it nobody could ever overwrite a slot again
        for record in self._hashes:
            self._send(record)
        if self._crew.mine() and self._crew.all_reached("finished"):
            self._send(r.Finished(self._job.epoch, node))

    # ---- records from workers

    def _from_worker(self, worker: Worker, record: r.WorkerRecord) -> None:
        recovery, lookout, upkeep, node = self._recovery, self._lookout, self._upkeep, self._s.node
        if recovery is None or lookout is None or upkeep is None:
            return  # without DeadPool workers have nothing to say
        match record:
            case r.WorkerStep():
                if record.step == "parked":
                    self._watch.pinned(self._crew.located(worker, record.numa))
                recovery.step(worker, record)
            case r.ArenaRequest():
                self._watch.pinned(self._crew.located(worker, record.numa))
                if is_constants(record.rank):
                    self._commits.has_constants(record.rank)
                upkeep.grant(worker, record)
            case r.Arrived():
                recovery.arrived(worker, record)
            case r.Registered():
                worker.in_loop = True
                worker.registered = msgspec.structs.replace(
                    record, node=node, local=worker.local, epoch=self._job.epoch
                )
                self._send(worker.registered)
            case r.ShardReady():
                recovery.saved(worker, record)
            case r.Leaving():
                if isinstance(worker.process, AdoptedProcess):
                    worker.process.said = record.code
            case r.WorkerFailed():
                self._send(msgspec.structs.replace(record, node=node, local=worker.local, rank=worker.rank))
            case r.Described():
                if self._durable is not None and worker.rank is not None:
                    self._durable.described(record, worker.rank)
                    self._begin(worker)
            case r.Iteration() if self._shards is not None:
                sent, bandwidth = self._shards.sent(record.rank)
                self._send(msgspec.structs.replace(record, node=node, sent_bytes=sent, send_bandwidth=bandwidth))
            case r.Whereabouts():
                lookout.answered(worker, record)
            case r.Held():
                recovery.held(worker, record)
            case r.Unreadable():
                recovery.unreadable(worker, record)
            case r.StateHash():
                self._hashes.append(msgspec.structs.replace(record, node=node))
                self._send(self._hashes[-1])
            case _:
                # Who it is about the agent knows best: a worker cannot speak for another node.
                self._send(msgspec.structs.replace(record, node=node))

    def _ended(self, worker: Worker) -> None:
        code = self._crew.reap(worker)
        if not worker.retired:
            self._send(r.WorkerExited(self._s.node, worker.local, worker.rank, worker.pid, code, self._job.epoch))
            return
        self._crew.renew(worker.local)
        if self._job.declared is None and not self._crew.renewing:
            self._introduce()  # the coordinator knows other processes
        if self._recovery is not None:
            self._recovery.take_over()

    # ---- events of the vault

    def _from_shards(self, event: ShardsEvent | DurableNews) -> None:
        assert self._shards is not None and self._recovery is not None
        match event:
            case Staged() | Done() | Loaded():
                if self._durable is not None:
                    self._durable.heard(event)
            case ReserveFailed():
                self._send(r.NoRoom(self._s.node, event.message))
            case Reserved():
                way, nodes = self._shards.transport, max(1, len(numa_nodes()))
                self._send(r.VaultMemory(self._s.node, event.nbytes, event.huge_bytes, nodes, way.name, way.why))
            case Damaged():
                self._send(r.DamagedCopy(self._job.epoch, self._s.node, event.holder, event.kind, event.generation))
            case RankCommitted():
                for due in self._commits.due(event):
                    self._rank_committed(due)
            case FetchDone():
                self._recovery.fetched(event)

    def _rank_committed(self, event: RankCommitted) -> None:
        covered = self._commits.covered(event.rank, event.generation)
        if covered is not None:
            self._send(covered)
        if event.epoch != self._job.epoch:
            return
        self._watch.committed(event.rank, event.epoch, event.generation)
        committed = self._commits.committed(event.rank, event.generation)
        if committed is not None:
            self._send(committed)

    # ---- records from the coordinator

    def _from_coordinator(self, record: r.CoordinatorRecord) -> None:
        recovery, upkeep = self._recovery, self._upkeep
        match record:
            case r.Roster():
                late = self._job.roster(record)
                if late and record.anew and recovery is not None:
                    self._start_over(recovery)
                elif late and self._shards is not None:
                    self._shards.set_epoch(record.epoch)
            case r.ExitNotice() if not self._s.deadpool:
                self._crew.signal(self._s.exit_signal)
            case r.Form() | r.Hold() | r.AllFinished() | r.ExitNotice():
                for worker in self._crew.mine().values():
                    worker.tell(record)
            case r.Respawn():
                if self._crew.workers[record.local].exited:
                    self._crew.renew(record.local)
            case r.EndStuck():
                if self._lookout is not None:
                    self._lookout.end_stuck(record)
            case r.Arm():
                self._faults.arm(record)
            case r.Stop():
                if record.code == Exit.FENCED or (self._s.tells_end and record.message):
                    print(f"deadpool: {record.message}", file=sys.stderr)
                self._code = record.code
                for worker in self._crew.workers.values():
                    if isinstance(worker.process, AdoptedProcess):
                        worker.tell(record)  # its launcher is to see this job's exit code, not a signal
            case r.Declare() if recovery is not None:
                self._declare(recovery, record)
            case r.Changed() if recovery is not None:
                whole = self._job.whole(record)
                if whole is not None:
                    self._declare(recovery, whole)
                elif record.epoch > self._job.epoch:
                    self._send(r.Behind(record.epoch, self._s.node))
            case r.Agree() if recovery is not None and record.epoch == self._job.epoch:
                self._commits.agreed(record)
                recovery.agree(record)
                if record.durable and self._durable is not None:
                    self._durable.fetch(record, self._job.ranks)
            case r.Placement() if upkeep is not None:
                upkeep.place(record)
            case r.CommittedTo() if upkeep is not None:
                upkeep.committed_to(record)
            case _ if self._durable is not None and self._job.ranks:
                self._from_coordinator_durable(self._durable, record)

    def _declare(self, recovery: NodeRecovery, record: r.Declare) -> None:
        if record.epoch <= self._job.epoch:
            return
        self._new_epoch()
        recovery.declare(record)

    def _start_over(self, recovery: NodeRecovery) -> None:
        self._new_epoch()
        if self._durable is not None:
            self._durable.start_over()
        recovery.start_over()

    def _new_epoch(self) -> None:
        self._commits.restart()
        if self._lookout is not None:
            self._lookout.restart()

    def _from_coordinator_durable(self, durable: NodeDurability, record: r.CoordinatorRecord) -> None:
        ranks = self._job.ranks.values()
        match record:
            case r.DrainShards():
                durable.drain(record, ranks)
            case r.SealGeneration():
                durable.seal(record)
            case r.GiveUpDrain():
                durable.give_up(record)
            case r.LoadShards():
                durable.load(record, ranks)
            case r.ResumeAt():
                durable.resume_at(record.generation)
                for worker in self._crew.mine().values():
                    self._begin(worker)

    def _begin(self, worker: Worker) -> None:
        """Tell a worker what durable generation it begins with, once that is known; a spare learns it in a recovery."""
        if self._durable is None or worker.rank is None or worker.began or self._job.declared is not None:
            return
        what = self._durable.begin(worker.rank, self._job.epoch)
        if isinstance(what, r.Generation):
            worker.began = True
            worker.tell(what)
        elif what is not None:
            self._send(
                r.WorkerFailed(self._s.node, worker.local, worker.rank, "setup", 0, -1, Exit.USAGE, "", "", what, "")
            )
