"""Bringing a shard into a vault: `fetch`, and what it shares with the server."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import xxhash

from .arena import Arena, Kind, Slot
from .direct import Direct, Reader
from .errors import (
    ChecksumMismatch,
    DirectFailed,
    GivenUp,
    LandingLost,
    Malformed,
    NotHeld,
    Refused,
    StaleEpoch,
    TransferFailed,
    VaultError,
    as_vault_error,
)
from .frames import Echo, Fetch, Found, Sent, Taken
from .intake import Intake
from .stripes import cut
from .vault import Vault
from .version import EMPTY, Version
from .wire import Channel, Deadlines, check_secret, connect, raise_refusal

_log = logging.getLogger(__name__)
_READ = 8 << 20  # bytes of one direct read


def part_entries(chunks: int, part: int, parts: int) -> range:
    """The table entries of one part of a shard; part 0 begins with the small state (entry 0)."""
    those = cut(chunks, part, parts)
    return range(0 if part == 0 else 1 + those.start, 1 + those.stop)


def take_entry(channel: Channel, slot: Slot, small_bytes: int, entry: int, expected: int) -> None:
    """Receive one entry of the table into its place and verify it. Raises ChecksumMismatch."""
    channel.fill(_place(slot, small_bytes, entry))
    _verify(slot, small_bytes, entry, expected)


def _place(slot: Slot, small_bytes: int, entry: int) -> memoryview:
    return slot.small[:small_bytes] if entry == 0 else slot.chunk(entry - 1)


def _verify(slot: Slot, small_bytes: int, entry: int, expected: int) -> None:
    if xxhash.xxh3_64_intdigest(_place(slot, small_bytes, entry)) != expected:
        raise ChecksumMismatch(f"part {entry} of {slot.version} arrived changed")
    slot.sums[entry] = expected


def read_entries(
    reader: Reader, slot: Slot, small_bytes: int, entries: range, sums: Sequence[int], checked: Callable[[int], None]
) -> None:
    """Read entries of the table through a window into their places, and verify them; no step in ``entries``.

    ``checked`` is told how many of them are in, now and then. Raises ChecksumMismatch (also when the owner writes its
    slot anew meanwhile), DirectFailed, LandingLost.
    """
    window, size = reader.window, slot.chunk_bytes
    runs = [range(0, 1)] if entries.start == 0 < entries.stop else []
    step = max(1, _READ // size)
    runs += [range(at, min(at + step, entries.stop)) for at in range(max(1, entries.start), max(1, entries.stop), step)]

    def place(run: range) -> tuple[int, memoryview]:
        if run.start == 0:
            return window.small, slot.small[:small_bytes]
        start = (run.start - 1) * size
        return window.unique + start, slot.unique[start : (run.stop - 1) * size]

    def took(index: int) -> None:
        for entry in runs[index]:
            _verify(slot, small_bytes, entry, sums[entry - entries.start])
        checked(runs[index].stop - entries.start)

    reader.read([place(run) for run in runs], took)


def telling(channel: Channel, taken: Callable[[int], Taken]) -> Callable[[int], None]:
    """For `read_entries`: tells whom is read from, which waits as long as there is progress, ten times a deadline."""
    told = time.monotonic()

    def checked(done: int) -> None:
        nonlocal told
        if time.monotonic() > told + channel.idle / 10:
            told = time.monotonic()
            channel.send(taken(done))

    return checked


def exchange(
    place: tuple[str, int], secret: bytes, epoch: int, nbytes: int, deadlines: Deadlines | None = None
) -> float:
    """Send bytes to another node's vault and get them back; the seconds it took once connected.

    Blocks, as long as there is progress. Raises DeadlinePassed, TransferFailed, Refused, OwnFault, ChecksumMismatch.
    """
    channel = connect(*place, check_secret(secret), deadlines or Deadlines())
    try:
        payload, begun = os.urandom(nbytes), time.perf_counter()
        channel.send(Echo(epoch, nbytes, xxhash.xxh3_64_intdigest(payload)), memoryview(payload))
        answer = channel.receive()
        raise_refusal(answer)
        if not isinstance(answer, Echo) or answer.nbytes != nbytes:
            raise Malformed(f"unexpected {type(answer).__name__} frame")
        back = bytearray(nbytes)
        channel.fill(memoryview(back))
        if xxhash.xxh3_64_intdigest(back) != answer.sum:
            raise ChecksumMismatch(f"{nbytes} bytes came back changed")
        return time.perf_counter() - begun
    finally:
        channel.close()


def fetch(
    vault: Vault,
    secret: bytes,
    source: tuple[str, int] | Vault,
    rank: int,
    epoch: int,
    version: Version,
    deadlines: Deadlines | None = None,
    streams: int = 2,
    others: Sequence[tuple[str, int]] = (),
    direct: Direct | None = None,
    doubted: bool = False,
) -> int:
    """Bring a version of ``rank``'s shard into this vault's own arena, every chunk verified; returns its bytes.

    ``source`` is another node's vault (host, port), or this vault itself when it keeps the peer copy. ``others`` hold
    the very same version; all send a part at the same time, over ``streams`` connections or more. With ``direct`` the
    bytes are read where the holder allows it, and sent as without it when that fails. ``doubted``: they have arrived
    changed before, so the holder reads its copy first. The arena is made when there is none. The worker of ``rank``
    must not be writing. Blocks for the transfer; to fail, some deadline without progress must have passed. Raises
    NotHeld, GivenUp, ChecksumMismatch, Refused, StaleEpoch, DeadlinePassed, TransferFailed, VaultFull.
    """
    version = Version(*version)
    if epoch < vault.epoch:
        raise StaleEpoch(f"fetch of rank {rank} in epoch {epoch}, but node {vault.node} is in epoch {vault.epoch}")
    patience = deadlines or Deadlines()
    with vault.intakes.begin(rank, f"rank {rank}", epoch, 2 * patience.idle) as intake:
        held = own_copy(vault, rank, version)
        if held is not None:
            return len(held.unique) + held.small_bytes
        if isinstance(source, Vault):
            return _copy(intake, vault, source, rank, version)
        places = [source, *others]
        wanted = Fetch(epoch, rank, *version, 0, max(streams, len(places)), direct=direct is not None, doubted=doubted)
        try:
            return _fetch(intake, vault, secret, places, wanted, patience, direct)
        except DirectFailed as err:
            _log.warning("rank %d: %s; its shard is fetched over TCP instead", rank, err)
            if isinstance(err, LandingLost):
                vault.drop(rank, "own")
        return _fetch(intake, vault, secret, places, msgspec.structs.replace(wanted, direct=False), patience, None)


def _fetch(
    intake: Intake,
    vault: Vault,
    secret: bytes,
    places: Sequence[tuple[str, int]],
    wanted: Fetch,
    deadlines: Deadlines,
    direct: Direct | None,
) -> int:
    rank, version, streams = wanted.rank, Version(wanted.version_epoch, wanted.generation), wanted.parts
    channels: list[Channel] = []

    def connected(place: tuple[str, int]) -> Channel:
        channel = connect(*place, check_secret(secret), deadlines, lambda: intake.is_cut)
        with lock:
            channels.append(channel)
        intake.add(channel.shut)
        return channel

    lock = threading.Lock()
    try:
        first = ask(connected(places[0]), wanted)
        if first.chunk_bytes != vault.chunk_bytes:
            raise VaultError(
                f"rank {rank}'s shard has chunks of {first.chunk_bytes} bytes, this vault {vault.chunk_bytes}"
            )
        if vault.arena(rank, "own") is None:
            # taking the memory may last longer than the holder waits: ask again once it is there
            channels.pop().close()
            vault.allocate_own(rank, first.unique_bytes, first.small_capacity)
            first = ask(connected(places[0]), wanted)
        slot = own_slot(intake, vault, rank, version, first.unique_bytes, first.small_capacity)
        into = vault.arena(rank, "own") if direct is not None else None
        failures: list[VaultError] = []

        def fetch_part(part: int) -> None:
            try:
                channel, found = channels[0], first
                if part:
                    channel = connected(places[part % len(places)])
                    found = ask(channel, msgspec.structs.replace(wanted, part=part))
                _fetch_part(intake, channel, slot, part, streams, found, direct, into)
            except Exception as err:  # noqa: BLE001 - a part that nobody misses would be taken for whole
                failures.append(as_vault_error(err))
                with lock:
                    for channel in channels:
                        channel.shut()

        side_by_side("vault-fetch", streams, fetch_part)
        if failures:
            raise next((err for err in failures if isinstance(err, LandingLost)), failures[0])
    finally:
        for channel in channels:
            channel.close()
    intake.check()
    finish(slot, first.small_bytes)
    return len(slot.unique) + slot.small_bytes


def side_by_side(name: str, parts: int, do: Callable[[int], None]) -> None:
    """Every part at the same time, the first one here and the others in threads called ``name``, until all are done."""
    threads = [threading.Thread(target=do, args=(part,), name=name, daemon=True) for part in range(1, parts)]
    for thread in threads:
        thread.start()
    do(0)
    for thread in threads:
        thread.join()


def read_doubted(arena: Arena, slot: Slot, damaged: Callable[[int, Kind, Version], None]) -> None:
    """Who asks for what is in ``slot`` says that it has arrived changed: has it changed here?

    Blocks for the time of reading it. Calls ``damaged`` with holder, kind and version, and raises GivenUp, if so.
    """
    version, info = slot.version, arena.info
    if version is not None and not slot.recheck():
        damaged(info.rank, info.kind, version)
        raise GivenUp(f"{version} of {info.kind} {info.rank} has changed in memory at its holder, and is given up")


def give(channel: Channel, vault: Vault, wanted: Fetch, arena: Arena, slot: Slot, direct: Direct | None = None) -> None:
    """Answer a `Fetch` with (a part of) the shard in ``slot``: sent, or left to be read if both sides can."""
    if wanted.runs is not msgspec.UNSET:
        _give_runs(channel, vault, wanted, wanted.runs, arena, slot)
        return
    turn, info, chunk = slot.turn, arena.info, arena.chunk_bytes
    entries = part_entries(slot.chunks, wanted.part, wanted.parts)
    window = None
    if direct is not None and wanted.direct:
        try:
            window = direct.window(arena, slot)
        except DirectFailed as err:
            _log.warning("a shard is sent and not read: %s", err)
    channel.send(
        Found(
            vault.epoch, info.unique_bytes, info.small_capacity, slot.small_bytes, chunk,
            [int(slot.sums[entry]) for entry in entries], window,
        )
    )  # fmt: skip
    if direct is not None and window is not None:
        taken = -1
        while taken != len(entries):
            frame = direct.receive(channel)
            if not isinstance(frame, Taken) or not taken <= frame.done <= len(entries):
                raise Malformed(f"unexpected {type(frame).__name__} frame while a shard is read")
            taken = frame.done
    else:
        if wanted.part == 0:
            channel.send_raw(slot.small[: slot.small_bytes])
            entries = entries[1:]
        if entries:
            channel.send_raw(slot.unique[(entries[0] - 1) * chunk : entries[-1] * chunk])
    channel.send(Sent(vault.epoch, slot.turn == turn))


def _give_runs(
    channel: Channel, vault: Vault, wanted: Fetch, runs: Sequence[tuple[int, int]], arena: Arena, slot: Slot
) -> None:
    """Answer a `Fetch` of single runs of entries. Raises Refused when they do not fit the table, NotHeld."""
    turn, info, chunk, small_bytes = slot.turn, arena.info, arena.chunk_bytes, slot.small_bytes
    before = 0
    for first, end in runs:
        if not before <= first < end <= 1 + slot.chunks:
            raise Refused(f"entries {first}:{end} of rank {wanted.rank} do not fit its {1 + slot.chunks}", "protocol")
        before = end
    sums = [int(slot.sums[entry]) for first, end in runs for entry in range(first, end)]
    version = Version(wanted.version_epoch, wanted.generation)
    if vault.find(wanted.rank, version)[1] is not slot or slot.turn != turn:
        raise NotHeld(f"{tuple(version)} of rank {wanted.rank} was overwritten while it was looked up")
    # The sums are of that version, so what agrees with them is, too, whatever becomes of the slot meanwhile.
    channel.send(Found(vault.epoch, info.unique_bytes, info.small_capacity, small_bytes, chunk, sums))
    for first, end in runs:
        if first == 0:
            channel.send_raw(slot.small[:small_bytes])
        channel.send_raw(slot.unique[(max(first, 1) - 1) * chunk : (end - 1) * chunk])
    channel.send(Sent(vault.epoch, slot.turn == turn))


def ask(channel: Channel, wanted: Fetch) -> Found:
    """Ask for (a part of) a shard; its payload follows. Raises what the holder refuses with."""
    channel.send(wanted)
    answer = channel.receive()
    raise_refusal(answer)
    if not isinstance(answer, Found):
        raise TransferFailed(f"unexpected {type(answer).__name__} frame instead of a shard")
    return answer


def _fetch_part(
    intake: Intake,
    channel: Channel,
    slot: Slot,
    part: int,
    parts: int,
    found: Found,
    direct: Direct | None,
    into: Arena | None,
) -> None:
    entries = part_entries(slot.chunks, part, parts)
    if len(found.sums) != len(entries) or found.unique_bytes != len(slot.unique) or found.small_bytes > len(slot.small):
        raise TransferFailed("the shard that was sent is not of the size that was announced")
    changed: ChecksumMismatch | None = None
    if found.window is None or direct is None or into is None:
        for entry, expected in zip(entries, found.sums, strict=True):
            intake.check()
            take_entry(channel, slot, found.small_bytes, entry, expected)
    else:
        try:
            read_entries(
                Reader(direct, channel, found.window, into), slot, found.small_bytes, entries, found.sums,
                telling(channel, lambda done: Taken(found.epoch, done)),
            )  # fmt: skip
        except ChecksumMismatch as err:
            changed = err  # perhaps only because the holder has opened its slot again: it says so now
        channel.send(Taken(found.epoch, len(entries)))
    end = channel.receive()
    if not isinstance(end, Sent) or not end.intact:
        raise NotHeld(f"{slot.version} was overwritten at its holder while it was sent")
    if changed is not None:
        raise changed


def own_copy(vault: Vault, rank: int, version: Version) -> Slot | None:
    """The own copy, read and found whole; None when there is none. One that has changed in memory is given up."""
    own = vault.arena(rank, "own")
    held = own.find(version) if own is not None else None
    return held if held is not None and held.recheck() and held.complete else None


def own_slot(intake: Intake, vault: Vault, rank: int, version: Version, unique_bytes: int, small_capacity: int) -> Slot:
    """A slot of the own arena, opened to restore into. Only ``kept`` must stay. Raises StaleEpoch."""
    vault.allocate_own(rank, unique_bytes, small_capacity)
    arena = vault.arena(rank, "own")
    if arena is None:
        raise VaultError(f"the memory of rank {rank} was dropped while its shard was fetched")
    # what an older epoch had here may have been offered by now, or set aside
    with vault.checking(rank), intake.allowed(), vault.opening(arena) as ours:
        if not ours:
            raise VaultError(f"the memory of rank {rank} was dropped while its shard was fetched")
        candidates = [slot for slot in arena.slots if slot.begin != arena.kept or not slot.complete]
        # First one that has the kept version and is broken: no worker may overwrite it, so it would stay for ever.
        order = lambda slot: (slot.begin != arena.kept, slot.begin != EMPTY, slot.sealed, slot.begin)  # noqa: E731
        slot = min(candidates, key=order)
        slot.reopen(version.pack())
    return slot


def finish(slot: Slot, small_bytes: int) -> None:
    """All is there and verified. The size of the small state comes last: until then nobody checksums the slot."""
    slot.published = len(slot.unique)
    slot.checked = 1 + slot.chunks
    slot.checked_turn = slot.turn
    slot.small_bytes = small_bytes
    slot.mark_complete()
    slot.seal()


def _copy(intake: Intake, vault: Vault, source: Vault, rank: int, version: Version) -> int:
    arena, origin = source.find(rank, version, ("peer", "own") if source is vault else ("own", "peer"))
    origin.verify()
    slot = own_slot(intake, vault, rank, version, arena.info.unique_bytes, arena.info.small_capacity)
    small_bytes = origin.small_bytes
    for entry in range(1 + slot.chunks):
        intake.check()  # a newer epoch waits
        _place(slot, small_bytes, entry)[:] = _place(origin, small_bytes, entry)
        _verify(slot, small_bytes, entry, origin.sums[entry])
    finish(slot, small_bytes)
    return len(slot.unique) + slot.small_bytes


def store_shard(
    vault: Vault,
    rank: int,
    epoch: int,
    version: Version,
    fill: Callable[[Callable[[int, int], Slot], Callable[[], None]], int],
) -> None:
    """Put a shard that does not come from a vault (but from a disk) into the own arena.

    Args:
        epoch: in which it was asked for.
        fill: given a function that opens the slot for (unique bytes, small capacity), and one that raises once the
            epoch is over, to be called often: the next epoch waits. It fills the slot's views, and returns how many
            bytes of small state there are. When it raises, the slot stays incomplete.

    The worker of ``rank`` must not be writing. Raises StaleEpoch, Busy, VaultFull, VaultError, and what ``fill``
    raises.
    """
    opened: list[Slot] = []

    def open_slot(unique_bytes: int, small_capacity: int) -> Slot:
        opened.append(own_slot(intake, vault, rank, version, unique_bytes, small_capacity))
        return opened[0]

    with vault.intakes.begin(rank, f"rank {rank}", epoch, 2 * Deadlines().idle) as intake:
        small_bytes = fill(open_slot, intake.check)
        slot = opened[0]
        slot.sum_up(small_bytes)
        intake.check()
        finish(slot, small_bytes)
