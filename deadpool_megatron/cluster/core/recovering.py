"""Where the recovery of one epoch stands: who has reached which phase, and until when the others have time. Pure.

::

    ARRIVING --all offers--> PREPARING --all ready--> FORMING --all formed--> RESTORING --all resumed--> (training)
                                  '--all arrived: groups form meanwhile--^

So groups form beside the transfer of shards, and whoever has both goes on at once: from the agreement on, news of any
later phase may come before the slowest has told that it is through an earlier one. A new epoch gets a new object, so
nothing of an old one can be mistaken for news.
"""

from __future__ import annotations

from collections.abc import Iterable

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.job import Deadlines, Phase

_STACKS_S = 3.0  # for a message, and for a process to write them


class Recovery:
    """One epoch's recovery. Every method says whether the phase it belongs to is complete now.

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
        self._arrived: set[int] = set()
        self._told_to_form = False
        self._reminded: set[Phase] = set()
        self._ready: set[int] = set()
        self._formed: set[int] = set()
        self._restored: set[int] = set()
        self._resumed: set[int] = set()
        self._saved: set[int] = set()
        self.restored_reported = False
        self.compared_s: float | None = None  # what comparing all ranks took, not told yet
        self._groups: dict[int, tuple[int, int, int]] = {}

    def offered(self, record: r.Offer) -> bool:
        """A node has left its step and says what it can give."""
        if self.phase is not Phase.ARRIVING:
            return False
        self.offers[record.node] = record
        if record.arrived:
            self._arrived.add(record.node)
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

    def arrived(self, node: int) -> None:
        """A node can form its groups."""
        self._arrived.add(node)

    def may_form(self) -> bool:
        """True once, when it is agreed what to go on from and every node can form its groups."""
        if self.phase is Phase.ARRIVING or self._told_to_form or not self._arrived >= self.active:
            return False
        self._told_to_form = True
        return True

    def ready(self, node: int, now: float) -> bool:
        """A node holds the agreed generation."""
        self._ready.add(node)
        if self.phase is Phase.PREPARING and self._ready >= self.active:
            self._enter(Phase.FORMING, now + 3 * self._deadlines.form)
            return True
        return False

    def formed(self, node: int, groups: int, changed: int = 0, of: int = 0) -> None:
        """A node has its groups: so many of one rank; `changed` re-formed, `of` in all, summed over its ranks."""
        self._groups[node] = (groups, changed, of)
        self._formed.add(node)

    @property
    def groups(self) -> tuple[int, int, int]:
        """Groups of one rank; re-formed, and all, summed over all ranks that have told so far."""
        a_rank, changed, of = zip(*self._groups.values(), strict=True)
        return max(a_rank), sum(changed), sum(of)

    def all_formed(self, now: float) -> bool:
        """True once, when every node has its groups."""
        if self.phase is Phase.FORMING and self._formed >= self.active:
            self._enter(Phase.RESTORING, now + self._deadlines.abort + self._deadlines.form)
            return True
        return False

    def restored(self, node: int) -> None:
        """A node has its parameters back."""
        self._restored.add(node)

    def resumed(self, node: int) -> None:
        """A node trains again."""
        self._resumed.add(node)

    def waits_for(self, node: int) -> bool:
        """A node is to say what it has, or that it trains."""
        asked = self.phase is Phase.ARRIVING and node in self.givers and node not in self.offers
        return asked or (node in self.active and node not in self._resumed)

    def all_restored(self, now: float) -> bool:
        """True once, when every node has its parameters back."""
        if self.phase is not Phase.RESTORING or self.restored_reported or not self._restored >= self.active:
            return False
        self.restored_reported = True
        if self.purpose == "save":
            self.deadline = now + self._deadlines.build
        return True

    @property
    def over(self) -> bool:
        """Every node trains again."""
        return self.purpose == "resume" and self.restored_reported and self._resumed >= self.active

    def saved(self, node: int) -> bool:
        """A node has written Megatron's checkpoint."""
        self._saved.add(node)
        return self._saved >= self.active

    def late(self) -> set[int]:
        """Who has not come to the end of the current phase."""
        if self.phase is Phase.WAITING:
            return set()
        if self.phase is Phase.ARRIVING:
            return set(self.givers) - self.offers.keys()
        through = {Phase.PREPARING: self._ready, Phase.FORMING: self._formed}.get(self.phase, self._resumed)
        if self.phase is Phase.RESTORING and not self.restored_reported:
            through = self._restored
        elif self.phase is Phase.RESTORING and self.purpose == "save":
            through = self._saved
        return set(self.active) - through

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
