"""Taking in what a `VaultServer` has agreed to keep: a whole shard, or one part of a word of parity."""

from __future__ import annotations

from collections.abc import Callable

from deadpool_megatron import points

from .arena import Slot
from .direct import Reader
from .errors import ChecksumMismatch, Malformed, Refused
from .frames import Begin, Bytes, Complete, Sent, Share, Stored, Taken
from .stripes import Filling
from .transfer import read_entries, take_entry, telling
from .vault import Vault
from .wire import Channel


def receive_shard(
    channel: Channel, vault: Vault, slot: Slot, reader: Reader | None, what: str, check_epoch: Callable[[int], None]
) -> None:
    """Fill an opened slot to the end of the version, each chunk verified; read by ``reader`` if there is one.

    ``check_epoch`` raises for a frame of an epoch that is over. Raises Refused, Malformed, ChecksumMismatch,
    TransferFailed, DeadlinePassed; the slot stays incomplete then. LandingLost: its arena must not be used again.
    """
    done, table = 0, 1 + slot.chunks
    while True:
        frame = channel.receive(wait=True)
        check_epoch(frame.epoch)
        if isinstance(frame, Begin):
            raise Refused("the transfer before was not ended", "protocol")
        if isinstance(frame, Complete):
            if done != table:
                raise Refused(f"{what} ended after {done} of {table} parts", "protocol")
            check_epoch(frame.epoch)
            slot.mark_complete()
            slot.seal()
            points.reach("peer-receive.complete")
            channel.send(Stored(vault.epoch))
            return
        if not isinstance(frame, Bytes) or frame.first != done or done + len(frame.sums) > table:
            raise Malformed(f"unexpected {type(frame).__name__} frame in a shard")
        try:
            if reader is not None:
                _read(channel, vault.epoch, slot, reader, frame)
            else:
                for entry, expected in enumerate(frame.sums, frame.first):
                    take_entry(channel, slot, slot.small_bytes, entry, expected)
        except ChecksumMismatch as err:
            raise ChecksumMismatch(f"{what}: {err}") from None
        done += len(frame.sums)
        points.reach("peer-receive.chunk")


def _read(channel: Channel, epoch: int, slot: Slot, reader: Reader, frame: Bytes) -> None:
    entries = range(frame.first, frame.first + len(frame.sums))
    progress = telling(channel, lambda done: Taken(epoch, frame.first + done))
    try:
        read_entries(reader, slot, slot.small_bytes, entries, frame.sums, progress)
    except ChecksumMismatch:
        # the owner may have opened its slot again; then it does not answer but leaves
        channel.send(Taken(epoch, frame.first, changed=True))
        if not isinstance(channel.receive(), Sent):
            raise Malformed("no answer whether the slot that was read is still the same") from None
        raise
    channel.send(Taken(epoch, entries.stop))


def receive_share(
    channel: Channel, vault: Vault, share: Share, filling: Filling, what: str, check_epoch: Callable[[int], None]
) -> None:
    """Add one part to a word's parity as it comes. Raises as `receive_shard`; what is in stays in."""
    scratch = memoryview(bytearray(max(vault.chunk_bytes, share.small_bytes)))
    while True:
        frame = channel.receive(wait=True)
        check_epoch(frame.epoch)
        if isinstance(frame, Complete):
            filling.complete(share.part)
            channel.send(Stored(vault.epoch))
            return
        done, table = filling.done(share.part), filling.entries(share.part)
        if not isinstance(frame, Bytes) or frame.first != done or done + len(frame.sums) > table:
            raise Malformed(f"unexpected {type(frame).__name__} frame in a shard")
        for entry, expected in enumerate(frame.sums, frame.first):
            view = scratch[: filling.entry_bytes(share.part, entry, share.small_bytes)]
            channel.fill(view)
            filling.add(share.part, entry, view, expected)
