"""What the ranks have told of themselves as they registered: coordinates, bytes of their shards, their groups. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from deadpool_megatron.cluster import records as r
from deadpool_megatron.vault import small_capacity


class Layout:
    """Grows until all ranks are known, then stays as it is until the start begins anew, perhaps with fewer ranks."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self.coordinates: dict[int, r.CoordinateInfo] = {}
        self.stages: dict[int, int] = {}
        """By rank, its pipeline stage."""
        self.can_rescue = True
        """Every rank could save a checkpoint beside others on its device."""
        self._cannot_rescue: set[int] = set()
        self.repeatable = True
        """Generations of one number are the same bits, whichever epoch they were computed in."""
        self.restarts = False
        """A recovery needs other processes, on all nodes."""
        self.replica = 0
        """Ranks of one data-parallel replica, the same at every width; 0: not known yet."""
        self.widths: list[int] = []
        """Numbers of replicas below that of the start that the job can go on with."""
        self.iterations = 0
        """That the job trains in all; 0: not known."""
        self._registered: dict[int, r.Registered] = {}
        self._digests: Counter[str] = Counter()
        self._sizes: tuple[list[int], list[int]] = ([], [])
        self._close: dict[int, frozenset[int]] = {}

    def register(self, record: r.Registered) -> None:
        """A rank is about to train, for the first time or after it has taken over a coordinate."""
        rank = record.coordinate.rank
        self._close = {}
        self.coordinates[rank] = record.coordinate
        self.stages[rank] = record.coordinate.pp
        before = self._registered.get(rank)
        self._registered[rank] = record
        (self._cannot_rescue.discard if record.can_rescue else self._cannot_rescue.add)(rank)
        self.can_rescue = not self._cannot_rescue
        self.repeatable = self.repeatable and record.repeatable
        self.restarts = self.restarts or record.restarts
        self._digests[record.table_digest] += 1
        if before is not None:
            self._digests[before.table_digest] -= 1
            self._digests = +self._digests
        self.widths = self.widths or list(record.widths)
        self.iterations = record.iterations or self.iterations
        if not self.replica and self.complete:
            self.replica = self._world_size // (1 + max(each.dp for each in self.coordinates.values()))

    def forget(self, world_size: int) -> None:
        """The start begins anew, with so many ranks: all register again."""
        self._world_size = world_size
        for known in (self.coordinates, self.stages, self._registered, self._digests, self._cannot_rescue):
            known.clear()
        self.can_rescue = self.repeatable = True
        self.restarts = False
        self._sizes, self._close = ([], []), {}

    def close_to(self, rank: int) -> frozenset[int]:
        """The ranks of its tensor- and expert-parallel groups, which exchange the most; looked up when needed."""
        if not self._close:
            groups: dict[tuple[object, ...], set[int]] = {}
            of: dict[int, list[set[int]]] = {}
            seen: Counter[tuple[int, int]] = Counter()
            for each, c in sorted(self.coordinates.items()):
                # Megatron numbers expert ranks alike in every group, so the n-th of each number are together.
                keys = ("tp", c.pp, c.dp, c.cp), ("ep", c.pp, seen[c.pp, c.ep])
                seen[c.pp, c.ep] += 1
                of[each] = [groups.setdefault(key, set()) for key in keys]
                for group in of[each]:
                    group.add(each)
            self._close = {each: frozenset(mine[0] | mine[1]) for each, mine in of.items()}
        return self._close.get(rank, frozenset())

    @property
    def differs(self) -> bool:
        """Not all have made the same process groups."""
        return len(self._digests) > 1

    @property
    def complete(self) -> bool:
        """All ranks have registered with this coordinator."""
        return len(self._registered) == self._world_size

    def registered(self) -> Iterable[r.Registered]:
        """The newest record of each rank."""
        return self._registered.values()

    @property
    def width(self) -> int:
        """Data-parallel replicas; 0: not known yet."""
        return self._world_size // self.replica if self.replica else 0

    @property
    def known(self) -> bool:
        """The sizes of all shards are known."""
        return bool(self._sizes[0])

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """By rank, bytes of unique state and room for small state."""
        if not self._sizes[0]:
            known = [self._registered[rank] for rank in range(self._world_size)]
            self._sizes = ([x.unique_bytes for x in known], [small_capacity(x.small_bytes) for x in known])
        return self._sizes

    @property
    def largest(self) -> int:
        """Bytes of the largest shard."""
        return max(unique + room for unique, room in zip(*self.sizes, strict=True))

    def dump(self) -> dict[str, Any]:
        """For a coordinator that starts again, as JSON types. Large."""
        return {
            "coordinates": [[c.tp, c.pp, c.dp, c.cp, c.ep, c.rank] for c in self.coordinates.values()],
            "sizes": self._sizes,
            "repeatable": self.repeatable,
            "restarts": self.restarts,
            "replica": self.replica,
            "widths": self.widths,
            "iterations": self.iterations,
        }

    def load(self, kept: dict[str, Any] | None, can_rescue: bool, world_size: int) -> None:
        """The opposite; None when no layout was known yet."""
        self._world_size = world_size
        for tp, pp, dp, cp, ep, rank in kept["coordinates"] if kept else ():
            self.coordinates[rank] = r.CoordinateInfo(rank, tp, pp, dp, cp, ep)
            self.stages[rank] = pp
        self._sizes = kept["sizes"] if kept else ([], [])
        self.repeatable = kept["repeatable"] if kept else True
        self.restarts = kept["restarts"] if kept else False
        self.replica, self.widths = (kept["replica"], list(kept["widths"])) if kept else (0, [])
        self.iterations = kept.get("iterations", 0) if kept else 0
        self.can_rescue = can_rescue
