"""What a vault agrees to keep for a peer: the server's decisions, without its sockets and threads."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from .arena import Arena, Slot
from .discipline import choose, is_free
from .errors import Refused, StaleEpoch
from .frames import Begin, Share
from .stripes import Filling, Stripes
from .vault import Vault
from .version import Version


class Keeper:
    """Of one vault.

    Attributes:
        plan: by rank that is kept here, the bytes of its unique state (None: any); None while nothing is planned yet.
        refused_epochs: how often something of an older epoch was refused that cannot have been on its way any more.
    """

    def __init__(self, vault: Vault, stripes: Stripes | None = None, late_s: float = 0.0) -> None:
        """``late_s``: what was right when it was sent comes within so many seconds after a new epoch has begun."""
        self._vault = vault
        self._stripes = stripes
        self._late_s = late_s
        self._clock = time.monotonic
        self._entered = -math.inf
        self.plan: Mapping[int, int | None] | None = None
        self.refused_epochs = 0

    def entered(self) -> None:
        """A new epoch has begun here."""
        self._entered = self._clock()

    def right_elsewhere(self, epoch: int) -> bool:
        """What is of ``epoch`` may be right where it comes from: nodes hear of a new epoch one after the other."""
        return epoch > self._vault.epoch or self._clock() < self._entered + self._late_s

    def check_epoch(self, epoch: int, what: str) -> None:
        """Raises StaleEpoch when ``epoch`` is over."""
        if epoch < self._vault.epoch:
            self.refused_epochs += not self.right_elsewhere(epoch)
            raise StaleEpoch(
                f"{what} of epoch {epoch} refused: the vault of node {self._vault.node} is in epoch {self._vault.epoch}"
            )

    def check(self, begin: Begin) -> None:
        """Whether a shard that is offered belongs here at all; learns what its owner knows. Raises Refused."""
        vault = self._vault
        self.check_epoch(begin.epoch, f"shard of rank {begin.rank}")
        if begin.chunk_bytes != vault.chunk_bytes:
            raise Refused(f"chunks of {begin.chunk_bytes} bytes, but this vault has {vault.chunk_bytes}", "wrong-size")
        if self.plan is not None and self.plan.get(begin.rank, -1) not in (None, begin.unique_bytes):
            raise Refused(f"rank {begin.rank}'s {begin.unique_bytes} bytes are not planned here", "not-planned")
        vault.learn(begin.kept, begin.floor)

    def open(self, begin: Begin) -> Slot | None:
        """The slot, opened, that the shard goes into; None when it is here already. Raises Refused, VaultFull."""
        version = Version(begin.version_epoch, begin.generation)
        arena = self._memory(begin)
        if arena.find(version) is not None:
            return None
        with self._vault.opening(arena) as ours:
            pairs = [slot.pair for slot in arena.slots]
            index = choose(pairs, version.pack(), arena.kept, arena.floor) if ours else None
            if index is None or begin.small_bytes > len(arena.slots[index].small):
                raise Refused(f"no slot for {tuple(version)} of rank {begin.rank} may be overwritten here", "no-slot")
            slot = arena.slots[index]
            slot.reopen(version.pack())
            slot.small_bytes = begin.small_bytes
            return slot

    def check_share(self, share: Share) -> Stripes:
        """Whether a part of a shard that is offered belongs into parity here; learns what its owner knows.

        Raises Refused.
        """
        what = f"part {share.part} of rank {share.rank}"
        self.check_epoch(share.epoch, what)
        if self._stripes is None:
            raise Refused("parity is not kept in this job", "not-planned")
        plan, chunk_bytes = self._stripes.planned(share.word), self._vault.chunk_bytes
        wanted = (share.rank, share.unique_bytes, share.chunk_bytes)
        if share.part >= len(plan.ranks) or wanted != (
            plan.ranks[share.part], plan.unique_bytes[share.part], chunk_bytes,
        ):  # fmt: skip
            raise Refused(f"{what} of {share.unique_bytes} bytes is not what word {share.word:x} has", "not-planned")
        if share.small_bytes > plan.small_capacity[share.part]:
            raise Refused(f"{what}: a small state of {share.small_bytes} bytes is larger than planned", "wrong-size")
        self._vault.learn(share.kept, share.floor)
        return self._stripes

    def open_share(self, share: Share, stripes: Stripes) -> Filling | None:
        """Where the part is added to; None when the version is complete here already. Raises Refused, VaultFull."""
        vault, plan = self._vault, stripes.planned(share.word)
        vault.allocate_parity(share.word, plan.chunks(vault.chunk_bytes) * vault.chunk_bytes,
                              plan.records_bytes(vault.chunk_bytes))  # fmt: skip
        arena = vault.arena(share.word, "parity")
        if arena is None:
            raise Refused(f"the memory of word {share.word:x} was dropped here just now", "no-room")
        return stripes.filling(
            arena, share.word, Version(share.version_epoch, share.generation), vault.kept, vault.floor
        )

    def _memory(self, begin: Begin) -> Arena:
        """The peer arena for the shard. One that has less room than its owner's gives way, unless what it holds must
        stay: then this shard has to fit."""
        vault = self._vault
        arena = vault.arena(begin.rank, "peer")
        if arena is not None:
            other = arena.info.unique_bytes != begin.unique_bytes
            if other or arena.info.small_capacity < begin.small_capacity:
                if all(is_free(*slot.pair, arena.kept, arena.floor) for slot in arena.slots):
                    vault.drop(begin.rank, "peer")
                elif other or arena.info.small_capacity < begin.small_bytes:
                    raise Refused(f"rank {begin.rank} has a shard of another size here that must be kept", "wrong-size")
        vault.allocate_peer(begin.rank, begin.unique_bytes, begin.small_capacity)
        arena = vault.arena(begin.rank, "peer")
        if arena is None:
            raise Refused(f"the memory of rank {begin.rank} was dropped here just now", "no-room")
        return arena
