"""Who is in the job: nodes, their roles and failures, epoch, assignment. Pure; survives the coordinator as a dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.job import JobSpec
from deadpool_megatron.cluster.placement import assignment as placing

GONE = ("lost", "left")
DEATHS_S: Final = 24 * 3600.0
"""Ends of workers that lie further apart do not add up against their node: jobs go on for months."""
LEMON_S: Final = 30 * DEATHS_S
"""A machine that failed within this time is taken as a spare only where no other one is there."""
_DEATHS: Final = ("worker", "memory")
_MOST: Final = 32  # failures of one machine that are kept, the newest


class Failure(NamedTuple):
    """One failure of a node.

    ``kind``: ``lost`` (the node itself), ``worker`` (a worker of it has ended), ``memory`` (what it held has changed),
    ``sign`` (its machine has told of a fault, see `cluster.core.signs`), ``check`` (as a spare it has failed one).
    ``epoch``: in which it happened; None where none counts.
    """

    when: float
    kind: str
    cause: str
    epoch: int | None = None


class FailureRecord:
    """The failures of one machine, oldest first: they go with it over swaps and from one coordinator to the next.

    Times are seconds since 1970, since a record outlives every process.
    """

    def __init__(self, failures: Iterable[Failure] = ()) -> None:
        self.failures = list(failures)

    def add(self, when: float, kind: str, cause: str, epoch: int | None = None) -> None:
        """One more. Workers that end in one epoch had one cause, and count once."""
        if epoch is not None and any((each.kind, each.epoch) == (kind, epoch) for each in self.failures):
            return
        self.failures = [*self.failures, Failure(when, kind, cause.split("\n")[0], epoch)][-_MOST:]

    def deaths(self, now: float) -> int:
        """How often workers have ended of late, or memory has changed."""
        return sum(each.kind in _DEATHS and now - each.when < DEATHS_S for each in self.failures)

    def recent(self, now: float) -> int:
        """Failures for which the machine is a lemon."""
        return sum(now - each.when < LEMON_S for each in self.failures)

    def forgive(self, since: float) -> None:
        """Workers that have ended since then did so for a fault elsewhere."""
        self.failures = [each for each in self.failures if each.kind != "worker" or each.when < since]

    def inherit(self, others: Iterable[FailureRecord]) -> None:
        """The machine had other numbers before."""
        known = dict.fromkeys([*(each for other in others for each in other.failures), *self.failures])
        self.failures = sorted(known, key=lambda each: each.when)[-_MOST:]

    def dump(self) -> list[Any]:
        """As JSON types."""
        return [list(each) for each in self.failures]

    @classmethod
    def load(cls, kept: Iterable[Any]) -> FailureRecord:
        """The opposite."""
        return cls(Failure(*each) for each in kept)


@dataclass(slots=True)
class NodeState:
    """What is known of one node. Roles: active, spare, leaving (drained, still giving its shards), lost, left."""

    node: int
    role: str
    agent_pid: int = 0
    vault: r.Address | None = None
    pids: dict[int, int] = field(default_factory=dict)
    parked: set[int] = field(default_factory=set)
    record: FailureRecord = field(default_factory=FailureRecord)
    respawns: bool = True
    name: str = ""  # of its machine
    trained: bool = False  # its workers have told what job this is
    was: int | None = None  # the node that its machine was before
    rehearsed: frozenset[int] = frozenset()  # coordinates that it has set up ahead of time
    unrehearsed: Mapping[int, str] = field(default_factory=dict)  # by coordinate, why it could not be set up
    standbys: dict[int, int] = field(default_factory=dict)  # by local index, who can take the place of its worker
    rehearses: frozenset[int] = frozenset()  # those that it is to; none: those of `placing.in_turn`
    checked: bool = False  # as a spare, once at least
    unfit: str = ""  # why it has failed its last check

    @property
    def gone(self) -> bool:
        """It has no say any more."""
        return self.role in GONE


class Members:
    """All nodes that are or were in the job."""

    def __init__(self, job: JobSpec) -> None:
        self.job = job
        self.epoch = 0
        self.unix_s = 0.0
        """When the event that is handled now has come, in seconds since 1970."""
        self._first = placing.initial(job.active_nodes, job.slots_per_node)
        self.assignment = self._first
        self.resized = 0
        """The epoch since when there are as many coordinates as now: what was written before is of others."""
        self._active: tuple[list[r.SlotAddress], list[int], frozenset[int]] = ([], [], frozenset())
        self.nodes = {n: NodeState(n, "active" if n < job.active_nodes else "spare") for n in range(job.nodes)}
        self._absent = set(self.nodes)  # and perhaps some who are not any more
        self.departed: list[int] = []
        """Nodes that were lost or have left: few, where all nodes are many."""

    # ---- questions

    def active(self) -> list[int]:
        """Nodes that hold a coordinate."""
        self._look()
        return list(self._active[1])

    def holds(self, node: int) -> bool:
        """The node holds a coordinate."""
        self._look()
        return node in self._active[2]

    def _look(self) -> None:
        if self._active[0] is not self.assignment:  # an assignment is never changed, but replaced
            nodes = placing.nodes_of(self.assignment)
            self._active = self.assignment, nodes, frozenset(nodes)

    def spares(self) -> list[int]:
        """Every spare, in the order in which they are taken where nothing else counts: lemons late, the unfit last."""
        spares = [n for n, s in self.nodes.items() if s.role == "spare"]
        return sorted(spares, key=lambda n: (self.unfit(n), self.failures(n), n))

    def ready_spares(self) -> list[int]:
        """Spares all of whose workers are parked."""
        return [n for n in self.spares() if self.parked(n)]

    def cold_spares(self) -> list[int]:
        """Spares whose workers still start: worth waiting for, but the last resort."""
        return [n for n in self.spares() if self.nodes[n].agent_pid and not self.parked(n)]

    def coming_spares(self) -> list[int]:
        """Spares whose agent has not joined yet."""
        return [n for n in self.spares() if not self.nodes[n].agent_pid]

    def failures(self, node: int) -> int:
        """How often the machine of a node has failed of late; more than never: it is a lemon."""
        return self.nodes[node].record.recent(self.unix_s)

    def unfit(self, node: int) -> bool:
        """It has failed its last check."""
        return bool(self.nodes[node].unfit)

    def parked(self, node: int) -> bool:
        """Every worker of the node is parked."""
        return len(self.nodes[node].parked) >= self.job.slots_per_node

    def rehearsed(self, nodes: Iterable[int]) -> dict[int, list[int]]:
        """By node, the parked spares that have rehearsed all that it holds."""
        spares = [(n, ranks) for n in self.ready_spares() if (ranks := self.nodes[n].rehearsed)]
        if not spares:
            return {}
        return {
            node: [spare for spare, ranks in spares if ranks.issuperset(self.ranks_of(node))]
            for node in nodes
            if self.holds(node)
        }

    def missing(self) -> set[int]:
        """Nodes whose agent has not joined yet."""
        self._absent = {n for n in self._absent if n in self.nodes and not self.nodes[n].agent_pid}
        return {n for n in self._absent if not self.nodes[n].gone}

    def complete(self) -> bool:
        """The agent of everybody has joined."""
        while self._absent:
            node = self._absent.pop()
            if not self.nodes[node].gone and not self.nodes[node].agent_pid:
                self._absent.add(node)
                return False
        return True

    def gone(self, node: int) -> bool:
        """Not in the job, or not any more."""
        state = self.nodes.get(node)
        return state is None or state.gone

    def lost(self) -> list[int]:
        """Nodes that were lost, in order of their numbers."""
        return sorted(n for n, s in self.nodes.items() if s.role == "lost")

    def present(self) -> list[int]:
        """Nodes that are in the job."""
        return [n for n, s in self.nodes.items() if not s.gone]

    @property
    def can_begin_anew(self) -> bool:
        """The agents of all nodes start their workers, so that they can start them again: no other launcher does."""
        return all(self.nodes[node].respawns for node in self.present())

    def called(self, node: int) -> str:
        """A node by its number and its machine's name, as people are told of it."""
        name = self.nodes[node].name
        return f"node {node} ({name})" if name else f"node {node}"

    def vaults(self) -> dict[int, r.Address]:
        """Where the vaults of the job listen, by node."""
        return {n: s.vault for n, s in self.nodes.items() if s.vault is not None and not s.gone}

    def ranks_of(self, node: int) -> list[int]:
        """Coordinates on a node."""
        return list(placing.ranks_of(self.assignment, node).values())

    def writer(self) -> int:
        """Who writes what is said of the whole job: the first holder of a coordinate that knows the job."""
        active = self.active()
        return next((node for node in active if self.nodes[node].trained), active[0])

    def healthy(self) -> list[int]:
        """Nodes whose agent is there, and that are not to leave: first those that are no lemons, the unfit last."""
        there = [n for n, s in self.nodes.items() if s.agent_pid and s.role in ("active", "spare")]
        return sorted(there, key=lambda n: (self.unfit(n), self.failures(n), not self.parked(n), n))

    def newcomer(self, node: int) -> bool:
        """It is given coordinates by a start with another number of them, and has had none before."""
        return bool(self.resized) and not self.nodes[node].trained

    @property
    def world_size(self) -> int:
        """Number of coordinates now."""
        return len(self.assignment)

    @property
    def width_nodes(self) -> int:
        """Nodes that all coordinates fill: as many train, but for a time in which the job only saves what it has."""
        return len(self.assignment) // self.job.slots_per_node

    # ---- changes

    def place(self, assignment: list[r.SlotAddress]) -> None:
        """All coordinates, perhaps fewer than before, are placed anew; healthy nodes that have none are spares, those
        that are still to join too."""
        if len(assignment) != len(self._first):
            self._first = placing.initial(len(assignment) // self.job.slots_per_node, self.job.slots_per_node)
            self.resized = self.epoch + 1
        self.assignment = assignment
        for node, state in self.nodes.items():
            holds = self.holds(node)
            if state.role not in ("active", "spare"):
                continue
            if state.role == "active" and not holds:
                state.parked.clear()
            state.role, state.rehearsed, state.standbys = "active" if holds else "spare", frozenset(), {}
            state.rehearses, state.unrehearsed = frozenset(), {}
            state.unfit = "" if holds else state.unfit

    def hand_over(self, taken_by: dict[int, int]) -> None:
        """Spares take over the coordinates of other nodes; a healthy node that gave way becomes a spare itself."""
        self.assignment = placing.replace_nodes(self.assignment, taken_by)
        for node, spare in taken_by.items():
            taken = self.nodes[spare]
            taken.role, taken.rehearsed, taken.rehearses, taken.unfit = "active", frozenset(), frozenset(), ""
            taken.unrehearsed = {}
            self.nodes[node].standbys = {}
            if self.nodes[node].role == "active":
                self.nodes[node].role = "spare"
                self.nodes[node].parked.clear()

    def failed(self, node: int, kind: str, cause: str, epoch: int | None = None) -> None:
        """One more line for the record of a node, whatever becomes of it (see `FailureRecord`)."""
        self.nodes[node].record.add(self.unix_s, kind, cause, epoch)

    def recognise(self, node: int) -> list[int]:
        """The numbers that the machine of a node had before, which gives it their record; it has just told its name.

        A name tells one machine from another only where no other node of the job has the same, and no two had it at
        once: of those that had it each but the first is known to have been another one.
        """
        state = self.nodes[node]
        before = {state.was} - {None}
        if state.name and any(self.nodes[n].name == state.name for n in self.departed):
            same = {n for n, s in self.nodes.items() if n != node and s.name == state.name}
            firsts = [n for n in same if self.nodes[n].was not in same]
            if len(firsts) == 1 and all(self.nodes[n].gone for n in same):
                before |= same
        known = sorted(n for n in before if n is not None)
        if known:
            state.was = known[-1]
            state.record.inherit(self.nodes[n].record for n in known)
        return known

    def depart(self, node: int, role: str) -> None:
        """A node is ``lost``, or has ``left``."""
        self.nodes[node].role = role
        self.departed.append(node)

    def add_spare(self, was: int | None = None) -> int:
        """A new spare, whose agent is still to come. Numbers are never used again, so that nobody can be mixed up.

        Args:
            was: the lost node whose machine it is.
        """
        node = max(self.nodes) + 1
        self.nodes[node] = NodeState(node, "spare", was=was)
        self._absent.add(node)
        return node

    # ---- a coordinator that starts again

    def dump(self) -> dict[str, Any]:
        """Everything, as JSON types. Of the assignment what differs from that of a first start."""
        return {
            "epoch": self.epoch,
            "world_size": len(self._first),
            "resized": self.resized,
            "moved": [
                [rank, slot.node, slot.local]
                for rank, (slot, first) in enumerate(zip(self.assignment, self._first, strict=True))
                if slot != first
            ],
            "nodes": [
                [
                    s.node,
                    s.role,
                    s.agent_pid,
                    [s.vault.host, s.vault.port] if s.vault else None,
                    list(s.pids.items()),
                    s.record.dump(),
                    s.trained,
                    s.name,
                    s.was,
                    s.unfit,
                    sorted(s.rehearses),
                ]
                for s in self.nodes.values()
            ],
        }

    def load(self, kept: dict[str, Any]) -> None:
        """The opposite of `dump`. Who is parked is told again by the agents."""
        self.epoch, self.resized = kept["epoch"], kept["resized"]
        slots = self.job.slots_per_node
        self._first = placing.initial(kept["world_size"] // slots, slots)
        assignment = list(self._first)
        for rank, node, local in kept["moved"]:
            assignment[rank] = r.SlotAddress(node, local)
        self.assignment = assignment
        self.nodes = {
            node: NodeState(
                node,
                role,
                agent_pid,
                r.Address(*vault) if vault else None,
                dict(map(tuple, pids)),
                record=FailureRecord.load(record),
                trained=trained,
                name=name,
                was=was,
                unfit=unfit,
                rehearses=frozenset(rehearses),
            )
            for node, role, agent_pid, vault, pids, record, trained, name, was, unfit, rehearses in kept["nodes"]
        }
        self._absent = set(self.nodes)
        self.departed = [node for node, state in self.nodes.items() if state.gone]
