"""Where the recovery of one epoch stands: who has reached which phase, and until when the others have time. Pure.

::

    ARRIVING --all offers--> PREPARING --all ready--> FORMING --all formed--> RESTORING --all resumed--> (training)

A new epoch gets a new object, so nothing of an old one can be mistaken for news.
"""

from __future__ import annotations

from collections.abc import Iterable

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.job import Deadlines, Phase

__all__ = ["Recovery"]


class Recovery:
    """One epoch's recovery. Every method says whether the phase it belongs to is complete now.

    Args:
        active: nodes that hold a coordinate in this epoch.
        helpers: nodes that hold none but have shards to give (drained ones, healthy ones that gave way).
    """

    def __init__(
        self,
        purpose: r.Purpose,
        active: Iterable[int],
        helpers: Iterable[int],
        deadlines: Deadlines,
        now: float,
    ) -> None:
        self.purpose: r.Purpose = purpose
        self.phase = Phase.ARRIVING
        self.generation = -1
        self.offers: dict[int, r.Offer] = {}
        self.active = frozenset(active)
        self.givers = self.active | set(helpers)
        self._deadlines = deadlines
        self.deadline: float | None = now + deadlines.abort
        self._reached: set[int] = set()
        self._restored: set[int] = set()
        self._resumed: set[int] = set()
        self._saved: set[int] = set()
        self._told_restored = False
        self._groups: dict[int, tuple[int, int]] = {}

    def offered(self, record: r.Offer) -> bool:
        """A node has left its step and says what it can give."""
        if self.phase is not Phase.ARRIVING:
            return False
        self.offers[record.node] = record
        return self.offers.keys() >= self.givers

    def agreed(self, generation: int, now: float) -> None:
        """The generation to go on from is known."""
        self.generation = generation
        self._enter(Phase.PREPARING, now + self._deadlines.build)

    def ready(self, node: int, now: float) -> bool:
        """A node holds the agreed generation."""
        if self.phase is Phase.PREPARING and self._all(self._reached, node):
            self._enter(Phase.FORMING, now + 3 * self._deadlines.form)
            return True
        return False

    @property
    def groups(self) -> tuple[int, int]:
        """Groups re-formed, and all: summed over the ranks that have told so far."""
        return sum(changed for changed, _ in self._groups.values()), sum(of for _, of in self._groups.values())

    def formed(self, node: int, now: float, changed: int = 0, of: int = 0) -> bool:
        """A node has its groups: `changed` re-formed, `of` in all, summed over its ranks."""
        self._groups[node] = (changed, of)
        if self.phase is Phase.FORMING and self._all(self._reached, node):
            self._enter(Phase.RESTORING, now + self._deadlines.abort + self._deadlines.form)
            return True
        return False

    def restored(self, node: int) -> None:
        """A node has its parameters back; a fast one may say so before the slowest has told that it formed."""
        if self.phase in (Phase.FORMING, Phase.RESTORING):
            self._restored.add(node)

    def resumed(self, node: int) -> None:
        """A node trains again."""
        if self.phase in (Phase.FORMING, Phase.RESTORING):
            self._resumed.add(node)

    def all_restored(self, now: float) -> bool:
        """True once, when every node has its parameters back."""
        if self.phase is not Phase.RESTORING or self._told_restored or not self._restored >= self.active:
            return False
        self._told_restored = True
        if self.purpose == "save":
            self.deadline = now + self._deadlines.build
        return True

    @property
    def over(self) -> bool:
        """Every node trains again."""
        return self.purpose == "resume" and self._told_restored and self._resumed >= self.active

    def saved(self, node: int) -> bool:
        """A node has written Megatron's checkpoint."""
        return self._all(self._saved, node)

    def late(self) -> set[int]:
        """Who has not come to the end of the current phase."""
        if self.phase is Phase.ARRIVING:
            return set(self.givers) - self.offers.keys()
        if self.phase is Phase.RESTORING:
            done = self._saved if self.purpose == "save" and self._told_restored else self._resumed
            return set(self.active) - done
        return set(self.active) - self._reached

    def _all(self, reached: set[int], node: int) -> bool:
        reached.add(node)
        return reached >= self.active

    def _enter(self, phase: Phase, deadline: float) -> None:
        self.phase = phase
        self.deadline = deadline
        self._reached.clear()
