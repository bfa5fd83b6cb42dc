"""Where the recovery of one epoch stands: who has reached which phase, and until when the others have time. Pure.

::

    ARRIVING --all offers--> PREPARING --all ready--> FORMING --all formed--> RESTORING --all resumed--> (training)
                                  '--all arrived: groups form meanwhile--^

So groups form beside the transfer of shards, and whoever has both goes on at once: from the agreement on, news of any
later phase may come before the slowest has told that it is through an earlier one. A new epoch gets a new object, so
nothing of an old one can be mistaken for news.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.job import Deadlines, Phase

_STACKS_S = 3.0  # for a message, and for a process to write them
_ENDS_WITH: Final = {Phase.PREPARING: "prepared", Phase.FORMING: "reformed", Phase.RESTORING: "restored"}


class Recovery:
    """One epoch's recovery. Each node goes through the steps of `cluster.records.STEPS`, and ``arrived`` and ``saved``.

    Args:
        active: nodes that hold a coordinate in this epoch.
        helpers: nodes that hold none but have shards to give (drained ones, healthy ones that gave way).
        waits_until: some coordinates are on lost nodes, and for so long on a spare is waited for; another epoch gives
            them to it.
    """

    def __init__(
        self,
        purpose: r.Purpose,
        active: Iterable[int],
        helpers: Iterable[int],
        deadlines: Deadlines,
        now: float,
        waits_until: float | None = None,
    ) -> None:
        self.purpose: r.Purpose = purpose
        self.phase = Phase.ARRIVING
        self.generation = -1
        self.offers: dict[int, r.Offer] = {}
        self.active = frozenset(active)
        self.givers = self.active | frozenset(helpers)
        self._deadlines = deadlines
        self.waits_until = waits_until
        self.deadline: float | None = now + deadlines.abort
        self._at: defaultdict[str, set[int]] = defaultdict(set)  # by step, who has reached it
        self._told_to_form = False
        self._reminded: set[Phase] = set()
        self.restored_reported = False
        self.compared_s: float | None = None  # what comparing all ranks took, not told yet
        self.formed: dict[int, tuple[int, int, int]] = {}
        """By node: groups of one rank; re-formed, and all, summed over its ranks."""

    def offered(self, record: r.Offer) -> bool:
        """A node has left its step and says what it can give."""
        if self.phase is not Phase.ARRIVING:
            return False
        self.offers[record.node] = record
        if record.arrived:
            self.reached("arrived", record.node)
        return self.offers.keys() >= self.givers

    def ask(self, others: Iterable[int], now: float) -> list[int]:
        """Those of ``others`` who have not said what they can give; they are waited for, with their own deadline."""
        more = sorted(set(others) - self.offers.keys() - self.givers)
        self.givers |= set(more)
        if more:
            self.deadline = now + self._deadlines.abort
        return more

    def wait(self) -> None:
        """Everybody holds what there is: until a spare comes."""
        assert self.waits_until is not None
        self._enter(Phase.WAITING, self.waits_until)

    def agreed(self, generation: int, now: float) -> None:
        """The generation to go on from is known."""
        self.generation = generation
        self._enter(Phase.PREPARING, now + self._deadlines.build)

    def reached(self, step: str, node: int) -> bool:
        """A node is through a step; True when all are that hold a coordinate."""
        self._at[step].add(node)
        return self._at[step] >= self.active

    def may_form(self) -> bool:
        """True once, when it is agreed what to go on from and every node can form its groups."""
        if self.phase is Phase.ARRIVING or self._told_to_form or not self._at["arrived"] >= self.active:
            return False
        self._told_to_form = True
        return True

    def advance(self, now: float) -> str | None:
        """The step that all are through now, once each, and in order: the next one begins. Call until it is None."""
        step = _ENDS_WITH.get(self.phase)
        if step is None or self.restored_reported or not self._at[step] >= self.active:
            return None
        if self.phase is Phase.PREPARING:
            self._enter(Phase.FORMING, now + 3 * self._deadlines.form)
        elif self.phase is Phase.FORMING:
            self._enter(Phase.RESTORING, now + self._deadlines.abort + self._deadlines.form)
        else:
            self.restored_reported = True
            if self.purpose == "save":
                self.deadline = now + self._deadlines.build
        return step

    @property
    def groups(self) -> tuple[int, int, int]:
        """Groups of one rank; re-formed, and all, summed over all ranks that have told so far."""
        a_rank, changed, of = zip(*self.formed.values(), strict=True)
        return max(a_rank), sum(changed), sum(of)

    def waits_for(self, node: int) -> bool:
        """A node is to say what it has, or that it trains."""
        asked = self.phase is Phase.ARRIVING and node in self.givers and node not in self.offers
        return asked or (node in self.active and node not in self._at["resumed"])

    @property
    def over(self) -> bool:
        """Every node trains again."""
        return self.purpose == "resume" and self.restored_reported and self._at["resumed"] >= self.active

    def late(self) -> set[int]:
        """Who has not come to the end of the current phase."""
        if self.phase is Phase.WAITING:
            return set()
        if self.phase is Phase.ARRIVING:
            return set(self.givers) - self.offers.keys()
        step = _ENDS_WITH[self.phase]
        if self.restored_reported:
            step = "saved" if self.purpose == "save" else "resumed"
        return set(self.active) - self._at[step]

    def remind(self, late: set[int], now: float) -> bool | None:
        """These nodes are late. The first time in a phase (else None) they get more time, to keep stacks of workers;
        and where True to end those that hang, since a process that begins anew is cheaper than a node.

        Not of who builds a model: that would take as long once more.
        """
        saves = self.purpose == "save" and self.restored_reported
        if not late & self.active or self.phase in self._reminded or self.purpose == "drain" or saves:
            return None
        self._reminded.add(self.phase)
        ends = self.phase is not Phase.PREPARING
        self.deadline = now + (self._deadlines.abort if ends else _STACKS_S)
        return ends

    def _enter(self, phase: Phase, deadline: float) -> None:
        self.phase = phase
        self.deadline = deadline
