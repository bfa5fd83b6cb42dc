"""The collectives of the ranks: who has entered, who is let go, and how the end of a peer shows."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulation.rank import Rank
    from simulation.run import Run

__all__ = ["Meetings"]


class _Meeting:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.entered: dict[int, Rank] = {}
        self.total = 0
        self.complete = False
        self.through: set[Rank] = set()
        self.failed: set[Rank] = set()

    def over(self, rank: Rank) -> bool:
        """It may go on. Raises when a peer's connection has ended."""
        from simulation.rank import Broken

        if rank in self.failed:
            raise Broken
        return rank in self.through


class Meetings:
    """All of one run."""

    def __init__(self, cluster: Run) -> None:
        self._cluster = cluster
        self._open: dict[tuple[int, str, int], _Meeting] = {}
        self._newest = 0
        self._broken: set[int] = set()  # epochs whose groups have lost a member, and it shows

    def enter(self, rank: Rank, epoch: int, what: str, iteration: int, value: int) -> _Meeting:
        """A rank has come to a collective."""
        if epoch > self._newest:
            self._newest = epoch
            self._open = {key: each for key, each in self._open.items() if key[0] >= epoch - 1}
        meeting = self._open.get((epoch, what, iteration))
        if meeting is None:
            meeting = self._open[epoch, what, iteration] = _Meeting(epoch)
        assert rank.rank is not None
        before = meeting.entered.get(rank.rank)
        assert before is None or not before.process.alive or before is rank, (
            f"rank {rank.rank} is twice in epoch {epoch}"
        )
        meeting.entered[rank.rank] = rank
        meeting.total = (meeting.total + value) & ((1 << 60) - 1)
        if epoch in self._broken:
            self._fail(meeting, rank)
        else:
            self._try(meeting)
        return meeting

    def _try(self, meeting: _Meeting) -> None:
        cluster = self._cluster
        missing = len(meeting.entered) < cluster.oracle.ranks(meeting.epoch)
        if meeting.complete or missing or meeting.epoch in self._broken:
            return
        nodes = sorted({rank.host.node for rank in meeting.entered.values()})
        if not all(cluster.network.both(a, b) for a, b in combinations(nodes, 2)):
            return  # tried again when a cut has ended
        meeting.complete = True
        for rank in meeting.entered.values():
            rank.process.later(cluster.world.delay(0.0005, 0.02), self._let_go, meeting, rank)

    def _let_go(self, meeting: _Meeting, rank: Rank) -> None:
        if rank not in meeting.failed:
            meeting.through.add(rank)
            rank.poke()

    def _fail(self, meeting: _Meeting, rank: Rank) -> None:
        rank.process.later(self._cluster.world.delay(0.001, 0.05), self._failed, meeting, rank)

    def _failed(self, meeting: _Meeting, rank: Rank) -> None:
        if rank not in meeting.through:
            meeting.failed.add(rank)
            rank.poke()

    def broken(self, gone: Rank) -> None:
        """A worker's connections have ended: its peers see that, now or when they next wait for it."""
        self._broken.add(gone.groups)
        for meeting in self._open.values():
            if meeting.epoch != gone.groups:
                continue
            half = self._cluster.world.chance.random() < 0.5
            for rank in meeting.entered.values():
                if rank not in meeting.through and (not meeting.complete or half):
                    self._fail(meeting, rank)

    def healed(self) -> None:
        """A cut has ended."""
        for meeting in self._open.values():
            self._try(meeting)
