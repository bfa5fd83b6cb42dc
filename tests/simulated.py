"""A job around the pure `Core` without any process: agents' records are put in, what the Core decides is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.core.effects import Action, Emit, Finish, Send
from deadpool_megatron.cluster.core.job import Deadlines, JobSpec
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.redundancy import holders

__all__ = ["DEADLINES", "SimulatedJob"]

DEADLINES = Deadlines(lease=5.0, abort=30.0, build=600.0, form=20.0)


class SimulatedJob:
    """Feeds a Core and remembers. Every node is healthy; a test says what goes wrong.

    The vaults it offers from hold ``generation`` of every rank wherever the protection groups before the loss put it.
    """

    def __init__(
        self,
        nodes: int = 4,
        spares: int = 1,
        slots: int = 2,
        deadpool: bool = True,
        retries: int = 3,
        can_rescue: bool = True,
        durable: DurableSpec | None = None,
        replica: int = 1,
        iterations: int = 0,
        **more: Any,
    ) -> None:
        """``replica``: pipeline stages, each of one rank; ``iterations``: that it trains, 0: not known; ``more``: of
        `JobSpec`."""
        preempt = durable is not None and bool(durable.directory)
        self.core = Core(
            JobSpec(nodes, spares, slots, deadpool, DEADLINES, retries, durable=durable, on_preempt=preempt, **more)
        )
        self.now = 100.0
        self.can_rescue = can_rescue
        self.restarts = False
        self.replica = replica
        self.iterations = iterations
        self.written = 0  # the epoch of what vaults hold
        self.sent: list[Send] = []
        self.emitted: list[Emit] = []
        self.finish: Finish | None = None
        self._held = list(self.core.assignment)
        self._groups = self.core.protection.groups

    # ---- in and out

    def take(self, actions: Iterable[Action]) -> None:
        """Remember what the Core decided."""
        for action in actions:
            match action:
                case Send():
                    self.sent.append(action)
                case Emit():
                    self.emitted.append(action)
                case Finish():
                    assert self.finish is None, "a job ends once"
                    self.finish = action

    def feed(self, record: Any) -> None:
        """A record of an agent."""
        self.take(self.core.received(record, self.now))

    def lose(self, node: int, cause: str = "its agent is gone or silent") -> None:
        """The connection of a node ends."""
        self.take(self.core.node_lost(node, cause, self.now))

    def wait(self, seconds: float) -> None:
        """Time passes; the Core is woken when it asked for it and at the end."""
        end = self.now + seconds
        while True:
            due = self.core.next_deadline()
            if due is None or due > end:
                break
            self.now = max(self.now, due)
            self.take(self.core.tick(self.now))
        self.now = end
        self.take(self.core.tick(self.now))

    def told(self, kind: type[msgspec.Struct], node: int | None = None) -> list[Any]:
        """Records of one kind that were sent (to everybody, or to ``node``), oldest first."""
        return [s.record for s in self.sent if isinstance(s.record, kind) and (node is None or s.node == node)]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Fields of the events of one name."""
        return [e.fields for e in self.emitted if e.event == name]

    @property
    def end(self) -> tuple[int, str]:
        """Exit code and message; fails when the job goes on."""
        assert self.finish is not None, f"the job has not ended: {self.core.phase}"
        return self.finish.code, self.finish.message

    @property
    def active(self) -> list[int]:
        """Nodes that hold coordinates."""
        return placing.nodes_of(self.core.assignment)

    # ---- a healthy job

    def join(self, nodes: Iterable[int] | None = None, name: str = "") -> None:
        """Agents come up; ``name``: of their machine."""
        slots = self.core.job.slots_per_node
        for node in range(self.core.job.nodes) if nodes is None else nodes:
            pids = [10 * node + i for i in range(slots)]
            self.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, pids, name=name))

    def park(self, nodes: Iterable[int] | None = None) -> None:
        """Spares become warm."""
        spares = [n for n, s in self.core.nodes.items() if s.role == "spare"]
        for node in spares if nodes is None else nodes:
            for local in range(self.core.job.slots_per_node):
                self.feed(r.WorkerReady(node, local, 10 * node + local))

    def register(self, rank: int, digest: str = "groups") -> None:
        """A coordinate is about to train."""
        slot = self.core.assignment[rank]
        width = len(self.core.assignment) // self.replica
        info = r.CoordinateInfo(rank, 0, rank // width, rank % width)
        epoch = self.core.epoch
        shrinks = self.core.job.when_out_of_spares == "shrink"
        widths = list(range(1, width)) if shrinks and rank == 0 else []
        told = (1 << 20, 1 << 10, digest, self.can_rescue, 0, epoch, True, self.restarts, widths, self.iterations)
        self.feed(r.Registered(slot.node, slot.local, info, *told))

    def train(self, name: str = "") -> SimulatedJob:
        """Up to the first iteration; ``name``: of each node's machine, with its number for ``{}``."""
        for node in range(self.core.job.nodes):
            self.join([node], name.format(node))
        self.park()
        for rank in range(len(self.core.assignment)):
            self.register(rank)
        self._groups = self.core.protection.groups
        return self

    def iterate(self, iteration: int) -> None:
        """The last rank has finished an iteration."""
        rank = len(self.core.assignment) - 1
        node = self.core.assignment[rank].node
        loss = {"lm loss": (0.5).hex()}
        self.feed(r.Iteration(node, rank, self.core.epoch, iteration, loss, (1.5).hex(), 0.1, 0.0, 1 << 20, 0))

    def commit(self, generation: int, nodes: Iterable[int] | None = None) -> None:
        """Nodes are through with a generation, in both vaults."""
        for node in self.active if nodes is None else nodes:
            self.feed(r.Committed(self.core.epoch, node, generation))

    # ---- a recovery

    def offer(self, node: int, generation: int = 5, live: bool = True, arrived: bool = True) -> None:
        """What ``node`` gives: live state and own copy of what it held before the loss, and its ward's copy."""
        before, after = self._held, self.core.assignment
        old = set(placing.ranks_of(before, node).values())
        keepers = holders(self._groups, self.core.protection.scheme)
        wards = [ward for ward, nodes in keepers.items() if node in nodes]
        peer = {rank for ward in wards for rank in placing.ranks_of(before, ward).values()}
        version = [(self.written, generation)]
        self.feed(
            r.Offer(
                self.core.epoch,
                node,
                {rank: generation if live and rank in old else None for rank in placing.ranks_of(after, node).values()},
                dict.fromkeys(sorted(old), version),
                dict.fromkeys(sorted(peer), version),
                arrived=arrived,
            )
        )

    def arrive(self, generation: int = 5) -> None:
        """Every active node has left its step."""
        recovery = self.core.recovery
        for node in sorted(recovery.givers) if recovery is not None else self.active:
            self.offer(node, generation)

    def prepare(self) -> None:
        """Every active node holds its shard."""
        for node in self.active:
            self.feed(r.NodeReady(self.core.epoch, node))

    def form(self) -> None:
        """Every active node has re-formed its groups."""
        for node in self.active:
            self.feed(r.NodeFormed(self.core.epoch, node, 12))

    def restore(self) -> None:
        """Every active node has its parameters back."""
        for node in self.active:
            self.feed(r.NodeRestored(self.core.epoch, node))

    def resume(self, generation: int = 5) -> None:
        """Every active node has begun its first iteration."""
        for node in self.active:
            self.feed(r.NodeResumed(self.core.epoch, node, generation))
        self._held = list(self.core.assignment)
        self._groups = self.core.protection.groups

    def recover(self, generation: int = 5) -> None:
        """The whole way back to training."""
        self.arrive(generation)
        self.prepare()
        self.form()
        self.restore()
        self.resume(generation)
