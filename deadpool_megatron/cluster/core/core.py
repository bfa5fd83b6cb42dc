"""The coordinator's decisions, pure: events in, actions out, no sockets, no clock of its own.

Parts of the core yield effects (`cluster.core.effects`), verdicts among them; `Core` carries them out in one place.

Failure-free a job goes STARTING -> RUNNING -> FINISHING -> ENDED. What takes it out of RUNNING and back is one recovery
(`cluster.core.recovering`), each in an epoch of its own::

    RUNNING --node lost, worker dead, drain--> declare(e+1) -> ... agree(g) ... form(e+1) ... -> RUNNING
    STARTING, or nothing committed --node lost, worker dead--> STARTING in e+1, all workers from the script's first line
    RUNNING --node lost, no spare, shrinks--> declare(e+1) -> agents hold the newest -> STARTING in e+2, fewer replicas

A loss in any phase of a recovery declares the next epoch and starts again. Every phase has a deadline; who misses it
counts as lost. Records of an epoch other than the current one are ignored.

What has been decided is kept (`Keep`) before anybody is told, so a coordinator that is started again goes on:
`restored` waits for the agents to come back, and if any was in the middle of something, declares a new epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.checks import SpareChecks
from deadpool_megatron.cluster.core.durable import Durability
from deadpool_megatron.cluster.core.effects import (
    Action,
    Declare,
    DeclareSoon,
    Effect,
    Effects,
    Emit,
    EndIfFinished,
    Finish,
    Keep,
    LetGo,
    Lose,
    Persist,
    Resize,
    Send,
    StartOver,
    Stop,
    emit,
)
from deadpool_megatron.cluster.core.job import JobSpec, Phase
from deadpool_megatron.cluster.core.layout import Layout
from deadpool_megatron.cluster.core.members import Members, NodeState
from deadpool_megatron.cluster.core.observations import Observations
from deadpool_megatron.cluster.core.planned_moves import Drains
from deadpool_megatron.cluster.core.progress import Progress
from deadpool_megatron.cluster.core.protection import Protection
from deadpool_megatron.cluster.core.recoveries import Recoveries
from deadpool_megatron.cluster.core.recovering import Recovery
from deadpool_megatron.cluster.core.rehearsals import Rehearsals
from deadpool_megatron.cluster.core.returning import Arrivals, Returning
from deadpool_megatron.cluster.core.spares import Spares
from deadpool_megatron.cluster.core.start import Start
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.core.suspicions import Suspicions
from deadpool_megatron.cluster.core.worker_ends import WorkerEnds
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.vault import Version

_COARSE = {Phase.STARTING: "starting", Phase.FINISHING: "finishing"}
# A job that had ended when its coordinator did: somebody may not have been told.
_RESTORED = {"starting": Phase.STARTING, "finishing": Phase.FINISHING, "ended": Phase.FINISHING}
_MOST_GATHERED: Final = 5  # times the time in which one more is waited for
_RETURN_S = 5.0  # beyond the lease, for agents to find a coordinator that starts again
GONE: Final = "its agent is gone or silent"
ABSENCE: Final = 0.25  # of the lease, for an agent whose connection has ended to connect again
_NOTICES: Final = 2.0  # leases until the pings of an agent (`Spoke`) find that nothing comes back over a connection


def _just(effect: Effect) -> Effects:
    yield effect


class Core:
    """Membership, epochs, agreement and the end of one job. Not thread-safe: one caller."""

    def __init__(self, job: JobSpec, rendezvous: r.Address | None = None, since_1970: float = 0.0) -> None:
        """``rendezvous``: where the store listens that process groups are re-formed over.

        ``since_1970``: seconds, what a time of this clock is more in seconds since 1970.
        """
        self.job = job
        self._since_1970 = since_1970
        self._actions: list[Action] = []
        self._now = 0.0
        self.members = Members(job)
        self.protection = Protection(job.redundancy, job.domains)
        self._layout = Layout(job.world_size)
        self._progress = Progress(self.members.active())
        self._durability = Durability(job.durable)
        spares = Spares(self.members, self._layout, self.protection)
        self._state = JobState(
            job, self.members, self._layout, self._progress, self.protection, self._durability, spares
        )
        self._recoveries = Recoveries(self._state, rendezvous)
        self._arrivals = Arrivals(job.deadlines.join)
        self._drains = Drains(self._state, self._recoveries)
        self._checks = SpareChecks(self._state)
        self._rehearsals = Rehearsals(self._state)
        self._suspicions = Suspicions(self._state)
        self._ends = WorkerEnds(self._state, self._recoveries, self._suspicions)
        self.seen = seen = Observations(self._state)
        self._start = Start(self._state, seen.snapshots)
        self._returning = Returning(self._state, self._recoveries, self._start, seen)
        self._soon: tuple[str, float, float] | None = None  # why an epoch is due, when, and when at the latest
        self._finished: set[int] = set()
        self._noticed = False
        self._armed: list[r.Fault] = []  # for an iteration
        self._handlers: dict[type, Callable[[Any], Iterable[Effect]]] = {
            r.Join: self._join,
            r.WorkerReady: self._worker_ready,
            r.Rehearsed: self._rehearsed,
            r.Standbys: self._start.stands_by,
            r.SpareChecked: self._checks.answered,
            r.Registered: self._register,
            r.WorkerExited: self._worker_exited,
            r.WorkerFailed: self._ends.failed,
            r.MachineSign: self._ends.sign,
            r.PeerError: self._peer_error,
            r.Stalled: self._stalled,
            r.Pace: lambda record: seen.paced(record, self._now),
            r.NodeHeld: self._node_held,
            r.SideEffect: self._did,
            r.Compared: lambda record: self._recoveries.compared(record, self._now),
            r.Offer: lambda record: self._recoveries.offer(record, self._now),
            r.NodeArrived: self._recoveries.arrived,
            r.NodeReady: self._node_ready,
            r.NodeFormed: lambda record: self._recoveries.got_on(record, self._now),
            r.NodeRestored: lambda record: self._recoveries.got_on(record, self._now),
            r.NodeResumed: lambda record: self._recoveries.got_on(record, self._now),
            r.Committed: self._committed,
            r.Covered: self._recoveries.covered,
            r.NoRoom: seen.no_room,
            r.Refusals: seen.refused,
            r.VaultMemory: seen.memory,
            r.DamagedCopy: self._damaged,
            r.Iteration: self._iterated,
            r.FetchFailed: self._fetch_failed,
            r.Finished: self._node_finished,
            r.StateHash: seen.state_hash,
            r.Saved: self._recoveries.saved,
            r.ShardsLoaded: self._shards_loaded,
            r.ShardsDrained: self._shards_drained,
            r.GenerationSealed: self._generation_sealed,
            r.SetAside: self._start.set_aside,
            r.PreemptionNotice: lambda record: self._preempt(),
        }

    # ---- what can be seen

    @property
    def phase(self) -> Phase:
        """Where the job stands."""
        current = self._recoveries.current
        return current.phase if current is not None else self._state.phase

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self.members.epoch

    @property
    def assignment(self) -> list[r.SlotAddress]:
        """The slot of each coordinate, by rank."""
        return self.members.assignment

    @property
    def awaits_agents(self) -> bool:
        """Agents that were there may come back, and none of them is given up yet."""
        return self._returning.waits

    def awaits(self, node: int) -> bool:
        """The agent of this node was there, may come back, and is not given up yet."""
        return self._returning.awaits(node)

    @property
    def recovery(self) -> Recovery | None:
        """The recovery under way, if any."""
        return self._recoveries.current

    @property
    def end(self) -> tuple[int, str] | None:
        """Exit code and message of the job, once it is over."""
        return self._state.end

    @property
    def coordinates(self) -> dict[int, r.CoordinateInfo]:
        """By rank, of all that have registered."""
        return self._layout.coordinates

    @property
    def iteration(self) -> int:
        """The newest iteration that has ended; -1 before the first."""
        return self._progress.iteration

    @property
    def committed(self) -> int:
        """The newest generation that all have committed; -1 before the first."""
        return self._progress.committed

    @property
    def nodes(self) -> dict[int, NodeState]:
        """Every node that is or was in the job."""
        return self.members.nodes

    def next_deadline(self) -> float | None:
        """When `tick` has to be called at the latest, in the clock of ``now``."""
        times = [self._arrivals.due, self._returning.due, self._durability.next_deadline()]
        if not self._returning.waits:  # who is not back may be the loss that explains an error
            times += [self._suspicions.due, self._drains.due]
            if self.phase is Phase.RUNNING:
                times += [self._checks.due, self._rehearsals.due]
            if self._state.phase is Phase.STARTING:
                times += [self._durability.loading_due, self._start.due]
            times.append(self._recovery_due())
            times.append(self._soon[1] if self._soon is not None else None)
        known = [t for t in times if t is not None]
        return min(known) if known else None

    # ---- events

    def received(self, record: r.AgentRecord, now: float) -> list[Action]:
        """A record came from an agent. ``now`` is a monotonic time in seconds."""
        if self.members.gone(getattr(record, "node", -1)) and not isinstance(record, r.Join):
            return []  # a node that was declared lost has no say any more
        self._at(now)
        effects = self._handlers[type(record)](record)
        return self._run(effects, now) if effects else []

    def node_lost(self, node: int, cause: str, now: float) -> list[Action]:
        """The agent of a node is gone for certain."""
        return self._run(self._lose({node}, cause), now)

    def node_lives(self, node: int, now: float) -> list[Action]:
        """The agent of a node that is away lives, and can be reached: it has time to notice that it is away."""
        if self._returning.awaits(node):
            self._returning.also(node, now + _NOTICES * self.job.deadlines.lease, stood_still=False)
        return []

    def node_away(self, node: int, now: float, stood_still: bool = False) -> list[Action]:
        """The connection of a node's agent has ended: it has a little time to come back.

        One that has not joined yet has the time to join (`Arrivals`), over whichever connection.

        Args:
            stood_still: it may have ended long ago, while nobody here could have heard it.
        """
        state = self.nodes.get(node)
        if self._state.phase is Phase.ENDED or state is None or state.gone or not state.agent_pid:
            return []
        lease = self.job.deadlines.lease
        self._returning.also(node, now + (lease + _RETURN_S if stood_still else ABSENCE * lease), stood_still)
        return []

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        return self._run(self._check_deadlines(), now)

    def interrupted(self, now: float, code: Exit = Exit.INTERRUPTED, how: str = "") -> list[Action]:
        """The user asked for the end, or (`Exit.TERMINATED`) a batch system did, unless ``how`` says what else."""
        how = how or ("interrupted" if code == Exit.INTERRUPTED else "ended by SIGTERM")
        return self._run(self._stop(code, f"{how}: every process of the job is ended"), now)

    def preempted(self, now: float) -> list[Action]:
        """The machines are wanted soon: what is committed becomes durable and the job leaves, if it is set up for that.

        Else Megatron decides: it handles the notice as its own exit signal (``--exit-signal-handler``).
        """
        return self._run(self._preempt(), now)

    def durable_taken(self, why: str, now: float) -> list[Action]:
        """The durable directory is another job's now."""
        return self._run(self._durable_taken(why), now)

    def inject(self, fault: r.Fault, now: float) -> tuple[str, list[Action]]:
        """A fault was asked for. Returns the reason it is refused, or an empty string."""
        if fault.kind == "abort":
            if self.phase is not Phase.RUNNING:
                return f"the job is not training now: {self.phase.value}", []
            return "", self._run(self._declare("abort injected"), now)
        error = self._no_such_node(fault.node)
        if error:
            return error, []
        if not self.nodes[fault.node].agent_pid or self._returning.awaits(fault.node):
            return f"not now: the agent of node {fault.node} is not connected; try again in a moment", []
        if not 0 <= fault.local < self.job.slots_per_node:
            return f"there is no worker {fault.local} on a node: {self.job.slots_per_node} are numbered from 0", []
        now_or_never = fault.iteration is None and not fault.point
        if fault.kind == "sign" and not self.job.deadpool:
            return "the job runs without --deadpool, so it blames nobody", []
        if fault.kind == "fail-check":
            if not self.job.spare_check_s:
                return "spares are not checked in this job: --deadpool-spare-check is 0", []
            if self.nodes[fault.node].role != "spare":
                return f"node {fault.node} is no spare: only spares are checked", []
            self._checks.ask_at(fault.node, now)
        if fault.kind == "corrupt" and not self.job.deadpool:
            return "the job runs without --deadpool, so it keeps no copies", []
        if fault.kind == "corrupt" and now_or_never and not self.members.holds(fault.node):
            return f"node {fault.node} has no copy of its own now: it is a spare", []
        if fault.iteration is not None and fault.iteration <= self.iteration:
            return f"iteration {fault.iteration} is over: the job is past iteration {self.iteration}", []
        if fault.iteration is not None and not fault.point:
            self._armed.append(fault)
        return "", self._run(_just(Send(fault.node, r.Arm(fault))), now)

    def drain(self, node: int, now: float) -> tuple[str, list[Action]]:
        """A node is to be taken away. Returns the reason it cannot, or an empty string."""
        why, _ = self.cannot_drain(node)
        return why, [] if why else self._run(self._drains.begin(node, now), now)

    def cancel_drain(self, node: int, now: float) -> tuple[str, list[Action]]:
        """A node is not to be taken away any more. Returns the reason it cannot stay, or an empty string."""
        error = self._no_such_node(node)
        if not error and self.nodes[node].role == "leaving":
            error = f"node {node} is replaced already, and leaves when it has given its shards"
        elif not error and self._drains.node != node:
            error = f"node {node} is not being drained"
        return error, [] if error else self._run(self._drains.cancel(node), now)

    @property
    def drain_under_way(self) -> tuple[int, str] | None:
        """The node that is being drained, and what that waits for, in words."""
        node = self._drains.node
        return None if node is None else (node, self._drains.state)

    def cannot_drain(self, node: int) -> tuple[str, bool]:
        """Why a node cannot be taken away now (empty: it can), and whether that may pass by itself."""
        error = self._no_such_node(node)
        if error:
            return error, False
        role = self.nodes[node].role
        under_way = self._drains.node
        if role == "leaving" or under_way == node:
            return f"node {node} is being drained already", False
        if self.phase is not Phase.RUNNING or under_way is not None or self._returning.waits:
            what = f"node {under_way} is being drained" if under_way is not None else self.phase.value
            what = self._returning.why if self._returning.waits else what
            soon = self._state.phase in (Phase.STARTING, Phase.RUNNING)
            return f"not now, the job is busy: {what}; try again in a moment", soon
        if role == "active" and not self.members.ready_spares():
            if any(each.role == "spare" for each in self.nodes.values()):
                return f"no spare is parked yet to take over node {node}, but one is starting", True
            return f"no parked spare is there to take over node {node}: add one with deadpool join", False
        return "", False

    def add_spare(self, host: str, now: float, was: int | None = None) -> tuple[str, int, list[Action]]:
        """A new node wants to come as a spare. Returns (why not, its number, actions).

        Args:
            was: the number of the lost node whose machine it is; what the user said of its failure domains holds on.
        """
        if not self.job.deadpool:
            return "the job runs without --deadpool, so it has no use for a spare", -1, []
        if self._state.phase is not Phase.RUNNING:
            return f"not now, the job is {self.phase.value}; try again in a moment", -1, []
        node = self.members.add_spare(was)
        self.protection.succeeds(node, was)
        self._arrivals.expect({node}, now)
        return "", node, self._run(_just(Persist()), now)

    @property
    def durable(self) -> int:
        """The newest durable generation; -1 when there is none."""
        newest = self._durability.newest_at_any_width
        return -1 if newest is None else newest

    @property
    def replicas(self) -> tuple[int, int]:
        """Data-parallel replicas now, and at first; 0 before the ranks have told."""
        return self._layout.width, self._state.widest

    @property
    def covered(self) -> list[str]:
        """How many losses of each domain spares of the same domain cover, in words."""
        return self._state.spares.covered()

    # ---- effects

    def _at(self, now: float) -> None:
        self._now, self.members.unix_s = now, now + self._since_1970

    def _run(self, effects: Iterable[Effect], now: float) -> list[Action]:
        self._at(now)
        if self._state.phase is not Phase.ENDED:
            self._carry_out(effects)
        actions, self._actions = self._actions, []
        return actions

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Emit(event, fields):
                    self._actions.append(Emit(event, {"epoch": self.epoch, **fields}))
                case Persist(parts):
                    self._actions.append(Keep({name: self._part(name) for name in parts}))
                case Declare(reason):
                    self._carry_out(self._declare(reason))
                case DeclareSoon(reason):
                    self._carry_out(self._declare_soon(reason))
                case StartOver(reason):
                    self._carry_out(self._start_over(reason))
                case Resize(reason):
                    self._carry_out(self._start_over(reason, resized=True))
                case Lose(nodes, cause):
                    self._carry_out(self._lose(nodes, cause))
                case LetGo(node):
                    self._carry_out(self._let_go(node))
                case Stop(code, message):
                    self._carry_out(self._stop(code, message))
                case EndIfFinished():
                    self._carry_out(self._look_for_end())
                case Send() | Keep() | Finish():
                    self._actions.append(effect)

    # ---- the end

    def _stop(self, code: Exit | int, message: str) -> Effects:
        if self._state.end is not None:  # decided before this coordinator was started: whatever came since
            code, message = self._state.end
        elif code in (Exit.NO_SPARE, Exit.GENERATION_LOST, Exit.RECOVERY_FAILED, Exit.FAILED):
            message += self._durability.hint
        code = int(code)
        for fault in self._armed:
            # The end of the last one may have been told in an epoch that was over by then, and the next one has begun.
            if (fault.iteration or 0) > self.iteration + 2:
                text = f"the fault {fault.kind} of node {fault.node} was for iteration {fault.iteration}, and the job "
                text += f"ended before it: its last iteration was {self.iteration}"
                yield emit("never_struck", node=fault.node, iteration=fault.iteration, message=text)
        if code:
            yield emit("stopped", code=code, message=message)
        elif self._state.phase is Phase.FINISHING and self.job.deadpool:
            yield emit("finished", iteration=self.iteration)
        else:
            yield emit("finished")
        yield Send(None, r.Stop(code, message))
        yield Finish(code, message)
        self._state.phase, self._recoveries.current, self._state.end = Phase.ENDED, None, (code, message)
        yield Persist(("now",))  # refused to a coordinator that was deposed: it must not end the job
        self._soon = None
        self._suspicions.ended()
        self._drains.ended()
        self._arrivals.clear()
        self._returning.end()

    def _no_such_node(self, node: int) -> str:
        if self._state.phase is Phase.ENDED:
            return "the job has ended"
        state = self.nodes.get(node)
        if state is None:
            return f"there is no node {node}: the job has nodes 0 to {max(self.nodes)}"
        if state.gone:
            return f"node {node} is lost already" if state.role == "lost" else f"node {node} has left already"
        return ""

    # ---- a coordinator that starts again

    def dump(self) -> dict[str, Any]:
        """What a coordinator that starts again has to know, by part, as JSON types."""
        return {name: self._part(name) for name in ("now", "members", "layout")}

    def _part(self, name: str) -> dict[str, Any]:
        if name == "layout":  # large, and the same from the first step to the last
            return {**self._layout.dump(), "base": self._durability.dump_memory()}
        if name == "members":
            return {**self.members.dump(), **self.protection.dump()}
        return {
            "epoch": self.epoch,
            "phase": "ended" if self._state.phase is Phase.ENDED else _COARSE.get(self.phase, "running"),
            "can_rescue": self._layout.can_rescue,
            "committed": self.committed,
            "iteration": self.iteration,
            **self._ends.dump(),
            "start_epoch": self._start.epoch,
            "began": self._start.began,
            "noticed": self._noticed,
            "done": self._progress.done,
            "end": self._state.end,
            "durable": self._durability.dump(),
            "drain": self._drains.dump(),
            **self._recoveries.dump(self._now),
        }

    def restored(self, parts: dict[str, Any], now: float) -> list[Action]:
        """Go on where a coordinator that is gone left off; the agents are expected back within the lease and a bit.

        ``waits_s`` of `dump` is to be what is left of it now.
        """
        kept = parts["now"]
        self._at(now)
        self.members.load(parts["members"])
        for node, state in self.nodes.items():
            self.protection.succeeds(node, state.was)
        self._state.phase = _RESTORED.get(kept["phase"], Phase.RUNNING)
        self._state.end = tuple(kept["end"]) if kept["end"] else None
        self._layout.load(parts.get("layout"), kept["can_rescue"], self.members.world_size)
        self._recoveries.load(kept, now)
        self._drains.load(kept["drain"])
        self._ends.load(kept)
        self._start.epoch, self._start.began = kept["start_epoch"], kept["began"]
        self._noticed = kept["noticed"]
        head = self._progress
        head.committed, head.iteration, head.done = kept["committed"], kept["iteration"], kept["done"]
        head.reached = head.iteration
        head.fresh = self._state.phase is Phase.STARTING  # else what was trained since may not be on record
        head.count_anew(self.members.active(), self.epoch)
        if self._layout.known:
            self.protection.begin(
                self.assignment, self.coordinates, self._layout.largest, self.job.slots_per_node, parts["members"]
            )
        self._durability.restored(self._state.phase is Phase.STARTING, kept["durable"])
        self._durability.load_memory(parts.get("layout", {}).get("base"))
        there = {n for n, s in self.nodes.items() if not s.gone and s.agent_pid}
        until = now + max(self.job.deadlines.lease + _RETURN_S, _NOTICES * self.job.deadlines.lease + 1.0)
        self._returning.begin(there, "a recovery was under way" if kept["recovering"] else "", until)
        self._arrivals.expect(self.members.missing(), now)
        return self._run(_just(emit("coordinator_back", nodes=sorted(there))), now)

    # ---- start

    def _join(self, record: r.Join) -> Effects:
        state = self.nodes.get(record.node)
        if state is not None and state.role == "left":  # the coordinator before this one ended before it could say so
            yield emit("left", node=record.node)
            yield Send(record.node, self._may_leave(record.node))
            return
        if state is None or state.gone:
            yield Send(record.node, r.Stop(Exit.FENCED, f"node {record.node} is not part of this job (any more)"))
            return
        if record.epoch == self.epoch:
            self._progress.heard(None if record.kept is None else Version(*record.kept), record.iteration)
        same = state.pids == dict(enumerate(record.worker_pids))  # else it tells of the workers of a new start
        first = self._start.joined(state, record)
        awaited = self._arrivals.without({record.node})
        connects_again = self._returning.awaits(record.node) and not self._returning.was_away
        replaces = same and not first and not self._returning.awaits(record.node)  # one whose end nobody has noticed
        if connects_again or replaces:
            yield emit("reconnected", node=record.node)
        self._checks.ask_at(record.node, self._now)  # an answer may have been lost with a connection
        if not first:
            self._rehearsals.again(record.node)
        if self._returning.awaits(record.node) and self._returning.was_away:
            yield from self._returning.back(record, self._now)
        elif self._state.phase is Phase.STARTING:
            if first and self._start.epoch and not self.members.holds(record.node):
                yield from self._start.came_later(record)
            elif first:
                yield from self._start.send_roster()
            else:
                yield from self._start.send_again(record.node, same or record.epoch < self.epoch)
        elif awaited:
            yield from self._start.came_later(record)
            yield from self._look_for_spare(record.node)
        elif self._has_missed(record):
            yield from self._declare(f"node {record.node} was away in epoch {record.epoch}")
        elif not first:
            yield from self._tell_again(record.node)
        if not first and self.members.departed:  # perhaps while this one was not connected
            yield Send(record.node, r.Departed(sorted(self.members.departed)))
        if self.members.holds(record.node) and record.epoch == self.epoch and not self._returning.defers_commits:
            yield from self.seen.catch_up(record.node)
        if connects_again:
            self._returning.without({record.node})
            if not self._returning.waits:
                yield from self._returning.all_back(self._now)

    def _has_missed(self, record: r.Join) -> bool:
        """Another connection has taken the place of one whose end nobody noticed: what went over that is lost."""
        return self._state.phase is Phase.RUNNING and self._recoveries.missed_by(record)

    def _tell_again(self, node: int) -> Effects:
        """What nobody waits for with a deadline may have been told over a connection that had ended."""
        if self._state.phase is Phase.FINISHING:
            yield Send(node, r.AllFinished(self.epoch))
        elif self._start.placement_holds and self.recovery is None:
            yield self._start.placement(node)
        yield from self._drains.again(node)

    def _worker_ready(self, record: r.WorkerReady) -> Effects:
        self._ends.begun(record)
        yield from self._start.worker_ready(record)
        self._checks.ask_at(record.node, self._now)
        self._rehearsals.changed()
        yield from self._look_for_spare(record.node)

    def _rehearsed(self, record: r.Rehearsed) -> Effects:
        yield from self._start.rehearsed(record)
        self._drains.rehearsed(record)

    def _look_for_spare(self, node: int) -> Effects:
        if self._recoveries.spare_came():
            yield from self._declare(f"node {node} has come as a spare")

    def _register(self, record: r.Registered) -> Effects:
        starting = self._state.phase is Phase.STARTING
        if (starting and record.epoch != self.epoch) or record.coordinate.rank >= self.members.world_size:
            return  # of a start that is over
        if (yield from self._start.registered(record)) and self._state.phase is Phase.STARTING:
            self._state.phase = Phase.RUNNING
            yield from self._start.train(record.unique_bytes)
            if self._noticed and self._start.epoch:
                yield Send(None, r.ExitNotice())  # which these processes have not heard
            yield from self._look_for_end()

    def _damaged(self, record: r.DamagedCopy) -> Effects:
        yield from self.seen.damaged(record)
        yield from self._recoveries.given_up(record)

    # ---- failure-free

    def _iterated(self, record: r.Iteration) -> Effects:
        if record.epoch == self.epoch and (yield from self.seen.iterated(record, self._now)):
            self._suspicions.got_on()
            self._ends.got_on(record.iteration)

    def _committed(self, record: r.Committed) -> Iterable[Effect]:
        before = self._progress.kept
        effects = self._returning.committed(record, self._now)
        return self._grow(effects, before) if effects else ()

    def _grow(self, effects: Iterable[Effect], before: Version | None) -> Effects:
        """With a generation that all have just committed the job begins anew where more replicas fit again."""
        yield from effects
        kept = self._progress.kept
        if kept is None or kept == before or not self._trains_alone or not self._state.can_grow():
            return
        yield from self._durability.keep_in_memory(kept, self.coordinates, self.epoch, self.assignment)
        spares = r.few_nodes(self.members.ready_spares())
        yield Resize(f"there is room for more of the {self._state.widest} replicas again (spare {spares})")

    def _did(self, record: r.SideEffect) -> Effects:
        if record.epoch >= self._start.epoch:  # else before the start began anew, and so it is to be done again
            yield from self.seen.did(record)

    def _node_ready(self, record: r.NodeReady) -> Effects:
        yield from self._recoveries.got_on(record, self._now)
        yield from self._leave_if_drained()

    def _node_finished(self, record: r.Finished) -> Effects:
        # Also in a recovery, and at the start: a node may be through before the news of another that it has begun.
        if record.epoch == self.epoch and self._state.phase in (Phase.STARTING, Phase.RUNNING):
            self._finished.add(record.node)
            yield from self._look_for_end()

    def _look_for_end(self) -> Effects:
        if self._returning.waits or self._soon is not None:
            return  # who is still to come back may have lost a worker, or one has ended just now
        if self._state.phase is Phase.FINISHING and self._ends.all_left():
            yield from self._stop(Exit.OK, "")
        elif self._state.phase is Phase.RUNNING and all(map(self._finished.__contains__, self.members.active())):
            self._state.phase, self._recoveries.current = Phase.FINISHING, None
            self._suspicions.ended()
            yield from self._drains.call_off("training has finished")
            yield from self._recoveries.let_helpers_go()
            yield Persist()
            yield Send(None, r.AllFinished(self.epoch))

    # ---- the durable tier

    def _shards_loaded(self, record: r.ShardsLoaded) -> Effects:
        why = yield from self._durability.loaded(record, self.members.active())
        if why:
            yield from self._stop(Exit.GENERATION_LOST, why)

    def _shards_drained(self, record: r.ShardsDrained) -> Effects:
        yield from self._durability.drained(
            record, self.assignment, self.coordinates, self.epoch, self.members.writer()
        )
        yield from self._leave_if_drained()

    def _generation_sealed(self, record: r.GenerationSealed) -> Effects:
        yield from self._durability.sealed(record, self.assignment, self._now)
        yield from self._leave_if_drained()

    @property
    def _trains_alone(self) -> bool:
        """All train: no node is about to be replaced, nobody is awaited, and nobody is through with it, or soon."""
        waits = self._returning.waits or self._soon is not None or self._drains.node is not None
        return self.phase is Phase.RUNNING and not waits and not self._finished and not self._noticed

    def _durable_taken(self, why: str) -> Effects:
        yield from self._durability.taken(why)
        yield from self._leave_if_drained()

    def _preempt(self) -> Effects:
        if not self.job.on_preempt:
            if not self._noticed:
                self._noticed = True
                yield Persist(("now",))
                yield emit("exit_notice")
                yield Send(None, r.ExitNotice())
            return
        yield from self._durability.preempt(self.assignment, self._now)
        yield from self._leave_if_drained()

    def _leave_if_drained(self) -> Effects:
        if self._durability.last_is_over:
            if not self._returning.owes:  # else a copy was refused: in the epoch that is due another one is had
                yield from self._recoveries.last_drained()
        elif self._durability.leave is not None:
            yield from self._stop(Exit.PREEMPTED, self._durability.leave)

    # ---- planned moves

    def _node_held(self, record: r.NodeHeld) -> Effects:
        if record.epoch == self.epoch and self.phase is Phase.RUNNING:
            yield from self._drains.held(record, self._now)
            if not self._returning.waits:
                yield from self._drains.tick(self._now)

    @staticmethod
    def _may_leave(node: int) -> r.Stop:
        return r.Stop(Exit.OK, f"node {node} is drained and may be taken away")

    def _let_go(self, node: int) -> Effects:
        yield Send(node, self._may_leave(node))
        self.members.depart(node, "left")
        yield Send(None, r.Departed([node]))
        self._arrivals.without({node})
        self._drains.lost({node})
        yield Persist()
        yield from self._wait_no_more_for({node}, self._returning.waits)

    # ---- ends of processes

    def _worker_exited(self, record: r.WorkerExited) -> Effects:
        of_old_start = self._state.phase is Phase.STARTING and record.epoch != self.epoch
        if of_old_start and record.rank is not None:
            return  # else it is a spare's, and those go on through all starts
        if taken_in := (yield from self._ends.exited(record, self._now)):
            self.seen.moved(taken_in)

    # ---- losses

    def _lose(self, nodes: set[int], cause: str) -> Effects:
        waited = self._returning.waits
        fresh = {n for n in nodes if not self.members.gone(n)}
        if not fresh:
            yield from self._wait_no_more_for(nodes, waited)
            return
        involved = set(self.members.active()) | (self.recovery.givers if self.recovery is not None else frozenset())
        hit = fresh & involved
        awaited = {node for node in fresh if not self.nodes[node].agent_pid}
        if waited and hit:
            self._returning.remember(f"node {min(hit)} was lost" if self._returning.was_away else cause)
        self._arrivals.without(fresh)
        self._drains.lost(fresh)
        for node in sorted(fresh):
            yield emit("detected", node=node, cause=cause, ranks=self.members.ranks_of(node))
            yield Send(node, r.Stop(Exit.FENCED, f"node {node} is out of the job: {cause}"))
            self.members.failed(node, "lost", cause)
            self.members.depart(node, "lost")
            self._recoveries.helpers.discard(node)
        if not hit:
            yield Send(None, r.Departed(sorted(fresh)))
            if awaited and self._state.phase is Phase.STARTING:
                yield from self._start.send_roster()  # it was the one the others waited for
            yield Persist()
            yield from self._start.gone(fresh)
            yield from self._wait_no_more_for(fresh, waited)
            return
        if not self.job.deadpool:
            yield from self._stop(Exit.FAILED, f"node {sorted(hit)[0]} was lost and DeadPool is off: {cause}")
            return
        if self._state.phase is Phase.FINISHING:  # everything is saved: the others leave, and that is a good end
            yield Persist()
            yield from self._wait_no_more_for(fresh, waited)
            yield from self._look_for_end()
            return
        if not waited:
            yield from self._declare(cause)
        yield from self._wait_no_more_for(fresh, waited)

    def _wait_no_more_for(self, lost: set[int], waited: bool) -> Effects:
        self._returning.without(lost)
        if waited and not self._returning.waits:
            yield from self._returning.all_back(self._now)

    def _declare_soon(self, reason: str) -> Effects:
        """What is vacant by then is filled in one epoch. (In a recovery, by its end nothing may be vacant any more.)"""
        if self.phase is not Phase.RUNNING or self._returning.waits or not self.job.gather_s:
            yield from self._declare(reason)
            return
        first, _, latest = self._soon or (reason, 0.0, self._now + _MOST_GATHERED * self.job.gather_s)
        self._soon = first, min(self._now + self.job.gather_s, latest), latest

    def _declare(self, reason: str) -> Effects:
        self._soon = None
        if self._returning.waits:  # whoever is not back yet would not hear of it: when all are (`Returning.all_back`)
            self._returning.remember(reason)
            return
        if self._state.phase is Phase.STARTING:
            yield from self._start_over(reason)
            return
        replaced = yield from self._recoveries.declare(reason, self._now)
        if replaced is not None:
            self._new_epoch(replaced)

    def _start_over(self, reason: str, resized: bool = False) -> Effects:
        """Nothing is committed that the job could go on from, so it begins anew; or with fewer replicas, or more."""
        start, placed = self._start, self._recoveries.placed
        if not (yield from start.resized(reason, placed) if resized else start.over(reason)):
            return
        self._state.phase = Phase.STARTING
        yield from self._recoveries.start_over()
        self._new_epoch(list(range(self.members.world_size)))
        self.seen.state_hashes.clear()
        yield Persist(("now", "members", "layout"))
        yield from self._start.send_roster()

    def _new_epoch(self, replaced: list[int]) -> None:
        self.seen.moved(replaced)
        self._finished.clear()
        self._suspicions.ended()
        self._ends.new_epoch()
        self._drains.forget()
        self._rehearsals.changed()

    def _fetch_failed(self, record: r.FetchFailed) -> Effects:
        if record.own and record.epoch == self.epoch:
            if not self._recoveries.ends:
                yield from self._lose({record.node}, record.why)  # another spare may have room
            elif why := (yield from self._recoveries.no_room(record)):
                yield from self._declare(why)
        elif self._changes_what_is_loaded(record) and self._ends.changed(record.node, record.why):
            yield from self._lose({record.node}, f"its memory changes what is read into it: {record.why}")
        elif why := (yield from self._recoveries.fetch_failed(record)):
            yield from self._declare(why)
        elif self._state.phase is Phase.STARTING and record.epoch == self.epoch and record.source < 0:
            yield from self._start.unreadable(record)
        elif self._state.phase is Phase.STARTING and record.epoch == self.epoch:
            yield from self._declare(f"the durable copy of rank {record.rank} on node {record.node}: {record.why}")

    def _changes_what_is_loaded(self, record: r.FetchFailed) -> bool:
        """What a node had read from the durable directory is not what it holds: reading it again brings no progress."""
        loaded = self._state.phase is Phase.STARTING or self._recoveries.went_back
        return loaded and record.source == record.node and record.epoch == self.epoch and not record.gone

    def _peer_error(self, record: r.PeerError) -> Effects:
        if record.epoch == self.epoch:
            yield from self._suspicions.peer_error(record, self._now)

    def _stalled(self, record: r.Stalled) -> Effects:
        if record.epoch == self.epoch and self.phase is Phase.RUNNING:
            yield from self._suspicions.stalled(record, self._now)

    # ---- time

    def _check_deadlines(self) -> Effects:
        yield from self._durability.tick(self.assignment, self._now)
        yield from self._leave_if_drained()
        if self._state.phase is Phase.ENDED:
            return
        if self._state.phase is Phase.STARTING and not self._arrivals.begun:
            self._arrivals.expect(self.members.missing(), self._now)
        if late := self._arrivals.late(self._now):
            yield from self._lose(late, self._arrivals.why_late)
        if self._soon is not None and self._now >= self._soon[1]:
            yield from self._declare(self._soon[0])
        if not self._returning.waits:
            yield from self._suspicions.judge_errors(self._now)
            yield from self._durability.judge_loading(self._now)
        if self._state.phase is Phase.STARTING and (late := self._start.late(self._now)):
            yield from self._remind(late, ends=False)
        if away := self._returning.late(self._now):
            yield from self._lose(away, self._returning.why_lost)
        if self.phase is Phase.RUNNING and not self._returning.waits:
            yield from self._drains.tick(self._now)
        if self.phase is Phase.RUNNING and not self._returning.waits:
            yield from self._checks.tick(self._now)
            yield from self._rehearsals.tick(self._drains.rehearses)
            yield from self._suspicions.judge_stalls(self._now)
        recovery = self.recovery
        if recovery is None or self._returning.waits:  # what is missing may have been lost with a connection
            return
        if (due := self._recovery_due()) is not None and self._now >= due:
            recovery.deadline = None
            late_nodes = recovery.late()
            if recovery.phase is Phase.WAITING:
                yield from self._declare("no spare has come in time")
            elif (late_nodes and recovery.restored_reported) and self._recoveries.not_saved(
                "it took too long", late_nodes >= set(self.members.active())
            ):
                yield from self._declare("the checkpoint was not saved in time")
            elif (ends := recovery.remind(late_nodes, self._now)) is not None:
                yield from self._remind(late_nodes & recovery.active, ends)
            elif late_nodes:
                yield from self._lose(late_nodes, f"missed the deadline of phase '{recovery.phase.value}'")

    def _remind(self, late: set[int], ends: bool) -> Effects:
        """The others wait for these nodes: what their workers do is to be found in a file, and perhaps to be ended."""
        phase, nodes = self.phase.value, sorted(late)
        text = f"{r.few_nodes(nodes)} missed the deadline of phase '{phase}'; what the workers do is in "
        text += f"stacks-node*-*.txt beside their logs{', and those that hang are ended and begin anew' * ends}"
        if ends:
            self._ends.ends_late(late)
        for node in nodes:
            yield Send(node, r.KeepStacks(self.epoch, ends))
        yield emit("late", nodes=nodes, phase=phase, ends=ends, message=text)

    def _recovery_due(self) -> float | None:
        """The deadline of the recovery's phase. A spare that has said that it joins is waited for, too."""
        due = self.recovery.deadline if self.recovery is not None else None
        if due is not None and self.phase is Phase.WAITING and self.members.coming_spares():
            return max(due, self._arrivals.due or due)
        return due
