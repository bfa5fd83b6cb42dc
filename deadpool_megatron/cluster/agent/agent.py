"""What the agent of one node does with all it hears: the node's counterpart of `Core`. No sockets, no clock of its own.

::

    coordinator  <-- Uplink -->  AgentProcess  the loop: sockets, signals, the vault's wake-ups
                                 Agent         who is told what  <-- Crew -->  workers
                                   KnownJob       epoch, assignment, tables (pure)
                                   NodeRecovery   this node's part in a recovery
                                   Upkeep         what the vault sends, keeps and frees  -->  vault (Shards)
                                   Commits        what this node has committed (pure)
                                   Checkup        could this spare take over
                                   Lookout        is it cut off, is a worker stuck
                                   Faults         what tests have strike it
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Final

import msgspec

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.adoption import AdoptedProcess
from deadpool_megatron.cluster.agent.checkup import Checkup
from deadpool_megatron.cluster.agent.commits import Commits, Upkeep
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.durable import DurableNews, Loaded, NodeDurability
from deadpool_megatron.cluster.agent.faults import Faults
from deadpool_megatron.cluster.agent.fence import Fence
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.lookout import Lookout
from deadpool_megatron.cluster.agent.recovery import NodeRecovery
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.agent.shards import (
    Damaged,
    FetchDone,
    Looked,
    RankCommitted,
    Shards,
    ShardsEvent,
)
from deadpool_megatron.cluster.agent.watch import Watch
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.agent.workers import Worker
from deadpool_megatron.cluster.placement.domains import slurm_labels
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.durable import Done, Staged
from deadpool_megatron.vault import is_constants, owner_of

MACHINE: Final = "DEADPOOL_MACHINE"
"""The variable that names the machine of a node, where its own name does not: a pod's may run anywhere."""


class Agent:
    """One node's decisions. One thread; nothing blocks but what `Shards.holdings` has to checksum.

    Args:
        job: what this node knows of the job; follows what is declared.
        shards: the node's vault; None without DeadPool.
        watch: hears everything.
        fence: this node's doubt when it has lost the coordinator.
        post: sends a packet to the coordinator if the connection is up.
        clock: seconds, monotonic.
        durability: makes this node's part in the durable tier, where there is one.

    Attributes:
        code: with which the agent is to leave; None while it is to stay.
    """

    def __init__(
        self,
        settings: AgentSettings,
        job: KnownJob,
        crew: Crew,
        processes: WorkerProcesses,
        shards: Shards | None,
        watch: Watch,
        fence: Fence,
        post: Callable[[bytes], None],
        clock: Callable[[], float] = time.monotonic,
        durability: Callable[..., NodeDurability] = NodeDurability,
    ) -> None:
        self._s = settings
        self.code: int | None = None
        self._job = job
        self._post = post
        self._shards = shards
        self._crew = crew
        self._processes = processes
        self._faults = Faults(settings.node, crew, shards, self.sign)
        self._watch = watch
        self._durable = (
            durability(
                settings.node,
                settings.durable_dir,
                settings.job_id,
                shards,
                self.send,
                not settings.config.export,
                lambda: job.world_size,
            )
            if shards is not None and (settings.durable_dir or settings.config.when_out_of_spares == "shrink")
            else None
        )
        self._commits = Commits(job)
        self._upkeep: Upkeep | None = None
        self._recovery: NodeRecovery | None = None
        self._lookout: Lookout | None = None
        self._checkup: Checkup | None = None
        if shards is not None:
            self._upkeep = Upkeep(job, shards, self._durable)
            self._recovery = NodeRecovery(job, crew, shards, self._upkeep, self._faults, self.send)
            self._checkup = Checkup(job, crew, shards, self.send)
            self._lookout = Lookout(settings, job, crew, self._recovery, processes, fence, self.send, clock)
        self._covered: r.Covered | None = None  # told last
        self._clock = clock
        self._signs: dict[int, tuple[float, r.MachineSign]] = {}  # the newest of each number, and when it came
        self._standbys: dict[int, int] = {}  # told last, by local index
        self._warm_server = (False, "")  # told last
        self._hashes: list[r.StateHash] = []
        self._done: dict[r.SideEffectKind, r.SideEffect] = {}  # the newest of each kind that a rank here has told
        self._iteration = -1  # the newest of this epoch that a rank here has told

    def send(self, record: r.AgentRecord) -> None:
        """To the coordinator, if it is there."""
        points.reach_record("agent", record)
        self._post(r.encode(record))
        self._watch.sent(record)

    def sign(self, record: r.MachineSign) -> None:
        """The machine tells of a fault."""
        self._signs[record.xid] = self._clock(), record
        self.send(record)

    def look(self, connected: bool) -> None:
        """Call often. ``connected``: to the coordinator."""
        if self._durable is not None:
            self._durable.look()
        if self._recovery is not None:
            self._crew.look(self._recovery.calm, self._clock())
            if self._warm_server != (now := self._processes.warm_server):
                self._warm_server = now
                self._watch.warm_server(*now)
                if now[1]:
                    print(f"deadpool: node {self._s.node}: fresh workers make their imports: {now[1]}", file=sys.stderr)
            if self._crew.standbys.asked and self._crew.standbys.pids() != self._standbys:
                self._tell_standbys()
        if self._lookout is not None and (why := self._lookout.look(connected)):
            print(f"deadpool: {why}", file=sys.stderr)
            self.code = Exit.FENCED

    def close(self) -> None:
        """End what runs beside the agent."""
        if self._durable is not None:
            self._durable.close()

    def introduce(self) -> None:
        """The connection to the coordinator is up, for the first time or again: tell all that it may not know."""
        node, workers = self._s.node, self._crew.workers
        self.send(
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
                self._commits.kept,
                self._iteration,
                os.environ.get(MACHINE) or os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            )
        )
        for when, sign in self._signs.values():  # before the ends of workers that they explain
            if self._clock() - when < r.SPREAD_S:
                self.send(sign)
        for worker in workers.values():
            if worker.parked and worker.rank is None and not worker.exited:
                self.send(r.WorkerReady(node, worker.local, worker.pid))
            if worker.registered is not None:
                self.send(worker.registered)
            if worker.broken is not None and worker.waits(self._job.epoch):
                self.send(worker.broken)  # somebody has to declare the epoch that it waits for
            if worker.failed is not None:  # why it has ended, or is about to
                self.send(worker.failed)
            if worker.exited and worker.exit_code is not None:
                self.send(self._exited(worker, worker.exit_code))
        if self._crew.rehearsed() or self._crew.unrehearsed:
            self._tell_rehearsed()
        if self._standbys:
            self._tell_standbys()
        if (last := self._commits.last) is not None:
            self.send(last)  # without it nobody could ever overwrite a slot again
        if self._covered is not None and self._covered.epoch == self._job.epoch:
            self.send(self._covered)  # it counts once
        for record in self._hashes:
            self.send(record)
        for done in self._done.values():
            self.send(done)
        if self._crew.mine() and self._crew.all_reached("finished"):
            self.send(r.Finished(self._job.epoch, node))

    # ---- records from workers

    def from_worker(self, worker: Worker, record: r.WorkerRecord) -> None:
        """A worker has said something."""
        recovery, lookout, upkeep, node = self._recovery, self._lookout, self._upkeep, self._s.node
        checkup = self._checkup
        if recovery is None or lookout is None or upkeep is None or checkup is None:
            return  # without DeadPool workers have nothing to say
        if worker in self._crew.beside:
            self._from_beside(worker, record)
            return
        if worker.retired and not isinstance(record, r.Leaving):
            return  # written before it was ended, perhaps of another number of coordinates
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
            case r.Checked():
                checkup.answered(worker, record)
            case r.Arrived():
                recovery.arrived(worker, record)
            case r.Registered():
                worker.in_loop = True
                worker.registered = msgspec.structs.replace(
                    record, node=node, local=worker.local, epoch=self._job.epoch
                )
                self.send(worker.registered)
            case r.ShardReady():
                recovery.saved(worker, record)
            case r.Leaving():
                if isinstance(worker.process, AdoptedProcess):
                    worker.process.said = record.code
            case r.WorkerFailed():
                worker.failed = msgspec.structs.replace(record, node=node, local=worker.local, rank=worker.rank)
                self.send(worker.failed)
            case r.PeerError():
                worker.broken = msgspec.structs.replace(record, node=node)
                self.send(worker.broken)
            case r.Described():
                if self._durable is not None and worker.rank is not None:
                    self._durable.described(record, worker.rank)
                    self._begin(worker)
            case r.Iteration() if self._shards is not None:
                self._iteration = record.iteration
                sent, bandwidth = self._shards.sent(record.rank)
                self.send(msgspec.structs.replace(record, node=node, sent_bytes=sent, send_bandwidth=bandwidth))
            case r.Whereabouts():
                lookout.answered(worker, record)
            case r.Held():
                recovery.held(worker, record)
            case r.Unreadable():
                recovery.unreadable(worker, record)
            case r.SideEffect():
                self._done[record.act] = msgspec.structs.replace(record, node=node)
                self.send(self._done[record.act])
            case r.StateHash():
                self._hashes.append(msgspec.structs.replace(record, node=node))
                self.send(self._hashes[-1])
            case _:
                # Who it is about the agent knows best: a worker cannot speak for another node.
                self.send(msgspec.structs.replace(record, node=node))

    def _from_beside(self, worker: Worker, record: r.WorkerRecord) -> None:
        """A worker that holds no slot has said something: only how its rehearsal went is of interest, or that it can
        stand by."""
        if isinstance(record, r.WorkerFailed):
            worker.failed = record
        elif worker.standby and isinstance(record, r.WorkerStep) and record.step in ("parked", "rehearsed"):
            worker.parked, worker.numa = True, record.numa
        elif isinstance(record, r.WorkerStep) and record.step == "rehearsed" and not worker.retired:
            worker.parked, worker.numa = True, record.numa
            self._tell_rehearsed()

    def _tell_rehearsed(self, why: str = "") -> None:
        self.send(r.Rehearsed(self._s.node, self._crew.rehearsed(), why, self._crew.unrehearsed))

    def _tell_standbys(self, why: str = "") -> None:
        self._standbys = self._crew.standbys.pids()
        self.send(r.Standbys(self._s.node, self._standbys, why))

    def rang(self, worker: Worker) -> None:
        """A worker has written more of its shard."""
        if worker.rank is not None and self._shards is not None:
            self._shards.rang(worker.rank)
            self._watch.rang(worker.rank)

    def ended(self, worker: Worker) -> None:
        """A worker's process has ended."""
        if worker in self._crew.beside:
            self._left(worker)
            return
        code = self._crew.reap(worker)
        if not worker.retired:
            self.send(self._exited(worker, code))
            if self._recovery is not None:
                self._recovery.ended(worker)
            return
        self._crew.renew(worker.local)
        if self._job.declared is None and not self._crew.renewing(self._crew.workers):
            self.introduce()  # the coordinator knows other processes
        if self._recovery is not None:
            self._recovery.renewed()

    def _left(self, worker: Worker) -> None:
        """One that held no slot has ended: by itself, or to make room for who takes over."""
        failed = self._crew.left(worker)
        if worker.standby and not worker.retired:
            self._tell_standbys(f"{self._crew.standbys.left(worker, failed)}; see {worker.log}")
        elif not worker.retired:
            self._tell_rehearsed(f"rank {worker.rehearses} is rehearsed no more: {failed}; see {worker.log}")
        elif self._recovery is not None:
            self._recovery.renewed()
            self._crew.rehearse()  # there is room

    def _exited(self, worker: Worker, code: int) -> r.WorkerExited:
        words = self._processes.last_words(worker) if code else []
        here = self._s.node, worker.local, worker.rank, worker.pid
        stands_by = self._crew.standbys.ready(worker.local) is not None
        return r.WorkerExited(*here, code, self._job.epoch, worker.log, words, stands_by)

    # ---- events of the vault

    def happened(self, event: ShardsEvent | DurableNews) -> None:
        """The vault, or the drainer, tells."""
        assert self._shards is not None and self._recovery is not None
        match event:
            case Staged() | Done() | Loaded():
                if self._durable is not None:
                    self._durable.handle(event)
            case r.NoRoom() | r.VaultMemory():
                self.send(event)
            case Damaged() if is_constants(event.holder):
                self._recovery.restore_constants(owner_of(event.holder))
            case Damaged():
                self.send(r.DamagedCopy(self._job.epoch, self._s.node, event.holder, event.kind, event.generation))
            case Looked() if self._checkup is not None:
                self._checkup.looked(event)
            case RankCommitted():
                for due in self._commits.due(event):
                    self._rank_committed(due)
            case FetchDone():
                self._recovery.fetched(event)

    def _rank_committed(self, event: RankCommitted) -> None:
        covered = self._commits.covered(event.rank, event.generation)
        if covered is not None:
            self._covered = covered
            self.send(covered)
        if event.epoch != self._job.epoch:
            return
        self._watch.committed(event.rank, event.epoch, event.generation)
        committed = self._commits.committed(event.rank, event.generation)
        if committed is not None:
            self.send(committed)

    # ---- records from the coordinator

    def from_coordinator(self, record: r.CoordinatorRecord) -> None:
        """The coordinator has said something."""
        self._act(record)
        self._watch.received(record, len(self._job.ranks), self._job.world_size)

    def _act(self, record: r.CoordinatorRecord) -> None:
        recovery, upkeep = self._recovery, self._upkeep
        match record:
            case r.Roster():
                before = self._job.world_size
                late = self._job.roster(record)
                resized = self._job.world_size != before
                if late:
                    self._watch.entered(record.epoch, len(self._job.ranks))
                if recovery is not None and late and record.base is not None:
                    recovery.set_aside(record.base)
                if resized and recovery is not None:
                    recovery.resized()
                if late and record.anew and recovery is not None:
                    self._start_over(recovery)
                elif late and self._shards is not None:
                    self._shards.server.set_epoch(record.epoch)
                if record.base is not None and self._shards is not None and record.epoch == self._job.epoch:
                    self.send(r.SetAside(record.epoch, self._s.node, *self._shards.aside(record.base)))
            case r.Departed():
                self._job.departed(record)
            case r.ExitNotice() if not self._s.config.deadpool:
                self._crew.signal(self._s.exit_signal)
            case r.Form() | r.Hold() | r.AllFinished() | r.ExitNotice():
                for worker in self._crew.mine().values():
                    worker.send(record)
            case r.Respawn():
                if self._crew.workers[record.local].exited:
                    self._crew.renew(record.local)
            case r.Rehearse():
                self._crew.rehearse(record.ranks)
                can = self._crew.can_rehearse
                if not can or self._crew.rehearsed() or self._crew.unrehearsed:
                    self._tell_rehearsed("" if can else f"node {self._s.node} cannot rehearse now")
            case r.CheckSpare() if self._checkup is not None:
                self._checkup.begin(record)
            case r.EndStuck():
                if self._lookout is not None:
                    self._lookout.end_stuck(record)
            case r.KeepStacks() if self._recovery is not None and self._lookout is not None:
                if record.epoch == self._job.epoch:
                    self._lookout.keep_stacks(self._recovery.late(), record.end)
            case r.Arm():
                self._faults.arm(record)
            case r.Stop():
                if record.code == Exit.FENCED or (self._s.tells_end and record.message):
                    print(f"deadpool: {record.message}", file=sys.stderr)
                self.code = record.code
                for worker in self._crew.workers.values():
                    if isinstance(worker.process, AdoptedProcess):
                        worker.send(record)  # its launcher is to see this job's exit code, not a signal
            case r.Declare() if recovery is not None:
                self._declare(recovery, record)
            case r.Changed() if recovery is not None:
                whole = self._job.whole(record)
                if whole is not None:
                    self._declare(recovery, whole)
                elif record.epoch > self._job.epoch:
                    self.send(r.Behind(record.epoch, self._s.node))
            case r.Agree() if recovery is not None and record.epoch == self._job.epoch:
                self._commits.agreed(record)
                recovery.agree(record)
                if record.durable and self._durable is not None:
                    self._durable.fetch(record, self._job.ranks)
            case r.Placement() if upkeep is not None:
                upkeep.place(record)
            case r.CommittedTo() if upkeep is not None:
                self._commits.committed_to(record)
                upkeep.committed_to(record)
            case _ if self._durable is not None and self._job.ranks:
                self._told_durable(self._durable, record)

    def _declare(self, recovery: NodeRecovery, record: r.Declare) -> None:
        if record.epoch <= self._job.epoch:
            if record.epoch == self._job.epoch:
                recovery.asked_again()
            return
        self._new_epoch()
        if len(record.assignment) != self._job.world_size:  # it has missed a start with fewer
            self._commits.start_over()
            recovery.resized()
        recovery.declare(record)
        self._watch.entered(record.epoch, len(self._job.ranks), record.reason)

    def _start_over(self, recovery: NodeRecovery) -> None:
        self._new_epoch()
        self._commits.start_over()
        self._done.clear()
        self._hashes.clear()
        if self._durable is not None:
            self._durable.start_over()
        recovery.start_over()

    def _new_epoch(self) -> None:
        self._commits.restart()
        self._iteration = -1
        if self._lookout is not None:
            self._lookout.restart()

    def _told_durable(self, durable: NodeDurability, record: r.CoordinatorRecord) -> None:
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
                durable.resume_at(record, self._job.vaults)
                for worker in self._crew.mine().values():
                    self._begin(worker)

    def _begin(self, worker: Worker) -> None:
        """Tell a worker what durable generation it begins with, once that is known; a spare learns it in a recovery."""
        if self._durable is None or worker.rank is None or worker.began or self._job.declared is not None:
            return
        what = self._durable.begin(worker.rank, self._job.epoch)
        if isinstance(what, r.Generation):
            worker.began = True
            worker.send(what)
        elif what is not None:
            self.send(
                r.WorkerFailed(self._s.node, worker.local, worker.rank, "setup", 0, -1, Exit.USAGE, "", "", what, "")
            )
