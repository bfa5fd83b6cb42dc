"""Sends own shards to the peers' vaults while the workers still write them, and says when they are there.

    worker          | writes slices, publishes, rings
    "sums" thread   | checksums what is new in every own arena (own vault complete)
    one sender      | for each own rank: begin, small state, chunks as they are summed, complete; the peer
      thread a rank | verifies and answers (peer vault complete) -> on_commit

A peer that is slow, gone or refuses costs the worker nothing: the sender backs off and tries again, from the start of
the version. A slot that the worker opens again meanwhile is abandoned.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from .arena import Arena, Slot
from .errors import Refused, VaultError
from .vault import Vault
from .version import EMPTY, unpack
from .wire import Begin, Begun, Bytes, Channel, Complete, Deadlines, Stored, check_secret, connect, raise_refusal

__all__ = ["Replicator"]

_log = logging.getLogger(__name__)
_BATCH = 16  # chunks in one frame
_SUM_CHUNKS = 64  # chunks summed for one rank before the next rank has its turn


class Replicator:
    """The agent's sender of own shards.

    Args:
        vault: the vault with the own arenas.
        secret: the job's 32 bytes.
        on_commit: called with (rank, epoch, generation) when a version of the current epoch is complete here and at
            the peer; from a sender thread, must not block.
    """

    def __init__(
        self,
        vault: Vault,
        secret: bytes,
        on_commit: Callable[[int, int, int], None],
        deadlines: Deadlines | None = None,
    ) -> None:
        self._vault = vault
        self._secret = check_secret(secret)
        self._on_commit = on_commit
        self._deadlines = deadlines or Deadlines()
        self._changed = threading.Condition()
        self._rung: set[int] = set()
        self._senders: dict[int, _Sender] = {}
        self._stopping = False
        self._sums = threading.Thread(target=self._sum, name="vault-sums", daemon=True)
        self._sums.start()

    def set_peers(self, epoch: int, peers: Mapping[int, tuple[str, int] | None]) -> None:
        """Who keeps the shards of the own ranks, from now on, by rank; None (or no entry) for nobody.

        Everything under way is cut off, and what is worth it is offered to the (new) peers again. Returns at once.
        """
        with self._changed:
            for sender in self._senders.values():
                sender.aim(epoch, peers.get(sender.rank))
            for rank, peer in peers.items():
                if rank not in self._senders and not self._stopping:
                    sender = _Sender(rank, self._vault, self._secret, self._on_commit, self._deadlines)
                    sender.aim(epoch, peer)
                    sender.thread.start()
                    self._senders[rank] = sender
            self._rung.update(peers)
            self._changed.notify_all()

    def notify(self, rank: int) -> None:
        """The worker of ``rank`` has rung. Returns at once."""
        with self._changed:
            self._rung.add(rank)
            self._changed.notify_all()

    def failures(self) -> dict[int, str]:
        """Why the last attempt to send failed, by rank; ranks whose last attempt went well have no entry."""
        with self._changed:
            return {rank: sender.failure for rank, sender in self._senders.items() if sender.failure}

    def stop(self) -> None:
        """Cut everything off and wait for the threads (well under a second)."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            senders = list(self._senders.values())
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
                senders = dict(self._senders)
            for rank in ranks:
                if self._vault.checksum(rank, _SUM_CHUNKS):
                    with self._changed:
                        self._rung.add(rank)  # perhaps there is more
                if rank in senders:
                    senders[rank].wake()


class _Aborted(Exception):
    """The version that is being sent is not wanted any more."""


class _Sender:
    """Sends one rank's shards to its peer; a thread of its own."""

    def __init__(
        self,
        rank: int,
        vault: Vault,
        secret: bytes,
        on_commit: Callable[[int, int, int], None],
        deadlines: Deadlines,
    ) -> None:
        self.rank = rank
        self.failure = ""
        self._vault = vault
        self._secret = secret
        self._on_commit = on_commit
        self._deadlines = deadlines
        self._changed = threading.Condition()
        self._pulse = 0  # counts wake-ups
        self._aim = 0  # counts set_peers
        self._epoch = 0
        self._peer: tuple[str, int] | None = None
        self._channel: Channel | None = None
        self._stopping = False
        self.thread = threading.Thread(target=self._run, name=f"vault-send-{rank}", daemon=True)

    # ---- from other threads

    def aim(self, epoch: int, peer: tuple[str, int] | None) -> None:
        with self._changed:
            self._epoch, self._peer = epoch, peer
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
                    self._forget()
                peer, epoch = self._peer, self._epoch
            arena = self._vault.arena(self.rank, "own")
            slot = _next(arena) if arena is not None and peer is not None else None
            if arena is None or slot is None or peer is None:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._aim != aim or self._pulse != pulse)  # noqa: B023
                continue
            try:
                self._send(arena, slot, peer, epoch, aim)
                self.failure, pause = "", self._deadlines.backoff
            except _Aborted:
                self._disconnect()
            except VaultError as err:
                self._disconnect()
                if self._aim != aim or self._stopping:
                    continue
                if str(err) != self.failure:
                    _log.warning("rank %d: shard not at its peer %s:%d: %s", self.rank, *peer, err)
                self.failure = str(err)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._aim != aim, timeout=pause)  # noqa: B023
                pause = min(2 * pause, self._deadlines.backoff_limit)
        self._disconnect()

    def _forget(self) -> None:
        """A new peer may hold nothing: offer everything again. It says so when it holds a version already."""
        self._disconnect()
        arena = self._vault.arena(self.rank, "own")
        if arena is not None:
            for slot in arena.slots:
                slot.peer_turn = 0

    def _disconnect(self) -> None:
        with self._changed:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _connected(self, peer: tuple[str, int], aim: int) -> Channel:
        if self._channel is None:
            channel = connect(*peer, self._secret, self._deadlines, lambda: self._stopping or self._aim != aim)
            with self._changed:
                self._channel = channel
                if self._stopping or self._aim != aim:
                    channel.shut()
        return self._channel

    def _send(self, arena: Arena, slot: Slot, peer: tuple[str, int], epoch: int, aim: int) -> None:
        turn, word = slot.turn, slot.begin
        version, small_bytes = unpack(word), slot.small_bytes
        if version is None or small_bytes == EMPTY or slot.turn != turn:
            return  # just being opened; the ring that follows brings us back
        channel = self._connected(peer, aim)
        info, vault = arena.info, self._vault
        channel.send(
            Begin(
                epoch, self.rank, *version, info.unique_bytes, info.small_capacity, small_bytes, arena.chunk_bytes,
                vault.kept, vault.floor,
            )
        )  # fmt: skip
        answer = channel.receive()
        raise_refusal(answer)
        if not isinstance(answer, Begun):
            raise Refused(f"unexpected {type(answer).__name__} frame", "protocol")
        if not answer.held:
            self._stream(channel, slot, turn, epoch, aim)
        if slot.turn != turn:
            return
        self._await(slot, turn, aim, lambda: slot.own_turn == turn)
        slot.peer_turn = turn
        if slot.turn == turn and version.epoch == epoch:
            self._on_commit(self.rank, *version)

    def _stream(self, channel: Channel, slot: Slot, turn: int, epoch: int, aim: int) -> None:
        sent, table = 0, 1 + slot.chunks
        while sent < table:
            ready = slot.checked if slot.checked_turn == turn else 0
            if ready <= sent:
                self._await(slot, turn, aim, lambda: slot.checked_turn == turn and slot.checked > sent)  # noqa: B023
                continue
            # the small state goes alone: its payload is not next to the chunks'
            last = 1 if sent == 0 else min(ready, sent + _BATCH)
            sums = [int(value) for value in slot.sums[sent:last]]
            if sent == 0:
                payload = slot.small[: slot.small_bytes]
            else:
                payload = slot.unique[(sent - 1) * slot.chunk_bytes : (last - 1) * slot.chunk_bytes]
            if slot.turn != turn:
                raise _Aborted
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


def _next(arena: Arena) -> Slot | None:
    """The slot to send next, or None.

    The kept version first (a new peer lacks it), then in the order they were written, so that commits are reported in
    order; one that is still being written last (an unfinished one beside a newer one was given up by the worker).
    """
    wanted = []
    for slot in arena.slots:
        word = slot.begin
        if word == EMPTY or slot.peer_turn == slot.turn or slot.small_bytes == EMPTY:
            continue
        if word == arena.kept and slot.sealed:
            return slot
        if word >= arena.floor:
            sealed = slot.sealed
            wanted.append((not sealed, word if sealed else -word, slot.index))
    return arena.slots[min(wanted)[2]] if wanted else None
