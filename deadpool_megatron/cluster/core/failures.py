"""What has failed on a node: its record, which goes with the machine over swaps and from one coordinator to the next.

Pure. Times are seconds since 1970, since a record outlives every process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

DEATHS_S: Final = 24 * 3600.0
"""Ends of workers that lie further apart do not add up against their node: jobs go on for months."""
LEMON_S: Final = 30 * DEATHS_S
"""A machine that failed within this time is taken as a spare only where no other one is there."""
_DEATHS: Final = ("worker", "memory")
_MOST: Final = 32  # failures of one machine that are kept, the newest


class Failure(NamedTuple):
    """One failure of a node.

    ``kind``: ``lost`` (the node itself), ``worker`` (a worker of it has ended), ``memory`` (what it held has changed),
    ``sign`` (its machine has told of a fault, see `cluster.core.signs`), ``check`` (as a spare it has failed one).
    ``epoch``: in which it happened; None where none counts.
    """

    when: float
    kind: str
    cause: str
    epoch: int | None = None


class FailureRecord:
    """The failures of one machine, oldest first."""

    def __init__(self, failures: Iterable[Failure] = ()) -> None:
        self.failures = list(failures)

    def add(self, when: float, kind: str, cause: str, epoch: int | None = None) -> None:
        """One more. Workers that end in one epoch had one cause, and count once."""
        if epoch is not None and any((each.kind, each.epoch) == (kind, epoch) for each in self.failures):
            return
        self.failures = [*self.failures, Failure(when, kind, cause.split("\n")[0], epoch)][-_MOST:]

    def deaths(self, now: float) -> int:
        """How often workers have ended of late, or memory has changed."""
        return sum(each.kind in _DEATHS and now - each.when < DEATHS_S for each in self.failures)

    def recent(self, now: float) -> int:
        """Failures for which the machine is a lemon."""
        return sum(now - each.when < LEMON_S for each in self.failures)

    def forgive(self, since: float) -> None:
        """Workers that have ended since then did so for a fault elsewhere."""
        self.failures = [each for each in self.failures if each.kind != "worker" or each.when < since]

    def inherit(self, others: Iterable[FailureRecord]) -> None:
        """The machine had other numbers before."""
        known = dict.fromkeys([*(each for other in others for each in other.failures), *self.failures])
        self.failures = sorted(known, key=lambda each: each.when)[-_MOST:]

    def dump(self) -> list[Any]:
        """As JSON types."""
        return [list(each) for each in self.failures]

    @classmethod
    def load(cls, kept: Iterable[Any]) -> FailureRecord:
        """The opposite."""
        return cls(Failure(*each) for each in kept)
