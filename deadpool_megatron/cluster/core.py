"""The coordinator's decisions, pure: events in, actions out, no sockets, no clock of its own.

Failure-free a job goes STARTING -> RUNNING -> FINISHING -> ENDED. A lost node takes it through one recovery::

    RUNNING --node lost--> ARRIVING --all offers--> PREPARING --all ready--> FORMING --all formed--> RESTORING
       ^                     declare(e+1)   agree(g)                form(e+1)                            |
       +------------------------------- all resumed ----------------------------------------------------+

A loss in any of those phases declares the next epoch and starts again at ARRIVING. Every phase has a deadline; who
misses it counts as lost. Records of an epoch other than the current one are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from deadpool_megatron.cluster import assignment as placing
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.accounting import SnapshotAccount
from deadpool_megatron.cluster.agreement import Agreement, NoCommonGeneration, agree
from deadpool_megatron.cluster.durability import Durability, DurableSpec
from deadpool_megatron.cluster.exits import Exit
from deadpool_megatron.cluster.protection import Protection
from deadpool_megatron.vault import CommitLedger, Version, small_capacity

__all__ = ["Action", "Core", "Deadlines", "Emit", "Finish", "JobSpec", "NodeState", "Phase", "Send"]


class Phase(Enum):
    """Where the job stands."""

    STARTING = "starting"
    RUNNING = "training"
    ARRIVING = "aborting"
    PREPARING = "restoring"
    FORMING = "re-forming"
    RESTORING = "gathering parameters"
    FINISHING = "finishing"
    ENDED = "ended"


RECOVERING = frozenset({Phase.ARRIVING, Phase.PREPARING, Phase.FORMING, Phase.RESTORING})


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Every deadline of the protocol, in seconds; detect < abort <= give up."""

    lease: float
    abort: float
    build: float
    form: float
    join: float = 120.0


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What the job is. ``nodes`` counts all nodes, spares included."""

    nodes: int
    spare_nodes: int
    slots_per_node: int
    deadpool: bool
    deadlines: Deadlines
    transient_retries: int = 3
    redundancy: str = "1"
    domains: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    durable: DurableSpec | None = None

    @property
    def active_nodes(self) -> int:
        """Nodes that train at first."""
        return self.nodes - self.spare_nodes

    @property
    def world_size(self) -> int:
        """Number of coordinates."""
        return self.active_nodes * self.slots_per_node


@dataclass(slots=True)
class NodeState:
    """What is known of one node."""

    node: int
    role: str
    agent_pid: int = 0
    vault: r.Address | None = None
    pids: dict[int, int] = field(default_factory=dict)
    parked: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Send:
    """Send a record to one node, or to all that are not lost when ``node`` is None."""

    node: int | None
    record: msgspec.Struct


@dataclass(frozen=True, slots=True)
class Emit:
    """Write an event."""

    event: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over."""

    code: int
    message: str


Action = Send | Emit | Finish


class Core:
    """Membership, epochs, agreement and the end of one job. Not thread-safe: one caller."""

    def __init__(self, job: JobSpec) -> None:
        self.job = job
        self.phase = Phase.STARTING
        self.epoch = 0
        self.assignment = placing.initial(job.active_nodes, job.slots_per_node)
        self.nodes = {n: NodeState(n, "active" if n < job.active_nodes else "spare") for n in range(job.nodes)}
        self.coordinates: dict[int, r.CoordinateInfo] = {}
        self.protection = Protection(job.redundancy, job.domains)
        self.committed = -1
        self.iteration = -1
        self.snapshots = SnapshotAccount()
        self.state_hashes: dict[int, dict[str, str]] = {}
        self._registered: dict[int, r.Registered] = {}
        self._kept: Version | None = None
        self._ledger = CommitLedger(placing.nodes_of(self.assignment), 0)
        self._offers: dict[int, r.Offer] = {}
        self._reached: set[int] = set()
        self._resumed: set[int] = set()
        self._restored: set[int] = set()
        self._finished: set[int] = set()
        self._exited: set[tuple[int, int]] = set()
        self._saved: set[int] = set()
        self._told_restored = False
        self._refused: set[tuple[int, int, int]] = set()
        self._errors: set[tuple[int, str]] = set()
        self._transients = 0
        self._purpose: r.Purpose = "resume"
        self._generation = -1
        self._deadline: float | None = None
        self._hint: tuple[float, str] | None = None
        self._last_failure: r.WorkerFailed | None = None
        self._durability = Durability(job.durable, self._send, self._emit)
        self._durable_name = ""  # of the durable generation this recovery goes back to
        self._out: list[Action] = []
        self._now = 0.0
        self._handlers: dict[type, Callable[[Any], None]] = {
            r.Join: self._join,
            r.WorkerReady: self._worker_ready,
            r.Registered: self._register,
            r.WorkerExited: self._worker_exited,
            r.WorkerFailed: self._worker_failed,
            r.PeerError: self._peer_error,
            r.Offer: self._offer,
            r.NodeReady: self._node_ready,
            r.NodeFormed: self._node_formed,
            r.NodeRestored: self._node_restored,
            r.NodeResumed: self._node_resumed,
            r.Committed: self._node_commit,
            r.Covered: self._node_covered,
            r.NoRoom: self._no_room,
            r.VaultMemory: self._vault_memory,
            r.DamagedCopy: self._damaged_copy,
            r.Iteration: self._iterated,
            r.FetchFailed: self._fetch_failed,
            r.Finished: self._node_finished,
            r.StateHash: self._state_hash,
            r.Saved: self._node_saved,
            r.ShardsLoaded: self._shards_loaded,
            r.ShardsDrained: self._shards_drained,
            r.GenerationSealed: self._generation_sealed,
            r.PreemptionNotice: lambda record: self._preempt(),
        }

    # ---- events

    def received(self, record: r.AgentRecord, now: float) -> list[Action]:
        """A record came from an agent. ``now`` is a monotonic time in seconds."""
        state = self.nodes.get(getattr(record, "node", -1))
        if (state is None or state.role == "lost") and not isinstance(record, r.Join):
            return []  # a node that was declared lost has no say any more
        return self._run(lambda: self._handlers[type(record)](record), now)

    def node_lost(self, node: int, cause: str, now: float) -> list[Action]:
        """The lease or the connection of a node ended."""
        return self._run(lambda: self._lose({node}, cause), now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        return self._run(self._check_deadlines, now)

    def interrupted(self, now: float) -> list[Action]:
        """The user asked for the end."""
        return self._run(lambda: self._stop(Exit.INTERRUPTED, "interrupted: every process of the job is ended"), now)

    def preempted(self, now: float) -> list[Action]:
        """The job has to leave its machines soon: what is committed becomes durable, then it ends."""
        return self._run(self._preempt, now)

    def inject(self, fault: r.Fault, now: float) -> tuple[str, list[Action]]:
        """A fault was asked for. Returns the reason it is refused, or an empty string."""
        if fault.kind == "abort":
            if self.phase is not Phase.RUNNING:
                return f"the job is not training now: {self.phase.value}", []
            return "", self._run(lambda: self._declare("abort injected"), now)
        state = self.nodes.get(fault.node)
        if state is None:
            return f"there is no node {fault.node}: the job has nodes 0 to {self.job.nodes - 1}", []
        if state.role == "lost":
            return f"node {fault.node} is lost already", []
        if self.phase is Phase.ENDED:
            return "the job has ended", []
        if fault.iteration is not None and fault.iteration <= self.iteration:
            return f"iteration {fault.iteration} is over: the job is past iteration {self.iteration}", []
        return "", self._run(lambda: self._send(fault.node, r.Arm(fault)), now)

    def next_deadline(self) -> float | None:
        """When `tick` has to be called at the latest, in the clock of ``now``."""
        soon = (self._deadline, self._hint[0] if self._hint else None, self._durability.next_deadline())
        times = [t for t in soon if t is not None]
        return min(times) if times else None

    @property
    def durable(self) -> int:
        """The newest durable generation; -1 when there is none."""
        newest = self._durability.newest
        return -1 if newest is None else newest

    # ---- helpers

    def _run(self, step: Callable[[], None], now: float) -> list[Action]:
        self._now = now
        if self.phase is not Phase.ENDED:
            step()
        out, self._out = self._out, []
        return out

    def _send(self, node: int | None, record: msgspec.Struct) -> None:
        self._out.append(Send(node, record))

    def _emit(self, event: str, **fields: Any) -> None:
        self._out.append(Emit(event, {"epoch": self.epoch, **fields}))

    def _stop(self, code: Exit | int, message: str) -> None:
        if code in (Exit.NO_SPARE, Exit.GENERATION_LOST, Exit.RECOVERY_FAILED, Exit.FAILED):
            message += self._durability.hint
        self._emit("stopped", code=int(code), message=message)
        self._send(None, r.Stop(int(code), message))
        self._out.append(Finish(int(code), message))
        self.phase = Phase.ENDED

    def _active(self) -> list[int]:
        return placing.nodes_of(self.assignment)

    def _spares(self) -> list[int]:
        # A spare whose workers still import is worth waiting for: it is the last resort, so it comes last.
        ready = {n: len(s.parked) >= self.job.slots_per_node for n, s in self.nodes.items() if s.role == "spare"}
        return sorted(ready, key=lambda n: (not ready[n], n))

    def _vaults(self) -> dict[int, r.Address]:
        return {n: s.vault for n, s in self.nodes.items() if s.vault is not None and s.role != "lost"}

    def _all_reached(self, node: int) -> bool:
        self._reached.add(node)
        return self._reached >= set(self._active())

    # ---- start

    def _join(self, record: r.Join) -> None:
        state = self.nodes.get(record.node)
        if state is None or state.role == "lost":
            self._send(record.node, r.Stop(Exit.FENCED, f"node {record.node} is not part of this job (any more)"))
            return
        state.agent_pid = record.pid
        state.vault = r.Address(record.host, record.vault_port)
        state.pids = dict(enumerate(record.worker_pids))
        self.protection.label(record.node, record.domains)
        self._tell_roster()

    def _tell_roster(self) -> None:
        """Once everybody who is not lost has joined."""
        if not self._missing():
            self._deadline = None
            self._send(None, r.Roster(self.epoch, self.assignment, self._vaults()))
            self._emit("started", nodes=self.job.nodes, spares=self.job.spare_nodes, world_size=self.job.world_size)
            self._durability.start(self._active())

    def _missing(self) -> set[int]:
        """Nodes whose agent has not joined yet."""
        return {n for n, s in self.nodes.items() if s.role != "lost" and not s.agent_pid}

    def _worker_ready(self, record: r.WorkerReady) -> None:
        state = self.nodes[record.node]
        state.pids[record.local] = record.pid
        if state.role == "spare":
            state.parked.add(record.local)
            if len(state.parked) == self.job.slots_per_node:
                self._emit("parked", node=record.node)

    def _register(self, record: r.Registered) -> None:
        rank = record.coordinate.rank
        self.coordinates[rank] = record.coordinate
        self._registered[rank] = record
        others = {x.table_digest for x in self._registered.values()}
        if len(others) > 1:
            self._stop(
                Exit.FAILED,
                f"rank {rank} on node {record.node} made other process groups than the rest: the ranks do not run "
                "the same script with the same flags",
            )
        elif self.phase is Phase.STARTING and len(self._registered) == self.job.world_size:
            self.phase = Phase.RUNNING
            for each in self._registered.values():
                self.snapshots.registered(each)
            self._emit(
                "training",
                strategy=record.strategy,
                unique_bytes=record.unique_bytes,
                planned_bytes=self.snapshots.planned_bytes,
                expected_bytes=self.snapshots.expected_bytes,
            )
            self._protect()

    def _protect(self) -> None:
        """Every coordinate is known: say who keeps whose shards, and what may be lost from then on."""
        sizes, rooms = self._shapes()
        largest = max(unique + room for unique, room in zip(sizes, rooms, strict=True))
        if self.job.active_nodes == 1:  # for measurements: nothing is protected
            self._send(None, r.Placement(self.epoch, [[0, 0]], sizes, rooms))
            return
        groups = self.protection.begin(self.assignment, self.coordinates, largest, self.job.slots_per_node)
        if self.job.deadpool:
            self._send(None, r.Placement(self.epoch, [list(group) for group in groups], sizes, rooms))
            self._emit("placed", costs=self.protection.costs(), **self.protection.status())

    def _shapes(self) -> tuple[list[int], list[int]]:
        """By rank, bytes of unique state and room for small state."""
        known = [self._registered[rank] for rank in range(self.job.world_size)]
        return [x.unique_bytes for x in known], [small_capacity(x.small_bytes) for x in known]

    def _no_room(self, record: r.NoRoom) -> None:
        self._stop(Exit.USAGE, f"node {record.node}: {record.message}")

    def _vault_memory(self, record: r.VaultMemory) -> None:
        self._emit("memory", node=record.node, bytes=record.nbytes, huge_bytes=record.huge_bytes)

    def _damaged_copy(self, record: r.DamagedCopy) -> None:
        if record.epoch == self.epoch:
            self.protection.damaged(record.node)
        self._emit(
            "damaged", node=record.node, kind=record.kind, holder=record.holder, iteration=record.generation
        )

    def _node_covered(self, record: r.Covered) -> None:
        here = record.epoch == self.epoch and record.generation == self._generation
        if here and self.protection.covered(record.node):
            self._emit("protected", survives=self.protection.degree, iteration=record.generation)

    # ---- failure-free

    def _iterated(self, record: r.Iteration) -> None:
        if record.epoch != self.epoch:
            return
        if record.iteration > self.iteration:
            self.iteration = record.iteration
            self._transients = 0  # it gets on: errors far apart do not add up over the life of a job
        self._ledger.progress(record.iteration + 1)
        self._emit(
            "iteration",
            node=record.node,
            rank=record.rank,
            iteration=record.iteration,
            losses={k: float.fromhex(v) for k, v in record.losses.items()},
            losses_hex=record.losses,
            grad_norm=float.fromhex(record.grad_norm) if record.grad_norm is not None else None,
            grad_norm_hex=record.grad_norm,
            seconds=record.seconds,
            blocked_s=record.blocked_s,
            copied_bytes=record.copied_bytes,
            skipped_generations=record.skipped_generations,
            stall_s=record.stall_s,
            device_stall_s=record.device_stall_s,
            copied_s=record.copied_s,
            copy_bandwidth=record.copy_bandwidth,
            sent_bytes=record.sent_bytes,
            send_bandwidth=record.send_bandwidth,
            commit_s=self.snapshots.iterated(record, self._now),
        )

    def _node_commit(self, record: r.Committed) -> None:
        if record.epoch != self.epoch:
            return
        told = self._ledger.committed(record.node, Version(record.epoch, record.generation))
        if told is None:
            return
        self._send(None, r.CommittedTo(self.epoch, told.kept, told.floor.generation))
        if told.kept is not None and told.kept != self._kept:
            self._kept = told.kept
            self.committed = told.kept.generation
            seconds = self.snapshots.committed(told.kept.generation, self._now)
            self._emit("committed", iteration=told.kept.generation, seconds=seconds)
            if self.protection.committed():
                self._emit("protected", survives=self.protection.degree, iteration=told.kept.generation)
            self._durability.committed(told.kept, self._active(), self._now)

    def _node_finished(self, record: r.Finished) -> None:
        if record.epoch != self.epoch or self.phase not in (Phase.RUNNING, Phase.RESTORING):
            return
        self._finished.add(record.node)
        if self._finished >= set(self._active()):
            self.phase = Phase.FINISHING
            self._deadline = self._hint = None
            self._send(None, r.AllFinished(self.epoch))

    def _state_hash(self, record: r.StateHash) -> None:
        self.state_hashes[record.rank] = record.digests

    # ---- the durable tier

    def _shards_loaded(self, record: r.ShardsLoaded) -> None:
        why = self._durability.loaded(record, self._active())
        if why:
            self._stop(Exit.GENERATION_LOST, why)

    def _shards_drained(self, record: r.ShardsDrained) -> None:
        self._durability.drained(record, self.assignment, self.coordinates, self.epoch)

    def _generation_sealed(self, record: r.GenerationSealed) -> None:
        self._durability.sealed(record, self.assignment, self._now)
        self._leave_if_preempted()

    def _preempt(self) -> None:
        self._durability.preempt(self._active(), self.assignment, self._now)
        self._leave_if_preempted()

    def _leave_if_preempted(self) -> None:
        if self._durability.leave is not None:
            self._stop(Exit.PREEMPTED, self._durability.leave)

    # ---- ends of processes

    def _worker_exited(self, record: r.WorkerExited) -> None:
        state = self.nodes[record.node]
        if state.role == "lost":
            return
        how = f"signal {-record.code}" if record.code < 0 else f"exit code {record.code}"
        who = f"rank {record.rank}" if record.rank is not None else f"spare worker {record.local}"
        if record.code == 0 and self.phase in (Phase.STARTING, Phase.FINISHING):
            self._exited.add((record.node, record.local))
            if {(s.node, s.local) for s in self.assignment} <= self._exited:
                self._done()
        elif state.role == "spare":
            self._lose({record.node}, f"worker {record.local} ended ({how})")
        elif not self.job.deadpool or self.phase in (Phase.STARTING, Phase.FINISHING):
            when = {Phase.STARTING: "before training began", Phase.FINISHING: "after training had finished"}
            code = record.code if 0 < record.code < 126 else Exit.FAILED
            failure = self._last_failure
            if failure is not None and failure.node == record.node and failure.local == record.local:
                self._stop(code, f"{who} on node {record.node}: {failure.message}")
            else:
                where = when.get(self.phase, "") if self.job.deadpool else ""
                self._stop(code, f"{who} on node {record.node} failed {where} ({how}); see its log".replace("  ", " "))
        else:
            self._lose({record.node}, f"{who} ended ({how})")

    def _worker_failed(self, record: r.WorkerFailed) -> None:
        if self.nodes[record.node].role == "lost":
            return
        who = f"rank {record.rank}" if record.rank is not None else f"spare worker {record.local}"
        self._last_failure = record
        self._emit(
            "worker_error", node=record.node, rank=record.rank, iteration=record.iteration, message=record.message
        )
        if record.user_error:
            self._stop(Exit.USAGE, record.message)
        elif record.phase == "training" and self.job.deadpool:
            signature = (record.iteration, record.message)
            if signature in self._errors:
                self._stop(
                    Exit.REPEATED_ERROR,
                    f"{who} raised the same error at iteration {record.iteration} again, so no spare is spent on it: "
                    f"{record.message}\n{record.traceback}",
                )
            self._errors.add(signature)

    def _done(self) -> None:
        if self.phase is Phase.FINISHING and self.job.deadpool:
            self._emit("finished", iteration=self.iteration)
        else:
            self._emit("finished")
        self._send(None, r.Stop(Exit.OK, ""))
        self._out.append(Finish(Exit.OK, ""))
        self.phase = Phase.ENDED

    # ---- recovery

    def _lose(self, nodes: set[int], cause: str) -> None:
        fresh = {n for n in nodes if n in self.nodes and self.nodes[n].role != "lost"}
        if not fresh:
            return
        was_active = fresh & set(self._active())
        for node in sorted(fresh):
            self.nodes[node].role = "lost"
            ranks = list(placing.ranks_of(self.assignment, node).values())
            self._emit("detected", node=node, cause=cause, ranks=ranks)
            self._send(node, r.Stop(Exit.FENCED, f"node {node} is out of the job: {cause}"))
        if not was_active:
            if any(not self.nodes[node].agent_pid for node in fresh):
                self._tell_roster()  # it was the one the others waited for
            return
        if self._exited and self.phase is Phase.FINISHING and not self.job.deadpool:
            return
        if not self.job.deadpool or self.phase in (Phase.STARTING, Phase.FINISHING):
            when = "before training began" if self.phase is Phase.STARTING else "after training had finished"
            where = when if self.job.deadpool else "and DeadPool is off"
            self._stop(Exit.FAILED, f"node {sorted(was_active)[0]} was lost {where}: {cause}")
            return
        self._declare(cause)

    def _declare(self, reason: str) -> None:
        lost = {n for n in self._active() if self.nodes[n].role == "lost"}
        old = list(self.assignment)
        taken_by = placing.choose_spares(lost, self._spares())
        if taken_by is not None and self._purpose == "resume":
            self.assignment = placing.replace_nodes(self.assignment, taken_by)
            for spare in taken_by.values():
                self.nodes[spare].role = "active"
        elif lost or self._purpose == "save":
            plan = placing.rescue(self.assignment, lost, self.job.slots_per_node)
            able = all(x.can_rescue for x in self._registered.values())
            if plan is None or not able:
                self._stop(
                    Exit.NO_SPARE,
                    f"no spare is left for node {sorted(lost)[0]} ({reason}) and no checkpoint could be saved: "
                    + ("nobody survives" if plan is None else "it takes --save and a backend that shares devices"),
                )
                return
            self._purpose = "save"
            self.assignment = plan
        self.epoch += 1
        self.snapshots.forget()
        groups = self.protection.moved(self.assignment, self.coordinates, self._purpose == "resume")
        replaced = [rank for rank, slot in enumerate(self.assignment) if slot != old[rank]]
        self._emit(
            "declared",
            lost=sorted(lost),
            replaced=replaced,
            nodes=self._active(),
            reason=reason,
            purpose=self._purpose,
        )
        self._durability.epoch_ended(lost, self.assignment)
        self._offers.clear()
        self._reached.clear()
        self._restored.clear()
        self._resumed.clear()
        self._finished.clear()
        self._saved.clear()
        self._told_restored = False
        self._hint = None
        self.phase = Phase.ARRIVING
        self._deadline = self._now + self.job.deadlines.abort
        self._send(
            None,
            r.Declare(
                self.epoch,
                self._purpose,
                reason,
                sorted(n for n, s in self.nodes.items() if s.role == "lost"),
                replaced,
                self.assignment,
                self._vaults(),
                [list(group) for group in groups],
                *self._shapes(),
            ),
        )

    def _offer(self, record: r.Offer) -> None:
        if record.epoch != self.epoch or self.phase is not Phase.ARRIVING:
            return
        self._offers[record.node] = record
        if set(self._offers) >= set(self._active()):
            self._emit("aborted")
            self._agree()

    def _nothing_left(self, err: NoCommonGeneration) -> str:
        if self.committed < 0:
            lost = [n for n, s in self.nodes.items() if s.role == "lost"]
            what = f"node {min(lost)} was lost" if lost else "communication failed"
            return (
                f"{what} before the first generation was committed, so there is nothing to go on from; start the "
                "job again"
            )
        held = "of ranks " + ", ".join(map(str, err.missing)) if err.missing else "of every rank"
        return (
            f"more nodes were lost than the redundancy covers: no vault holds the shards {held} of one generation; "
            "restart the job from Megatron's last checkpoint (--load)"
        )

    def _agree(self) -> None:
        self._durable_name = ""
        try:
            agreement = agree(
                self.assignment, self._offers, frozenset(self._refused), self.protection.words
            )
        except NoCommonGeneration as err:
            fallback = self._durability.fallback()
            if fallback is None:
                self._stop(Exit.GENERATION_LOST, self._nothing_left(err))
                return
            agreement, self._durable_name = Agreement(fallback[0], {}), fallback[1]
            self.iteration = agreement.generation - 1
            held = "of ranks " + ", ".join(map(str, err.missing)) if err.missing else "of every rank"
            self._emit(
                "durable_fallback",
                iteration=agreement.generation,
                name=self._durable_name,
                message=f"no vault holds the shards {held} of one generation: training goes back to durable generation "
                f"{agreement.generation}",
            )
        self._generation = agreement.generation
        self.committed = agreement.generation
        self._kept = None
        self._ledger = CommitLedger(self._active(), self.epoch)
        self._emit(
            "agreed",
            iteration=agreement.generation,
            sources={str(rank): source.node for rank, source in agreement.sources.items()},
            rebuilds={
                str(rank): sorted({share.node for part in parts for share in part})
                for rank, parts in agreement.rebuilds.items()
            },
        )
        self.phase = Phase.PREPARING
        self._deadline = self._now + self.job.deadlines.build
        self._reached.clear()
        a = agreement
        self._send(None, r.Agree(self.epoch, a.generation, a.sources, a.rebuilds, self._durable_name))

    def _node_ready(self, record: r.NodeReady) -> None:
        if record.epoch != self.epoch or self.phase is not Phase.PREPARING:
            return
        if self._all_reached(record.node):
            self._emit("prepared", iteration=self._generation)
            self.phase = Phase.FORMING
            self._deadline = self._now + 3 * self.job.deadlines.form
            self._reached.clear()
            self._send(None, r.Form(self.epoch))

    def _node_formed(self, record: r.NodeFormed) -> None:
        if record.epoch != self.epoch or self.phase is not Phase.FORMING:
            return
        if self._all_reached(record.node):
            self._emit("reformed", groups=record.groups)
            self.phase = Phase.RESTORING
            self._deadline = self._now + self.job.deadlines.abort + self.job.deadlines.form
            self._check_restored()

    def _node_restored(self, record: r.NodeRestored) -> None:
        if record.epoch == self.epoch and self.phase in (Phase.FORMING, Phase.RESTORING):
            # A fast node may be through its parameter gather before the slowest has told that it formed.
            self._restored.add(record.node)
            self._check_restored()

    def _node_resumed(self, record: r.NodeResumed) -> None:
        if record.epoch == self.epoch and self.phase in (Phase.FORMING, Phase.RESTORING):
            self._resumed.add(record.node)
            self._check_restored()

    def _check_restored(self) -> None:
        active = set(self._active())
        if self.phase is not Phase.RESTORING or not self._restored >= active:
            return
        if not self._told_restored:
            self._told_restored = True
            self._emit("restored", iteration=self._generation)
            if self._purpose == "save":
                self._deadline = self._now + self.job.deadlines.build
        if self._purpose == "resume" and self._resumed >= active:
            self._emit("resumed", iteration=self._generation)
            self.phase = Phase.RUNNING
            self._deadline = None

    def _node_saved(self, record: r.Saved) -> None:
        if record.epoch != self.epoch:
            return
        self._saved.add(record.node)
        if self._saved >= set(self._active()):
            self._emit("saved", iteration=record.iteration, directory=record.directory)
            lost = sorted(n for n, s in self.nodes.items() if s.role == "lost")
            self._stop(
                Exit.NO_SPARE_SAVED,
                f"no spare is left (nodes lost: {', '.join(map(str, lost))}); Megatron's checkpoint of iteration "
                f"{record.iteration} was saved to {record.directory}: restart the job with --load {record.directory}",
            )

    def _fetch_failed(self, record: r.FetchFailed) -> None:
        if record.epoch != self.epoch or self.phase not in RECOVERING:
            return
        if self._durable_name:
            self._durability.bad(self._durable_name, record.why)
            self._declare(f"rank {record.rank} of durable generation {record.generation} could not be read")
            return
        self._refused.add((record.rank, record.source, record.generation))
        self._emit(
            "refused", rank=record.rank, node=record.source, iteration=record.generation, cause=record.why
        )
        self._declare(f"the copy of rank {record.rank} on node {record.source} could not be used: {record.why}")

    def _peer_error(self, record: r.PeerError) -> None:
        if record.epoch != self.epoch or self._hint is not None:
            return
        self._emit("peer_error", node=record.node, rank=record.rank, cause=record.text)
        # The lease decides whether a node is gone; only when it is over is the error one that no loss explains.
        self._hint = (self._now + self.job.deadlines.lease + 1.0, record.text)

    def _check_deadlines(self) -> None:
        self._durability.tick(self.assignment, self._now)
        self._leave_if_preempted()
        if self.phase is Phase.ENDED:
            return
        if self.phase is Phase.STARTING and self._missing():
            if self._deadline is None:
                self._deadline = self._now + self.job.deadlines.join
            elif self._now >= self._deadline:
                self._deadline = None
                self._lose(self._missing(), f"its agent has not joined within {self.job.deadlines.join:g} s")
            return
        if self._hint is not None and self._now >= self._hint[0]:
            text = self._hint[1]
            self._hint = None
            self._transients += 1
            if self._transients > self.job.transient_retries:
                self._stop(
                    Exit.RECOVERY_FAILED,
                    f"communication failed {self._transients} times with every node alive, the last time with: {text}",
                )
                return
            self._declare(f"communication error with every node alive: {text}")
        if self._deadline is not None and self._now >= self._deadline:
            done = {
                Phase.ARRIVING: set(self._offers),
                Phase.PREPARING: self._reached,
                Phase.FORMING: self._reached,
                Phase.RESTORING: self._saved if self._purpose == "save" and self._restored else self._resumed,
            }.get(self.phase, set())
            late = set(self._active()) - done
            self._deadline = None
            if late:
                self._lose(late, f"missed the deadline of phase '{self.phase.value}'")
