"""Which generations the ranks of one node have committed, and when the coordinator hears of it. Pure."""

from __future__ import annotations

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.known import KnownJob

__all__ = ["Commits"]


class Commits:
    """One node's account. The coordinator hears of a generation once, when all ranks of the node have it.

    Attributes:
        last: what was told last, for a coordinator that may not know it: no slot could ever be overwritten again.
    """

    def __init__(self, job: KnownJob) -> None:
        self._job = job
        self.last: r.Committed | None = None
        self._committed: dict[int, set[tuple[int, int]]] = {}
        self._agreed: r.Agree | None = None
        self._covered: set[int] = set()

    def restart(self) -> None:
        """A new epoch begins."""
        self._committed.clear()
        self._agreed = None
        self._covered.clear()

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
        """A rank has committed a version of the current epoch; what to tell when it was the last one here."""
        version = (self._job.epoch, generation)
        self._committed.setdefault(rank, set()).add(version)
        ranks = self._job.ranks.values()
        if not all(version in self._committed.get(each, ()) for each in ranks):
            return None
        for each in ranks:
            self._committed[each] = {v for v in self._committed[each] if v > version}
        self.last = r.Committed(self._job.epoch, self._job.node, generation)
        return self.last
