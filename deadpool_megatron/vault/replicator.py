"""Sends own shards to the peers' vaults while the workers still write them, and says when they are there.

    worker          | writes slices, publishes, rings
    "sums" thread   | checksums what is new in every own arena (own vault complete)
    one sender      | for each own rank and target: begin, small state, chunks as they are summed, complete; the
      thread each   | peer verifies and answers. When all targets of a rank have answered -> on_safe

A peer that is slow, gone or refuses costs the worker nothing: the sender backs off and tries again, from the start of
the version. A slot that the worker opens again meanwhile is abandoned.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deadpool_megatron import points

from .arena import Arena, Slot
from .errors import Refused, VaultError
from .pace import SendPace
from .stripes import cut
from .vault import Vault
from .version import EMPTY, Version, unpack
from .wire import Begin, Begun, Bytes, Channel, Complete, Deadlines, Share, Stored, check_secret, connect, raise_refusal

__all__ = ["PartTo", "Replicator", "Target"]

_log = logging.getLogger(__name__)
_PATIENCE = 1.0  # seconds of back-off before a refusal that may be early is worth a warning
_BATCH = 16  # chunks in one frame
_SUM_CHUNKS = 64  # chunks summed for one rank before the next rank has its turn


@dataclass(frozen=True, slots=True)
class PartTo:
    """One part of a shard, for one row of parity: part ``part`` of ``parts``, to word ``word``."""

    word: int
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class Target:
    """A vault that keeps a copy of a shard, or the parity of a part of it."""

    host: str
    port: int
    part: PartTo | None = None


class Replicator:
    """The agent's sender of own shards.

    Args:
        vault: the vault with the own arenas.
        secret: the job's 32 bytes.
        on_safe: called with (rank, epoch, generation) when a version is complete here and at every target; from a
            sender thread, must not block.
    """

    def __init__(
        self,
        vault: Vault,
        secret: bytes,
        on_safe: Callable[[int, int, int], None],
        deadlines: Deadlines | None = None,
        pace: SendPace | None = None,
    ) -> None:
        self._vault = vault
        self._secret = check_secret(secret)
        self._on_safe = on_safe
        self._deadlines = deadlines or Deadlines()
        self.pace = pace or SendPace()
        self._changed = threading.Condition()
        self._rung: set[int] = set()
        self._senders: dict[int, list[_Sender]] = {}
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
                    senders.append(_Sender(rank, self._vault, self._secret, self._safe, self._deadlines, self.pace))
                    senders[-1].thread.start()
                for index, sender in enumerate(senders):
                    sender.aim(epoch, wanted[index] if index < len(wanted) else None)
                arena = self._vault.arena(rank, "own")
                for slot in arena.slots if arena is not None else ():
                    slot.peer_turn = 0
            self._rung.update(targets)
            self._changed.notify_all()

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

    def failures(self) -> dict[int, str]:
        """Why the last attempt to send failed, by rank; ranks whose last attempt went well have no entry."""
        with self._changed:
            return {s.rank: s.failure for senders in self._senders.values() for s in senders if s.failure}

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


class _Aborted(Exception):
    """The version that is being sent is not wanted any more."""


class _Sender:
    """Sends one rank's shards to one target; a thread of its own."""

    def __init__(
        self,
        rank: int,
        vault: Vault,
        secret: bytes,
        on_stored: Callable[[int, Slot, int, Version], None],
        deadlines: Deadlines,
        pace: SendPace,
    ) -> None:
        self.rank = rank
        self.failure = ""
        self._vault = vault
        self._secret = secret
        self._on_stored = on_stored
        self._deadlines = deadlines
        self._pace = pace
        self._changed = threading.Condition()
        self._done: dict[Slot, int] = {}  # the turn of each slot that the target has
        self._pulse = 0  # counts wake-ups
        self._aim = 0  # counts set_targets
        self._epoch = 0
        self._target: Target | None = None
        self._channel: Channel | None = None
        self._stopping = False
        self.thread = threading.Thread(target=self._run, name=f"vault-send-{rank}", daemon=True)

    # ---- from other threads

    @property
    def aimed(self) -> bool:
        return self._target is not None

    def done(self, slot: Slot) -> int:
        """The turn of ``slot`` that the target has."""
        return self._done.get(slot, 0)

    def aim(self, epoch: int, target: Target | None) -> None:
        with self._changed:
            self._epoch, self._target = epoch, target
            self._done = {}  # a new target may hold nothing: offer everything again; it says what it has
            self._aim += 1
            if self._channel is not None:
                self._channel.shut()
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._pulse += 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            if self._channel is not None:
                self._channel.shut()
            self._changed.notify_all()

    # ---- the sender's own thread

    def _run(self) -> None:
        aim, pause = -1, self._deadlines.backoff
        while not self._stopping:
            with self._changed:
                pulse = self._pulse
                if aim != self._aim:
                    aim, pause = self._aim, self._deadlines.backoff
                    self._disconnect()
                target, epoch = self._target, self._epoch
            arena = self._vault.arena(self.rank, "own")
            slot = _next(arena, self._done) if arena is not None and target is not None else None
            if arena is None or slot is None or target is None:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._aim != aim or self._pulse != pulse)  # noqa: B023
                continue
            try:
                self._send(arena, slot, target, epoch, aim)
                self.failure, pause = "", self._deadlines.backoff
            except _Aborted:
                self._disconnect()
            except VaultError as err:
                self._disconnect()
                if self._aim != aim or self._stopping:
                    continue
                # a keeper that has not heard of the epoch yet does not know its part; it will in a moment
                early = isinstance(err, Refused) and err.code == "not-planned" and pause < _PATIENCE
                if str(err) != self.failure and not early:
                    _log.warning("rank %d: shard not at its peer %s:%d: %s", self.rank, target.host, target.port, err)
                self.failure = "" if early else str(err)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._aim != aim, timeout=pause)  # noqa: B023
                pause = min(2 * pause, self._deadlines.backoff_limit)
        self._disconnect()

    def _disconnect(self) -> None:
        with self._changed:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _connected(self, target: Target, aim: int) -> Channel:
        if self._channel is None:
            channel = connect(
                target.host,
                target.port,
                self._secret,
                self._deadlines,
                lambda: self._stopping or self._aim != aim,
            )
            with self._changed:
                self._channel = channel
                if self._stopping or self._aim != aim:
                    channel.shut()
        return self._channel

    def _send(self, arena: Arena, slot: Slot, target: Target, epoch: int, aim: int) -> None:
        turn, word = slot.turn, slot.begin
        version, small_bytes = unpack(word), slot.small_bytes
        if version is None or small_bytes == EMPTY or slot.turn != turn:
            return  # just being opened; the ring that follows brings us back
        points.reach("peer-send.before")
        channel = self._connected(target, aim)
        info, vault = arena.info, self._vault
        part = target.part
        if part is None:
            entries = range(1 + slot.chunks)
            channel.send(
                Begin(
                    epoch, self.rank, *version, info.unique_bytes, info.small_capacity, small_bytes, arena.chunk_bytes,
                    vault.kept, vault.floor,
                )
            )  # fmt: skip
        else:
            those = cut(slot.chunks, part.part, part.parts)
            entries = range(those.start, 1 + those.stop)  # its first one stands for the small state
            channel.send(
                Share(
                    epoch, part.word, part.part, self.rank, *version, info.unique_bytes, small_bytes,
                    arena.chunk_bytes, vault.kept, vault.floor,
                )
            )  # fmt: skip
        answer = channel.receive()
        raise_refusal(answer)
        if not isinstance(answer, Begun):
            raise Refused(f"unexpected {type(answer).__name__} frame", "protocol")
        if not answer.held:
            self._stream(channel, arena, slot, turn, epoch, aim, entries, answer.done)
        if slot.turn != turn:
            return
        self._await(slot, turn, aim, lambda: slot.own_turn == turn)
        with self._changed:
            if self._aim != aim:
                return
            self._done[slot] = turn
        self._on_stored(self.rank, slot, turn, version)

    def _stream(
        self, channel: Channel, arena: Arena, slot: Slot, turn: int, epoch: int, aim: int, entries: range, done: int
    ) -> None:
        """Send ``entries`` (the first stands for the small state, the others are chunks + 1) but the first ``done``."""
        shift = entries.start  # what a chunk's entry is less in the part than in the shard
        sent = done
        if done > len(entries):
            raise Refused(f"the keeper has {done} of {len(entries)} entries", "protocol")
        while sent < len(entries):
            ready = (slot.checked if slot.checked_turn == turn else 0) - (shift if sent else 0)
            if ready <= sent:
                self._await(
                    slot,
                    turn,
                    aim,
                    lambda: slot.checked_turn == turn and slot.checked > (sent + shift if sent else 0),  # noqa: B023
                )
                continue
            # the small state goes alone: its payload is not next to the chunks'
            if sent == 0:
                last, sums, payload = 1, [int(slot.sums[0])], slot.small[: slot.small_bytes]
            else:
                last = min(ready, sent + _BATCH, len(entries))
                sums = [int(value) for value in slot.sums[sent + shift : last + shift]]
                payload = slot.unique[(sent + shift - 1) * slot.chunk_bytes : (last + shift - 1) * slot.chunk_bytes]
            if slot.turn != turn:
                raise _Aborted
            points.reach("peer-send.chunk")
            with self._pace.sending(arena, len(payload)):
                channel.send(Bytes(epoch, sent, sums), payload)
            sent = last
        self._await(slot, turn, aim, lambda: slot.own_turn == turn)
        if slot.turn != turn:  # read after the last of the data: what was sent is of this turn
            raise _Aborted
        channel.send(Complete(epoch))
        answer = channel.receive()
        raise_refusal(answer)
        if not isinstance(answer, Stored):
            raise Refused(f"unexpected {type(answer).__name__} frame", "protocol")

    def _await(self, slot: Slot, turn: int, aim: int, ready: Callable[[], bool]) -> None:
        """Wait for the worker and the sums thread. Raises _Aborted when the slot or the aim changed."""
        with self._changed:
            while not ready():
                if self._stopping or self._aim != aim or slot.turn != turn:
                    raise _Aborted
                pulse = self._pulse
                self._changed.wait_for(
                    lambda: self._pulse != pulse or self._stopping or self._aim != aim  # noqa: B023
                )


def _next(arena: Arena, done: Mapping[Slot, int]) -> Slot | None:
    """The slot to send next, or None. ``done``: the turn of each slot that the target has.

    The kept version first (a new peer lacks it), then in the order they were written, so that commits are reported in
    order; one that is still being written last (an unfinished one beside a newer one was given up by the worker).
    """
    wanted = []
    for slot in arena.slots:
        word = slot.begin
        if word == EMPTY or done.get(slot) == slot.turn or slot.small_bytes == EMPTY:
            continue
        if word == arena.kept and slot.sealed:
            return slot
        if word >= arena.floor:
            sealed = slot.sealed
            wanted.append((not sealed, word if sealed else -word, slot.index))
    return arena.slots[min(wanted)[2]] if wanted else None
