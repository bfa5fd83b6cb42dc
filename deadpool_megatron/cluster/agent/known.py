"""What one node knows of the job: the epoch, the tables of its version, and what of them is its own. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.duties import kept_for_others, targets
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.cluster.records.tables import Tables, apply
from deadpool_megatron.vault import Target, WordPlan


class KnownJob:
    """Follows what the coordinator tells of the whole job.

    Args:
        node: whose knowledge this is.
        scheme: how many copies, or which parity, the job keeps.

    Attributes:
        ranks: local index to rank, for the coordinates of this node.
        declared: the newest `Declare`, for the workers: without the tables, which grow with the job, while a worker's
            socket takes whole packets only.
        rendezvous: where the store of the process groups listens, once that is elsewhere than at the start.
        began: when the job did, in seconds since 1970; 0 until that was told.
    """

    def __init__(self, node: int, active_nodes: int, slots_per_node: int, scheme: Scheme) -> None:
        self.node = node
        self._slots_per_node = slots_per_node
        self.epoch = 0
        self.declared: r.Declare | None = None
        self.rendezvous: r.Address | None = None
        self.began = 0.0
        self._scheme = scheme
        self._hold(Tables(assignment=placing.initial(active_nodes, slots_per_node)))

    @property
    def vaults(self) -> Mapping[int, r.Address]:
        """By node, where its vault answers."""
        return self._tables.vaults

    def roster(self, record: r.Roster) -> bool:
        """The job is complete. True when it has a history, and so an epoch that this node has not heard of."""
        late = record.epoch > self.epoch
        self.began = record.began
        if late:
            self.epoch = record.epoch
        if late and record.anew:
            self.declared = None
            self._tables = Tables()
        assignment = record.assignment if late else self._tables.assignment
        self._hold(replace(self._tables, version=record.version, assignment=assignment, vaults=record.vaults))
        return late

    def place(self, record: r.Placement) -> None:
        """The groups that protect one another, and the sizes of all shards."""
        old, sizes = self._tables, (record.unique_bytes, record.small_capacity)
        self._hold(Tables(record.version, old.assignment, old.vaults, record.groups, *sizes))

    def departed(self, record: r.Departed) -> None:
        """Nodes have left the job, and nothing else has changed."""
        there = {node: at for node, at in self.vaults.items() if node not in record.nodes}
        self._hold(replace(self._tables, vaults=there))

    def whole(self, record: r.Changed) -> r.Declare | None:
        """What a difference to these tables makes of them; None when it is one to others."""
        return apply(record, self._tables)

    def declare(self, record: r.Declare) -> None:
        """A new epoch begins, with tables of its own."""
        self.epoch = record.epoch
        self.rendezvous = record.rendezvous or self.rendezvous
        self.declared = msgspec.structs.replace(
            record, assignment=[], vaults={}, groups=[], unique_bytes=[], small_capacity=[]
        )
        sizes = record.unique_bytes, record.small_capacity
        self._hold(Tables(record.version, record.assignment, record.vaults, record.groups, *sizes))

    def also_replaced(self, rank: int) -> None:
        """A coordinate of this node gets a new worker in the epoch that has been declared."""
        if self.declared is not None and rank not in self.declared.replaced:
            self.declared = msgspec.structs.replace(self.declared, replaced=sorted([*self.declared.replaced, rank]))

    def targets(self) -> Mapping[int, list[Target]] | None:
        """By rank of this node, and holder of its constants, the vaults they go to; None before the first placement."""
        t = self._tables
        return targets(self.node, t.groups, self._fitting, t.assignment, t.vaults) if t.groups else None

    def kept_for_others(self) -> tuple[dict[int, tuple[int, int]], dict[int, WordPlan], set[int]]:
        """What this node keeps of others (see `cluster.placement.duties`)."""
        t = self._tables
        return kept_for_others(self.node, t.groups, self._fitting, t.assignment, t.unique_bytes, t.small_capacity)

    @property
    def world_size(self) -> int:
        """Number of coordinates now."""
        return len(self._tables.assignment)

    @property
    def trains(self) -> bool:
        """All have been told who protects whom, as it is when training begins."""
        return bool(self._tables.groups)

    @property
    def active_nodes(self) -> int:
        """Nodes that hold coordinates, but for a time in which the job only saves what it has."""
        return self.world_size // self._slots_per_node

    @property
    def _fitting(self) -> Scheme:
        return self._scheme.fitting(self.active_nodes)

    def in_turn(self, local: int, count: int) -> list[int]:
        """The coordinates that a slot of this node, a spare, rehearses until the coordinator says others.

        A coordinate stays with those of its first node wherever they move.
        """
        nodes = placing.in_turn(self.node, self.active_nodes, count)
        return [node * self._slots_per_node + local for node in nodes]

    def _hold(self, tables: Tables) -> None:
        self._tables = tables
        self.ranks: Mapping[int, int] = placing.ranks_of(tables.assignment, self.node)
