"""From the first agent that joins to the first iteration: who is there, what they plan, who keeps whose shards. Pure.

::

    all Join -> Roster .. all Registered -> Placement .. training

Until the first generation is committed there is nothing to go on from. Who is lost by then costs the start: a spare
takes the place, and all workers begin the script from its first line, in an epoch of its own (`over`).
"""

from __future__ import annotations

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Answer, Effects, Lose, Persist, Send, StartOver, Stop, emit
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.members import NodeState
from deadpool_megatron.cluster.core.observations import SnapshotAccount
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.records.exits import Exit


class Start:
    """Of one job; agents and workers that come later come the same way."""

    def __init__(self, state: JobState, snapshots: SnapshotAccount) -> None:
        self._state = state
        self._snapshots = snapshots
        self.epoch = 0
        """In which the start is, or was."""
        self.began = 0.0
        """When the job did, in seconds since 1970; 0: not yet."""
        self._told = False  # to all that they may begin
        self._unread: dict[int, str] = {}  # by node, why it cannot read what all begin with
        self.due: float | None = None
        """When who is not about to train is late; None where nobody is any more, or not yet."""

    # ---- agents

    def joined(self, state: NodeState, record: r.Join) -> bool:
        """The agent of a node is there, or there again; True when it is the first time."""
        first = not state.agent_pid
        state.agent_pid = record.pid
        state.vault = r.Address(record.host, record.vault_port)
        state.pids = dict(enumerate(record.worker_pids))
        state.respawns = record.respawns
        state.name = record.name or state.name
        self._state.protection.label(record.node, record.domains)
        if first:
            self._state.members.recognise(record.node)
            self._state.protection.succeeds(record.node, state.was)
        return first

    def send_roster(self) -> Effects:
        """To all, once everybody who is not lost has joined."""
        if self._all_are_there:
            job = self._state.job
            self.began = self.began or self._state.members.unix_s
            yield Send(None, self._roster(asks=True))
            self._told = True
            if not self.epoch:
                names = [state.name for _, state in sorted(self._state.members.nodes.items())]
                sizes = {"nodes": job.nodes, "spares": job.spare_nodes, "world_size": job.world_size}
                yield emit("started", **sizes, names=names)
            yield from self._state.durability.start(self._state.members.active(), self.epoch)
            yield Persist()

    def send_again(self, node: int | None = None, roster: bool = True) -> Effects:
        """To one (None: to all) who was away, and may have missed the roster, or where training begins."""
        members = self._state.members
        if self._all_are_there:
            self._told = self._told or node is None
            if roster or self._state.durability.waits_for(node):
                yield Send(node, self._roster(asks=node is None))
            yield from self._state.durability.start_again(members.active(), members.epoch, node)

    @property
    def _all_are_there(self) -> bool:
        """A start that begins anew waits for no spare that is still to join."""
        members = self._state.members
        return members.complete() or (self.epoch > 0 and all(members.nodes[n].agent_pid for n in members.active()))

    def late(self, now: float) -> set[int]:
        """Nodes with ranks that are not about to train, a while after all could begin; once a start."""
        if self._told and self._state.job.deadpool:
            self._told, self.due = False, now + self._state.job.deadlines.build
        if self.due is None or now < self.due:
            return set()
        self.due = None
        return self._not_registered()

    def _not_registered(self) -> set[int]:
        """Nodes with ranks that are not about to train."""
        there, assignment = self._state.layout.coordinates, self._state.members.assignment
        return {slot.node for rank, slot in enumerate(assignment) if rank not in there}

    def came_later(self, record: r.Join) -> Effects:
        """An agent that the job did not begin with has joined."""
        yield Send(record.node, self._roster())
        members = self._state.members
        state, more = members.nodes[record.node], {}
        if state.was is not None:
            times = members.failures(record.node)
            more["message"] = f"the machine of node {state.was}" + (
                f", a lemon: it failed {times} times" if times else ""
            )
        yield emit("joined", node=record.node, host=record.host, name=record.name, **more)
        yield Persist()

    def _roster(self, asks: bool = False) -> r.Roster:
        """``asks``: it is for all, who say what they hold of what the job begins with."""
        members, memory = self._state.members, self._state.durability.memory
        anew = members.epoch == self.epoch > 0
        if memory is not None and asks:
            memory.ask(node for node in members.present() if members.nodes[node].agent_pid)
        base = memory.base if memory is not None and anew else None
        return r.Roster(members.epoch, members.assignment, members.vaults(), anew=anew, began=self.began, base=base)

    # ---- once more

    def unreadable(self, record: r.FetchFailed) -> Effects:
        """A rank cannot read what it begins with, of a generation of another number of replicas."""
        self._unread[record.node] = record.why
        yield from self._judge_unread()

    def _judge_unread(self) -> Effects:
        """That a node cannot read which has never had a coordinate may be its own fault: if any other can, it is."""
        state, members = self._state, self._state.members
        nobody_can = self._unread.keys() >= set(members.active())
        damaged = next((why for node, why in self._unread.items() if nobody_can or not members.newcomer(node)), "")
        base = state.durability.base
        if damaged and base is not None and state.durability.try_again():
            yield StartOver(damaged)
        elif damaged and base is not None:
            yield from state.durability.bad(base[1], damaged)
            older = state.durability.base
            if older is not None and members.can_begin_anew:
                yield StartOver(f"{'durable ' * bool(base[1])}generation {base[0]} cannot be used")
                return
            if not base[1]:
                yield Stop(Exit.GENERATION_LOST, damaged)
                return
            way_out = "no other durable generation is there: "
            if older is not None:
                way_out = f"move that directory away to start from generation {older[0]}, or "
            way_out += "start with Megatron's last checkpoint (--load) and another --deadpool-durable-dir, or none"
            yield Stop(Exit.USAGE, f"{damaged}; {way_out}")
        elif not damaged and self._unread and self._not_registered() <= self._unread.keys():
            node, why = next(iter(self._unread.items()))
            yield Lose({node}, why)

    def set_aside(self, record: r.SetAside) -> Effects:
        """A node has said what it holds of what the job begins with."""
        if record.epoch == self._state.members.epoch:
            yield from self._judge_held((yield from self._state.durability.set_aside(record)))

    def gone(self, nodes: set[int]) -> Effects:
        """These are out of the job, and held no coordinates."""
        yield from self._judge_held((yield from self._state.durability.gone(nodes)))

    def _judge_held(self, why: str) -> Effects:
        if why and self._state.durability.base is not None:
            yield StartOver(why)
        elif why:
            yield Stop(
                Exit.GENERATION_LOST,
                f"{why}: nodes were lost while the job began anew, in which time there are no more copies than are "
                "left, and there is no parity; restart the job from Megatron's last checkpoint (--load)",
            )

    def over(self, reason: str) -> Answer[bool]:
        """The start begins anew, with a spare for each node that is lost. False: there is none, and the job ends."""
        members = self._state.members
        lost = [node for node in members.active() if members.gone(node)]
        taken_by = self._state.spares.for_start(lost)
        why = f"node {lost[0]} was lost" if lost else "a worker ended"
        why += f" before the first generation was committed ({reason})"
        if self._state.progress.committed >= 0 or (self._state.durability.base is not None and not lost):
            why = reason  # what there is is of other replicas than there are now, and nobody but a new start reads it
        if taken_by is None and self._state.can_shrink() and self._state.durability.base is not None:
            return (yield from self.resized(f"{why}, and no spare is left", members.assignment))
        if taken_by is None:
            yield Stop(Exit.NO_SPARE, f"{why}, and no spare is left to begin anew with: start the job again")
            return False
        if (yield from self._fixed(why)):
            return False
        members.hand_over(taken_by)
        self._begin_anew(False)
        message = f"{why}: the job begins anew on nodes {', '.join(map(str, members.active()))}"
        yield emit("started_over", lost=lost, nodes=members.active(), reason=reason, message=message)
        return True

    def resized(self, why: str, before: list[r.SlotAddress]) -> Answer[bool]:
        """The job begins anew with as many replicas as its nodes can hold, from `Durability.base`. False: they hold
        none, and the job ends.

        Args:
            before: how coordinates were placed.
        """
        state, members, layout = self._state, self._state.members, self._state.layout
        base, width, was = state.durability.base, state.replicas(), layout.width
        lost = [node for node in placing.nodes_of(before) if members.gone(node)]
        nodes = placing.nodes_for(width, layout.replica, state.job.slots_per_node) if width else None
        replicas = {rank: each.dp for rank, each in layout.coordinates.items()}
        plan = placing.resize(before, replicas, members.healthy(), nodes or 1, state.job.slots_per_node)
        if base is None or nodes is None or plan is None:
            yield Stop(Exit.NO_SPARE, f"{why}, and too few nodes are left for one data-parallel replica")
            return False
        if (yield from self._fixed(why)):
            return False
        members.place(plan)
        self._begin_anew(width != was)
        spares = members.spares()
        free = f"; {r.few_nodes(spares)} {'is a spare' if len(spares) == 1 else 'are spares'} now" if spares else ""
        yield emit(
            "grown" if width > was else "shrunk",
            width=width,
            was=was,
            iteration=base[0],
            name=base[1],
            lost=lost,
            nodes=members.active(),
            spares=spares,
            reason=why,
            message=f"{why}: the job goes on with {width} {'instead ' * (width > was)}of {was} data-parallel replicas, "
            f"from {'durable ' * bool(base[1])}generation {base[0]}, on {r.few_nodes(members.active())}{free}",
        )
        return True

    def _fixed(self, why: str) -> Answer[bool]:
        if self._state.members.can_begin_anew:
            return False
        yield Stop(Exit.NO_SPARE, f"{why}, and another launcher starts the workers, so that it has to start them again")
        return True

    def _begin_anew(self, resized: bool) -> None:
        members = self._state.members
        members.epoch += 1
        self.epoch = members.epoch
        self._told, self.due = False, None
        self._unread.clear()
        self._state.durability.begin_anew(resized)
        self._state.layout.forget(members.world_size)
        self._state.progress.start_over(members.active(), members.epoch)

    # ---- workers

    def worker_ready(self, record: r.WorkerReady) -> Effects:
        """A worker without a coordinate is parked, or one with a coordinate is there again."""
        state = self._state.members.nodes[record.node]
        state.pids[record.local] = record.pid
        if state.role == "spare" and record.local not in state.parked:
            state.parked.add(record.local)
            if len(state.parked) == self._state.job.slots_per_node:
                yield emit("parked", node=record.node)

    def rehearsed(self, record: r.Rehearsed) -> Effects:
        """A spare has set up coordinates ahead of time."""
        state = self._state.members.nodes[record.node]
        if state.role == "spare":
            there = self._state.members.world_size  # of a wider job they may be more
            state.rehearsed = frozenset(rank for rank in record.ranks if rank < there)
            state.unrehearsed = {rank: why for rank, why in record.failed.items() if rank < there}
            yield emit("rehearsed", node=record.node, ranks=sorted(record.ranks), cause=record.why)

    def stands_by(self, record: r.Standbys) -> Effects:
        """Who can take the place of a worker of an active node, which is not decided by it: see `WorkerExited`."""
        self._state.members.nodes[record.node].standbys = record.pids
        yield emit("standbys", node=record.node, locals=sorted(record.pids), cause=record.why)

    def registered(self, record: r.Registered) -> Answer[bool]:
        """A rank is about to train; True when all are, and are the same job."""
        self._state.layout.register(record)
        self._state.members.nodes[record.node].trained = True
        if self._state.layout.differs:
            yield Stop(
                Exit.FAILED,
                f"rank {record.coordinate.rank} on node {record.node} made other process groups than the rest: the "
                "ranks do not run the same script with the same flags",
            )
            return False
        yield from self._judge_unread()
        return self._state.layout.complete

    def train(self, unique_bytes: int) -> Effects:
        """All ranks are about to train for the first time, the last to say so with this plan."""
        self._snapshots.planned_bytes = self._snapshots.expected_bytes = 0  # those of an earlier start
        for each in self._state.layout.registered():
            self._snapshots.registered(each)
        yield emit(
            "training",
            width=self._state.layout.width,
            unique_bytes=unique_bytes,
            planned_bytes=self._snapshots.planned_bytes,
            expected_bytes=self._snapshots.expected_bytes,
        )
        yield from self._protect()
        yield Persist(("now", "members", "layout"))

    def _protect(self) -> Effects:
        """Every coordinate is known: say who keeps whose shards, and what may be lost from then on."""
        members, layout, protection = self._state.members, self._state.layout, self._state.protection
        if len(members.active()) == 1:  # nobody keeps a copy
            protection.alone(members.assignment)
            yield self.placement()
            return
        protection.begin(members.assignment, layout.coordinates, layout.largest, self._state.job.slots_per_node)
        if self._state.job.deadpool:
            yield self.placement()
            yield emit("placed", costs=protection.costs(), **protection.status())

    @property
    def placement_holds(self) -> bool:
        """The job trains with what `placement` has told."""
        state = self._state
        return state.phase is Phase.RUNNING and state.members.epoch == self.epoch and state.layout.known

    def placement(self, node: int | None = None) -> Send:
        """Who keeps whose shards, in the first epoch; in later ones that comes with the declaration."""
        return Send(
            node, r.Placement(self._state.members.epoch, self._state.protection.told, *self._state.layout.sizes)
        )
