"""One transfer at a time goes into the own arena of a rank: the newest; what an older epoch brings never lands."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deadpool_megatron.vault import (
    EMPTY,
    Kind,
    Slot,
    StaleEpoch,
    Vault,
    VaultError,
    VaultServer,
    Version,
    fetch,
    small_capacity,
    store_shard,
)
from deadpool_megatron.vault.errors import Refused
from deadpool_megatron.vault.frames import Begin, Refusal
from deadpool_megatron.vault.intake import Intakes
from deadpool_megatron.vault.keeper import Keeper
from deadpool_megatron.vault.transfer import finish, own_slot
from deadpool_megatron.vault.wire import Channel, Deadlines

SECRET = bytes(32)


def test_the_newest_cuts_off_the_one_before_and_waits_for_it() -> None:
    intakes, shut = Intakes(), threading.Event()
    older = intakes.begin(3, "rank 3", 1, 60.0)
    older.add(shut.set)
    began = threading.Event()
    thread = threading.Thread(target=lambda: (intakes.begin(3, "rank 3", 2, 60.0), began.set()))
    thread.start()
    while not shut.is_set():
        assert not began.is_set(), "it waits for the one before to leave"
    with pytest.raises(StaleEpoch), older:
        older.check()
    thread.join()
    assert began.is_set()
    intakes.begin(4, "rank 4", 1, 0.0)  # of another rank


def test_an_older_epoch_begins_nothing_once_a_newer_one_has() -> None:
    intakes = Intakes()
    intakes.begin(3, "rank 3", 2, 0.0)
    with pytest.raises(StaleEpoch):
        intakes.begin(3, "rank 3", 1, 0.0)


def test_who_does_not_leave_in_time_keeps_the_next_one_out() -> None:
    intakes = Intakes()
    intakes.begin(3, "rank 3", 1, 0.0)
    with pytest.raises(Refused):
        intakes.begin(3, "rank 3", 2, 0.0)


def test_who_comes_next_still_waits_for_the_one_that_did_not_leave() -> None:
    intakes = Intakes()
    first = intakes.begin(3, "rank 3", 1, 0.0)
    for _ in range(2):
        with pytest.raises(Refused):
            intakes.begin(3, "rank 3", 2, 0.0)
    first.left.set()
    intakes.begin(3, "rank 3", 2, 0.0)


def test_what_an_epoch_that_is_over_asked_for_is_not_begun_and_overwrites_nothing() -> None:
    vault = Vault(f"i{os.getpid()}", 0)
    try:
        vault.allocate_own(3, 4096, 64)
        store_shard(vault, 3, 1, Version(1, 5), _fill)
        begun = vault.intakes.begin(3, "rank 3", 1, 0.0)
        vault.set_epoch(2)
        with pytest.raises(StaleEpoch):  # cut off before it has opened the slot
            own_slot(begun, vault, 3, Version(1, 6), 4096, 64)
        begun.left.set()
        with pytest.raises(StaleEpoch):
            store_shard(vault, 3, 1, Version(1, 6), _fill)
        held = vault.holdings().ranks[3]
        assert [(one.epoch, one.generation) for one in held] == [(1, 5)]
        assert all(slot.begin in (EMPTY, Version(1, 5).pack()) for slot in vault.arena(3, "own").slots)
    finally:
        vault.close()


def _fill(open_slot: Callable[[int, int], Slot], check: Callable[[], None]) -> int:
    open_slot(4096, 64)
    return 8


def test_a_keeper_lets_no_late_epoch_end_the_transfer_of_the_one_that_is() -> None:
    server = VaultServer(Vault(f"i{os.getpid()}", 0), SECRET, "127.0.0.1")
    ends = [socket.socketpair() for _ in range(2)]
    try:
        now, late = (Channel(mine, Deadlines(), SECRET, server=True) for mine, _ in ends)
        server.set_epoch(2)
        with server._writing(now, (3,), 2):
            with pytest.raises(StaleEpoch), server._writing(late, (3,), 1):
                raise AssertionError("it writes")
            ends[0][1].setblocking(False)
            with pytest.raises(BlockingIOError):
                ends[0][1].recv(1)  # else the connection was shut
    finally:
        server.stop()
        for pair in ends:
            for each in pair:
                each.close()


@pytest.mark.parametrize("first", ["plan", "owner"])
def test_what_is_planned_and_what_the_owner_asks_for_may_have_other_room_for_a_small_state(first: str) -> None:
    """The plan knows the small state that a worker has, the owner may have the room of one that came from a disk."""
    vault = Vault(f"i{os.getpid()}", 0)
    keeper, owners, planned = Keeper(vault), small_capacity(33_000), small_capacity(32_500)
    assert owners != planned

    def from_owner(generation: int, small_bytes: int) -> Slot | None:
        begin = Begin(0, 5, 0, generation, 1 << 20, owners, small_bytes, vault.chunk_bytes, EMPTY, EMPTY)
        return keeper.open(begin)

    try:
        if first == "plan":
            vault.allocate_peer(5, 1 << 20, planned)
        slot = from_owner(100, 33_000)
        vault.allocate_peer(5, 1 << 20, planned)  # `Shards.reserve`
        assert slot is not None and len(slot.small) == owners, "nothing was in the one that was planned"
        slot.seal()
        assert from_owner(101, 33_000) is not None
    finally:
        vault.close()


def test_a_copy_that_is_kept_stays_when_its_owner_has_more_room_now_and_what_fits_goes_beside_it() -> None:
    vault = Vault(f"i{os.getpid()}", 0)
    keeper = Keeper(vault)

    def opened(generation: int, small_bytes: int, room: int) -> Slot | None:
        begin = Begin(0, 5, 0, generation, 1 << 20, room, small_bytes, vault.chunk_bytes, EMPTY, EMPTY)
        return keeper.open(begin)

    try:
        kept = opened(100, 32_500, 1 << 16)
        assert kept is not None
        kept.seal()
        beside = opened(101, 33_000, 1 << 17)
        assert kept.sealed and beside is not None and len(beside.small) == 1 << 16
        with pytest.raises(Refused, match="must be kept"):
            opened(102, (1 << 16) + 1, 1 << 17)
    finally:
        vault.close()


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A vault that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_a_new_epoch_ends_a_fetch_that_waits_for_bytes(silent: socket.socket) -> None:
    vault = Vault(f"i{os.getpid()}", 0)
    errors: list[VaultError] = []

    def bring() -> None:
        try:
            fetch(vault, SECRET, silent.getsockname(), 3, 0, Version(0, 5), Deadlines(connect=3600.0, idle=3600.0))
        except VaultError as err:
            errors.append(err)

    thread = threading.Thread(target=bring)
    thread.start()
    with silent.accept()[0]:
        vault.set_epoch(1)
        thread.join()
    assert errors
    vault.close()


def test_what_was_sent_before_the_epoch_changed_is_refused_and_not_counted() -> None:
    server = VaultServer(Vault(f"l{os.getpid()}", 0), SECRET, "127.0.0.1", deadlines=Deadlines(late=10.0))
    now = 100.0
    server._keeper._clock = lambda: now

    def refusal(epoch: int, size: int) -> Refusal:
        mine, theirs = socket.socketpair()
        owner, ours = (
            Channel(mine, Deadlines(), SECRET, server=False),
            Channel(theirs, Deadlines(), SECRET, server=True),
        )
        owner.send(Begin(epoch, 3, epoch, 5, size, 1 << 12, 16, 1 << 20, EMPTY, 0))
        server._requests(ours)
        answer = owner.receive()
        owner.close()
        ours.close()
        assert isinstance(answer, Refusal)
        return answer

    try:
        server.set_plan({3: 4096})
        server.set_epoch(1)
        assert refusal(0, 4096).code == "stale-epoch" and refusal(1, 8192).code == "not-planned"
        assert not any(server.refusals.values()), "nodes hear of an epoch one after the other"
        now += 11.0
        assert refusal(2, 8192).code == "not-planned" and not any(server.refusals.values()), "this one is behind"
        assert refusal(0, 4096).code == "stale-epoch" and refusal(1, 8192).code == "not-planned"
        assert (server.refusals["stale epoch"], server.refusals["not as planned"]) == (1, 1)
    finally:
        server.stop()


@pytest.mark.parametrize("kind", ["own", "peer"])
def test_a_transfer_that_has_looked_its_memory_up_opens_no_slot_once_that_is_set_aside(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault, base, later = Vault(f"i{os.getpid()}", 0), Version(0, 5), Version(0, 6)
    begin = Begin(0, 3, *later, 4096, 64, 8, vault.chunk_bytes, EMPTY, 0)
    lookup = Vault.arena
    lookups = 0

    def looked_up(vault: Vault, *what: Any) -> Any:
        nonlocal lookups
        lookups += 1
        found = lookup(vault, *what)
        if lookups == (1 if kind == "own" else 2):  # the last one before it opens
            assert vault.set_aside(base, -1) == {3: (kind,)}
        return found

    try:
        (vault.allocate_own if kind == "own" else vault.allocate_peer)(3, 4096, 64)
        arena = vault.arena(3, kind)
        assert arena is not None
        for slot in arena.slots:
            slot.reopen(base.pack())
        finish(arena.slots[1], 8)
        monkeypatch.setattr(Vault, "arena", looked_up)
        if kind == "own":
            with pytest.raises(VaultError, match="dropped"), vault.intakes.begin(3, "rank 3", 0, 1.0) as intake:
                own_slot(intake, vault, 3, later, 4096, 64)
        else:
            with pytest.raises(Refused):
                Keeper(vault).open(begin)
        assert vault.find(3, base)[1] is arena.slots[1] and arena.slots[0].begin == EMPTY, "not even the other one"
    finally:
        vault.close()
