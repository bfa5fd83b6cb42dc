"""A cluster as a state machine around the real Core, the real vaults and the real rule of the fence.

Nodes do what an agent and its workers do, each over a connection that keeps its own order; whoever drives the model
decides who is heard next, who dies, who is cut off, when the coordinator dies and when time passes. After everything
that happens the promises of the design are checked:

* 3: a committed generation is given up only when every node that held some coordinate of it is gone;
* 4: nothing of an epoch acts in a later one, and nobody trains a coordinate that another node trains in the same epoch;
* 5: a recovery always has a deadline, and once nothing goes wrong any more the job trains or has ended (`settle`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from deadpool_megatron.cluster import Core, Deadlines, Exit, JobSpec, Phase
from deadpool_megatron.cluster import assignment as placing
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core import RECOVERING, Action, Emit, Finish, Keep, Send
from deadpool_megatron.cluster.fence import on_smaller_side
from deadpool_megatron.cluster.plan_check import misfit
from deadpool_megatron.cluster.redundancy import holders
from deadpool_megatron.vault import Vault, Version
from deadpool_megatron.vault.discipline import choose
from deadpool_megatron.vault.transfer import own_slot
from protocol_node import SHARD_BYTES, Node

__all__ = ["Cluster"]


class Cluster:
    """A Core, its nodes, and the promises checked after everything that happens."""

    def __init__(self, nodes: int, spares: int, slots: int, name: str) -> None:
        self.job = JobSpec(nodes, spares, slots, True, Deadlines(5.0, 30.0, 600.0, 20.0), 2)
        self.core = Core(self.job)
        self.now = 0.0
        self.name = name
        self.nodes = [self._node(n) for n in range(nodes)]
        for node in self.nodes:
            node.parked = node.number >= nodes - spares
            node.joins()
        self.ended: Finish | None = None
        self.declared: list[int] = []
        self.kept: dict[str, str] = {}
        self.crash_after: int | None = None
        self._settling = False
        self.safe: tuple[int, dict[int, list[Node]]] | None = None  # committed: generation, and by rank who held it

    def _node(self, number: int) -> Node:
        return Node(number, self.job.slots_per_node, Vault(self.name, number, chunk_bytes=SHARD_BYTES))

    def close(self) -> None:
        """Give the memory back."""
        for node in self.nodes:
            node.close()

    # ---- what the Core decides

    def act(self, actions: Iterable[Action]) -> None:
        """As `Coordinator._do`: what must be known after a crash first, then messages, then the log."""
        actions = list(actions)
        if any(isinstance(action, Finish) for action in actions):
            self.crash_after = None  # its launcher does not start one again whose job is over
        for action in actions:
            if isinstance(action, Keep):
                self.kept |= {name: json.dumps(part) for name, part in action.parts.items()}
        for action in actions:
            if isinstance(action, Send):
                for node in self.nodes:
                    if action.node == node.number or (action.node is None and not self.core.members.gone(node.number)):
                        if self.crash_after is not None:
                            self.crash_after -= 1
                            if self.crash_after < 0:
                                self.restart()
                                return
                        self._deliver(node, action.record)
        for action in actions:
            match action:
                case Emit():
                    self._seen(action)
                case Finish():
                    assert self.ended is None
                    self.ended = action
                    self._check_end(action)
        told = any(isinstance(action, Send) for action in actions)
        if self.crash_after is not None and told and self.ended is None:
            self.restart()
            return
        self._check()

    def _deliver(self, node: Node, record: Any) -> None:
        if isinstance(record, r.Declare) and (not self.declared or record.epoch != self.declared[-1]):
            assert not self.declared or record.epoch > self.declared[-1], "epochs only grow"
            self.declared.append(record.epoch)
        epoch = getattr(record, "epoch", None)
        if epoch is not None and self.declared and not isinstance(record, r.Roster):
            assert epoch == self.declared[-1], f"{record} of another epoch than {self.declared[-1]}"
        if node.connected:  # a socket drops what is for somebody it is not connected to
            (node.late if node.cut else node.inbox).append(record)

    def restart(self) -> None:
        """The coordinator dies here and now and is started again; what nobody had heard is gone."""
        self.crash_after = None
        self.core = Core(self.job)
        for node in self.nodes:
            node.connected = False
            if not node.alive:
                node.outbox.clear()
        if self.kept:
            parts = {name: json.loads(part) for name, part in self.kept.items()}
            self.act(self.core.restored(parts, self.now))

    def reconnect(self, node: Node) -> None:
        """A node finds the coordinator that was started again; what it said in between is gone."""
        if node.alive and not node.cut and not node.connected:
            node.outbox.clear()
            node.joins()

    def _seen(self, event: Emit) -> None:
        match event.event:
            case "detected" if self._settling:
                node = self.nodes[event.fields["node"]]
                mine = "ended" in event.fields["cause"]  # of its workers, which are made good
                assert mine or not node.alive or node.cut, f"healthy, and taken for lost: {event}"
            case "committed":
                generation = event.fields["iteration"]
                holding = {
                    rank: [n for n in self.nodes if n.holds(rank, generation)] for rank in range(self.job.world_size)
                }
                assert all(holding.values()), f"generation {generation} is committed, and not there: {holding}"
                self.safe = (generation, holding)
            case "agreed":
                self._check_agreed(event.fields["iteration"])
            case "resumed":
                self._check_resumed(event.fields["epoch"])

    # ---- the promises

    def _has_no_say(self, node: Node) -> bool:
        return not node.alive or node.cut or self.core.members.gone(node.number)

    def _is_lost(self) -> bool:
        """Every node that held some coordinate of the newest committed generation is gone."""
        assert self.safe is not None
        return any(all(self._has_no_say(n) for n in nodes) for nodes in self.safe[1].values())

    def _check_agreed(self, generation: int) -> None:
        if self.safe is not None and generation < self.safe[0]:
            assert self._is_lost(), f"back to {generation} although {self.safe[0]} was committed and could be had"
            self.safe = None

    def _check_end(self, end: Finish) -> None:
        if end.code == Exit.GENERATION_LOST and self.safe is not None:
            assert self._is_lost(), f"given up although generation {self.safe[0]} could be had: {end.message}"

    def _check_resumed(self, epoch: int) -> None:
        """Every coordinate is trained by exactly one node that has a say."""
        for rank in range(self.job.world_size):
            trains = [n.number for n in self.nodes if n.training and n.epoch == epoch and rank in n.ranks]
            assert trains == [self.core.assignment[rank].node], f"rank {rank} is on nodes {trains}"

    def _check(self) -> None:
        core = self.core
        if core.phase in RECOVERING:
            assert core.next_deadline() is not None, f"{core.phase} without a deadline"
        assert (core.phase is Phase.ENDED) == (self.ended is not None)
        assert len(set(core.assignment)) == len(core.assignment), "two coordinates in one slot"

    # ---- the shards' way

    def reachable(self, a: Node, b: Node) -> bool:
        """Can two nodes exchange data?"""
        return a.alive and b.alive and a.cut == b.cut

    def send(self, node: Node) -> None:
        """The node's newest complete slots go to their keepers (`Replicator`, `VaultServer`)."""
        keepers = holders(node.groups, self.core.protection.scheme).get(node.number, ())
        for rank in node.ranks:
            arena = node.vault.arena(rank, "own")
            slots = [s for s in arena.slots if s.complete] if arena is not None else []
            wanted = [s for s in slots if s.begin == arena.kept or s.begin >= arena.floor] if arena else []
            for slot in sorted(wanted, key=lambda s: (s.begin != node.vault.kept, s.begin)):
                for keeper in keepers:
                    self._store(node, self.nodes[keeper], rank, slot.version)
        self._commits(node, keepers)

    def _store(self, node: Node, keeper: Node, rank: int, version: Version) -> None:
        if not self.reachable(node, keeper) or node.epoch < keeper.vault.epoch:
            return  # refused: of an older epoch
        keeper.vault.learn(node.vault.kept, node.vault.floor)
        keeper.vault.allocate_peer(rank, SHARD_BYTES, SHARD_BYTES)
        arena = keeper.vault.arena(rank, "peer")
        if arena.find(version) is not None:
            return
        pairs = [(slot.begin, slot.end) for slot in arena.slots]
        index = choose(pairs, version.pack(), keeper.vault.kept, keeper.vault.floor)
        if index is not None:
            slot = arena.slots[index]
            slot.reopen(version.pack())
            slot.small_bytes = 1
            slot.mark_complete()
            slot.seal()

    def _commits(self, node: Node, keepers: Iterable[int]) -> None:
        """What all ranks of the node have complete here and there is told, in order."""
        said = node.committed.generation if node.committed is not None and node.committed.epoch == node.epoch else -1
        for generation in range(said + 1, node.at + 1) if node.training and keepers else ():
            version = Version(node.epoch, generation)
            there = [(node, "own"), *((self.nodes[keeper], "peer") for keeper in keepers)]
            arenas = [holder.vault.arena(rank, kind) for rank in node.ranks for holder, kind in there]
            if all(arena is not None and arena.find(version) is not None for arena in arenas):
                node.committed = r.Committed(node.epoch, node.number, generation)
                node.outbox.append(node.committed)

    def fetch(self, node: Node) -> None:
        """The agreed generation comes to one rank of a node, from where it was told (`NodeRecovery.agree`)."""
        agreed = node.agreed
        if agreed is None or agreed.epoch != node.epoch or node.training:
            return
        for rank in node.ranks:
            if rank in node.ready:
                continue
            held = [h for h in node.vault.holdings().ranks.get(rank, ()) if h.generation == agreed.generation]
            source = agreed.sources.get(rank)
            if source is None:
                own = [Version(h.epoch, h.generation) for h in held if h.kind == "own"]
                kept = [v for v in own if v.pack() == node.vault.kept]
                assert own or node.live.get(rank) == agreed.generation, "asked to go on from what is not there"
                if own:
                    node.take(rank, (kept or own)[-1])
                else:
                    node.ready.add(rank)
                    node.prepare()
                return
            version = Version(source.version_epoch, agreed.generation)
            giver = self.nodes[source.node]
            try:
                if not self.reachable(node, giver):
                    raise LookupError("gone")
                giver.vault.find(rank, version)
            except Exception as err:  # noqa: BLE001 - whatever the vault says
                node.outbox.append(
                    r.FetchFailed(node.epoch, node.number, rank, source.node, agreed.generation, str(err))
                )
                node.agreed = None
                return
            slot = own_slot(node.vault, rank, version, SHARD_BYTES, SHARD_BYTES)
            slot.small_bytes = 1
            slot.mark_complete()
            slot.seal()
            node.take(rank, version)
            return

    # ---- training, in parts

    def _all_at(self) -> list[Node]:
        """The nodes that train, all in the same iteration; empty when a collective would not come about."""
        active = [self.nodes[n] for n in placing.nodes_of(self.core.assignment)]
        at = {(n.epoch, n.at) for n in active}
        good = all(n.alive and n.training and not n.holding and not n.cut for n in active) and len(at) == 1
        return active if good else []

    def copy(self, node: Node) -> None:
        """A node's slots are whole."""
        if node.training and not node.stepping:
            for rank in node.ranks:
                node.copy(rank)

    def step(self) -> None:
        """Gradients are reduced: everybody passes the gate and begins to change its state."""
        active = self._all_at()
        if any(node.stepping for node in active):
            return
        for node in active:
            self.copy(node)
            node.stepping = True
            node.live = dict.fromkeys(node.ranks)

    def advance(self, node: Node) -> None:
        """A node is through the optimizer's step: the next iteration begins there."""
        if node.alive and node.training and node.stepping and not node.holding:
            node.stepping = False
            node.at += 1
            node.live = dict.fromkeys(node.ranks, node.at)
            loss = {"lm loss": (0.5).hex()}
            node.outbox.append(
                r.Iteration(node.number, node.ranks[-1], node.epoch, node.at - 1, loss, None, 0.1, 0.0, 0, 0)
            )
            node.begin()

    # ---- what goes wrong

    def hear(self, node: Node) -> None:
        """The coordinator reads one record of a node."""
        record = node.outbox.popleft()
        core = self.core
        stale = core.members.gone(node.number) or getattr(record, "epoch", core.epoch) < core.epoch
        if not misfit(record, self.job.world_size, core.epoch):
            actions = core.received(record, self.now)
            assert not (stale and actions) or isinstance(record, r.Join), f"{record} acts in epoch {core.epoch}"
            self.act(actions)

    def die(self, node: Node) -> None:
        """A node stops; what it has said may still be heard. The coordinator learns it later or at once."""
        node.alive = node.training = False
        node.inbox.clear()

    def notice(self, node: Node) -> None:
        """The lease of a node that is dead or cut off ends."""
        self.act(self.core.node_lost(node.number, "gone", self.now))

    def worker_dies(self, node: Node) -> None:
        """One worker of a healthy node ends."""
        if node.ranks and node.training:
            local, rank = next(iter(placing.ranks_of(node.assignment, node.number).items()))
            node.training, node.live[rank] = False, None
            node.writer(rank).abandon()
            node.registered = [x for x in node.registered if x.coordinate.rank != rank]
            node.exited.append(r.WorkerExited(node.number, local, rank, 1, -9))
            node.outbox.append(node.exited[-1])

    def cut(self, node: Node) -> None:
        """From now on a node speaks with no other; what is on its way comes when the cut is healed."""
        node.cut = True

    def fence(self, node: Node) -> None:
        """A node that is cut off has asked who is there."""
        others = [n for n in self.nodes if n is not node and not self.core.members.gone(n.number)]
        reached = sum(self.reachable(node, other) for other in others)
        if node.cut and on_smaller_side(reached, len(others)):
            self.die(node)

    def heal(self, node: Node) -> None:
        """The network is back: all that the node said is heard late, and it comes back as it is."""
        if node.cut:
            node.cut = False
            if node.alive and node.connected:
                node.inbox.extend(node.late)
                node.joins()
            node.late.clear()

    def join(self) -> None:
        """A new node becomes a spare."""
        error, number, actions = self.core.add_spare("h", self.now)
        if not error:
            self.act(actions)
            assert number == len(self.nodes)
            node = self._node(number)
            node.parked = True
            self.nodes.append(node)
            node.joins()

    def drain(self, node: Node) -> None:
        """A node is to be taken away."""
        _, actions = self.core.drain(node.number, self.now)
        self.act(actions)

    def complain(self, node: Node) -> None:
        """A node's worker sees a communication error."""
        if node.ranks:
            node.outbox.append(r.PeerError(node.epoch, node.number, node.ranks[0], "connection closed by peer"))

    def wait(self) -> None:
        """Until the Core wants to be woken."""
        due = self.core.next_deadline()
        if due is not None:
            self.now = max(self.now, due)
            self.act(self.core.tick(self.now))

    # ---- rest

    def settle(self) -> None:
        """From now on nothing goes wrong any more, but the dead are still dead: the job must train or end."""
        for node in self.nodes:
            self.reconnect(node)
        self._settling = True
        try:
            self._come_to_rest()
        finally:
            self._settling = False

    def _come_to_rest(self) -> None:
        for _ in range(3000):
            if self.ended is not None:
                return
            busy = False
            for node in list(self.nodes):
                gone = self.core.members.gone(node.number)
                if not gone and node.connected and (node.cut or (not node.alive and not node.outbox)):
                    self.notice(node)
                    busy = True
                while node.outbox and node.connected and not node.cut and self.ended is None:
                    self.hear(node)
                    busy = True
                while node.inbox and node.alive:
                    node.read()
                    busy = True
                before = len(node.outbox), len(node.ready)
                self.fetch(node)
                busy = busy or before != (len(node.outbox), len(node.ready))
            if busy:
                continue
            if self.core.phase in (Phase.RUNNING, Phase.STARTING) and self.core.next_deadline() is None:
                return
            self.wait()
        raise AssertionError(f"no rest: {self.core.phase}, epoch {self.core.epoch}")

    def train(self) -> None:
        """An iteration without a fault, committed everywhere."""
        for node in list(self.nodes):
            self.advance(node)
        for node in self._all_at():
            self.copy(node)
        for node in self._all_at():
            self.send(node)
        self.step()
        for node in list(self.nodes):
            self.advance(node)
