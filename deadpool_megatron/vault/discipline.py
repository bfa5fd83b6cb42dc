"""Which slot may be overwritten, and what must be told to everybody so that commits neither get lost nor stop.

Pure: numbers in, numbers out. Used by the worker (its own arena), by the peer's agent (the peer arena), and, as
`CommitLedger`, by the coordinator.

The rule
--------
An arena has two slots. Two words in it are told by the coordinator through the agent:

* ``kept``:  the newest *globally* committed version (every coordinate complete in its own vault and in its peer's);
* ``floor``: nothing below it, except ``kept``, will ever be committed or resumed from.

A slot is free when it is empty, when its last write was never finished, or when its version is below ``floor`` and is
not ``kept``. Otherwise it stays, and if no slot is free this generation is skipped; nobody waits.

Why a finished slot above the floor stays although it is not known to be committed: this coordinate may have been the
last one missing. Then the version *is* globally committed, others have heard so and have given up the one before it,
and only the message to us is late. (A version whose transfer is still under way stays too: overwriting it would, on a
network slower than an iteration, abandon every transfer and never commit again.)

Why ``floor`` is needed besides ``kept``: a commit that is heard by some coordinates just before and by others just
after an iteration boundary makes the former take generation g and the latter skip it and take g+1. All of them then
hold {kept, something else}; without the floor nobody could ever overwrite anything again. The coordinator sees that a
coordinate has committed a later version than another one still waits with (`CommitLedger`), declares both dead by
raising the floor to a generation nobody has begun, and all of them take that one together.

A new epoch raises the floor to (epoch, 0): of all older versions only ``kept`` counts, until the new epoch commits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from .version import EMPTY, MAX_GENERATION, Version


def is_free(begin: int, end: int, kept: int, floor: int) -> bool:
    """May a slot with these begin and end words (packed versions) be overwritten?"""
    return begin == EMPTY or begin != end or (begin != kept and begin < floor)


def choose(slots: Sequence[tuple[int, int]], new: int, kept: int, floor: int) -> int | None:
    """The index of the slot to write version ``new`` (packed) into, or None when this version is to be skipped.

    ``slots`` are (begin, end) words. Versions below the floor are not worth writing (`kept` is, to a new peer), nor is
    one that a slot holds already. Of several free slots the one least likely to be of use goes first: unfinished (so
    that its sender sees that it was given up), empty, then the older one, but another generation before the one that
    is being written again in a new epoch.
    """
    if new < floor and new != kept:
        return None
    best: tuple[int, bool, int] | None = None
    where: int | None = None
    for index, (begin, end) in enumerate(slots):
        if begin == end == new:
            return None
        if not is_free(begin, end, kept, floor):
            continue
        kind = 0 if begin != end else 1 if begin == EMPTY else 2
        order = (kind, kind == 2 and begin & MAX_GENERATION == new & MAX_GENERATION, begin)
        if best is None or order < best:
            best, where = order, index
    return where


class Told(NamedTuple):
    """What every agent must be told: `Vault.set_committed(*kept)` and `Vault.set_floor(*floor)`."""

    kept: Version | None
    floor: Version


class CommitLedger:
    """The coordinator's account of one epoch: who has committed what, what is global, what can never be.

    Members are coordinates, or nodes if a node reports a version once all of its coordinates have committed it.
    A member's commits must be reported in order. Messages to the members must keep their order too.

    Args:
        members: all that must commit.
        epoch: the epoch; a ledger serves one.
        kept: the newest globally committed version of earlier epochs, if any.
        margin: how many generations ahead of the newest one begun the floor is set after a divergence; it should cover
            the time a message to the slowest member takes. One more for each divergence since the last commit.
    """

    def __init__(self, members: Iterable[Hashable], epoch: int, kept: Version | None = None, margin: int = 2) -> None:
        self._local: dict[Hashable, frozenset[Version]] = {member: frozenset() for member in members}
        # How many members hold just these: they are always a few different sets, however many members there are.
        self._alike: Counter[frozenset[Version]] = Counter(self._local.values())
        self._margin = margin
        self._missed = 0  # divergences since the last commit
        self._newest = 0
        self._told = Told(kept, Version(epoch, 0))

    @property
    def told(self) -> Told:
        """What holds now; for a member that joins."""
        return self._told

    def progress(self, generation: int) -> None:
        """Iteration ``generation`` is known to have begun somewhere."""
        self._newest = max(self._newest, generation)

    def committed(self, member: Hashable, version: Version) -> Told | None:
        """``member`` is complete in its own vault and in its peer's; returns what to tell everybody, if anything.

        Reports of another epoch, of unknown members and below the floor are without effect.
        """
        kept, floor = self._told
        if member not in self._local or version.epoch != floor.epoch or version < floor or version == kept:
            return None
        self.progress(version.generation)
        before = self._local[member]
        if version in before:
            return None
        self._local[member] = after = before | {version}
        self._alike[before] -= 1
        self._alike[after] += 1
        if self._alike[before] and self._alike[after] > 1:
            return None  # the same sets as before: nothing follows from them that has not already
        if not self._alike[before]:
            del self._alike[before]
        if all(version in done for done in self._alike):
            self._missed = 0
            return self._tell(Told(version, version))
        lasts = {max(done) for done in self._alike if done}
        newest = max(lasts)
        ahead = [done for done in self._alike if newest in done]
        if any(last < newest and last not in done for last in lasts for done in ahead):
            return self._raise_floor()
        return None

    def lacking(self) -> list[Hashable]:
        """Members that have not committed the newest version that anybody has; all, when nobody has one."""
        newest = max((version for done in self._alike for version in done), default=None)
        return [member for member, done in self._local.items() if newest not in done]

    def apart(self, version: Version) -> Told | None:
        """What belongs to one member has no version in common any more; ``version`` is the newest of one of its parts.

        Returns what to tell everybody, if it has not been told yet.
        """
        floor = self._told.floor
        if version.epoch != floor.epoch or version < floor:
            return None
        self.progress(version.generation)
        return self._raise_floor()

    def _raise_floor(self) -> Told:
        """Nothing that has begun can be committed any more: all meet at one that nobody has."""
        kept, floor = self._told
        ahead, self._missed = self._margin + self._missed, self._missed + 1
        return self._tell(Told(kept, Version(floor.epoch, self._newest + ahead)))

    def raised(self, floor: Version) -> None:
        """Somebody else has told everybody this floor; one of another epoch, or below the present one, says nothing."""
        if floor.epoch == self._told.floor.epoch and floor > self._told.floor:
            self._tell(Told(self._told.kept, floor))

    def adopt(self, kept: Version) -> bool:
        """Somebody else has told members that this version of the epoch is committed; False when it is known here."""
        if kept.epoch != self._told.floor.epoch or (self._told.kept is not None and kept <= self._told.kept):
            return False
        self.progress(kept.generation)
        self._tell(Told(kept, max(kept, self._told.floor)))
        return True

    def _tell(self, told: Told) -> Told:
        floor = told.floor
        # the kept version is behind us, and what is below the floor can no longer be committed
        left = {done: frozenset(v for v in done if v >= floor and v != told.kept) for done in self._alike}
        self._local = {member: left[done] for member, done in self._local.items()}
        self._alike = Counter(self._local.values())
        self._told = told
        return told
