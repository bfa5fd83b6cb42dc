"""What nodes report of a job that trains: for the event log, the status, and whatever is decided next. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.accounting import SnapshotAccount
from deadpool_megatron.cluster.core.effects import Answer, Effect, Effects, Send, Stop, emit
from deadpool_megatron.cluster.core.lag import Lag, LagJudge
from deadpool_megatron.cluster.core.stalls import StragglerJudge
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.vault import Told


class Observations:
    """Of one job, through all its epochs.

    Attributes:
        snapshots: what they cost and are worth.
        refusals: by node, how much its vault has refused, by kind.
        state_hashes: at the end of the job, by rank and part.
    """

    def __init__(self, state: JobState) -> None:
        self._state = state
        self._stragglers = StragglerJudge()
        self._lag = LagJudge(state.job.snapshot_interval)
        self.snapshots = SnapshotAccount()
        self.refusals: dict[int, dict[str, int]] = {}
        self.state_hashes: dict[int, dict[str, str]] = {}

    def moved(self, ranks: list[int]) -> None:
        """A new epoch, in which these coordinates have new workers."""
        self.snapshots.forget()
        self._stragglers.forget(ranks)

    @property
    def lag(self) -> Lag | None:
        """How far protection is behind training; None while it keeps up."""
        return self._lag.lag

    # ---- training

    def iterated(self, record: r.Iteration, now: float) -> Answer[bool]:
        """An iteration of this epoch has ended; True when it is the first time that this one has."""
        head = self._state.progress
        first = head.iterated(record)
        yield emit(
            "iteration",
            **msgspec.structs.asdict(record)
            | {
                "losses": {k: float.fromhex(v) for k, v in record.losses.items()},
                "losses_hex": record.losses,
                "grad_norm": float.fromhex(record.grad_norm) if record.grad_norm is not None else None,
                "grad_norm_hex": record.grad_norm,
            },
            commit_s=self.snapshots.iterated(record, now),
            replicas=self._state.layout.width,
        )
        if first and self._lag.iterated(head.iteration - head.committed, head.held_back_by, now) and self.lag:
            yield emit(
                "behind",
                iteration=record.iteration,
                committed=head.committed,
                seconds=round(self.lag.seconds, 3),
                cause=self.lag.cause,
            )
        return first

    def committed(self, record: r.Committed, now: float, training: bool) -> Iterable[Effect]:
        """A node has committed a generation in this epoch. (Of a thousand nodes one changes what is to be told.)"""
        told, by_all = self._state.progress.node_committed(record)
        return self._all_are_told(told, by_all, now, training) if told is not None else ()

    def _all_are_told(self, told: Told, by_all: bool, now: float, training: bool) -> Effects:
        yield self._told(None, told)
        if by_all and told.kept is not None:
            seconds = self.snapshots.committed(told.kept.generation, now)
            if self._lag.committed(now):
                yield emit("caught_up", iteration=told.kept.generation)
            yield emit("committed", iteration=told.kept.generation, seconds=seconds)
            if self._state.protection.committed():
                yield emit("protected", survives=self._state.protection.degree, iteration=told.kept.generation)
            state = self._state
            yield from state.durability.committed(told.kept, state.members.active(), now, training, state.can_grow())

    def catch_up(self, node: int | None) -> Effects:
        """A node (None: all) was away: what was told meanwhile it has not heard, and without it could skip for ever."""
        told = self._state.progress.told
        if told is not None:
            yield self._told(node, told)

    def _told(self, node: int | None, told: Told) -> Send:
        return Send(node, r.CommittedTo(self._state.members.epoch, told.kept, told.floor.generation))

    def did(self, record: r.SideEffect) -> Effects:
        """Something was done that must not be done again."""
        if self._state.progress.did(record) and record.act != "log":
            yield emit(record.act, iteration=record.iteration, rank=record.rank, node=record.node)

    def paced(self, record: r.Pace, now: float) -> Effects:
        """A node tells how fast its ranks are."""
        ratio = self._stragglers.report(record.node, record.forward_s, self._state.layout.stages, now)
        if ratio is not None:
            yield emit(
                "straggler",
                node=record.node,
                iteration=record.iteration,
                ratio=round(ratio, 2),
                advice=f"deadpool drain --node {record.node}",
            )

    def state_hash(self, record: r.StateHash) -> Effects:
        """What a rank ends with."""
        self.state_hashes[record.rank] = record.digests
        yield from ()

    # ---- vaults

    def no_room(self, record: r.NoRoom) -> Effects:
        """A node has no memory for what it is to keep."""
        if self._state.progress.committed < 0:  # nothing would ever be protected
            yield Stop(Exit.USAGE, f"node {record.node}: {record.message}")
        else:  # a spare that has come since, as a rule: the job trains, and falls back further when it loses a node
            yield emit("no_room", node=record.node, cause=record.message)

    def refused(self, record: r.Refusals) -> Effects:
        """A vault has turned away what nobody of this job, or of this epoch, may send."""
        self.refusals[record.node] = record.counts
        yield from ()

    def memory(self, record: r.VaultMemory) -> Effects:
        """What a vault has taken of its node's memory."""
        told = {"numa_nodes": record.numa_nodes, "transport": record.transport, "why": record.why}
        yield emit("memory", node=record.node, bytes=record.nbytes, huge_bytes=record.huge_bytes, **told)

    def damaged(self, record: r.DamagedCopy) -> Effects:
        """A copy does not have the checksums it had."""
        if record.epoch == self._state.members.epoch:
            self._state.protection.damaged(record.node)
        yield emit("damaged", node=record.node, kind=record.kind, holder=record.holder, iteration=record.generation)
