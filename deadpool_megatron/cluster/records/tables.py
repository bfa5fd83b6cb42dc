"""What all agents hold of the whole job, and how they are told what changed of it. Pure.

Assignment, vault addresses, protection groups and sizes are about as large as the job; what an epoch changes of them is
as large as what was lost. So a `Declare` goes out as the difference (`Changed`) to those who hold the tables of the
version before, which at 4,096 nodes is a few hundred bytes in the place of a megabyte, and in full to the others.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from deadpool_megatron.cluster import records as r


@dataclass(frozen=True, slots=True)
class Tables:
    """One version of them. ``version`` is a number that no other version of the job has; 0: none was told."""

    version: int = 0
    assignment: Sequence[r.SlotAddress] = ()
    vaults: Mapping[int, r.Address] = field(default_factory=dict)
    groups: Sequence[Sequence[int]] = ()
    unique_bytes: Sequence[int] = ()
    small_capacity: Sequence[int] = ()


def apply(changed: r.Changed, tables: Tables) -> r.Declare | None:
    """The whole `Declare`; None when it is a change of other tables than these."""
    if not changed.base or changed.base != tables.version:
        return None
    assignment = list(tables.assignment)
    for rank, slot in changed.moved.items():
        assignment[rank] = slot
    vaults = {node: at for node, at in tables.vaults.items() if node not in changed.gone} | changed.vaults
    groups = [list(group) for group in tables.groups]
    for index, group in changed.groups.items():
        groups[index] = group
    return r.Declare(
        changed.epoch,
        changed.purpose,
        changed.reason,
        changed.lost_nodes,
        changed.replaced,
        assignment,
        vaults,
        groups,
        list(tables.unique_bytes),
        list(tables.small_capacity),
        changed.rendezvous,
        changed.version,
    )


def _difference(record: r.Declare, old: Tables) -> r.Changed | None:
    """None when they are not about the same things."""
    same = len(record.assignment) == len(old.assignment) and len(record.groups) == len(old.groups)
    if not old.version or not same or list(record.unique_bytes) != list(old.unique_bytes):
        return None
    return r.Changed(
        record.epoch,
        record.purpose,
        record.reason,
        record.lost_nodes,
        record.replaced,
        old.version,
        record.version,
        {i: new for i, (new, was) in enumerate(zip(record.assignment, old.assignment, strict=True)) if new != was},
        {node: at for node, at in record.vaults.items() if old.vaults.get(node) != at},
        [node for node in old.vaults if node not in record.vaults],
        {i: new for i, (new, was) in enumerate(zip(record.groups, old.groups, strict=True)) if new != list(was)},
        record.rendezvous,
    )


class Broadcast:
    """The coordinator's side: what was told last, and who has it."""

    def __init__(self, chance: random.Random | None = None) -> None:
        """``chance``: draws the versions; None: the system's."""
        self._chance = chance or random.SystemRandom()
        self._sent = Tables()
        self._whole = b""  # the last Declare in full, encoded
        self._epoch = -1  # that it declares
        self._has: dict[int, int] = {}

    def joined(self, node: int) -> None:
        """A new connection: what was on its way may be lost."""
        self._has.pop(node, None)

    def packets(self, record: msgspec.Struct, nodes: Sequence[int]) -> list[tuple[int, bytes]]:
        """What goes to whom: a record for these nodes, encoded once or twice."""
        if isinstance(record, r.Roster) and len(nodes) > 1:
            # (a roster for one who joins later leaves out what the job has learnt since: it gets the next one whole)
            record = msgspec.structs.replace(record, version=self._fresh())
            self._sent = Tables(record.version, record.assignment, record.vaults)
            self._has = dict.fromkeys(nodes, record.version)
            if record.epoch == 0:  # everybody knows the first assignment without being told
                record = msgspec.structs.replace(record, assignment=[])
        elif isinstance(record, r.Roster):
            for node in nodes:  # it forgets the tables it had
                self._has.pop(node, None)
        elif isinstance(record, r.Placement):
            old = self._sent
            record = msgspec.structs.replace(record, version=self._fresh())
            sizes = record.unique_bytes, record.small_capacity
            self._sent = Tables(record.version, old.assignment, old.vaults, record.groups, *sizes)
            self._has = {node: record.version for node in nodes if self._has.get(node) == old.version}
        elif isinstance(record, r.Declare):
            return self._declare(record, nodes)
        packet = r.encode(record)
        return [(node, packet) for node in nodes]

    def behind(self, node: int) -> bytes:
        """The last `Declare` in full, for one that does not hold what it was changed from; empty: there was none."""
        if self._whole:
            self._has[node] = self._sent.version
        return self._whole

    def _declare(self, record: r.Declare, nodes: Sequence[int]) -> list[tuple[int, bytes]]:
        if record.epoch == self._epoch:  # told to these once more
            return [(node, self.behind(node)) for node in nodes]
        self._epoch = record.epoch
        old = self._sent
        record = msgspec.structs.replace(record, version=self._fresh())
        changed = _difference(record, old)
        sizes = record.unique_bytes, record.small_capacity
        self._sent = Tables(record.version, record.assignment, record.vaults, record.groups, *sizes)
        self._whole = r.encode(record)
        short = r.encode(changed) if changed is not None else self._whole
        out = [(node, short if self._has.get(node) == old.version else self._whole) for node in nodes]
        self._has = dict.fromkeys(nodes, record.version)
        return out

    def _fresh(self) -> int:
        return self._chance.getrandbits(62) | 1
