"""What the ranks of one node have committed, when the coordinator hears of it, and what the vault keeps and frees."""

from __future__ import annotations

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.durable import NodeDurability
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.shards import RankCommitted, Shards
from deadpool_megatron.cluster.agent.workers import Worker
from deadpool_megatron.vault import (
    CommitLedger,
    VaultError,
    Version,
    WordPlan,
    constants_of,
    is_constants,
    small_capacity,
)


class Commits:
    """One node's account, pure. The coordinator hears of a generation once, when all ranks of the node have it.

    A rank has none while its constants are not wherever they belong: without them its shard is of no use.
    """

    def __init__(self, job: KnownJob) -> None:
        self._job = job
        self._last: r.Committed | None = None
        self.kept: tuple[int, int] | None = None
        """The newest version that the whole job has committed, as told; None before the first."""
        self._floor = Version(0, 0)
        self._ledger: CommitLedger | None = None
        self._agreed: r.Agree | None = None
        self._covered: set[int] = set()
        self._with_constants: set[int] = set()  # holders
        self._safe: set[int] = set()  # those of them that are wherever they belong
        self._waiting: dict[int, list[RankCommitted]] = {}

    @property
    def last(self) -> r.Committed | None:
        """What was told last, for a coordinator that may not know it: no slot could ever be overwritten again.

        None when it is below the floor that another coordinator has told: it may be overwritten by now.
        """
        last = self._last
        if last is None or (last.epoch, last.generation) == self.kept:
            return last
        return last if Version(last.epoch, last.generation) >= self._floor else None

    def committed_to(self, record: r.CommittedTo) -> None:
        """What the job has committed, and what can never be: ranks that wait with that are not apart for it."""
        if record.epoch == self._job.epoch:
            self.kept = record.kept or self.kept
            self._floor = max(self._floor, Version(record.epoch, record.floor))
            if self._ledger is not None:
                self._ledger.raised(self._floor)

    def has_constants(self, holder: int) -> None:
        """A rank of this node has constants."""
        self._with_constants.add(holder)

    def due(self, event: RankCommitted) -> list[RankCommitted]:
        """What counts now that ``event`` has come, in order; see above."""
        if is_constants(event.rank):
            self._safe.add(event.rank)
            return self._waiting.pop(event.rank, [])
        holder = constants_of(event.rank)
        if holder in self._with_constants and holder not in self._safe:
            self._waiting.setdefault(holder, []).append(event)
            return []
        return [event]

    def start_over(self) -> None:
        """All workers begin anew, perhaps of other coordinates, and tell what they have: see `has_constants`."""
        self._with_constants.clear()
        self.restart()

    def restart(self) -> None:
        """A new epoch begins."""
        self._ledger = None
        self._agreed = None
        self._covered.clear()
        self._safe.clear()
        self._waiting.clear()

    def agreed(self, record: r.Agree) -> None:
        """The generation that this epoch goes on from."""
        self._agreed = record

    def covered(self, rank: int, generation: int) -> r.Covered | None:
        """A rank has a generation wherever it belongs: once all here have the agreed one, the node is redundant again.

        It may be a version of an older epoch: the bytes are the same.
        """
        agreed, job = self._agreed, self._job
        if agreed is None or agreed.epoch != job.epoch or generation != agreed.generation:
            return None
        ranks = set(job.ranks.values())
        if ranks <= self._covered:
            return None
        self._covered.add(rank)
        return r.Covered(job.epoch, job.node, generation) if ranks <= self._covered else None

    def committed(self, rank: int, generation: int) -> r.Committed | None:
        """A rank has committed a version of the current epoch; what to tell when it was the last one here.

        Or when no version can be on all of them any more: one began a generation just before the message that freed its
        slot, another one just after, so that this one has what that one has skipped.
        """
        version = Version(self._job.epoch, generation)
        if self._ledger is None:
            # (margin 1: what the job takes next is the coordinator's to say, and may be the very next one)
            self._ledger = CommitLedger(self._job.ranks.values(), version.epoch, margin=1)
            self._ledger.raised(self._floor)
        told = self._ledger.committed(rank, version)
        if told is None:
            return None
        self._last = r.Committed(version.epoch, self._job.node, generation, told.kept != version)
        return self._last


class Upkeep:
    """Keeps a vault to the tables of the job: where its shards go, what it keeps for others, what it may free. Used by
    the agent's thread only; everything but `grant` returns at once.

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
        if self._durable is not None and (refusal := self._durable.refusal(record.rank, record.layout)):
            worker.send(r.ArenaRefused(refusal))
            return
        try:
            path = self._shards.allocate(record.rank, record.unique_bytes, record.small_bytes, record.numa)
        except (VaultError, OSError) as err:
            worker.send(r.ArenaRefused(str(err)))
            return
        worker.send(r.ArenaGranted(record.rank, path))
        if self._durable is not None:
            self._durable.granted(record.rank, record.unique_bytes + small_capacity(record.small_bytes))
        self.aim()

    def replan(self, sizes_known: bool) -> None:
        """A new epoch: nothing is sent until its generation is agreed, and what is kept for others is another."""
        self._shards.set_targets(self._job.epoch, {})
        if sizes_known:
            self._plan()

    def empty(self) -> None:
        """Nothing of what is here has a use any more, but for what is set aside."""
        self._shards.vault.end_making()
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
            self._shards.vault.let_go()
            if self._durable is not None:
                self._durable.keep_only(self._own())

    def _own(self) -> set[int]:
        """The ranks here, and the holders of their constants."""
        ranks = set(self._job.ranks.values())
        return ranks | {constants_of(rank) for rank in ranks}

    def _plan(self) -> None:
        self._kept = self._job.kept_for_others()
        self._shards.plan(*self._kept)
