"""Sends own shards to the peers' vaults while the workers still write them, and says when they are there.

    worker          | writes slices, publishes, rings
    "sums" thread   | checksums what is new in every own arena (own vault complete)
    one sender      | for each own rank and target: begin, small state, chunks as they are summed, complete; the
      thread each   | peer verifies and answers. When all targets of a rank have answered -> on_safe

A peer that is slow, gone or refuses costs the worker nothing: the sender backs off and tries again, from the start of
the version. A slot that the worker opens again meanwhile is abandoned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence

from deadpool_megatron import points

from .arena import Slot
from .direct import Direct
from .sender import Sender, SendPace, Target
from .vault import Vault
from .version import Version
from .wire import Deadlines, check_secret

_SUM_CHUNKS = 64  # chunks summed for one rank before the next rank has its turn


class Replicator:
    """The agent's sender of own shards.

    Args:
        vault: the vault with the own arenas.
        secret: the job's 32 bytes.
        on_safe: called with (rank, epoch, generation) when a version is complete here and at every target; from a
            sender thread, must not block.
        direct: to let peers read what they keep, where they can.
    """

    def __init__(
        self,
        vault: Vault,
        secret: bytes,
        on_safe: Callable[[int, int, int], None],
        deadlines: Deadlines | None = None,
        pace: SendPace | None = None,
        direct: Direct | None = None,
    ) -> None:
        self._vault = vault
        self._secret = check_secret(secret)
        self._on_safe = on_safe
        self._deadlines = deadlines or Deadlines()
        self.pace = pace or SendPace()
        self._direct = direct
        self._changed = threading.Condition()
        self._rung: set[int] = set()
        self._senders: dict[int, list[Sender]] = {}
        self._stopping = False
        self._sums = threading.Thread(target=self._sum, name="vault-sums", daemon=True)
        self._sums.start()

    def set_targets(self, epoch: int, targets: Mapping[int, Sequence[Target]]) -> None:
        """Who keeps the shards of the own ranks, from now on, by rank; no target (or no entry) for nobody.

        Everything under way is cut off, and what is worth it is offered to the (new) targets again. Returns at once.
        """
        with self._changed:
            if self._stopping:
                return
            for rank in {*self._senders, *targets}:
                wanted = targets.get(rank, ())
                senders = self._senders.setdefault(rank, [])
                while len(senders) < len(wanted):
                    senders.append(
                        Sender(rank, self._vault, self._secret, self._safe, self._deadlines, self.pace, self._direct)
                    )
                    senders[-1].thread.start()
                for index, sender in enumerate(senders):
                    sender.aim(epoch, wanted[index] if index < len(wanted) else None)
                arena = self._vault.arena(rank, "own")
                for slot in arena.slots if arena is not None else ():
                    slot.peer_turn = 0
            self._rung.update(targets)
            self._changed.notify_all()

    def keep_only(self, ranks: Collection[int]) -> None:
        """All others are here no more: end their threads. Returns at once."""
        with self._changed:
            gone = [sender for rank in {*self._senders} - {*ranks} for sender in self._senders.pop(rank)]
        for sender in gone:
            sender.stop()

    def _safe(self, rank: int, slot: Slot, turn: int, version: Version) -> None:
        """A target of ``rank`` has ``version``, opened as ``turn``: if it was the last one, the version is safe."""
        with self._changed:
            aimed = [sender for sender in self._senders.get(rank, ()) if sender.aimed]
            if not aimed or slot.turn != turn or slot.peer_turn == turn:
                return
            if any(sender.done(slot) != turn for sender in aimed):
                return
            slot.peer_turn = turn
            self._on_safe(rank, *version)  # with the lock held: versions are told in the order they became safe

    def notify(self, rank: int) -> None:
        """The worker of ``rank`` has rung. Returns at once."""
        with self._changed:
            self._rung.add(rank)
            self._changed.notify_all()

    def stop(self) -> None:
        """Cut everything off and wait for the threads (well under a second)."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            senders = [sender for each in self._senders.values() for sender in each]
        for sender in senders:
            sender.stop()
        self._sums.join()
        for sender in senders:
            sender.thread.join()

    def _sum(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rung or self._stopping)
                if self._stopping:
                    return
                ranks, self._rung = self._rung, set()
                senders = {rank: list(each) for rank, each in self._senders.items()}
            for rank in ranks:
                points.reach("checksum.chunk")
                if self._vault.checksum(rank, _SUM_CHUNKS):
                    with self._changed:
                        self._rung.add(rank)  # perhaps there is more
                for sender in senders.get(rank, ()):
                    sender.wake()
