"""Fewer replicas and more again, out of memory: whatever is lost while, no generation is that two nodes held."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.core.effects import Action, Emit, Finish, Send
from deadpool_megatron.cluster.core.job import JobSpec, Phase
from deadpool_megatron.cluster.placement import assignment as placing
from simulated import DEADLINES
from test_core_property import Cluster, Node


@dataclass
class Holder(Node):
    """An agent that sets aside what its start begins with. A copy is a version of a shard, of one of so many ranks."""

    base: r.Base | None = None
    aside: set[int] = field(default_factory=set)
    resume: r.ResumeAt | None = None
    settled: bool = True
    began: int = 0  # how often its workers have
    kept: tuple[int, int] | None = None
    registered: list[r.Registered] = field(default_factory=list)
    last: r.Committed | None = None

    def introduce(self) -> None:
        """A connection to the coordinator is up; what went over one before may be lost."""
        pids = [self.began]
        join = r.Join(self.number, 1000, "h", 1, pids, epoch=self.epoch, settled=self.settled, kept=self.kept)
        self.outbox.append(join)
        if not self.ranks:
            self.outbox.append(r.WorkerReady(self.number, 0, 1))
        self.outbox += self.registered
        if self.last is not None:
            self.outbox.append(self.last)

    def read(self) -> None:
        record = self.inbox[0]
        match record:
            case r.Roster():
                self.inbox.popleft()
                if record.epoch > self.epoch or not self.assignment:
                    self._begin(record)
                if record.base is not None and record.epoch == self.epoch:
                    self.outbox.append(r.SetAside(self.epoch, self.number, sorted(self.aside), []))
            case r.ResumeAt():
                self.inbox.popleft()
                again, self.resume = self.resume is not None, record
                if not again:
                    self._train(max(0, record.generation))
            case r.CommittedTo():
                self.inbox.popleft()
                if record.epoch == self.epoch and record.kept is not None:
                    self.aside.clear()
                    self.kept = (record.kept[0], record.kept[1])
            case r.Agree() if record.epoch == self.epoch:
                super().read()
                for rank in self.ranks:
                    if rank in record.sources:
                        self.own[rank] = [(record.sources[rank].version_epoch, record.generation)]
            case r.Declare() | r.Form():
                if isinstance(record, r.Declare) and record.epoch > self.epoch:
                    self.last = self.kept = None
                super().read()
                self.settled = self.training or not self.ranks
            case r.Stop():
                super().read()
            case _:
                self.inbox.popleft()

    def _begin(self, record: r.Roster) -> None:
        if record.base is None:
            self.aside.clear()
        elif record.base != self.base:
            held = [(rank, *each) for of in (self.own, self.peer) for rank, known in of.items() for each in known]
            wanted = (record.base.version_epoch, record.base.generation)
            self.aside = {rank for rank, epoch, g in held if wanted in ((epoch, g), (-1, g))}
        self.base, self.epoch, self.assignment = record.base, record.epoch, record.assignment
        self.resume, self.training, self.settled, self.last, self.kept = None, False, True, None, None
        self.began += 1
        self.registered.clear()
        for known in (self.own, self.peer, self.live):
            known.clear()
        if not self.ranks:
            self.outbox.append(r.WorkerReady(self.number, 0, 1))

    def _train(self, generation: int) -> None:
        widths = list(range(1, len(self.assignment)))
        for local, rank in placing.ranks_of(self.assignment, self.number).items():
            self.live[rank], self.training = generation, True
            info = r.CoordinateInfo(rank, 0, 0, rank)
            told = (1, 1, "same", True, 0, self.epoch, True, False, widths if rank == 0 else [])
            self.registered.append(r.Registered(self.number, local, info, *told))
        self.outbox += self.registered


class Resized(Cluster):
    """A job that shrinks and grows, without a durable directory."""

    nodes: list[Holder]  # type: ignore[assignment]

    def __init__(self, nodes: int) -> None:
        super().__init__(nodes, 0, 1)
        job = JobSpec(
            nodes, 0, 1, True, DEADLINES, 2, durable=DurableSpec("", "", resume=True), when_out_of_spares="shrink"
        )  # fmt: skip
        self.core = Core(job)
        self.nodes = [Holder(n) for n in range(nodes)]
        self.events: list[str] = []
        for node in self.nodes:
            node.introduce()

    def restart(self, chance: random.Random) -> None:
        """Another coordinator takes over."""
        parts = json.loads(json.dumps(self.core.dump()))
        self.core = Core(self.core.job)
        self.act(self.core.restored(parts, self.now))
        for node in self.nodes:
            self._connect(node, chance)

    def reconnect(self, node: Holder, chance: random.Random) -> None:
        """An agent comes back over another connection; the end of the one before may have been noticed."""
        if chance.random() < 0.5:
            self.act(self.core.node_away(node.number, self.now))
        self._connect(node, chance)

    def _connect(self, node: Holder, chance: random.Random) -> None:
        for _ in range(chance.randrange(len(node.inbox) + 1)):
            if node.alive:
                node.read()
        node.inbox.clear()
        node.outbox.clear()
        if node.alive:
            node.introduce()

    def iterate(self) -> None:
        super().iterate()
        for node in self.nodes:
            node.last = next((each for each in reversed(node.outbox) if isinstance(each, r.Committed)), node.last)

    def act(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    self._send(action)
                case Emit():
                    self.events.append(action.event)
                case Finish():
                    self.ended = action

    def _send(self, action: Send) -> None:
        record = action.record
        if isinstance(record, r.ResumeAt) and record.memory is not None:
            for rank, there in enumerate(record.memory.holders):
                assert there and all(rank in self.nodes[n].aside for n in there if self.nodes[n].alive)
        for node in self.nodes:
            gone = self.core.members.gone(node.number)
            if action.node == node.number or (action.node is None and not gone):
                node.inbox.append(record)

    def come(self) -> None:
        """A machine more."""
        why, number, actions = self.core.add_spare("host", self.now)
        if not why:
            self.nodes.append(Holder(number))
            self.act(actions)
            self.nodes[-1].introduce()


def _some_steps(cluster: Resized, chance: random.Random, most: int) -> None:
    for _ in range(chance.randrange(most)):
        node = chance.choice(cluster.nodes)
        if cluster.ended is None and node.outbox and chance.random() < 0.5:
            cluster.hear(node)
        elif node.inbox and node.alive:
            node.read()
        elif chance.random() < 0.05 and node.alive and cluster.core.nodes[node.number].agent_pid:
            cluster.reconnect(node, chance)


@pytest.mark.parametrize("seed", range(100))
def test_a_loss_at_a_time_costs_no_generation_and_the_job_trains_until_one_node_is_left(seed: int) -> None:
    chance = random.Random(seed)
    cluster = Resized(chance.choice([3, 4, 5, 6]))
    cluster.settle()
    committed = 0
    for _ in range(12):
        assert cluster.ended is None and cluster.core.phase is Phase.RUNNING
        for _ in range(2):
            cluster.iterate()
            cluster.settle()
        assert cluster.core.committed >= committed or cluster.core.committed == -1
        committed = max(committed, cluster.core.committed)
        alone = len(cluster.core.members.active()) == 1  # nobody else holds anything
        if chance.random() < 0.5:
            cluster.come()
            _some_steps(cluster, chance, 20)
            cluster.iterate()
        _some_steps(cluster, chance, 60)
        if alone:
            cluster.settle()
            continue
        lost = chance.choice([node for node in cluster.nodes if node.alive])
        if chance.random() < 0.3:
            cluster.restart(chance)
            _some_steps(cluster, chance, 60)
        cluster.die(lost)
        if chance.random() < 0.3:
            _some_steps(cluster, chance, 60)
            cluster.restart(chance)
        if chance.random() < 0.5:
            _some_steps(cluster, chance, 20)
            if cluster.ended is None:
                cluster.notice(lost)
        cluster.settle()
        trains = [n for n in cluster.core.members.active() if cluster.nodes[n].training]
        assert cluster.ended is None and cluster.core.phase is Phase.RUNNING, cluster.ended
        assert sorted(trains) == sorted(cluster.core.members.active())
        lives = {live for n in trains for live in cluster.nodes[n].live.values()}
        (live,) = lives
        assert live is not None and live >= committed
    assert "base_lost" not in cluster.events
