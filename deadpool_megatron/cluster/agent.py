"""The agent: one process a node. Starts and watches the workers, owns the vault, speaks with the coordinator.

One thread runs the loop; the vault's threads report through a queue. Nothing here trains, and nothing here imports
torch, so an agent starts in a fraction of a second and wakes in milliseconds.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from deadpool_megatron import points
from deadpool_megatron.cluster import assignment as placing
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.adoption import AdoptedProcess, Adoption
from deadpool_megatron.cluster.domains import slurm_labels
from deadpool_megatron.cluster.draining import DurableNews, Loaded, NodeDurability
from deadpool_megatron.cluster.exits import Exit
from deadpool_megatron.cluster.fence import Fence
from deadpool_megatron.cluster.keeping import kept_for_others, targets
from deadpool_megatron.cluster.leadership import Follower, Place
from deadpool_megatron.cluster.link import Spoke
from deadpool_megatron.cluster.redundancy import Scheme
from deadpool_megatron.cluster.shards import Damaged, RankCommitted, Reserved, ReserveFailed, Shards, ShardsEvent
from deadpool_megatron.cluster.stalls import StallRule
from deadpool_megatron.cluster.store import open_store
from deadpool_megatron.cluster.stuck import StuckWatch
from deadpool_megatron.cluster.tables import Tables, apply
from deadpool_megatron.cluster.watch import Watch
from deadpool_megatron.cluster.workers import STACKS_FILE, Worker, end_group, start_worker
from deadpool_megatron.durable import Done, Staged
from deadpool_megatron.vault import VaultError, WordPlan, numa_nodes, small_capacity

__all__ = ["Agent", "AgentSettings"]

_TERM_GRACE_S = 5.0
_SAME_NOTICE_S = 5.0  # the batch system tells every process, and they tell each other
_LOOK_S = 0.25
_PACE_S = 2.0
_MANY_NODES = 512  # more tell their pace less often, so that the coordinator hears as many a second


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What one agent has to know. ``environment`` is the workers' (without ranks).

    ``tells_end``: print why the job ended, since no launcher beside the agent does. ``adopt``: name of the socket at
    which workers that somebody else has started come to this agent; empty where it starts them itself. ``store``: what
    `open_store` takes, where the coordinator may move to another node; else empty.
    """

    job_id: str
    node: int
    slots_per_node: int
    active_nodes: int
    host: str
    coordinator: str
    secret: bytes
    lease: float
    log_dir: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    deadpool: bool = True
    hang_factor: float = 10.0
    hang_floor: float = 20.0
    hang_outside: float = 600.0
    shm_directory: str = "/dev/shm"
    tells_end: bool = False
    adopt: str = ""
    redundancy: str = "1"
    send_bandwidth: float = 0.0
    transport: str = "tcp"
    host_memory: int = 0
    metrics_port: int = 0
    scrub_rate: int = 0
    durable_dir: str = ""
    on_preempt: bool = False
    store: Sequence[str] = ()

    @property
    def world_size(self) -> int:
        """Number of coordinates."""
        return self.active_nodes * self.slots_per_node


class Agent:
    """Runs one node to the end of the job. `run` returns the exit code."""

    def __init__(self, settings: AgentSettings) -> None:
        self._s = settings
        self._active = settings.node < settings.active_nodes
        self._epoch = 0
        self._assignment = placing.initial(settings.active_nodes, settings.slots_per_node)
        self._vaults: dict[int, r.Address] = {}
        self._scheme = Scheme.parse(settings.redundancy)
        self._groups: list[list[int]] = []
        self._sizes: tuple[list[int], list[int]] = ([], [])
        self._version = 0  # of the tables these are
        self._kept: tuple[dict[int, tuple[int, int]], dict[int, WordPlan]] = ({}, {})
        self._covered: set[int] = set()
        self._malformed = 0
        self._refusals: dict[str, int] = {}
        self._refusals_due = 0.0
        self._declared: r.Declare | None = None
        self._offered = -1
        self._arrived = False  # every worker here, in the epoch of the offer
        self._tidied = 0
        self._agreed: r.Agree | None = None
        self._workers: dict[int, Worker] = {}
        self._committed: dict[int, set[tuple[int, int]]] = {}
        self._told: dict[tuple[str, int], bool] = {}
        self._code: int | None = None
        self._terminated = False
        self._preempted = math.inf  # when the first notice came
        self._coordinator = settings.coordinator
        self._spoke = Spoke(settings.coordinator, f"node-{settings.node}", settings.secret, settings.lease)
        self._follower = Follower(lambda: open_store(*settings.store)) if settings.store else None
        self._rendezvous: r.Address | None = None
        self._shards = (
            Shards(
                settings.job_id,
                settings.node,
                settings.secret,
                settings.host,
                settings.shm_directory,
                Scheme.parse(settings.redundancy),
                settings.scrub_rate,
                settings.send_bandwidth,
                settings.host_memory,
                settings.transport,
            )
            if settings.deadpool
            else None
        )
        self._adoption = Adoption(settings.adopt) if settings.adopt else None
        self._watch = Watch(
            settings.node,
            settings.job_id,
            settings.log_dir,
            self._shards.vault if self._shards else None,
            settings.metrics_port,
        )
        self._durable = (
            NodeDurability(settings.node, settings.durable_dir, self._shards, self._send)
            if self._shards is not None and settings.durable_dir
            else None
        )
        self._hashes: list[r.StateHash] = []
        self._holding = False
        self._armed: list[r.Arm] = []
        self._last_commit: r.Committed | None = None
        self._fence = Fence(settings.node, settings.lease)
        self._stuck: StuckWatch | None = None
        if settings.deadpool and settings.hang_floor > 0:
            rule = StallRule(settings.hang_factor, settings.hang_floor, settings.hang_outside)
            self._stuck = StuckWatch(rule, settings.lease, self._stalled)
        self._look_due = self._pace_due = 0.0
        self._poller = zmq.Poller()
        self._poller.register(self._spoke.monitor, zmq.POLLIN)
        self._poller.register(self._spoke.socket, zmq.POLLIN)
        if self._follower is not None:
            self._poller.register(self._follower.fd, zmq.POLLIN)
        if self._shards is not None:
            self._poller.register(self._shards.wake_fd, zmq.POLLIN)

    # ---- the loop

    def run(self) -> int:
        """Start the workers, serve until told to stop, end everything."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what Ctrl-C means
        for local in range(self._s.slots_per_node):
            self._start(local, self._s.node * self._s.slots_per_node + local if self._active else None)
        if self._adoption is not None:
            self._adoption.close()
        told = False
        try:
            while self._code is None and not self._terminated:
                if self._preempted < math.inf and not told and self._spoke.connected:
                    told = True
                    self._send(r.PreemptionNotice(self._s.node))
                self._step(self._poller.poll(int(_LOOK_S * 1000) if self._s.deadpool else 1000))
                self._tell_refusals()
        finally:
            self._end_workers(at_once=self._code in (Exit.FENCED, Exit.PREEMPTED))
            if self._durable is not None:
                self._durable.close()
            if self._shards is not None:
                self._shards.close()
            if self._follower is not None:
                self._follower.rest()
            self._spoke.close()
            self._watch.close()
        return 128 + signal.SIGTERM if self._code is None else self._code

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._s.on_preempt and time.monotonic() < self._preempted + _SAME_NOTICE_S:
            self._preempted = min(self._preempted, time.monotonic())  # told in the loop; a later one ends this node
        else:
            self._terminated = True

    def _step(self, ready: list[tuple[object, int]]) -> None:
        fds = {fd for fd, _ in ready}
        if self._spoke.monitor in fds and self._spoke.changed() and self._spoke.connected:
            self._introduce()
        if self._follower is not None and self._follower.fd in fds and (place := self._follower.found()) is not None:
            self._go_to(place)
        if self._spoke.socket in fds:
            while (packet := self._spoke.receive()) is not None:
                try:
                    told = r.decode_from_coordinator(packet)
                except r.RecordError:
                    self._malformed += 1
                    continue
                self._from_coordinator(told)
                self._watch.heard(told, len(placing.ranks_of(self._assignment, self._s.node)))
        for worker in list(self._workers.values()):
            if worker.doorbell in fds and worker.rank is not None and self._shards is not None:
                os.eventfd_read(worker.doorbell)
                self._shards.rang(worker.rank)
                self._watch.rang(worker.rank)
            if worker.control.fileno() in fds or worker.pidfd in fds:
                for record in worker.hear():
                    self._from_worker(worker, record)
            if worker.pidfd in fds:
                self._reap(worker)
        if self._shards is not None and self._shards.wake_fd in fds:
            os.eventfd_read(self._shards.wake_fd)
            while not self._shards.events.empty():
                self._from_shards(self._shards.events.get())
        if self._follower is not None and self._spoke.connected:
            self._follower.rest()
        elif self._follower is not None:
            host, port = self._coordinator.rsplit(":", 1)
            self._follower.look((host, int(port)))
        if self._s.deadpool and (now := time.monotonic()) >= self._look_due:
            self._look_due = now + _LOOK_S
            self._look_around(now)

    def _look_around(self, now: float) -> None:
        if self._spoke.connected:
            self._fence.connected()
        elif self._fence.cut_off(self._vaults, now):
            print(f"deadpool: node {self._s.node} is cut off from the others and ends its workers", file=sys.stderr)
            self._code = Exit.FENCED
            return
        if self._stuck is None:
            return
        mine = self._mine()
        if self._declared is None or self._settled():
            self._stuck.look(mine, now)
        if self._stuck.finish(now):
            print(f"deadpool: a stuck worker of node {self._s.node} cannot be killed", file=sys.stderr)
            self._code = Exit.FENCED
        if now >= self._pace_due:
            self._pace_due = now + _PACE_S * max(1.0, self._s.active_nodes / _MANY_NODES)
            paces = self._stuck.paces(mine)
            if paces:
                self._send(r.Pace(self._s.node, max(w.page.iteration for w in mine.values()), paces))

    def _go_to(self, place: Place) -> None:
        """The coordinator has moved. The new connection is introduced like the first; the old one is not heard."""
        self._poller.unregister(self._spoke.monitor)
        self._poller.unregister(self._spoke.socket)
        self._spoke.close(linger_ms=0)
        self._coordinator = f"{place.host}:{place.port}"
        self._rendezvous = r.Address(place.host, place.store_port)
        self._spoke = Spoke(self._coordinator, f"node-{self._s.node}", self._s.secret, self._s.lease)
        self._poller.register(self._spoke.monitor, zmq.POLLIN)
        self._poller.register(self._spoke.socket, zmq.POLLIN)

    def _stalled(self, worker: Worker, record: r.Stalled) -> None:
        self._send(msgspec.structs.replace(record, epoch=self._epoch, node=self._s.node))

    def _tell_refusals(self) -> None:
        """Once a second, if anything was refused since."""
        if time.monotonic() < self._refusals_due:
            return
        self._refusals_due = time.monotonic() + 1.0
        counts = dict(self._shards.server.refusals) if self._shards is not None else {}
        counts["unsealed"] = self._spoke.seal.refused
        counts["malformed"] = self._malformed + sum(worker.refused for worker in self._workers.values())
        if counts != self._refusals and any(counts.values()):
            self._send(r.Refusals(self._s.node, counts))
        self._refusals = counts

    def _send(self, record: r.AgentRecord) -> None:
        points.reach_record("agent", record)
        self._spoke.post(r.encode(record))
        self._watch.sent(record)

    def _introduce(self) -> None:
        """The connection to the coordinator is up, for the first time or again: tell all that it may not know."""
        node = self._s.node
        self._send(
            r.Join(
                node,
                os.getpid(),
                self._s.host,
                self._shards.server.port if self._shards else 0,
                [self._workers[i].pid for i in sorted(self._workers)],
                slurm_labels(os.environ),
                self._epoch,
                self._settled(),
                self._adoption is None,
            )
        )
        for worker in self._workers.values():
            if worker.parked and worker.rank is None and not worker.exited:
                self._send(r.WorkerReady(node, worker.local, worker.pid))
            if worker.registered is not None:
                self._send(worker.registered)
            if worker.exited and worker.exit_code is not None:
                self._send(r.WorkerExited(node, worker.local, worker.rank, worker.pid, worker.exit_code))
        if self._last_commit is not None:
            self._send(self._last_commit)  # without it nobody could ever overwrite a slot again
        for record in self._hashes:
            self._send(record)
        if self._mine() and self._all_reached("finished"):
            self._send(r.Finished(self._epoch, node))

    def _settled(self) -> bool:
        """Every worker of this node trains in the current epoch (or there is none that should)."""
        if self._holding:
            return False
        if self._declared is None:
            return True
        return not placing.ranks_of(self._assignment, self._s.node) or self._all_reached("resumed")

    # ---- workers

    def _start(self, local: int, rank: int | None) -> None:
        env = dict(self._s.environment)
        env["LOCAL_RANK"] = str(local)
        env["LOCAL_WORLD_SIZE"] = str(self._s.slots_per_node)
        env["WORLD_SIZE"] = str(self._s.world_size)
        env["GROUP_RANK"] = str(self._s.node)
        env["GROUP_WORLD_SIZE"] = str(self._s.active_nodes)
        env["DEADPOOL_NODE"] = str(self._s.node)
        if self._rendezvous is not None:
            env["MASTER_ADDR"], env["MASTER_PORT"] = self._rendezvous.host, str(self._rendezvous.port)
        env[STACKS_FILE] = str(self._stacks_file(local))
        if rank is not None:
            env["RANK"] = str(rank)
            name = f"rank-{rank}.log"
        else:
            name = f"spare-node{self._s.node}-{local}.log"
        if self._adoption is not None and local < self._s.slots_per_node:
            ours = {k: v for k, v in env.items() if os.environ.get(k) != v}
            worker = self._adoption.take(local, rank, ours, lambda: self._terminated)
        else:
            worker = start_worker(self._s.command, env, local, rank, Path(self._s.log_dir) / name)
        self._workers[local] = worker
        self._poller.register(worker.pidfd, zmq.POLLIN)
        self._poller.register(worker.control.fileno(), zmq.POLLIN)
        self._poller.register(worker.doorbell, zmq.POLLIN)

    def _stacks_file(self, local: int) -> Path:
        return Path(self._s.log_dir) / f"stacks-node{self._s.node}-{local}.txt"

    def _start_parked(self, local: int) -> None:
        """A fresh parked process in a slot, once the one that is there has ended (it is ended now)."""
        old = self._workers.get(local)
        if old is not None and not old.exited:
            old.retired = True
            end_group(old.pid, signal.SIGKILL)  # its end is seen by `_reap`: device memory may take a while to go
            return
        if old is not None:
            old.close()
        self._start(local, None)

    def _forget_descriptors(self, worker: Worker) -> None:
        for fd in (worker.pidfd, worker.control.fileno(), worker.doorbell):
            self._poller.unregister(fd)

    def _reap(self, worker: Worker) -> None:
        if worker.exited:
            return
        code = worker.process.wait()
        worker.exited, worker.exit_code = True, code
        end_group(worker.pid, signal.SIGKILL)  # its forked children hold its sockets open
        self._forget_descriptors(worker)
        if worker.retired:
            self._start_parked(worker.local)
            self._take_over()
        else:
            self._send(r.WorkerExited(self._s.node, worker.local, worker.rank, worker.pid, code))

    def _end_workers(self, at_once: bool) -> None:
        alive = [w for w in self._workers.values() if not w.exited]
        if not at_once:
            for worker in alive:
                if self._code is None or not isinstance(worker.process, AdoptedProcess):  # those were told to leave
                    end_group(worker.pid, signal.SIGTERM)
            end = time.monotonic() + _TERM_GRACE_S
            poller = zmq.Poller()
            for worker in alive:
                poller.register(worker.pidfd, zmq.POLLIN)
            while (left := end - time.monotonic()) > 0 and any(w.process.poll() is None for w in alive):
                poller.poll(min(100, int(left * 1000) + 1))
        for worker in alive:
            end_group(worker.pid, signal.SIGKILL)
            worker.process.wait()
        for worker in self._workers.values():
            worker.close()

    def _mine(self) -> dict[int, Worker]:
        """By rank, the workers of this node that hold a coordinate of the current assignment."""
        out: dict[int, Worker] = {}
        for local, rank in placing.ranks_of(self._assignment, self._s.node).items():
            worker = self._workers.get(local)
            if worker is not None and not worker.exited and not worker.retired:
                out[rank] = worker
        return out

    # ---- records from workers

    def _from_worker(self, worker: Worker, record: r.WorkerRecord) -> None:
        match record:
            case r.WorkerStep():
                self._worker_step(worker, record)
            case r.ArenaRequest():
                self._arena(worker, record)
            case r.Arrived():
                worker.arrived = record
                if self._offered == self._epoch and not self._arrived and self._all_arrived():
                    self._arrived = True
                    self._send(r.NodeArrived(self._epoch, self._s.node))
                self._maybe_offer()
            case r.Registered():
                worker.in_loop = True
                worker.registered = msgspec.structs.replace(record, node=self._s.node, local=worker.local)
                self._send(worker.registered)
            case r.ShardReady():
                self._reached(worker, "saved", record.epoch)
                if self._all_reached("saved"):
                    self._send(r.Saved(record.epoch, self._s.node, record.iteration, record.directory))
            case r.Leaving():
                if isinstance(worker.process, AdoptedProcess):
                    worker.process.said = record.code
            case r.WorkerFailed():
                self._send(msgspec.structs.replace(record, node=self._s.node, local=worker.local, rank=worker.rank))
            case r.Described():
                if self._durable is not None and worker.rank is not None:
                    self._durable.described(record, worker.rank)
                    self._begin(worker)
            case r.Iteration() if self._shards is not None:
                sent, bandwidth = self._shards.sent(record.rank)
                self._send(
                    msgspec.structs.replace(record, node=self._s.node, sent_bytes=sent, send_bandwidth=bandwidth)
                )
            case r.Whereabouts():
                if self._stuck is not None:
                    self._stuck.answered(worker, record, time.monotonic())
            case r.Held():
                self._held(worker, record)
            case r.Unreadable():
                if record.epoch == self._epoch and worker.rank is not None:
                    self._send(
                        r.FetchFailed(
                            record.epoch, self._s.node, worker.rank, self._s.node, record.generation, record.why
                        )
                    )
            case r.StateHash():
                self._hashes.append(msgspec.structs.replace(record, node=self._s.node))
                self._send(self._hashes[-1])
            case _:
                # Who it is about the agent knows best: a worker cannot speak for another node.
                self._send(msgspec.structs.replace(record, node=self._s.node))

    def _held(self, worker: Worker, record: r.Held) -> None:
        if record.epoch != self._epoch:
            return
        self._holding = True
        if record.missed:
            self._send(r.NodeHeld(self._epoch, self._s.node, record.iteration, True))
            return
        worker.reached["held"] = record.iteration
        held = [w.reached.get("held", -1) for w in self._mine().values()]
        if all(iteration == record.iteration for iteration in held):
            self._send(r.NodeHeld(self._epoch, self._s.node, record.iteration, False))

    def _worker_step(self, worker: Worker, record: r.WorkerStep) -> None:
        node = self._s.node
        if record.step == "parked":
            worker.parked, worker.numa = True, record.numa
            self._send(r.WorkerReady(node, worker.local, worker.pid))
            self._take_over()
            return
        self._reached(worker, record.step, record.epoch)
        if record.step == "formed":
            worker.formed = (record.changed, record.number)
        if record.epoch != self._epoch or not self._all_reached(record.step):
            return
        match record.step:
            case "ready":
                self._send(r.NodeReady(self._epoch, node))
            case "formed":
                formed = [self._workers[local].formed for local in placing.ranks_of(self._assignment, node)]
                changed, of = (sum(each) for each in zip(*formed, strict=True))
                self._send(r.NodeFormed(self._epoch, node, record.number, changed, of))
            case "restored":
                self._send(r.NodeRestored(self._epoch, node))
            case "resumed":
                self._send(r.NodeResumed(self._epoch, node, record.number))
            case "finished":
                self._send(r.Finished(self._epoch, node))

    def _reached(self, worker: Worker, step: str, epoch: int) -> None:
        worker.reached[step] = epoch

    def _all_reached(self, step: str) -> bool:
        ranks = placing.ranks_of(self._assignment, self._s.node)
        return all(
            local in self._workers and self._workers[local].reached.get(step, -1) == self._epoch for local in ranks
        )

    def _arena(self, worker: Worker, record: r.ArenaRequest) -> None:
        assert self._shards is not None
        if self._durable is not None and (refusal := self._durable.refusal(record.rank)):
            worker.tell(r.ArenaRefused(refusal))
            return
        try:
            path = self._shards.allocate(record.rank, record.unique_bytes, record.small_bytes, record.numa)
        except (VaultError, OSError) as err:
            worker.tell(r.ArenaRefused(str(err)))
            return
        worker.tell(r.ArenaGranted(record.rank, path))
        if self._durable is not None:
            self._durable.granted(record.rank, small_capacity(record.small_bytes))
        self._aim()

    def _aim(self) -> None:
        """Tell the replicator where the shards of each own rank go."""
        if self._shards is None or not self._groups:
            return
        ranks = placing.ranks_of(self._assignment, self._s.node).values()
        aims = targets(self._s.node, self._groups, self._scheme, self._assignment, self._vaults)
        self._shards.set_targets(
            self._epoch, {rank: aims.get(rank, ()) for rank in ranks if self._shards.path_of(rank)}
        )

    def _plan(self, unique_bytes: Sequence[int], small_capacity: Sequence[int]) -> None:
        """What this node is to keep for others."""
        assert self._shards is not None
        self._kept = kept_for_others(
            self._s.node, self._groups, self._scheme, self._assignment, unique_bytes, small_capacity
        )
        self._shards.plan(*self._kept)

    def _place(self, record: r.Placement) -> None:
        """The first placement: take the memory for what this node keeps, then send."""
        if record.epoch != self._epoch or self._shards is None:
            return
        self._groups, self._version = record.groups, record.version
        self._sizes = record.unique_bytes, record.small_capacity
        self._plan(record.unique_bytes, record.small_capacity)
        self._shards.reserve()
        self._aim()

    # ---- events of the vault

    def _from_shards(self, event: ShardsEvent | DurableNews) -> None:
        assert self._shards is not None
        if isinstance(event, Staged | Done | Loaded):
            if self._durable is not None:
                self._durable.heard(event)
        elif isinstance(event, ReserveFailed):
            self._send(r.NoRoom(self._s.node, event.message))
        elif isinstance(event, Reserved):
            way = self._shards.transport
            nodes = max(1, len(numa_nodes()))
            self._send(r.VaultMemory(self._s.node, event.nbytes, event.huge_bytes, nodes, way.name, way.why))
        elif isinstance(event, Damaged):
            self._send(r.DamagedCopy(self._epoch, self._s.node, event.holder, event.kind, event.generation))
        elif isinstance(event, RankCommitted):
            self._rank_covered(event)
            if event.epoch != self._epoch:
                return
            self._watch.committed(event.rank, event.epoch, event.generation)
            done = self._committed.setdefault(event.rank, set())
            done.add((event.epoch, event.generation))
            ranks = placing.ranks_of(self._assignment, self._s.node).values()
            if all((event.epoch, event.generation) in self._committed.get(rank, ()) for rank in ranks):
                for rank in ranks:
                    self._committed[rank] = {v for v in self._committed[rank] if v > (event.epoch, event.generation)}
                self._last_commit = r.Committed(event.epoch, self._s.node, event.generation)
                self._send(self._last_commit)
        elif event.epoch == self._epoch:
            if event.version is None:
                self._send(
                    r.FetchFailed(event.epoch, self._s.node, event.rank, event.source, event.generation, event.error)
                )
            else:
                self._hand_out(event.rank, event.generation)

    def _rank_covered(self, event: RankCommitted) -> None:
        """Once all ranks here have the agreed generation wherever it belongs, this node is redundant again."""
        agreed = self._agreed
        if agreed is None or agreed.epoch != self._epoch or event.generation != agreed.generation:
            return
        ranks = set(placing.ranks_of(self._assignment, self._s.node).values())
        if ranks <= self._covered:
            return
        self._covered.add(event.rank)
        if ranks <= self._covered:
            self._send(r.Covered(self._epoch, self._s.node, event.generation))

    # ---- records from the coordinator

    def _from_coordinator(self, record: r.CoordinatorRecord) -> None:
        match record:
            case r.Declare():
                self._declare(record)
            case r.Changed():
                whole = apply(record, self._tables())
                if whole is not None:
                    self._declare(whole)
                elif record.epoch > self._epoch:
                    self._send(r.Behind(record.epoch, self._s.node))
            case r.Agree():
                self._agree(record)
            case r.Form():
                for worker in self._mine().values():
                    worker.tell(record)
            case r.Roster():
                self._vaults, self._version = record.vaults, record.version
                if record.epoch > self._epoch:  # joined a job that has a history
                    self._epoch, self._assignment = record.epoch, record.assignment
                    if self._shards is not None:
                        self._shards.set_epoch(record.epoch)
            case r.Placement():
                self._place(record)
            case r.Respawn():
                if self._workers[record.local].exited:
                    self._start_parked(record.local)
            case r.Hold():
                for worker in self._mine().values():
                    worker.tell(record)
            case r.EndStuck():
                stuck = self._mine().get(record.rank) if record.epoch == self._epoch else None
                if stuck is not None and self._stuck is not None:
                    self._stuck.end(stuck, self._stacks_file(stuck.local), time.monotonic())
            case r.CommittedTo():
                if record.epoch == self._epoch and self._shards is not None:
                    self._shards.set_kept(record.epoch, record.kept, record.floor)
                    if record.kept is not None and record.kept[0] == self._epoch != self._tidied:
                        self._tidied = self._epoch
                        self._tidy()
            case r.AllFinished():
                for worker in self._mine().values():
                    worker.tell(record)
            case r.Arm():
                self._arm(record)
            case r.Stop():
                if record.code == Exit.FENCED or (self._s.tells_end and record.message):
                    print(f"deadpool: {record.message}", file=sys.stderr)
                self._code = record.code
                for worker in self._workers.values():
                    if isinstance(worker.process, AdoptedProcess):
                        worker.tell(record)  # its launcher is to see this job's exit code, not a signal
            case r.InjectReply() | r.Enlisted() | r.SpareAdded():
                pass
            case _:
                self._from_coordinator_durable(record)

    def _from_coordinator_durable(self, record: r.CoordinatorRecord) -> None:
        ranks = placing.ranks_of(self._assignment, self._s.node)
        if self._durable is None or not ranks:
            return
        match record:
            case r.DrainShards():
                self._durable.drain(record, ranks.values())
            case r.SealGeneration():
                self._durable.seal(record)
            case r.GiveUpDrain():
                self._durable.give_up(record)
            case r.LoadShards():
                self._durable.load(record, ranks.values())
            case r.ResumeAt():
                self._durable.resume_at(record.generation)
                for worker in self._mine().values():
                    self._begin(worker)

    def _begin(self, worker: Worker) -> None:
        """Tell a worker what durable generation it begins with, once that is known; a spare learns it in a recovery."""
        if self._durable is None or worker.rank is None or worker.began or self._epoch:
            return
        what = self._durable.begin(worker.rank)
        if isinstance(what, r.Generation):
            worker.began = True
            worker.tell(what)
        elif what is not None:
            self._send(r.WorkerFailed(self._s.node, worker.local, worker.rank, "setup", -1, True, what, ""))

    def _tables(self) -> Tables:
        return Tables(self._version, self._assignment, self._vaults, self._groups, *self._sizes)

    def _tidy(self) -> None:
        """The first commit of an epoch: copies that an older placement left here are of no use any more."""
        assert self._shards is not None
        peers, words = self._kept
        self._shards.keep_only(set(placing.ranks_of(self._assignment, self._s.node).values()), set(peers), set(words))

    def _declare(self, record: r.Declare) -> None:
        if record.epoch <= self._epoch:
            return
        self._epoch, self._version = record.epoch, record.version
        self._assignment = record.assignment
        self._vaults, self._groups = record.vaults, record.groups
        self._sizes = record.unique_bytes, record.small_capacity
        self._covered.clear()
        # Workers need no tables, which grow with the job and a worker's socket takes whole packets only.
        self._declared = msgspec.structs.replace(
            record, assignment=[], vaults={}, groups=[], unique_bytes=[], small_capacity=[]
        )
        self._agreed = None
        self._rendezvous = record.rendezvous or self._rendezvous
        self._committed.clear()
        self._holding = False
        if self._stuck is not None:
            self._stuck.restart(time.monotonic())
        assert self._shards is not None
        self._shards.set_epoch(record.epoch)
        here = placing.ranks_of(self._assignment, self._s.node)
        for worker in list(self._workers.values()):
            if worker.rank is not None and here.get(worker.local) != worker.rank and not worker.retired:
                # The coordinate is somebody else's now; the node is healthy and parks fresh workers.
                self._start_parked(worker.local)
        for worker in self._mine().values():
            worker.tell(self._declared)
        self._shards.set_targets(record.epoch, {})
        if record.unique_bytes:
            self._plan(record.unique_bytes, record.small_capacity)
        for local in here:
            if local not in self._workers or self._workers[local].exited:
                self._start_parked(local)
        self._take_over()
        self._maybe_offer()

    def _take_over(self) -> None:
        """Give parked workers the coordinates the assignment has for them."""
        for local, rank in placing.ranks_of(self._assignment, self._s.node).items():
            worker = self._workers.get(local)
            if worker is not None and worker.parked and worker.rank is None and not worker.retired:
                worker.rank = rank
                target = Path(self._s.log_dir) / f"spare-node{self._s.node}-{local}.log"
                if target.exists():  # an adopted worker writes where its launcher wants it
                    link = Path(self._s.log_dir) / f"rank-{rank}.epoch-{self._epoch}.log"
                    link.unlink(missing_ok=True)
                    link.symlink_to(target.name)
                if self._declared is not None:
                    worker.tell(self._declared)  # one started since then has not heard of it
                for armed in self._armed:
                    if armed.fault.kind == "raise":  # a bug is there in every process that runs the code
                        worker.tell(armed)
                worker.tell(r.TakeOver(self._epoch, rank))

    def _maybe_offer(self) -> None:
        """Tell the coordinator what this node can give once every worker here has left its step."""
        if self._declared is None or self._offered == self._epoch or self._shards is None:
            return
        live: dict[int, int | None] = {}
        for rank, worker in self._mine().items():
            if not worker.in_loop:
                live[rank] = None
            elif worker.arrived is not None and worker.arrived.epoch == self._epoch:
                live[rank] = worker.arrived.live
            else:
                return
        # A spare tells that it has nothing: it may be one that the coordinator waits for, having just given way.
        self._offered, self._arrived = self._epoch, self._all_arrived()
        self._send(r.Offer(self._epoch, self._s.node, live, *self._shards.holdings(), arrived=self._arrived))

    def _all_arrived(self) -> bool:
        """Every coordinate here has a worker that can form its groups."""
        mine = self._mine()
        ranks = placing.ranks_of(self._assignment, self._s.node).values()
        told = [mine[rank].arrived for rank in ranks if rank in mine]
        return len(told) == len(ranks) and all(each is not None and each.epoch == self._epoch for each in told)

    def _agree(self, record: r.Agree) -> None:
        if record.epoch != self._epoch or self._shards is None:
            return
        self._agreed = record
        if record.durable:
            if self._durable is not None:
                self._durable.fetch(record, placing.ranks_of(self._assignment, self._s.node))
            return
        for local, rank in placing.ranks_of(self._assignment, self._s.node).items():
            if local in self._workers:
                self._shards.set_near(rank, self._workers[local].numa)
            source = record.sources.get(rank)
            if rank in record.rebuilds:
                self._shards.rebuild(record.epoch, rank, record.generation, record.rebuilds[rank], self._vaults)
            elif source is None:
                self._hand_out(rank, record.generation)
            else:
                here = source.node == self._s.node
                others = [self._vaults[node] for node in source.others if node in self._vaults]
                address = None if here else self._vaults.get(source.node)
                self._shards.fetch(record.epoch, rank, record.generation, source, address, others)

    def _hand_out(self, rank: int, generation: int) -> None:
        """The agreed generation is here: tell the worker, and keep that version until a newer one is committed."""
        assert self._shards is not None
        version = self._shards.version_of(rank, generation)
        if version is not None:
            self._shards.set_kept(self._epoch, version, 0)
        worker = self._mine().get(rank)
        if worker is not None:
            epoch = version[0] if version is not None else -1
            done = dict(self._agreed.done) if self._agreed is not None else {}
            worker.tell(r.Generation(self._epoch, generation, epoch, self._shards.path_of(rank), done))
        self._aim()

    def _arm(self, record: r.Arm) -> None:
        fault = record.fault
        if fault.point:
            where = points.POINTS[fault.point][0]
            if where == "agent":
                points.arm(fault.point, -1, lambda: self._strike(fault))
                return
        if fault.point or fault.iteration is not None:
            self._armed.append(record)
            for worker in self._workers.values():
                worker.tell(record)
            return
        self._strike(fault)

    def _strike(self, fault: r.Fault) -> None:
        """Do what the fault says, now."""
        worker = self._workers.get(fault.local)
        points.announce(fault.kind, f"node {self._s.node}", sys.stderr)
        match fault.kind:
            case "kill":
                for each in self._workers.values():
                    end_group(each.pid, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill-agent":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop-agent":
                for each in self._workers.values():
                    end_group(each.pid, signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGSTOP)
            case "kill-worker" if worker is not None:
                end_group(worker.pid, signal.SIGKILL)
            case "crash" if worker is not None:
                end_group(worker.pid, signal.SIGSEGV)
            case "stop" if worker is not None:
                end_group(worker.pid, signal.SIGSTOP)
            case "corrupt" if worker is not None and worker.rank is not None and self._shards is not None:
                self._shards.corrupt(worker.rank)
            case _:
                if worker is not None:
                    worker.tell(r.Arm(fault))
