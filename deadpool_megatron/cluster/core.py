"""The coordinator's decisions, pure: events in, actions out, no sockets, no clock of its own.

Failure-free a job goes STARTING -> RUNNING -> FINISHING -> ENDED. What takes it out of RUNNING and back is one recovery
(`cluster.recovering`), each in an epoch of its own::

    RUNNING --node lost, worker dead, drain--> declare(e+1) -> ... agree(g) ... form(e+1) ... -> RUNNING

A loss in any phase of a recovery declares the next epoch and starts again. Every phase has a deadline; who misses it
counts as lost. Records of an epoch other than the current one are ignored.

What has been decided is kept (`Keep`) before anybody is told, so a coordinator that is started again goes on:
`restored` waits for the agents to come back, and if any was in the middle of something, declares a new epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.accounting import SnapshotAccount
from deadpool_megatron.cluster.blame import Blame, how_it_ended
from deadpool_megatron.cluster.durability import Durability
from deadpool_megatron.cluster.exits import Exit
from deadpool_megatron.cluster.headway import Headway
from deadpool_megatron.cluster.job import (
    RECOVERING,
    Action,
    Deadlines,
    Emit,
    Finish,
    JobSpec,
    Keep,
    Out,
    Phase,
    Send,
    Voice,
)
from deadpool_megatron.cluster.layout import Layout
from deadpool_megatron.cluster.members import Members, NodeState
from deadpool_megatron.cluster.protection import Protection
from deadpool_megatron.cluster.recoveries import Recoveries
from deadpool_megatron.cluster.recovering import Recovery
from deadpool_megatron.cluster.reunion import Reunion
from deadpool_megatron.cluster.stalls import StallJudge, StragglerJudge

__all__ = [
    "RECOVERING",
    "Action",
    "Core",
    "Deadlines",
    "Emit",
    "Finish",
    "JobSpec",
    "Keep",
    "NodeState",
    "Phase",
    "Send",
]

_COARSE = {Phase.STARTING: "starting", Phase.FINISHING: "finishing"}
# A job that had ended when its coordinator did: somebody may not have been told.
_RESTORED = {"starting": Phase.STARTING, "finishing": Phase.FINISHING, "ended": Phase.FINISHING}
_HOLD_NOTICE_S = 0.5  # what a message to the slowest worker may take


class Core:
    """Membership, epochs, agreement and the end of one job. Not thread-safe: one caller."""

    def __init__(self, job: JobSpec, rendezvous: r.Address | None = None) -> None:
        """``rendezvous``: where the store listens that process groups are re-formed over."""
        self.job = job
        self._phase = Phase.STARTING
        self._end: tuple[int, str] | None = None
        self._out = Out()
        self._now = 0.0
        voice = Voice(self._send, self._emit, self._keep, self._stop)
        self.members = Members(job)
        self.protection = Protection(job.redundancy, job.domains)
        self._layout = Layout(job.world_size)
        self._headway = Headway(self.members.active())
        self._durability = Durability(job.durable, self._send, self._emit)
        self._recoveries = Recoveries(
            job,
            self.members,
            self._layout,
            self._headway,
            self.protection,
            self._durability,
            rendezvous,
            voice,
            self._let_go,
        )
        self._reunion = Reunion()
        self._blame = Blame(job.worker_deaths)
        self._stalls = StallJudge(job.world_size)
        self._stall_texts: dict[int, str] = {}
        self._stragglers = StragglerJudge()
        self.snapshots = SnapshotAccount()
        self.refusals: dict[int, dict[str, int]] = {}
        self.state_hashes: dict[int, dict[str, str]] = {}
        self._finished: set[int] = set()
        self._exited: set[tuple[int, int]] = set()
        self._drain: tuple[int, int, set[int]] | None = None  # node, iteration, nodes that hold still
        self._transients = 0
        self._deadline: float | None = None
        self._awaited: dict[int, float] = {}
        self._hint: tuple[float, str] | None = None
        self._handlers: dict[type, Callable[[Any], None]] = {
            r.Join: self._join,
            r.WorkerReady: self._worker_ready,
            r.Registered: self._register,
            r.WorkerExited: self._worker_exited,
            r.WorkerFailed: self._worker_failed,
            r.PeerError: self._peer_error,
            r.Stalled: self._stalled,
            r.Pace: self._paced,
            r.NodeHeld: self._node_held,
            r.Did: self._did,
            r.Offer: lambda record: self._recoveries.offer(record, self._now),
            r.NodeArrived: self._recoveries.arrived,
            r.NodeReady: lambda record: self._recoveries.ready(record, self._now),
            r.NodeFormed: lambda record: self._recoveries.formed(record, self._now),
            r.NodeRestored: lambda record: self._recoveries.restored(record, self._now),
            r.NodeResumed: lambda record: self._recoveries.resumed(record, self._now),
            r.Committed: self._node_commit,
            r.Covered: self._recoveries.covered,
            r.NoRoom: self._no_room,
            r.Refusals: self._vault_refused,
            r.VaultMemory: self._vault_memory,
            r.DamagedCopy: self._damaged_copy,
            r.Iteration: self._iterated,
            r.FetchFailed: self._fetch_failed,
            r.Finished: self._node_finished,
            r.StateHash: self._state_hash,
            r.Saved: self._recoveries.saved,
            r.ShardsLoaded: self._shards_loaded,
            r.ShardsDrained: self._shards_drained,
            r.GenerationSealed: self._generation_sealed,
            r.PreemptionNotice: lambda record: self._preempt(),
        }

    # ---- what can be seen

    @property
    def phase(self) -> Phase:
        """Where the job stands."""
        current = self._recoveries.current
        return current.phase if current is not None else self._phase

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self.members.epoch

    @property
    def assignment(self) -> list[r.SlotAddress]:
        """The slot of each coordinate, by rank."""
        return self.members.assignment

    @property
    def recovery(self) -> Recovery | None:
        """The recovery under way, if any."""
        return self._recoveries.current

    @property
    def coordinates(self) -> dict[int, r.CoordinateInfo]:
        """By rank, of all that have registered."""
        return self._layout.coordinates

    @property
    def iteration(self) -> int:
        """The newest iteration that has ended; -1 before the first."""
        return self._headway.iteration

    @property
    def committed(self) -> int:
        """The newest generation that all have committed; -1 before the first."""
        return self._headway.committed

    @property
    def nodes(self) -> dict[int, NodeState]:
        """Every node that is or was in the job."""
        return self.members.nodes

    def next_deadline(self) -> float | None:
        """When `tick` has to be called at the latest, in the clock of ``now``."""
        times = [self._deadline, self._hint[0] if self._hint else None, self._stalls.due, *self._awaited.values()]
        times.append(self._durability.next_deadline())
        if self.recovery is not None:
            times.append(self.recovery.deadline)
        known = [t for t in times if t is not None]
        return min(known) if known else None

    # ---- events

    def received(self, record: r.AgentRecord, now: float) -> list[Action]:
        """A record came from an agent. ``now`` is a monotonic time in seconds."""
        if self.members.gone(getattr(record, "node", -1)) and not isinstance(record, r.Join):
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
        error = self._no_such_node(fault.node)
        if error:
            return error, []
        if fault.iteration is not None and fault.iteration <= self.iteration:
            return f"iteration {fault.iteration} is over: the job is past iteration {self.iteration}", []
        return "", self._run(lambda: self._out.send(fault.node, r.Arm(fault)), now)

    def drain(self, node: int, now: float) -> tuple[str, list[Action]]:
        """A node is to be taken away. Returns the reason it cannot, or an empty string."""
        error = self._no_such_node(node)
        if error:
            return error, []
        role = self.nodes[node].role
        if role == "leaving" or (self._drain is not None and self._drain[0] == node):
            return f"node {node} is being drained already", []
        if self.phase is not Phase.RUNNING or self._drain is not None or self._reunion.waits:
            what = f"node {self._drain[0]} is being drained" if self._drain else self.phase.value
            what = "the coordinator has just come back" if self._reunion.waits else what
            return f"not now, the job is busy: {what}; try again in a moment", []
        if role == "active" and not self.members.ready_spares():
            return f"no parked spare is there to take over node {node}: add one with deadpool join", []
        return "", self._run(lambda: self._begin_drain(node), now)

    def add_spare(self, host: str, now: float) -> tuple[str, int, list[Action]]:
        """A new node wants to come as a spare. Returns (why not, its number, actions)."""
        if not self.job.deadpool:
            return "the job runs without --deadpool, so it has no use for a spare", -1, []
        if self._phase is not Phase.RUNNING:
            return f"not now, the job is {self.phase.value}; try again in a moment", -1, []
        node = self.members.add_spare()
        self._awaited[node] = now + self.job.deadlines.join
        return "", node, self._run(lambda: self._keep(), now)

    @property
    def durable(self) -> int:
        """The newest durable generation; -1 when there is none."""
        newest = self._durability.newest
        return -1 if newest is None else newest

    # ---- helpers

    def _run(self, step: Callable[[], None], now: float) -> list[Action]:
        self._now = now
        if self._phase is not Phase.ENDED:
            step()
        return self._out.take()

    def _send(self, node: int | None, record: msgspec.Struct) -> None:
        self._out.send(node, record)

    def _emit(self, event: str, **fields: Any) -> None:
        self._out.add(Emit(event, {"epoch": self.epoch, **fields}))

    def _stop(self, code: Exit | int, message: str) -> None:
        if code in (Exit.NO_SPARE, Exit.GENERATION_LOST, Exit.RECOVERY_FAILED, Exit.FAILED):
            message += self._durability.hint
        self._emit("stopped", code=int(code), message=message)
        self._send(None, r.Stop(int(code), message))
        self._finish(int(code), message)

    def _finish(self, code: int, message: str) -> None:
        self._out.add(Finish(code, message))
        self._phase, self._recoveries.current, self._end = Phase.ENDED, None, (code, message)
        self._keep("now")  # refused to a coordinator that was deposed: it must not end the job
        self._deadline, self._hint = None, None
        self._awaited.clear()

    def _no_such_node(self, node: int) -> str:
        if self._phase is Phase.ENDED:
            return "the job has ended"
        state = self.nodes.get(node)
        if state is None:
            return f"there is no node {node}: the job has nodes 0 to {max(self.nodes)}"
        if state.gone:
            return f"node {node} is lost already" if state.role == "lost" else f"node {node} has left already"
        return ""

    # ---- a coordinator that starts again

    def _keep(self, *parts: str) -> None:
        """Keep what may have changed: the parts named; without any, what changes in a job's life."""
        self._out.add(Keep({name: self._part(name) for name in parts or ("now", "members")}))

    def dump(self) -> dict[str, Any]:
        """What a coordinator that starts again has to know, by part, as JSON types."""
        return {name: self._part(name) for name in ("now", "members", "layout")}

    def _part(self, name: str) -> dict[str, Any]:
        if name == "layout":  # large, and the same from the first step to the last
            return self._layout.dump()
        if name == "members":
            return {**self.members.dump(), "groups": self.protection.groups}
        return {
            "epoch": self.epoch,
            "phase": "ended" if self._phase is Phase.ENDED else _COARSE.get(self.phase, "running"),
            "can_rescue": self._layout.can_rescue,
            "committed": self.committed,
            "iteration": self.iteration,
            "errors": self._blame.dump(),
            "done": self._headway.done,
            "end": self._end,
            **self._recoveries.dump(),
        }

    def restored(self, parts: dict[str, Any], now: float) -> list[Action]:
        """Go on where a coordinator that is gone left off; the agents are expected back within the lease and a bit."""
        kept = parts["now"]
        self.members.load(parts["members"])
        self._phase = _RESTORED.get(kept["phase"], Phase.RUNNING)
        self._end = tuple(kept["end"]) if kept["end"] else None
        self._layout.load(parts.get("layout"), kept["can_rescue"])
        self._recoveries.load(kept)
        self._blame.load(kept["errors"])
        head = self._headway
        head.committed, head.iteration, head.done = kept["committed"], kept["iteration"], kept["done"]
        head.count_anew(self.members.active(), self.epoch)
        if self._layout.known:
            groups = tuple(tuple(group) for group in parts["members"]["groups"])
            self.protection.begin(
                self.assignment, self.coordinates, self._layout.largest, self.job.slots_per_node, groups
            )
        self._durability.restored(self._phase is Phase.STARTING)
        there = {n for n, s in self.nodes.items() if not s.gone and s.agent_pid}
        self._reunion.begin(there, "a recovery was under way" if kept["recovering"] else "")
        if self._phase is not Phase.STARTING:
            self._awaited = dict.fromkeys(self.members.missing(), now + self.job.deadlines.join)
        self._deadline = now + self.job.deadlines.lease + 5.0
        return self._run(lambda: self._emit("coordinator_back", nodes=sorted(there)), now)

    def _returned(self, record: r.Join) -> None:
        """An agent is back after the coordinator was away."""
        self._reunion.without({record.node})
        active = self.members.holds(record.node) or record.node in self._recoveries.helpers
        if active and (not record.settled or record.epoch != self.epoch):
            self._reunion.remember(f"node {record.node} was in the middle of epoch {record.epoch}")
        if not self._reunion.waits:
            self._all_returned()

    def _all_returned(self) -> None:
        missing, unsettled = self._reunion.end()
        self._deadline = None
        if self._end is not None:
            self._stop(*self._end) if self._end[0] else self._end_well()
            return
        if missing:
            self._lose(missing, "its agent has not come back to the coordinator")
        if self._phase is Phase.FINISHING:
            self._send(None, r.AllFinished(self.epoch))
        elif self._phase is Phase.STARTING and self.members.complete():
            self._durability.start(self.members.active())
        if self.recovery is not None or self._phase is not Phase.RUNNING:
            return
        lost = [n for n in self.members.active() if self.members.gone(n)]
        if unsettled or lost or self._recoveries.vacant:
            why = unsettled or (f"node {lost[0]} was lost" if lost else "a worker died")
            self._declare(f"the coordinator was away and {why}")
        elif not self.epoch and self._layout.known:
            self._send_placement()  # later ones come with a declaration; who heard the first one hears the same again

    # ---- start

    def _join(self, record: r.Join) -> None:
        state = self.nodes.get(record.node)
        if state is None or state.gone:
            self._send(record.node, r.Stop(Exit.FENCED, f"node {record.node} is not part of this job (any more)"))
            return
        first = not state.agent_pid
        state.agent_pid = record.pid
        state.vault = r.Address(record.host, record.vault_port)
        state.pids = dict(enumerate(record.worker_pids))
        state.respawns = record.respawns
        self.protection.label(record.node, record.domains)
        if record.node in self._reunion.expected:
            self._returned(record)
        elif self._awaited.pop(record.node, None) is not None:
            self._send(record.node, self._roster())
            self._emit("joined", node=record.node, host=record.host)
            self._keep()
        elif first:
            self._tell_roster()

    def _roster(self) -> r.Roster:
        return r.Roster(self.epoch, self.assignment, self.members.vaults())

    def _tell_roster(self) -> None:
        """Once everybody who is not lost has joined."""
        if self.members.complete():
            self._deadline = None
            self._send(None, self._roster())
            self._emit("started", nodes=self.job.nodes, spares=self.job.spare_nodes, world_size=self.job.world_size)
            self._durability.start(self.members.active())
            self._keep()

    def _worker_ready(self, record: r.WorkerReady) -> None:
        state = self.nodes[record.node]
        state.pids[record.local] = record.pid
        if state.role == "spare":
            state.parked.add(record.local)
            if len(state.parked) == self.job.slots_per_node:
                self._emit("parked", node=record.node)

    def _register(self, record: r.Registered) -> None:
        layout = self._layout
        layout.register(record)
        if layout.differs:
            self._stop(
                Exit.FAILED,
                f"rank {record.coordinate.rank} on node {record.node} made other process groups than the rest: the "
                "ranks do not run the same script with the same flags",
            )
        elif self._phase is Phase.STARTING and layout.complete:
            self._phase = Phase.RUNNING
            for each in layout.registered():
                self.snapshots.registered(each)
            self._emit(
                "training",
                strategy=record.strategy,
                unique_bytes=record.unique_bytes,
                planned_bytes=self.snapshots.planned_bytes,
                expected_bytes=self.snapshots.expected_bytes,
            )
            self._protect()
            self._keep("now", "members", "layout")

    def _protect(self) -> None:
        """Every coordinate is known: say who keeps whose shards, and what may be lost from then on."""
        if self.job.active_nodes == 1:  # for measurements: nothing is protected
            self._send(None, r.Placement(self.epoch, [[0, 0]], *self._layout.sizes))
            return
        self.protection.begin(self.assignment, self.coordinates, self._layout.largest, self.job.slots_per_node)
        if self.job.deadpool:
            self._send_placement()
            self._emit("placed", costs=self.protection.costs(), **self.protection.status())

    def _send_placement(self) -> None:
        groups = [list(group) for group in self.protection.groups]
        self._send(None, r.Placement(self.epoch, groups, *self._layout.sizes))

    def _no_room(self, record: r.NoRoom) -> None:
        self._stop(Exit.USAGE, f"node {record.node}: {record.message}")

    def _vault_refused(self, record: r.Refusals) -> None:
        self.refusals[record.node] = record.counts

    def _vault_memory(self, record: r.VaultMemory) -> None:
        told = {"numa_nodes": record.numa_nodes, "transport": record.transport, "why": record.why}
        self._emit("memory", node=record.node, bytes=record.nbytes, huge_bytes=record.huge_bytes, **told)

    def _damaged_copy(self, record: r.DamagedCopy) -> None:
        if record.epoch == self.epoch:
            self.protection.damaged(record.node)
        self._emit("damaged", node=record.node, kind=record.kind, holder=record.holder, iteration=record.generation)

    # ---- failure-free

    def _iterated(self, record: r.Iteration) -> None:
        if record.epoch != self.epoch:
            return
        if self._headway.iterated(record):
            self._transients = 0  # it gets on: errors far apart do not add up over the life of a job
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
        told, by_all = self._headway.node_committed(record)
        if told is None:
            return
        self._send(None, r.CommittedTo(self.epoch, told.kept, told.floor.generation))
        if by_all and told.kept is not None:
            seconds = self.snapshots.committed(told.kept.generation, self._now)
            self._emit("committed", iteration=told.kept.generation, seconds=seconds)
            if self.protection.committed():
                self._emit("protected", survives=self.protection.degree, iteration=told.kept.generation)
            self._durability.committed(told.kept, self.members.active(), self._now, self.phase is Phase.RUNNING)

    def _did(self, record: r.Did) -> None:
        self._headway.did(record)
        if record.act != "log":
            self._emit(record.act, iteration=record.iteration, rank=record.rank, node=record.node)

    def _node_finished(self, record: r.Finished) -> None:
        if record.epoch != self.epoch or self.phase not in (Phase.RUNNING, Phase.RESTORING):
            return
        self._finished.add(record.node)
        if all(map(self._finished.__contains__, self.members.active())):
            self._phase, self._recoveries.current = Phase.FINISHING, None
            self._deadline = self._hint = None
            self._keep()
            self._send(None, r.AllFinished(self.epoch))

    def _state_hash(self, record: r.StateHash) -> None:
        self.state_hashes[record.rank] = record.digests

    # ---- the durable tier

    def _shards_loaded(self, record: r.ShardsLoaded) -> None:
        why = self._durability.loaded(record, self.members.active())
        if why:
            self._stop(Exit.GENERATION_LOST, why)

    def _shards_drained(self, record: r.ShardsDrained) -> None:
        self._durability.drained(record, self.assignment, self.coordinates, self.epoch)

    def _generation_sealed(self, record: r.GenerationSealed) -> None:
        self._durability.sealed(record, self.assignment, self._now)
        self._leave_if_preempted()

    def _preempt(self) -> None:
        self._durability.preempt(self.members.active(), self.assignment, self._now)
        self._leave_if_preempted()

    def _leave_if_preempted(self) -> None:
        if self._durability.leave is not None:
            self._stop(Exit.PREEMPTED, self._durability.leave)

    def _paced(self, record: r.Pace) -> None:
        ratio = self._stragglers.report(record.node, record.forward_s, self._layout.stages, self._now)
        if ratio is not None:
            self._emit(
                "straggler",
                node=record.node,
                iteration=record.iteration,
                ratio=round(ratio, 2),
                advice=f"deadpool drain --node {record.node}",
            )

    # ---- planned moves

    def _begin_drain(self, node: int) -> None:
        if self.nodes[node].role == "spare":
            self._emit("left", node=node)
            self._let_go(node)
            return
        pace = self._headway.pace
        ahead = 2 + math.ceil(_HOLD_NOTICE_S / pace) if pace > 0 else 3
        self._drain = (node, self.iteration + ahead, set())
        self._deadline = self._now + self.job.deadlines.abort + ahead * pace
        self._emit("leaving", node=node, iteration=self._drain[1])
        self._send(None, r.Hold(self.epoch, self._drain[1]))

    def _node_held(self, record: r.NodeHeld) -> None:
        if record.epoch != self.epoch or self.phase is not Phase.RUNNING:
            return
        if self._drain is None:  # the coordinator that told everybody to hold still is gone, and nobody else would
            self._declare(f"node {record.node} holds still for a drain that was begun by another coordinator")
            return
        node, _, held = self._drain
        held.add(record.node)
        # Who was past the boundary already is brought back by an ordinary recovery, at the cost of an iteration.
        if record.missed or held >= set(self.members.active()):
            self._move_out(node)

    def _move_out(self, node: int) -> None:
        self._drain, self._deadline = None, None
        self.nodes[node].role = "leaving"
        self._recoveries.helpers.add(node)
        self._declare(f"node {node} is drained")

    def _let_go(self, node: int) -> None:
        self._send(node, r.Stop(Exit.OK, f"node {node} is drained and may be taken away"))
        self.nodes[node].role = "left"
        self._awaited.pop(node, None)
        self._keep()

    # ---- ends of processes

    def _worker_exited(self, record: r.WorkerExited) -> None:
        state = self.nodes[record.node]
        who, how = how_it_ended(record)
        if record.code == 0 and self._phase in (Phase.STARTING, Phase.FINISHING):
            self._exited.add((record.node, record.local))
            if {(s.node, s.local) for s in self.assignment} <= self._exited:
                self._end_well()
        elif state.role == "spare" and self.job.deadpool:
            self._spare_worker_exited(state, record.local, how)
        elif not self.job.deadpool or self._phase in (Phase.STARTING, Phase.FINISHING):
            code = record.code if 0 < record.code < 126 else Exit.FAILED
            self._stop(code, self._blame.fatal(record, self._phase, self.job.deadpool))
        elif state.role == "active":
            self._refill(state, record, f"{who} ended ({how})")

    def _spare_worker_exited(self, state: NodeState, local: int, how: str) -> None:
        state.parked.discard(local)
        if self._blame.died(state):
            self._lose({state.node}, f"{state.deaths} of its workers ended, the last with {how}")
            return
        self._emit("detected", node=state.node, cause=f"spare worker {local} ended ({how})", ranks=[])
        self._send(state.node, r.Respawn(local))

    def _refill(self, state: NodeState, record: r.WorkerExited, cause: str) -> None:
        """A worker died, its node is healthy: a spare takes over, or a new process in the same slot."""
        if record.rank is None or self.assignment[record.rank] != r.SlotAddress(record.node, record.local):
            return  # it has been replaced already
        to_blame = self._blame.died(state)
        if self._blame.crashed_again(record, self.iteration, cause):
            again = f"after iteration {self.iteration} again, so no spare is spent on it; see its log"
            self._stop(Exit.REPEATED_ERROR, f"{cause} {again}")
            return
        if to_blame:
            again = f"{state.deaths} of its workers ended, the last one: " if state.deaths > 1 else ""
            self._lose({state.node}, again + cause)
            return
        self._emit("detected", node=record.node, rank=record.rank, cause=cause, ranks=[record.rank])
        self._recoveries.vacant.add((record.node, record.local))
        self._declare(cause)

    def _worker_failed(self, record: r.WorkerFailed) -> None:
        who = self._blame.failed(record)
        self._emit(
            "worker_error", node=record.node, rank=record.rank, iteration=record.iteration, message=record.message
        )
        if record.user_error:
            self._stop(Exit.USAGE, record.message)
        elif self.job.deadpool and self._phase is Phase.RUNNING and self._blame.failed_again(record):
            self._stop(
                Exit.REPEATED_ERROR,
                f"{who} raised the same error at iteration {record.iteration} again, so no spare is spent on it: "
                f"{record.message}\n{record.traceback}",
            )

    def _end_well(self) -> None:
        if self._phase is Phase.FINISHING and self.job.deadpool:
            self._emit("finished", iteration=self.iteration)
        else:
            self._emit("finished")
        self._send(None, r.Stop(Exit.OK, ""))
        self._finish(Exit.OK, "")

    # ---- losses

    def _lose(self, nodes: set[int], cause: str) -> None:
        fresh = {n for n in nodes if not self.members.gone(n)}
        if not fresh:
            return
        involved = set(self.members.active()) | (self.recovery.givers if self.recovery is not None else frozenset())
        hit = fresh & involved
        awaited = {node for node in fresh if not self.nodes[node].agent_pid}
        for node in sorted(fresh):
            self._emit("detected", node=node, cause=cause, ranks=self.members.ranks_of(node))
            self._send(node, r.Stop(Exit.FENCED, f"node {node} is out of the job: {cause}"))
            self.nodes[node].role = "lost"
            self._awaited.pop(node, None)
            self._recoveries.helpers.discard(node)
        if not hit:
            if awaited and self._phase is Phase.STARTING:
                self._tell_roster()  # it was the one the others waited for
            self._keep()
            return
        if self._exited and self._phase is Phase.FINISHING and not self.job.deadpool:
            return
        if not self.job.deadpool or self._phase in (Phase.STARTING, Phase.FINISHING):
            when = "before training began" if self._phase is Phase.STARTING else "after training had finished"
            where = when if self.job.deadpool else "and DeadPool is off"
            self._stop(Exit.FAILED, f"node {sorted(hit)[0]} was lost {where}: {cause}")
            return
        if not self._reunion.waits:
            self._declare(cause)
            return
        self._reunion.without(fresh)
        if not self._reunion.waits:
            self._all_returned()

    def _declare(self, reason: str) -> None:
        if self._reunion.waits:  # whoever is not back yet would not hear of it: when all are (`_all_returned`)
            self._reunion.remember(reason)
            return
        replaced = self._recoveries.declare(reason, self._now)
        if replaced is None:
            return
        self.snapshots.forget()
        self._finished.clear()
        self._stragglers.forget(replaced)
        self._stalls = StallJudge(self.job.world_size)
        self._hint = self._drain = self._deadline = None

    def _fetch_failed(self, record: r.FetchFailed) -> None:
        if why := self._recoveries.fetch_failed(record):
            self._declare(why)

    def _peer_error(self, record: r.PeerError) -> None:
        if record.epoch != self.epoch or self._hint is not None:
            return
        self._emit("peer_error", node=record.node, rank=record.rank, cause=record.text)
        if self._phase is not Phase.RUNNING:
            return  # nothing to go back to: the worker ends with its error, and that ends the job
        # The lease decides whether a node is gone; only when it is over is the error one that no loss explains.
        self._hint = (self._now + self.job.deadlines.lease + 1.0, record.text)

    def _stalled(self, record: r.Stalled) -> None:
        if record.epoch != self.epoch or self.phase is not Phase.RUNNING:
            return
        self._stall_texts[record.rank] = f"no progress for {record.seconds:.1f} s ({record.state})"
        self._stalls.report(record, self._now)
        self._judge_stalls()

    def _judge_stalls(self) -> None:
        if self._stalls.due is None or self._now < self._stalls.due or self.phase is not Phase.RUNNING:
            return
        stuck, all_of_them = self._stalls.verdict(self._now)
        for rank in stuck:
            node = self.assignment[rank].node
            cause = f"rank {rank} is stuck: {self._stall_texts[rank]}"
            self._emit("stuck", node=node, rank=rank, cause=cause)
            self._send(node, r.EndStuck(self.epoch, rank))
        if all_of_them:
            self._transient("every rank waits in a communication and none gets on")

    def _transient(self, text: str) -> None:
        self._transients += 1
        if self._transients > self.job.transient_retries:
            self._stop(
                Exit.RECOVERY_FAILED,
                f"communication failed {self._transients} times with every node alive, the last time with: {text}",
            )
            return
        self._declare(f"communication error with every node alive: {text}")

    # ---- time

    def _check_deadlines(self) -> None:
        self._durability.tick(self.assignment, self._now)
        self._leave_if_preempted()
        if self._phase is Phase.ENDED:
            return
        if self._phase is Phase.STARTING and not self.members.complete() and not self._reunion.waits:
            if self._deadline is None:
                self._deadline = self._now + self.job.deadlines.join
            elif self._now >= self._deadline:
                self._deadline = None
                late = f"its agent has not joined within {self.job.deadlines.join:g} s"
                self._lose(self.members.missing(), late)
            return
        for node, due in list(self._awaited.items()):
            if self._now >= due:
                self._lose({node}, f"its agent has not joined within {self.job.deadlines.join:g} s")
        if self._hint is not None and self._now >= self._hint[0]:
            text = self._hint[1]
            self._hint = None
            self._transient(text)
        if self._deadline is not None and self._now >= self._deadline:
            self._deadline = None
            if self._reunion.waits:
                self._all_returned()
            elif self._drain is not None:
                self._move_out(self._drain[0])
        self._judge_stalls()
        recovery = self.recovery
        if recovery is not None and recovery.deadline is not None and self._now >= recovery.deadline:
            recovery.deadline = None
            late_nodes = recovery.late()
            if late_nodes:
                self._lose(late_nodes, f"missed the deadline of phase '{recovery.phase.value}'")
