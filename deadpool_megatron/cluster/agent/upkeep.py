"""Keeps one node's vault to the tables of the job: where its shards go, what it keeps for others, what it may free."""

from __future__ import annotations

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.durable import NodeDurability
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.shards import Shards
from deadpool_megatron.cluster.agent.workers import Worker
from deadpool_megatron.vault import VaultError, WordPlan, constants_of, small_capacity


class Upkeep:
    """Used by the agent's thread only; everything but `grant` returns at once.

    Args:
        job: what this node knows of the job; follows the first placement.
        durable: this node's part in the durable tier, if there is one.
    """

    def __init__(self, job: KnownJob, shards: Shards, durable: NodeDurability | None) -> None:
        self._job = job
        self._shards = shards
        self._durable = durable
        self._kept: tuple[dict[int, tuple[int, int]], dict[int, WordPlan], set[int]] = ({}, {}, set())
        self._tidied = 0  # the epoch since when nothing of an older placement is here

    def place(self, record: r.Placement) -> None:
        """The first placement: take the memory for what this node keeps, then send."""
        if record.epoch != self._job.epoch:
            return
        self._job.place(record)
        self._plan()
        self._shards.reserve()
        self.aim()

    def grant(self, worker: Worker, record: r.ArenaRequest) -> None:
        """Give a worker the memory of its shard, or tell it why not."""
        if self._durable is not None and (refusal := self._durable.refusal(record.rank)):
            worker.send(r.ArenaRefused(refusal))
            return
        try:
            path = self._shards.allocate(record.rank, record.unique_bytes, record.small_bytes, record.numa)
        except (VaultError, OSError) as err:
            worker.send(r.ArenaRefused(str(err)))
            return
        worker.send(r.ArenaGranted(record.rank, path))
        if self._durable is not None:
            self._durable.granted(record.rank, small_capacity(record.small_bytes))
        self.aim()

    def replan(self, sizes_known: bool) -> None:
        """A new epoch: nothing is sent until its generation is agreed, and what is kept for others is another."""
        self._shards.set_targets(self._job.epoch, {})
        if sizes_known:
            self._plan()

    def empty(self) -> None:
        """Nothing of what is here has a use any more."""
        self._shards.keep_only(set(), set(), set())
        if self._durable is not None:
            self._durable.keep_only(set())

    def aim(self) -> None:
        """Tell the replicator where the shards of each own rank go."""
        aims = self._job.targets()
        if aims is not None:
            here = [holder for holder in self._own() if self._shards.path_of(holder)]
            self._shards.set_targets(self._job.epoch, {holder: aims.get(holder, ()) for holder in here})

    def committed_to(self, record: r.CommittedTo) -> None:
        """What the whole job has committed. With the first commit of an epoch, older placements' copies are freed."""
        epoch = self._job.epoch
        if record.epoch != epoch:
            return
        self._shards.set_kept(epoch, record.kept, record.floor)
        if record.kept is not None and record.kept[0] == epoch != self._tidied:
            self._tidied = epoch
            peers, words, constants = self._kept
            self._shards.keep_only(self._own(), set(peers) | constants, set(words))
            if self._durable is not None:
                self._durable.keep_only(self._own())

    def _own(self) -> set[int]:
        """The ranks here, and the holders of their constants."""
        ranks = set(self._job.ranks.values())
        return ranks | {constants_of(rank) for rank in ranks}

    def _plan(self) -> None:
        self._kept = self._job.kept_for_others()
        self._shards.plan(*self._kept)
