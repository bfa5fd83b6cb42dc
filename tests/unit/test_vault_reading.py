"""The promise: parts of shards are read out of the memories that are left, and nothing that has changed there."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from deadpool_megatron.vault import (
    CONSTANT,
    ChecksumMismatch,
    ConstantsWriter,
    Copies,
    NotHeld,
    Slot,
    StaleEpoch,
    Unreadable,
    Vault,
    VaultError,
    VaultServer,
    Version,
    constants_of,
    fetch,
    reading,
    store_shard,
)
from deadpool_megatron.vault.errors import Refused, TransferFailed
from deadpool_megatron.vault.frames import Fetch, Found, Sent
from deadpool_megatron.vault.transfer import ask
from deadpool_megatron.vault.wire import Channel, Deadlines, connect

SECRET = bytes(range(32))
CHUNK = 1 << 12
UNIQUE = 37 * CHUNK + 777
BASE = Version(2, 7)
PATIENT = Deadlines(connect=60.0, idle=60.0, backoff=0.01)
SHORT = Deadlines(connect=0.3, idle=0.3, backoff=0.01)  # for who says nothing


def content(rank: int, nbytes: int = UNIQUE) -> bytes:
    return np.random.default_rng(rank).bytes(nbytes)


class Holder:
    """A node's vault and its server."""

    def __init__(self, node: int) -> None:
        self.vault = Vault(f"r{os.getpid()}", node, chunk_bytes=CHUNK)
        self.server = VaultServer(self.vault, SECRET, "127.0.0.1", deadlines=PATIENT)
        self.server.start()
        self.vault.set_epoch(BASE.epoch)
        self.at = self.server.host, self.server.port

    def store(self, rank: int, version: Version = BASE, data: bytes | None = None, small: bytes = b"") -> Slot:
        data, small = content(rank) if data is None else data, small or b"small state of %d" % rank

        def fill(open_slot: Callable[[int, int], Slot], check: Callable[[], None]) -> int:
            slot = open_slot(len(data), max(4096, len(small)))
            slot.unique[:] = data
            slot.small[: len(small)] = small
            return len(small)

        store_shard(self.vault, rank, self.vault.epoch, version, fill)
        return self.vault.find(rank, version)[1]

    def constants(self, rank: int, data: bytes) -> None:
        holder = constants_of(rank)
        writer = ConstantsWriter(self.vault.allocate_own(holder, len(data), 100).path)
        assert writer.begin() is not None
        writer.buffer[:] = np.frombuffer(data, np.uint8)
        writer.complete()
        self.vault.checksum(holder)
        writer.close()

    def close(self) -> None:
        self.server.stop()
        self.vault.close()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    made = [Holder(0), Holder(1)]
    yield made
    for each in made:
        each.close()


@pytest.fixture
def copies(holders: list[Holder]) -> Iterator[Callable[..., Copies]]:
    made: list[Copies] = []

    def make(*at: Any, epoch: int = 3, version: Version = BASE, deadlines: Deadlines = PATIENT) -> Copies:
        """Of ranks 0 and 1, and constants of rank 0, at these (all holders, unless some are named)."""
        places = [*at] or [each.at for each in holders]
        made.append(Copies(SECRET, epoch, version, dict.fromkeys((0, 1, constants_of(0)), places), deadlines))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def bytes_sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each entry that readers have got."""
    filled: list[int] = []
    fill = Channel.fill

    def counted(channel: Channel, view: memoryview) -> None:
        fill(channel, view)
        if sys._getframe(1).f_code.co_name == "_sent":
            filled.append(len(view))

    monkeypatch.setattr(Channel, "fill", counted)
    return filled


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Where readers have connected to."""
    made: list[tuple[str, int]] = []

    def counted(host: str, port: int, secret: bytes, deadlines: Deadlines) -> Channel:
        made.append((host, port))
        return connect(host, port, secret, deadlines)

    monkeypatch.setattr(reading, "connect", counted)
    return made


class Taken:
    """What a read gives, in order."""

    def __init__(self, wanted: list[tuple[int, int]], data: bytes) -> None:
        self.bytes, self.wanted, self._data = bytearray(), wanted, data
        self._at = [at for begin, end in wanted for at in range(begin, end)]

    def __call__(self, offset: int, data: memoryview) -> None:
        done = len(self.bytes)
        assert self._at[done : done + len(data)] == list(range(offset, offset + len(data))), "in order, each byte once"
        assert data and data.readonly
        self.bytes += data

    @property
    def whole(self) -> bool:
        return bytes(self.bytes) == b"".join(self._data[begin:end] for begin, end in self.wanted)


def test_the_small_state_comes_alone(
    holders: list[Holder], copies: Callable[..., Copies], bytes_sent: list[int]
) -> None:
    holders[0].store(0)
    holders[0].store(1, small=b"x" * 3 * CHUNK)
    read = copies()
    assert read.small(0) == b"small state of 0" and bytes_sent == [16]
    assert read.small(1) == b"x" * 3 * CHUNK, "larger than a chunk"
    assert read.small(0) == b"small state of 0" and bytes_sent == [16, 3 * CHUNK, 16]


@pytest.mark.parametrize(
    ("wanted", "chunks"),
    [
        ([], []),
        ([(5, 5), (UNIQUE, UNIQUE)], []),
        ([(0, 1)], [CHUNK]),
        ([(UNIQUE - 1, UNIQUE)], [777]),
        ([(CHUNK - 1, CHUNK + 1)], [CHUNK, CHUNK]),
        ([(CHUNK, 2 * CHUNK)], [CHUNK]),
        ([(1, 2), (3, 3), (3, 9), (CHUNK - 1, CHUNK)], [CHUNK]),
        ([(7, CHUNK), (CHUNK, CHUNK + 3), (9 * CHUNK + 1, 11 * CHUNK)], [CHUNK] * 4),
        ([(0, UNIQUE)], [CHUNK] * 37 + [777]),
    ],
)
def test_only_the_chunks_that_ranges_touch_are_sent_and_only_the_ranges_are_taken(
    holders: list[Holder],
    copies: Callable[..., Copies],
    bytes_sent: list[int],
    wanted: list[tuple[int, int]],
    chunks: list[int],
) -> None:
    holders[0].store(0)
    taken = Taken(wanted, content(0))
    copies().read(0, wanted, taken)
    assert taken.whole and bytes_sent == chunks


def test_any_ranges_give_the_bytes_that_were_written(
    holders: list[Holder], copies: Callable[..., Copies], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(1)
    holders[0].store(0)
    holders[1].store(1)
    read = copies()
    for turn in range(150):
        monkeypatch.setattr(reading, "_BATCH", chance.choice((1, 3 * CHUNK, 7 * CHUNK, 64 << 20)))
        rank, cuts = turn % 2, sorted(chance.choices(range(UNIQUE + 1), k=2 * chance.randrange(1, 30)))
        wanted = list(zip(cuts[::2], cuts[1::2], strict=True))
        taken = Taken(wanted, content(rank))
        read.read(rank, wanted, taken)
        assert taken.whole, wanted
        if turn % 10 == 0:
            assert read.small(rank) == b"small state of %d" % rank


def test_a_shard_without_unique_bytes_is_read(holders: list[Holder], copies: Callable[..., Copies]) -> None:
    holders[0].store(0, data=b"")
    read = copies()
    read.read(0, [(0, 0)], Taken([], b""))
    assert read.small(0) == b"small state of 0"
    with pytest.raises(VaultError, match="rank 0 has 0 unique bytes"):
        read.read(0, [(0, 1)], Taken([], b""))


@pytest.mark.parametrize("wanted", [[(3, 2)], [(0, 5), (4, 6)], [(5, 6), (0, 1)], [(-1, 3)], [(0, UNIQUE + 1)]])
def test_ranges_that_make_no_sense_are_refused_before_anything_is_taken(
    holders: list[Holder], copies: Callable[..., Copies], wanted: list[tuple[int, int]]
) -> None:
    holders[0].store(0)
    with pytest.raises(VaultError, match="rank 0"):
        copies().read(0, wanted, lambda offset, data: pytest.fail("taken"))


def test_a_connection_serves_all_reads_from_one_holder(
    holders: list[Holder],
    copies: Callable[..., Copies],
    monkeypatch: pytest.MonkeyPatch,
    connections: list[tuple[str, int]],
) -> None:
    monkeypatch.setattr(reading, "_BATCH", 2 * CHUNK)
    for each in holders:
        each.store(0)
        each.store(1)
    read = copies()
    for rank in (0, 1, 0):
        read.small(rank)
        read.read(rank, [(0, UNIQUE)], Taken([(0, UNIQUE)], content(rank)))
    assert connections == [holders[0].at]


def test_no_more_connections_stay_open_than_a_process_may_have(
    holders: list[Holder],
    copies: Callable[..., Copies],
    connections: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "_MOST_OPEN", 1)
    for rank, holder in enumerate(holders):
        holder.store(rank)
    read = copies()
    read.places = {rank: (holder.at,) for rank, holder in enumerate(holders)}
    for _ in range(2):
        assert [read.small(rank) for rank in (0, 0, 1)] == [b"small state of 0"] * 2 + [b"small state of 1"]
        assert [*read._channels] == [holders[1].at]
    assert connections == [holders[0].at, holders[1].at] * 2


def test_a_chunk_is_all_the_memory_that_a_read_takes(holders: list[Holder], copies: Callable[..., Copies]) -> None:
    holders[0].store(0)
    read = copies()
    read.read(0, [(0, UNIQUE)], Taken([(0, UNIQUE)], content(0)))
    assert len(read._buffer) == CHUNK


def test_what_takes_may_fail_and_the_next_read_works(holders: list[Holder], copies: Callable[..., Copies]) -> None:
    holders[0].store(0)
    read = copies()

    def take(offset: int, data: memoryview) -> None:
        raise KeyError(offset)

    with pytest.raises(KeyError, match="3"):
        read.read(0, [(3, UNIQUE)], take)
    taken = Taken([(3, UNIQUE)], content(0))
    read.read(0, taken.wanted, taken)
    assert taken.whole and read.small(0) == b"small state of 0"


def test_a_holder_that_goes_in_the_middle_gives_way_to_the_next_one(
    holders: list[Holder],
    copies: Callable[..., Copies],
    monkeypatch: pytest.MonkeyPatch,
    bytes_sent: list[int],
    connections: list[tuple[str, int]],
) -> None:
    monkeypatch.setattr(reading, "_BATCH", 2 * CHUNK)
    for each in holders:
        each.store(0)
    taken = Taken([(0, UNIQUE)], content(0))

    def take(offset: int, data: memoryview) -> None:
        taken(offset, data)
        if offset == 9 * CHUNK:
            holders[0].server.stop()

    read = copies()
    read.read(0, taken.wanted, take)
    assert taken.whole and bytes_sent == [CHUNK] * 37 + [777], "it has gone on where it stopped"
    connections.clear()
    assert read.small(0) == b"small state of 0" and not connections, "who is gone is not asked first any more"


def test_a_connection_that_breaks_is_made_again(
    holders: list[Holder], copies: Callable[..., Copies], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, of the only holder: as long as there is progress, that is no reason to give up."""
    monkeypatch.setattr(reading, "_BATCH", 2 * CHUNK)
    holders[0].store(0)
    read, taken = copies(holders[0].at), Taken([(0, UNIQUE)], content(0))

    def take(offset: int, data: memoryview) -> None:
        taken(offset, data)
        if offset // CHUNK % 3 == 0:
            read._channels[holders[0].at].shut()

    read.read(0, taken.wanted, take)
    assert taken.whole


@pytest.mark.parametrize("entry", ["small state", "chunk"])
def test_bytes_that_have_changed_in_memory_are_never_taken_and_another_copy_serves(
    holders: list[Holder], copies: Callable[..., Copies], bytes_sent: list[int], entry: str
) -> None:
    slot, _ = (each.store(0) for each in holders)
    view, at = (slot.small, 2) if entry == "small state" else (slot.unique, 11 * CHUNK + 5)
    view[at] ^= 1
    read, taken = copies(), Taken([(3, UNIQUE - 5)], content(0))
    assert read.small(0) == b"small state of 0"
    read.read(0, taken.wanted, taken)
    assert taken.whole
    assert len(bytes_sent) == 1 + 38 + 1, "what was good is not sent again"


def test_two_copies_that_have_changed_at_different_places_are_as_good_as_one(
    holders: list[Holder], copies: Callable[..., Copies]
) -> None:
    for each, chunks in zip(holders, ((3, 20, 21), (4, 19, 36)), strict=True):
        slot = each.store(0)
        for chunk in chunks:
            slot.chunk(chunk)[0] ^= 1
    taken = Taken([(0, UNIQUE)], content(0))
    copies().read(0, taken.wanted, taken)
    assert taken.whole


def test_no_good_copy_is_an_error_that_names_the_rank_and_what_each_holder_said(
    holders: list[Holder], copies: Callable[..., Copies]
) -> None:
    holders[0].store(0).chunk(4)[7] ^= 1
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = listener.getsockname()
    read, taken = copies(gone, *(each.at for each in holders)), Taken([(0, 4 * CHUNK)], content(0))
    with pytest.raises(Unreadable, match=r"no copy of rank 0, version \(2, 7\), can be read") as raised:
        read.read(0, [(0, UNIQUE)], taken)
    assert taken.whole, "what came before stays good"
    said = raised.value.reasons
    kinds = [type(said[at]) for at in (gone, holders[0].at, holders[1].at)]
    assert kinds == [TransferFailed, ChecksumMismatch, NotHeld]
    assert all(f"{host}:{port}: {said[host, port]}" in str(raised.value) for host, port in said)
    assert raised.value.broken, "one of them has said nothing of its copy"
    with pytest.raises(Unreadable, match="rank 1") as raised:
        copies().small(1)
    assert not raised.value.broken
    with pytest.raises(Unreadable, match=r"rank 5.*nobody holds it"):
        read.small(5)


def test_a_holder_that_says_nothing_gives_way_after_the_deadline(
    holders: list[Holder], copies: Callable[..., Copies]
) -> None:
    holders[1].store(0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        read = copies(silent.getsockname(), holders[1].at, deadlines=SHORT)
        assert read.small(0) == b"small state of 0"


def test_who_is_of_an_older_epoch_reads_nothing(holders: list[Holder], copies: Callable[..., Copies]) -> None:
    for each in holders:
        each.store(0)
    holders[0].server.set_epoch(4)
    with pytest.raises(StaleEpoch):
        copies(epoch=3).small(0)
    assert copies(epoch=4).small(0) == b"small state of 0"


def test_another_job_is_not_read(holders: list[Holder]) -> None:
    holders[0].store(0)
    with pytest.raises(Unreadable, match="another job"):
        Copies(bytes(32), 3, BASE, {0: [holders[0].at]}).small(0)
    with pytest.raises(VaultError, match="32 bytes"):
        Copies(b"short", 3, BASE, {})


def test_a_slot_that_is_written_anew_while_it_is_read_gives_no_byte_of_the_new_version(
    holders: list[Holder], copies: Callable[..., Copies], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BATCH", 5 * CHUNK)
    slot, _ = (each.store(0) for each in holders)
    taken = Taken([(0, UNIQUE)], content(0))

    def take(offset: int, data: memoryview) -> None:
        taken(offset, data)
        if offset == 7 * CHUNK:
            slot.reopen(Version(3, 8).pack())
            slot.unique[:] = content(9)
            slot.small_bytes = 4
            slot.sum_up(4)
            slot.mark_complete()
            slot.seal()

    copies().read(0, taken.wanted, take)
    assert taken.whole


def test_holders_that_do_not_agree_on_the_size_are_not_mixed(
    holders: list[Holder], copies: Callable[..., Copies]
) -> None:
    holders[0].store(0).chunk(1)[0] ^= 1
    holders[1].store(0, data=content(0)[:-1])
    with pytest.raises(Unreadable, match="another copy has"):
        copies().read(0, [(0, UNIQUE)], lambda offset, data: None)


# ---- what is aside


def test_what_is_aside_is_served_while_new_memory_has_its_ranks(
    holders: list[Holder], copies: Callable[..., Copies]
) -> None:
    first = holders[0]
    first.store(0)
    first.constants(0, b"old constants")
    first.server.set_epoch(3)
    assert first.vault.set_aside(BASE, -1) == {0: ("own",), constants_of(0): ("own",)}
    first.store(0, Version(3, 7), content(8, 5000))
    first.constants(0, b"new ones")
    first.vault.set_committed(3, 7)
    read, old = copies(first.at), Taken([(0, UNIQUE)], content(0))
    read.read(0, old.wanted, old)
    assert old.whole and read.small(0) == b"small state of 0"
    constants = bytearray()
    read.read(constants_of(0), [(0, 13)], lambda offset, data: constants.extend(data))
    assert constants == b"old constants"
    fresh = Copies(SECRET, 3, CONSTANT, {constants_of(0): [first.at]})
    fresh.read(constants_of(0), [(0, 8)], lambda offset, data: constants.extend(data))
    fresh.close()
    assert constants == b"old constantsnew ones", "they have the same number, and are of other coordinates"
    first.vault.let_go()
    with pytest.raises(Unreadable, match="does not hold"):
        read.small(0)
    with pytest.raises(Unreadable, match="does not hold"):
        read.small(constants_of(0))


def test_a_whole_shard_that_is_aside_is_fetched_too(holders: list[Holder]) -> None:
    first, second = holders
    first.store(0)
    first.server.set_epoch(3)
    second.server.set_epoch(3)
    first.vault.set_aside(BASE, -1)
    fetch(second.vault, SECRET, first.at, 0, 3, BASE, PATIENT)
    assert bytes(second.vault.find(0, BASE)[1].unique) == content(0)


# ---- what is asked for and refused


def _asked(holder: Holder, **fields: Any) -> tuple[Found, bytes, Sent]:
    """The whole answer to a fetch of rank 0."""
    channel = connect(*holder.at, SECRET, PATIENT)
    try:
        found = ask(channel, msgspec.structs.replace(Fetch(3, 0, *BASE, 0, 1), **fields))
        table = list(range(1 + -(-UNIQUE // CHUNK)))
        runs = fields.get("runs", [(0, len(table))])
        sizes = [found.small_bytes if entry == 0 else min(CHUNK, UNIQUE - (entry - 1) * CHUNK) for entry in table]
        payload = bytearray(sum(sizes[entry] for first, end in runs for entry in range(first, end)))
        channel.fill(memoryview(payload))
        end = channel.receive()
        assert isinstance(end, Sent)
        return found, bytes(payload), end
    finally:
        channel.close()


def test_an_answer_has_the_checksums_and_bytes_of_just_the_runs(holders: list[Holder]) -> None:
    slot, data = holders[0].store(0), content(0)
    found, payload, end = _asked(holders[0], runs=[(0, 2), (5, 6), (6, 7), (38, 39)])
    assert payload == b"small state of 0" + data[:CHUNK] + data[4 * CHUNK : 6 * CHUNK] + data[-777:] and end.intact
    assert found.sums == [slot.sums[entry] for entry in (0, 1, 5, 6, 38)]
    assert (found.unique_bytes, found.small_bytes, found.chunk_bytes) == (UNIQUE, 16, CHUNK)
    found, payload, end = _asked(holders[0], runs=[], direct=True)
    assert not found.sums and found.window is None and found.unique_bytes == UNIQUE and end.intact
    found, payload, _ = _asked(holders[0])
    assert payload == b"small state of 0" + data and found.sums == list(slot.sums), "without runs, all of it"


@pytest.mark.parametrize(
    "fields",
    [
        {"runs": [(0, 40)]},
        {"runs": [(39, 40)]},
        {"runs": [(3, 3)]},
        {"runs": [(4, 3)]},
        {"runs": [(2, 4), (3, 5)]},
        {"runs": [(2, 4), (0, 1)]},
        {"runs": [(0, (1 << 63) - 1)]},
        {"runs": [(0, 1)], "parts": 2},
    ],
)
def test_runs_that_do_not_fit_the_table_are_refused(holders: list[Holder], fields: dict[str, Any]) -> None:
    holders[0].store(0)
    with pytest.raises(Refused) as raised:
        _asked(holders[0], **fields)
    assert raised.value.code == "protocol" and holders[0].server.misfits == 1


def test_more_runs_than_the_protocol_has_end_the_connection(holders: list[Holder]) -> None:
    holders[0].store(0)
    with pytest.raises(TransferFailed):
        _asked(holders[0], runs=[(0, 1)] * 1025)


def test_a_fetch_without_runs_is_what_it_was_before_there_were_any() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Fetch(3, 0, 2, 7, 0, 1))) == {
        "type": "Fetch", "epoch": 3, "rank": 0, "version_epoch": 2, "generation": 7, "part": 0, "parts": 1,
        "parity": False, "direct": False, "doubted": False,
    }  # fmt: skip


def test_a_slot_that_is_opened_again_as_it_is_looked_up_is_not_held(
    holders: list[Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = holders[0].store(0)
    find = Vault.find

    def found(vault: Vault, *what: Any) -> Any:
        out = find(vault, *what)
        slot.reopen(Version(3, 8).pack())
        return out

    monkeypatch.setattr(Vault, "find", found)
    with pytest.raises(NotHeld):
        _asked(holders[0], runs=[(0, 1)])
