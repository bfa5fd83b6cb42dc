"""Which generations the ranks of one node have committed, and when the coordinator hears of it. Pure."""

from __future__ import annotations

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.shards import RankCommitted
from deadpool_megatron.vault import CommitLedger, Version, constants_of, is_constants


class Commits:
    """One node's account. The coordinator hears of a generation once, when all ranks of the node have it.

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
