"""How far the job is: iterations that have ended, generations that everybody has committed. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from deadpool_megatron.cluster import records as r
from deadpool_megatron.vault import CommitLedger, Told, Version

_MOST_NAMED = 8


class Progress:
    """Of one job, through all its epochs.

    Args:
        active: nodes that hold a coordinate.
    """

    def __init__(self, active: Iterable[int]) -> None:
        self.iteration = -1
        self.committed = -1
        self.reached = -1
        """The newest iteration that has ended in this epoch, which may have begun far before `iteration`."""
        self.fresh = True
        """Nothing has been trained or committed, for certain: beginning anew loses nothing."""
        self.pace = 0.0
        """Seconds the last iteration took."""
        self.done: dict[r.SideEffectKind, int] = {}
        """Of what happens once an iteration, and not in training itself, the last iteration it was done for."""
        self._kept: Version | None = None
        self._ledger = CommitLedger(active, 0)

    def iterated(self, record: r.Iteration) -> bool:
        """An iteration has ended; True when it is the first time that this one has."""
        self.pace = record.seconds
        self._ledger.progress(record.iteration + 1)
        self.fresh = False
        self.reached = record.iteration
        if record.iteration <= self.iteration:
            return False
        self.iteration = record.iteration
        return True

    def did(self, record: r.SideEffect) -> bool:
        """Something was done that must not be done again; False when it is known already."""
        if record.iteration <= self.done.get(record.act, -1):
            return False
        self.done[record.act] = record.iteration
        return True

    def node_committed(self, record: r.Committed) -> tuple[Told | None, bool]:
        """A node has committed a generation. Returns what to send to all, if anything, and whether all have it now."""
        version = Version(record.epoch, record.generation)
        told = self._ledger.apart(version) if record.apart else self._ledger.committed(record.node, version)
        if told is None or told.kept is None or told.kept == self._kept:
            return told, False
        self._kept = told.kept
        self.fresh = False
        self.committed = told.kept.generation
        return told, True

    def heard(self, kept: Version | None, iteration: int) -> None:
        """What a node says that comes back: it was told that ``kept`` is committed, and ``iteration`` has ended."""
        if kept is not None and self._ledger.adopt(kept):
            self._kept, self.committed, self.fresh = kept, kept.generation, False
        if iteration > self.iteration:
            self.iteration = self.reached = iteration
            self.fresh = False

    @property
    def kept(self) -> Version | None:
        """The newest version that all have committed in this epoch."""
        return self._kept

    def held_back_by(self) -> str:
        """What the next commit waits for, in words."""
        nodes = sorted(int(str(node)) for node in self._ledger.lacking())
        if not nodes:
            return "no generation that all nodes have begun together"
        some = ", ".join(map(str, nodes[:_MOST_NAMED])) + (" ..." if len(nodes) > _MOST_NAMED else "")
        return f"node {some} has not stored a newer generation here and with its peer"

    @property
    def told(self) -> Told | None:
        """What has been told in this epoch so far, for a node that may not have heard it; None before anything was."""
        told = self._ledger.told
        return told if told.kept is not None or told.floor.generation else None

    def go_on(self, active: Iterable[int], epoch: int, generation: int) -> None:
        """In this epoch the job goes on from a generation that is committed."""
        self.committed = self.reached = generation
        self.fresh = False
        self.count_anew(active, epoch)

    def start_over(self, active: Iterable[int], epoch: int) -> None:
        """The job begins to train anew."""
        self.iteration = self.committed = self.reached = -1
        self.fresh = True
        self.done.clear()
        self.count_anew(active, epoch)

    def count_anew(self, active: Iterable[int], epoch: int) -> None:
        """Nothing is known of what the nodes have committed in this epoch."""
        self._kept = None
        self._ledger = CommitLedger(active, epoch)
