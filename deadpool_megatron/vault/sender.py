"""Sends one rank's shards to one vault that keeps them, at its node's pace (`replicator` has the whole picture)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from deadpool_megatron import points

from .arena import Arena, Slot
from .direct import Direct
from .errors import ChecksumMismatch, DirectFailed, Refused, as_vault_error
from .frames import NO_DIRECT, Begin, Begun, Bytes, Complete, Sent, Share, Stored, Taken
from .stripes import cut
from .vault import Vault
from .version import EMPTY, Version, unpack
from .wire import Channel, Deadlines, connect, raise_refusal

_log = logging.getLogger(__name__)
_PATIENCE = 1.0  # seconds of back-off before a refusal that may be early is worth a warning
_BATCH = 16  # chunks in one frame
_BATCH_READ = 64  # the same where they are read: each costs a round trip
_STEP_S: Final = 0.002  # how often a sender looks whether the links are quiet again
_BUSY_S: Final = 0.25  # links that are busy for longer are not waited for: the worker may be dead


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


class _Aborted(Exception):
    """The version that is being sent is not wanted any more."""


class SendPace:
    """How fast shards leave the node: as the user allows, and not beside training's own traffic. Accounts for it too.

    Shared by all senders of a node; every method from any thread.

    Args:
        limit: bytes a second that all senders together may reach; 0 for no limit.
        clock, sleep: for tests.
    """

    def __init__(
        self,
        limit: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limit = limit
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the limit allows the next byte
        self._sent: dict[int, tuple[int, float]] = {}

    @contextmanager
    def sending(self, arena: Arena, nbytes: int) -> Iterator[None]:
        """Around the sending of ``nbytes`` of the arena's shard. Waits first, a quarter of a second for busy links."""
        until = self._clock() + _BUSY_S
        while arena.links_busy and self._clock() < until:
            self._sleep(_STEP_S)
        if self._limit:
            with self._lock:
                start = max(self._free_at, self._clock())
                self._free_at = start + nbytes / self._limit
            self._sleep(max(0.0, start - self._clock()))
        begin = self._clock()
        yield
        with self._lock:
            so_far, seconds = self._sent.get(arena.info.rank, (0, 0.0))
            self._sent[arena.info.rank] = (so_far + nbytes, seconds + self._clock() - begin)

    def sent(self, rank: int) -> tuple[int, float]:
        """Bytes of a rank's shards sent since the start, to all who keep them, and the seconds that took."""
        with self._lock:
            return self._sent.get(rank, (0, 0.0))


class Sender:
    """Sends one rank's shards to one target; a thread of its own."""

    def __init__(
        self,
        rank: int,
        vault: Vault,
        secret: bytes,
        on_stored: Callable[[int, Slot, int, Version], None],
        deadlines: Deadlines,
        pace: SendPace,
        direct: Direct | None = None,
    ) -> None:
        self.rank = rank
        self.failure = ""
        self._vault = vault
        self._secret = secret
        self._on_stored = on_stored
        self._deadlines = deadlines
        self._pace = pace
        self._direct = direct
        self._unreadable = -1  # the aim for which direct reads have failed
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
            slot = next_slot(arena, self._done) if arena is not None and target is not None else None
            if arena is None or slot is None or target is None:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._aim != aim or self._pulse != pulse)  # noqa: B023
                continue
            try:
                self._send(arena, slot, target, epoch, aim)
                self.failure, pause = "", self._deadlines.backoff
            except _Aborted:
                self._disconnect()
            except Exception as error:  # noqa: BLE001 - without this thread nothing would be committed any more
                err = as_vault_error(error)
                self._disconnect()
                if self._aim != aim or self._stopping:
                    continue
                if isinstance(err, ChecksumMismatch) or (isinstance(err, Refused) and err.code == "checksum"):
                    slot.recheck()  # perhaps it has changed here, and not on the way: then others are sent instead
                if isinstance(err, DirectFailed) or (isinstance(err, Refused) and err.code == NO_DIRECT):
                    self._unreadable = aim
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
                target.host, target.port, self._secret, self._deadlines, lambda: self._stopping or self._aim != aim
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
            offer = self._direct is not None and self._unreadable != aim
            window = self._direct.window(arena, slot) if self._direct is not None and offer else None
            channel.send(
                Begin(
                    epoch, self.rank, *version, info.unique_bytes, info.small_capacity, small_bytes, arena.chunk_bytes,
                    vault.kept, vault.floor, window,
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
            self._stream(channel, arena, slot, turn, epoch, aim, entries, answer)
        if slot.turn != turn:
            return
        self._await(slot, turn, aim, lambda: slot.own_turn == turn)
        with self._changed:
            if self._aim != aim:
                return
            self._done[slot] = turn
        self._on_stored(self.rank, slot, turn, version)

    def _stream(
        self, channel: Channel, arena: Arena, slot: Slot, turn: int, epoch: int, aim: int, entries: range, begun: Begun
    ) -> None:
        """Send ``entries`` (the first stands for the small state, others are chunks + 1) from ``begun.done`` on."""
        shift = entries.start  # what a chunk's entry is less in the part than in the shard
        sent = begun.done
        if sent > len(entries):
            raise Refused(f"the keeper has {sent} of {len(entries)} entries", "protocol")
        batch = _BATCH_READ if begun.direct else _BATCH
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
                last = min(ready, sent + batch, len(entries))
                sums = [int(value) for value in slot.sums[sent + shift : last + shift]]
                payload = slot.unique[(sent + shift - 1) * slot.chunk_bytes : (last + shift - 1) * slot.chunk_bytes]
            if slot.turn != turn:
                raise _Aborted
            points.reach("peer-send.chunk")
            with self._pace.sending(arena, len(payload)):
                if begun.direct:
                    channel.send(Bytes(epoch, sent, sums))
                    self._await_read(channel, slot, turn, epoch, last)
                else:
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

    def _await_read(self, channel: Channel, slot: Slot, turn: int, epoch: int, last: int) -> None:
        """Wait until the peer has read the entries before ``last``."""
        while True:
            answer = self._direct.receive(channel) if self._direct is not None else channel.receive()
            raise_refusal(answer)
            if not isinstance(answer, Taken) or answer.done > last:
                raise Refused(f"unexpected {type(answer).__name__} frame", "protocol")
            if answer.changed:
                if slot.turn != turn:
                    raise _Aborted  # what it read was half of the next generation
                channel.send(Sent(epoch, True))  # so its memory or the link is bad: it refuses
            elif answer.done == last:
                return

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


def next_slot(arena: Arena, done: Mapping[Slot, int]) -> Slot | None:
    """The slot to send next, or None. ``done``: the turn of each slot that the target has.

    The kept version first (a new peer lacks it), then in the order they were written, so that commits are reported in
    order; one that is still being written last (an unfinished one beside a newer one was given up by the worker).
    """
    wanted = []
    for slot in arena.slots:
        word = slot.begin
        if word == EMPTY or done.get(slot) == slot.turn or slot.small_bytes == EMPTY or slot.damaged:
            continue
        if word == arena.kept and slot.sealed:
            return slot
        if word >= arena.floor:
            sealed = slot.sealed
            wanted.append((not sealed, word if sealed else -word, slot.index))
    return arena.slots[min(wanted)[2]] if wanted else None
