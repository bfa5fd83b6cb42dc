"""One node of `protocol_model`: what an agent and its workers do with what they are told, around a real vault."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from deadpool_megatron.cluster import assignment as placing
from deadpool_megatron.cluster import records as r
from deadpool_megatron.vault import SlotWriter, Vault, Version

__all__ = ["SHARD_BYTES", "Node"]

SHARD_BYTES = 4096


@dataclass
class Node:
    """An agent with its workers and its vault: what it was told and has not read, what it said and nobody heard."""

    number: int
    slots: int
    vault: Vault
    inbox: deque[Any] = field(default_factory=deque)
    outbox: deque[Any] = field(default_factory=deque)
    late: list[Any] = field(default_factory=list)  # on its way while the node is cut off
    alive: bool = True
    cut: bool = False
    connected: bool = True
    epoch: int = 0
    assignment: list[r.SlotAddress] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    live: dict[int, int | None] = field(default_factory=dict)  # by rank: the generation its live state is
    at: int = -1  # the iteration it is in
    stepping: bool = False  # in the optimizer's step
    ready: set[int] = field(default_factory=set)
    agreed: r.Agree | None = None
    forming: bool = False
    training: bool = False
    parked: bool = False
    saves: bool = False
    hold: r.Hold | None = None
    holding: bool = False
    registered: list[r.Registered] = field(default_factory=list)
    exited: list[r.WorkerExited] = field(default_factory=list)
    committed: r.Committed | None = None
    _writers: dict[int, SlotWriter] = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        return list(placing.ranks_of(self.assignment, self.number).values())

    def writer(self, rank: int) -> SlotWriter:
        info = self.vault.allocate_own(rank, SHARD_BYTES, SHARD_BYTES)
        if rank not in self._writers:
            self._writers[rank] = SlotWriter(info.path)
        return self._writers[rank]

    def joins(self) -> None:
        """The connection to a coordinator is up: tell all that it may not know (`Agent._introduce`)."""
        self.connected = True
        settled = not self.holding and (self.epoch == 0 or not self.ranks or self.training)
        self.outbox.append(r.Join(self.number, 1000, "h", 1, [1] * self.slots, epoch=self.epoch, settled=settled))
        if self.parked:
            self.outbox.extend(r.WorkerReady(self.number, i, 1) for i in range(self.slots))
        self.outbox.extend([*self.registered, *self.exited])
        if self.committed is not None:
            self.outbox.append(self.committed)

    def read(self) -> None:
        """Act on one record of the coordinator."""
        record = self.inbox.popleft()
        match record:
            case r.Roster():
                self._roster(record)
            case r.Placement() if record.epoch == self.epoch:
                self.groups = record.groups
            case r.Declare() if record.epoch > self.epoch:
                self._declare(record)
            case r.Agree() if record.epoch == self.epoch and self.ranks:
                self.agreed, self.ready = record, set()
            case r.Form() if record.epoch == self.epoch and self.ranks:
                assert self.agreed is not None and self.agreed.epoch == self.epoch
                self.forming = True
                self.resume()
            case r.CommittedTo() if record.epoch == self.epoch:
                if record.kept is not None:
                    self.vault.set_committed(*record.kept)
                self.vault.set_floor(record.epoch, record.floor)
            case r.Hold() if record.epoch == self.epoch:
                self.hold = record
            case r.Respawn():
                self.outbox.append(r.WorkerReady(self.number, record.local, 1))
            case r.Stop():
                self.alive = False

    def _roster(self, record: r.Roster) -> None:
        self.epoch, self.assignment = max(self.epoch, record.epoch), record.assignment
        if record.epoch == 0 and self.ranks and not self.registered:
            self.training, self.at = True, 0
            for local, rank in placing.ranks_of(self.assignment, self.number).items():
                self.live[rank] = 0
                info = r.CoordinateInfo(rank, 0, 0, 0)
                self.registered.append(r.Registered(self.number, local, info, SHARD_BYTES, 1, "same", True))
            self.outbox.extend(self.registered)
            self.begin()
        else:
            self.vault.set_epoch(self.epoch)

    def _declare(self, record: r.Declare) -> None:
        had = set(self.ranks)
        self.epoch, self.assignment, self.groups = record.epoch, record.assignment, record.groups
        self.training = self.holding = self.stepping = False
        self.saves = record.purpose == "save"
        self.agreed = self.hold = None
        self.ready = set()
        self.forming = False
        self.exited.clear()  # a new process is in the slot
        self.vault.set_epoch(record.epoch)
        for writer in self._writers.values():
            writer.abandon()
        if had - set(self.ranks):  # healthy, but somebody else's now: fresh workers are parked
            self.live.clear()
            self.parked = True
            self.registered.clear()
            self.outbox.extend(r.WorkerReady(self.number, i, 1) for i in range(self.slots))
        if self.ranks:
            self.parked = False
        live = {rank: self.live.get(rank) for rank in self.ranks}
        arrived = had >= set(self.ranks)  # who takes over a coordinate has to build its model first
        self.outbox.append(r.Offer(self.epoch, self.number, live, *self._held(), arrived=arrived))
        if not arrived:
            self.outbox.append(r.NodeArrived(self.epoch, self.number))

    def _held(self) -> tuple[dict[int, list[tuple[int, int]]], dict[int, list[tuple[int, int]]]]:
        own: dict[int, list[tuple[int, int]]] = {}
        peer: dict[int, list[tuple[int, int]]] = {}
        for rank, held in self.vault.holdings().ranks.items():
            for one in held:
                (own if one.kind == "own" else peer).setdefault(rank, []).append((one.epoch, one.generation))
        return own, peer

    def holds(self, rank: int, generation: int) -> bool:
        """A complete copy of any kind is here."""
        return any(one.generation == generation for one in self.vault.holdings().ranks.get(rank, ()))

    def take(self, rank: int, version: Version) -> None:
        """The agreed version is here: keep it until a newer one is committed (`NodeRecovery._hand_out`)."""
        self.vault.set_committed(*version)
        self.ready.add(rank)
        self.prepare()

    def prepare(self) -> None:
        """Once every rank here has the agreed generation."""
        if self.agreed is not None and self.ready >= set(self.ranks):
            self.outbox.append(r.NodeReady(self.epoch, self.number))
            self.resume()

    def resume(self) -> None:
        """Once it has the agreed generation and its groups: train on."""
        if self.agreed is None or not self.forming or not self.ready >= set(self.ranks) or self.training:
            return
        self.live = dict.fromkeys(self.ranks, self.agreed.generation)
        self.at, self.stepping, self.training = self.agreed.generation, False, True
        self.outbox.append(r.NodeFormed(self.epoch, self.number, 1))
        self.outbox.append(r.NodeRestored(self.epoch, self.number))
        if self.saves:
            self.outbox.append(r.Saved(self.epoch, self.number, self.at, "dir"))
        else:
            self.begin()
            self.outbox.append(r.NodeResumed(self.epoch, self.number, self.at))

    # ---- training

    def begin(self) -> None:
        """An iteration begins: open a slot, or hold still for a planned move."""
        if self.hold is not None and self.hold.epoch == self.epoch and self.at >= self.hold.iteration:
            self.holding, missed = True, self.at > self.hold.iteration
            for rank in self.ranks if not missed else ():
                self.writer(rank).open(self.epoch, self.at, b"s")
                self.copy(rank)
            self.outbox.append(r.NodeHeld(self.epoch, self.number, self.at, missed))
            return
        for rank in self.ranks:
            self.writer(rank).open(self.epoch, self.at, b"s")

    def copy(self, rank: int) -> None:
        """The rank's slot is written to its end and checksummed."""
        if self.writer(rank).slot is not None:
            self.writer(rank).complete()
            self.vault.checksum(rank)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self.vault.close()
