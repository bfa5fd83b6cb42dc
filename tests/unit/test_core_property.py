"""Whatever is lost, late or reordered between nodes, the Core keeps its promises: hypothesis drives the real Core.

Simulated agents answer what they are told, each over a connection that keeps its own order; the test decides who is
heard next, who dies, and when time passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.effects import Action, Emit, Finish, Send
from deadpool_megatron.cluster.core.job import RECOVERING, Deadlines, JobSpec, Phase
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.redundancy import holders

ITERATIONS = 12


@dataclass
class Node:
    """An agent with its workers: what it was told and has not read, what it has said and nobody heard."""

    number: int
    inbox: deque[Any] = field(default_factory=deque)
    outbox: deque[Any] = field(default_factory=deque)
    alive: bool = True
    epoch: int = 0
    assignment: list[r.SlotAddress] = field(default_factory=list)
    live: dict[int, int | None] = field(default_factory=dict)
    own: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    peer: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    agreed: r.Agree | None = None
    training: bool = False

    @property
    def ranks(self) -> list[int]:
        return list(placing.ranks_of(self.assignment, self.number).values())

    def read(self) -> None:
        """Act on one record of the coordinator."""
        record = self.inbox.popleft()
        match record:
            case r.Roster():
                self.assignment = record.assignment
                self.training = bool(self.ranks)
                for local, rank in placing.ranks_of(self.assignment, self.number).items():
                    self.live[rank] = 0
                    info = r.CoordinateInfo(rank, 0, 0, 0)
                    self.outbox.append(r.Registered(self.number, local, info, 1, 1, "same", True))
            case r.Declare() if record.epoch > self.epoch:
                had = set(self.ranks)
                self.epoch, self.assignment, self.training = record.epoch, record.assignment, False
                if self.ranks:
                    live = {rank: self.live.get(rank) for rank in self.ranks}
                    arrived = had >= set(self.ranks)
                    offer = r.Offer(self.epoch, self.number, live, dict(self.own), dict(self.peer), arrived=arrived)
                    self.outbox.append(offer)
                    if not arrived:
                        self.outbox.append(r.NodeArrived(self.epoch, self.number))
            case r.Agree() if record.epoch == self.epoch and self.ranks:
                self.agreed = record
                for rank in self.ranks:
                    held = self.live.get(rank) == record.generation or any(
                        g == record.generation for _, g in self.own.get(rank, [])
                    )
                    assert held or rank in record.sources, "a rank is asked to go on from what it has not got"
                self.outbox.append(r.NodeReady(self.epoch, self.number))
            case r.Form() if record.epoch == self.epoch and self.ranks:
                assert self.agreed is not None and self.agreed.epoch == self.epoch
                self.live = dict.fromkeys(self.ranks, self.agreed.generation)
                self.outbox.append(r.NodeFormed(self.epoch, self.number, 1))
                self.outbox.append(r.NodeRestored(self.epoch, self.number))
                self.training = True
                self.outbox.append(r.NodeResumed(self.epoch, self.number, self.agreed.generation))
            case r.Stop():
                self.alive = False


class Cluster:
    """A Core, its nodes, and the promises checked after everything that happens."""

    def __init__(self, nodes: int, spares: int, slots: int) -> None:
        deadlines = Deadlines(5.0, 30.0, 600.0, 20.0)
        self.core = Core(JobSpec(nodes, spares, slots, True, deadlines, 2))
        self.now = 0.0
        self.nodes = [Node(n) for n in range(nodes)]
        self.ended: Finish | None = None
        self.declared: list[int] = []
        for node in self.nodes:
            node.outbox.append(r.Join(node.number, 1000, "h", 1, [1] * slots))
            if node.number >= nodes - spares:
                node.outbox.extend(r.WorkerReady(node.number, i, 1) for i in range(slots))

    def act(self, actions: Iterable[Action]) -> None:
        """Deliver what the Core decided, then check every promise."""
        for action in actions:
            match action:
                case Send():
                    self._send(action)
                case Emit():
                    if action.event == "resumed":
                        self._check_resumed(action.fields["epoch"])
                case Finish():
                    assert self.ended is None
                    self.ended = action
        core = self.core
        if core.phase in RECOVERING:
            assert core.next_deadline() is not None, f"{core.phase} without a deadline"
        assert (core.phase is Phase.ENDED) == (self.ended is not None)
        assert len(set(core.assignment)) == len(core.assignment), "two coordinates in one slot"
        if self.ended is None and core.phase is not Phase.STARTING:
            lost = {n for n in placing.nodes_of(core.assignment) if core.nodes[n].role == "lost"}
            assert not lost, f"coordinates on lost nodes {lost}"

    def _send(self, action: Send) -> None:
        record = action.record
        if isinstance(record, r.Declare):
            assert not self.declared or record.epoch > self.declared[-1], "epochs only grow"
            self.declared.append(record.epoch)
        epoch = getattr(record, "epoch", None)
        if epoch is not None and self.declared:
            assert epoch == self.declared[-1], f"{record} of another epoch than {self.declared[-1]}"
        for node in self.nodes:
            if action.node == node.number or (action.node is None and self.core.nodes[node.number].role != "lost"):
                node.inbox.append(record)

    def _check_resumed(self, epoch: int) -> None:
        """Every coordinate is trained by exactly one node that has a say."""
        for rank in range(self.core.job.world_size):
            holders = [
                node.number for node in self.nodes if node.training and node.epoch == epoch and rank in node.ranks
            ]
            assert holders == [self.core.assignment[rank].node], f"rank {rank} is on nodes {holders}"

    # ---- what can happen

    def hear(self, node: Node) -> None:
        """The coordinator reads one record of a node."""
        self.act(self.core.received(node.outbox.popleft(), self.now))

    def die(self, node: Node) -> None:
        """A node stops; what it has said may still be heard. The coordinator learns it later or at once."""
        node.alive = False
        node.inbox.clear()

    def notice(self, node: Node) -> None:
        """The coordinator learns that a node is gone."""
        self.act(self.core.node_lost(node.number, "gone", self.now))

    def wait(self) -> None:
        """Until the Core wants to be woken."""
        due = self.core.next_deadline()
        if due is not None:
            self.now = max(self.now, due)
            self.act(self.core.tick(self.now))

    def iterate(self) -> None:
        """Every node trains one iteration further and commits where it stands; what is left behind is dropped."""
        active = [self.nodes[n] for n in placing.nodes_of(self.core.assignment)]
        if self.core.phase is not Phase.RUNNING or not all(n.alive and n.training for n in active):
            return
        here = active[0].live[active[0].ranks[0]]
        if here is None or any(n.live[rank] != here for n in active for rank in n.ranks) or here >= ITERATIONS:
            return
        keepers = holders(self.core.protection.groups, self.core.protection.scheme)
        for node in active:
            version = (node.epoch, here)
            for rank in node.ranks:
                node.own[rank] = [*node.own.get(rank, [])[-1:], version]
                for keeper in keepers.get(node.number, ()):
                    kept = self.nodes[keeper].peer
                    kept[rank] = [*kept.get(rank, [])[-1:], version]
                node.live[rank] = here + 1
            node.outbox.append(r.Committed(node.epoch, node.number, here))
        last = active[-1]
        loss = {"lm loss": (0.5).hex()}
        last.outbox.append(r.Iteration(last.number, last.ranks[-1], last.epoch, here, loss, None, 0.1, 0.0, 0, 0))

    def complain(self, node: Node) -> None:
        """A node's worker sees a communication error."""
        if node.ranks:
            node.outbox.append(r.PeerError(node.epoch, node.number, node.ranks[0], "connection closed by peer"))

    def refuse(self, node: Node) -> None:
        """A shard cannot be read at its source."""
        if node.agreed is not None and node.agreed.epoch == node.epoch:
            for rank in node.ranks:
                source = node.agreed.sources.get(rank)
                if source is not None:
                    node.outbox.append(
                        r.FetchFailed(node.epoch, node.number, rank, source.node, node.agreed.generation, "torn")
                    )
                    return

    def settle(self) -> None:
        """From now on nothing goes wrong any more, but the dead are still dead: the job must train or end."""
        for _ in range(2000):
            if self.ended is not None:
                return
            busy = False
            for node in self.nodes:
                if not node.alive and self.core.nodes[node.number].role != "lost" and not node.outbox:
                    self.notice(node)
                    busy = True
                while node.outbox and self.ended is None:
                    self.hear(node)
                    busy = True
                while node.inbox and node.alive:
                    node.read()
                    busy = True
            if busy:
                continue
            if self.core.phase in (Phase.RUNNING, Phase.STARTING) and self.core.next_deadline() is None:
                return
            self.wait()
        raise AssertionError(f"no rest: {self.core.phase}, epoch {self.core.epoch}")


EVENTS = ("hear", "read", "die", "notice", "wait", "iterate", "complain", "refuse")
# Losses are rare beside messages, or every example would end before anything happens.
choices = st.tuples(
    st.sampled_from(("hear", "read") * 8 + ("iterate",) * 3 + ("die", "notice", "wait", "complain", "refuse")),
    st.integers(0, 6),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(3, 1, 1), (4, 1, 2), (5, 2, 1), (7, 3, 2), (4, 0, 1)]),
    start=st.booleans(),
    steps=st.lists(choices, max_size=120),
)
def test_no_interleaving_of_losses_and_messages_leaves_the_job_stuck_or_a_coordinate_on_two_nodes(
    shape: tuple[int, int, int], start: bool, steps: list[tuple[str, int]]
) -> None:
    cluster = Cluster(*shape)
    if start:
        cluster.settle()
        assert cluster.core.phase is Phase.RUNNING
        cluster.iterate()
    for what, which in steps:
        if cluster.ended is not None:
            break
        _step(cluster, what, cluster.nodes[which % len(cluster.nodes)])
    cluster.settle()
    assert cluster.ended is not None or cluster.core.phase in (Phase.RUNNING, Phase.STARTING)
    if cluster.ended is None and cluster.core.phase is Phase.RUNNING:
        # A Core that rests in RUNNING has really handed out every coordinate.
        for rank, slot in enumerate(cluster.core.assignment):
            node = cluster.nodes[slot.node]
            assert node.alive and node.training and node.epoch == cluster.core.epoch and rank in node.ranks


def _step(cluster: Cluster, what: str, node: Node) -> None:
    possible: dict[str, tuple[bool, Callable[[], None]]] = {
        "hear": (bool(node.outbox), lambda: cluster.hear(node)),
        "read": (bool(node.inbox) and node.alive, node.read),
        "die": (node.alive, lambda: cluster.die(node)),
        "notice": (not node.alive, lambda: cluster.notice(node)),
        "wait": (True, cluster.wait),
        "iterate": (True, cluster.iterate),
        "complain": (node.alive, lambda: cluster.complain(node)),
        "refuse": (node.alive, lambda: cluster.refuse(node)),
    }
    can, do = possible[what]
    if can:
        do()
