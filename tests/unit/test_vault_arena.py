"""The promise: a shard that is given back is whole and unchanged, and memory is there when it is granted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deadpool_megatron.vault import (
    CONSTANT,
    EMPTY,
    Arena,
    ChecksumMismatch,
    ConstantsWriter,
    Kind,
    NotHeld,
    Slot,
    SlotWriter,
    StaleEpoch,
    Vault,
    VaultError,
    VaultFull,
    Version,
    clean_leftovers,
    constants_of,
    store_shard,
)
from deadpool_megatron.vault import arena as arenas

UNIQUE = 300_000  # not a multiple of the chunk size
CHUNK = 1 << 16


@pytest.fixture
def vault() -> Iterator[Vault]:
    made = Vault(f"t{os.getpid()}", 0, chunk_bytes=CHUNK)
    yield made
    made.close()


def write(vault: Vault, writer: SlotWriter, epoch: int, generation: int, fill: int) -> bool:
    if writer.open(epoch, generation, b"small%d" % fill) is None:
        return False
    writer.buffer[:] = fill
    writer.publish(UNIQUE)
    writer.complete()
    while vault.checksum(0):
        pass
    return True


def test_a_written_version_is_read_back_only_once_it_is_checksummed(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, UNIQUE, 100).path)
    assert writer.open(0, 3, b"tiny") is not None
    writer.buffer[:] = 7
    writer.complete()
    with pytest.raises(NotHeld):
        writer.read(Version(0, 3))
    while vault.checksum(0):
        pass
    small, unique = writer.read(Version(0, 3))
    assert small == b"tiny"
    assert np.all(np.frombuffer(unique, dtype=np.uint8) == 7)
    assert [(h.epoch, h.generation, h.kind) for h in vault.holdings().ranks[0]] == [(0, 3, "own")]


def test_one_flipped_bit_anywhere_is_never_accepted(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, UNIQUE, 100).path)
    assert write(vault, writer, 0, 1, 9)
    slot = writer.arena.find(Version(0, 1))
    assert slot is not None
    for view, at in ((slot.unique, 0), (slot.unique, UNIQUE - 1), (slot.small, 2)):
        view[at] ^= 1
        with pytest.raises(ChecksumMismatch):
            writer.read(Version(0, 1))
        view[at] ^= 1
    slot.sums[2] ^= 1
    with pytest.raises(ChecksumMismatch):
        vault.find(0, Version(0, 1), ("own",))[1].verify()
    slot.sums[2] ^= 1
    vault.find(0, Version(0, 1), ("own",))[1].verify()


def test_checksums_are_taken_while_the_writer_still_writes(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, UNIQUE, 100).path)
    slot = writer.open(0, 1, b"x")
    assert slot is not None
    vault.checksum(0)
    assert slot.checked == 1
    writer.publish(CHUNK * 2 + 5)
    vault.checksum(0)
    assert slot.checked == 3
    assert not vault.checksum(0)
    writer.publish(UNIQUE)
    vault.checksum(0)
    assert slot.checked == 1 + slot.chunks
    assert not slot.complete
    writer.complete()
    vault.checksum(0)
    assert slot.complete


def test_the_two_slots_alternate_and_the_committed_one_is_never_touched(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, UNIQUE, 100).path)
    assert write(vault, writer, 0, 0, 1)
    assert write(vault, writer, 0, 1, 2)
    assert not write(vault, writer, 0, 2, 3)
    assert writer.skipped == 1
    vault.set_committed(0, 1)
    assert write(vault, writer, 0, 3, 4)
    assert not write(vault, writer, 0, 4, 5)
    assert writer.read(Version(0, 1))[0] == b"small2"
    assert writer.read(Version(0, 3))[0] == b"small4"
    with pytest.raises(NotHeld):
        writer.read(Version(0, 0))


def test_a_slot_is_incomplete_from_the_moment_it_is_opened_even_for_the_same_version(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, UNIQUE, 100).path)
    assert write(vault, writer, 0, 1, 1)
    slot = writer.arena.find(Version(0, 1))
    assert slot is not None
    slot.reopen(Version(0, 1).pack())
    assert not slot.sealed
    assert vault.holdings().ranks[0] == ()


def test_a_worker_of_an_older_epoch_cannot_write(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, UNIQUE, 100).path)
    assert write(vault, writer, 0, 0, 1)
    vault.set_epoch(2)
    with pytest.raises(StaleEpoch, match="epoch 1 but the job is in epoch 2"):
        writer.open(1, 5, b"")
    with pytest.raises(StaleEpoch):
        vault.set_epoch(1)
    assert writer.read(Version(0, 0))[0] == b"small1"


def test_a_new_epoch_keeps_only_the_committed_version(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, UNIQUE, 100).path)
    assert write(vault, writer, 0, 4, 1)
    assert write(vault, writer, 0, 5, 2)
    vault.set_committed(0, 4)
    vault.set_epoch(1)
    assert write(vault, writer, 1, 4, 3)
    assert writer.read(Version(0, 4))[0] == b"small1"
    assert not write(vault, writer, 1, 5, 4)


def test_small_state_that_does_not_fit_says_what_to_do(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, UNIQUE, 10).path)
    with pytest.raises(VaultError, match="small_capacity"):
        writer.open(0, 0, b"x" * 11)


def test_memory_that_is_not_there_is_refused_with_the_bytes_needed_and_there(vault: Vault) -> None:
    with pytest.raises(VaultFull, match=r"needs \d{15,} bytes in /dev/shm but \d+ are there"):
        vault.allocate_own(0, 1 << 50, 100)
    assert vault.bytes_allocated == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_shared_memory_is_refused_not_a_bus_error_later(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        small = Vault("mount", 0, directory=str(tmp_path))
        with pytest.raises(VaultFull):
            small.allocate_own(0, 3 << 20, 100)
        small.allocate_own(1, 1 << 20, 100)
        small.close()
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


class Slow:
    """Makes arenas, and waits with each until it may."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Semaphore(0), threading.Event()

    def __call__(self, *arguments: Any) -> Arena:
        self.begun.release()
        self.go_on.wait()
        return Arena.create(*arguments)


def test_nothing_waits_for_memory_that_is_cleared_and_what_was_told_meanwhile_holds(tmp_path: Path) -> None:
    slow, size = Slow(), Arena.size(0, "own", UNIQUE, 100, CHUNK)
    vault = Vault("slow", 0, str(tmp_path), CHUNK, limit_bytes=2 * size, create=slow)
    with ThreadPoolExecutor() as pool:
        try:
            first, again = (pool.submit(vault.allocate_own, 0, UNIQUE, 100) for _ in range(2))
            other = pool.submit(vault.allocate_peer, 1, UNIQUE, 100)
            for _ in range(2):
                slow.begun.acquire()
            with pytest.raises(VaultFull, match=f"has {2 * size} of the {2 * size} in use"):
                vault.allocate_own(2, UNIQUE, 100)
            vault.set_committed(0, 5)
            vault.set_epoch(3)
            assert vault.holdings().ranks == {} and vault.arena(0, "own") is None
        finally:
            slow.go_on.set()
        assert first.result() == again.result() and not slow.begun.acquire(blocking=False), "it was made once"
        assert other.result().total_bytes == size and vault.bytes_allocated == 2 * size
    for arena in vault.arenas():
        assert (arena.epoch, arena.kept, arena.floor) == (3, Version(0, 5).pack(), Version(3, 0).pack())
    vault.close()


def test_memory_that_is_made_while_the_vault_is_closed_is_not_left_behind(tmp_path: Path) -> None:
    slow = Slow()
    vault = Vault("slow", 0, str(tmp_path), create=slow)
    with ThreadPoolExecutor() as pool:
        made = pool.submit(vault.allocate_own, 0, UNIQUE, 100)
        slow.begun.acquire()
        try:
            vault.close()
        finally:
            slow.go_on.set()
        with pytest.raises(VaultError, match="closed"):
            made.result()
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_another_arena_is_about_to_take_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def nothing(fd: int, size: int) -> None:
        begun.set()
        go_on.wait()
        raise OSError("not now")

    vault, third = Vault(f"t{os.getpid()}", 0), arenas._free_bytes("/dev/shm") // 3
    monkeypatch.setattr(arenas, "populated", nothing)
    with ThreadPoolExecutor() as pool:
        try:
            first = pool.submit(vault.allocate_own, 0, third, 100)  # two slots
            begun.wait()
            with pytest.raises(VaultFull, match=r"but \d+ are there"):
                vault.allocate_own(1, third, 100)
        finally:
            go_on.set()
        with pytest.raises(VaultFull, match="not now"):
            first.result()
    assert arenas._free_bytes("/dev/shm") > third and not arenas._making


def test_allocated_memory_is_given_back(vault: Vault) -> None:
    info = vault.allocate_own(0, UNIQUE, 100)
    vault.allocate_peer(0, UNIQUE, 100)
    assert vault.bytes_allocated == 2 * info.total_bytes == 2 * Path(info.path).stat().st_size
    with pytest.raises(VaultError, match="drop it first"):
        vault.allocate_own(0, UNIQUE + 1, 100)
    vault.drop(0, "peer")
    assert vault.bytes_allocated == info.total_bytes
    vault.drop(0)
    assert not Path(info.path).exists()


def test_dropped_memory_is_unmapped_even_while_the_agent_lives(vault: Vault) -> None:
    path = vault.allocate_peer(5, UNIQUE, 100).path
    assert path in Path("/proc/self/maps").read_text()
    vault.drop(5)
    assert path not in Path("/proc/self/maps").read_text()


def test_leftovers_of_a_dead_agent_are_cleaned_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from deadpool_megatron.vault import Vault\n"
        "vault = Vault('left', 1, directory=sys.argv[1])\n"
        "vault.allocate_own(3, 100000, 100)\n"
        "print('made', flush=True)\n"
        "sys.stdin.read()\n"
        "os._exit(9)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "made\n"
    (tmp_path / "deadpool-something-else").write_text("not an arena")
    assert clean_leftovers(str(tmp_path)) == []
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert clean_leftovers(str(tmp_path)) == ["deadpool-left-1-3-own"]
    assert [path.name for path in tmp_path.iterdir()] == ["deadpool-something-else"]


def test_arenas_of_another_container_that_lives_are_not_cleaned(tmp_path: Path) -> None:
    """It shares the directory, and its process ids mean nothing here."""
    contained = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*contained, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a process namespace")
    vault = Vault("elsewhere", 0, str(tmp_path))
    path = vault.allocate_own(0, UNIQUE, 100).path
    code = "import sys; from deadpool_megatron.vault import clean_leftovers; clean_leftovers(sys.argv[1])"
    subprocess.run([*contained, sys.executable, "-c", code, str(tmp_path)], check=True)
    SlotWriter(path).close()
    vault.drop(0)
    vault.allocate_own(0, UNIQUE, 100)  # its name is free again


def test_an_arena_of_a_living_job_is_not_taken_over(vault: Vault) -> None:
    vault.allocate_own(0, UNIQUE, 100)
    with pytest.raises(VaultError, match="living agent"):
        Vault(vault.job_id, 0).allocate_own(0, UNIQUE, 100)


def test_a_file_that_is_no_arena_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(8192))
    with pytest.raises(VaultError, match="not an arena"):
        Arena.attach(str(tmp_path / "x"))
    with pytest.raises(VaultError, match="agent that owned it is gone"):
        Arena.attach(str(tmp_path / "y"))


def test_job_ids_cannot_name_other_directories() -> None:
    with pytest.raises(VaultError, match="job id"):
        Vault("../x", 0)


def test_a_shard_without_unique_bytes_works(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, 0, 100).path)
    assert writer.open(0, 0, b"only small") is not None
    writer.complete()
    while vault.checksum(0):
        pass
    assert writer.read(Version(0, 0))[0] == b"only small"


def test_the_doorbell_rings_when_there_is_more_to_send_and_never_blocks(vault: Vault) -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        writer = SlotWriter(vault.allocate_own(0, UNIQUE, 100).path, bell)
        writer.open(0, 0, b"")
        writer.publish(CHUNK)
        writer.complete()
        assert os.eventfd_read(bell) == 2  # the opening is heard of with the first bytes
        os.eventfd_write(bell, (1 << 64) - 2)
        writer.open(0, 1, b"")
        writer.publish(CHUNK)
    finally:
        os.close(bell)


# ---- what is set aside

BASE = Version(0, 7)


def stored(vault: Vault, rank: int, version: Version, fill: int, kind: Kind = "own") -> Slot:
    """A complete copy."""
    if kind == "peer":
        vault.allocate_peer(rank, UNIQUE, 100)
        arena = vault.arena(rank, "peer")
        assert arena is not None
        slot = next(slot for slot in arena.slots if slot.begin == EMPTY)
        slot.reopen(version.pack())
        _filled(slot, fill)
        slot.small_bytes = 5
        slot.sum_up(5)
        slot.mark_complete()
        slot.seal()
        return slot

    def put(open_slot: Callable[[int, int], Slot], check: Callable[[], None]) -> int:
        return _filled(open_slot(UNIQUE, 100), fill)

    store_shard(vault, rank, vault.epoch, version, put)
    return vault.find(rank, version, ("own",))[1]


def _filled(slot: Slot, fill: int) -> int:
    slot.small[:5] = b"small"
    slot.unique[:] = bytes([fill]) * len(slot.unique)
    return 5


def constants(vault: Vault, rank: int, data: bytes) -> None:
    holder = constants_of(rank)
    writer = ConstantsWriter(vault.allocate_own(holder, len(data), 100).path)
    assert writer.begin() is not None
    writer.buffer[:] = np.frombuffer(data, np.uint8)
    writer.complete()
    vault.checksum(holder)
    writer.close()


def test_what_is_set_aside_is_found_unchanged_whatever_the_vault_does_next(vault: Vault) -> None:
    info = vault.allocate_own(3, UNIQUE, 100)
    stored(vault, 3, Version(0, 6), 6)
    stored(vault, 3, BASE, 7)
    stored(vault, 4, BASE, 8, "peer")
    stored(vault, 5, Version(0, 6), 9)
    constants(vault, 3, b"what never changes")
    vault.allocate_parity(1, CHUNK, 100)
    holder = constants_of(3)
    vault.set_epoch(1)
    assert vault.set_aside(BASE, -1) == vault.aside == {3: ("own",), 4: ("peer",), holder: ("own",)}
    assert vault.arenas() == [] and vault.holdings().ranks == {} and not Path(info.path).exists()
    # all that may be told or asked of a vault, and new memory of the same ranks
    vault.allocate_own(3, 2 * UNIQUE, 200)
    stored(vault, 4, Version(1, 8), 1, "peer")
    stored(vault, 5, BASE, 2)
    constants(vault, 3, b"others")
    vault.set_epoch(2)
    vault.pin()
    vault.set_committed(2, 9)
    vault.set_floor(2, 12)
    vault.unpin()
    for rank in (3, 4, 5, holder):
        vault.checksum(rank)
        vault.drop(rank)
    for rank, fill, kind in ((3, 7, "own"), (4, 8, "peer")):
        arena, slot = vault.find(rank, BASE)
        slot.verify()
        assert bytes(slot.unique) == bytes([fill]) * UNIQUE and arena.info.kind == kind
        assert slot.small[:5] == b"small" and slot.small_bytes == 5
    assert bytes(vault.find(holder, BASE)[1].unique) == b"what never changes"
    for rank, version in ((3, Version(0, 6)), (5, BASE), (holder, CONSTANT), (4, Version(1, 8))):
        with pytest.raises(NotHeld):
            vault.find(rank, version)
    with pytest.raises(NotHeld):
        vault.find(4, BASE, ("own",))
    with pytest.raises(NotHeld):
        vault.find(1, BASE, ("parity",))
    assert vault.aside == {3: ("own",), 4: ("peer",), holder: ("own",)}


def test_of_two_copies_of_a_rank_its_own_one_is_set_aside_unless_only_the_other_is_complete(vault: Vault) -> None:
    for rank in (0, 1):
        stored(vault, rank, BASE, 1, "own")
        stored(vault, rank, BASE, 1, "peer")
    own = vault.find(1, BASE, ("own",))[1]
    own.give_up(own.turn)
    stored(vault, 2, BASE, 1).reopen(Version(0, 8).pack())
    assert vault.set_aside(BASE, -1) == {0: ("own",), 1: ("peer",)}


def test_a_start_that_begins_anew_keeps_its_base_and_adds_nothing_to_it(vault: Vault) -> None:
    slot = stored(vault, 0, BASE, 1)
    constants(vault, 0, b"old")
    aside = {0: ("own",), constants_of(0): ("own",)}
    vault.set_epoch(1)
    assert vault.set_aside(BASE, -1) == aside
    stored(vault, 0, Version(1, 7), 2)
    stored(vault, 1, BASE, 3)
    for rank in (0, 1):
        constants(vault, rank, b"of other coordinates")
    vault.set_epoch(2)
    assert vault.set_aside(BASE, -1) == aside, "what is new has the same numbers and is of others"
    assert vault.arenas() == [] and vault.find(0, BASE)[1].unique is slot.unique
    slot.verify()
    assert bytes(vault.find(constants_of(0), BASE)[1].unique) == b"old"
    # a vault that had nothing of the base has nothing of it later, either
    vault.let_go()
    assert vault.set_aside(Version(0, 9), -1) == {}
    constants(vault, 0, b"new")
    assert vault.set_aside(Version(0, 9), -1) == {}


def test_another_base_takes_the_place_of_the_one_before(vault: Vault) -> None:
    stored(vault, 0, BASE, 1)
    stored(vault, 1, BASE, 1)
    constants(vault, 0, b"old")
    vault.set_aside(BASE, -1)
    new = Version(1, 9)
    stored(vault, 0, new, 2)
    constants(vault, 0, b"new")
    assert vault.set_aside(new, -1) == {0: ("own",), constants_of(0): ("own",)}
    assert bytes(vault.find(constants_of(0), new)[1].unique) == b"new"
    assert vault.find(0, new)[1].unique[0] == 2
    for rank in (0, 1, constants_of(0)):
        with pytest.raises(NotHeld):
            vault.find(rank, BASE)
    assert vault.bytes_allocated < Arena.size(0, "own", UNIQUE, 100, CHUNK) + 8 * 4096


def test_what_is_aside_counts_with_what_it_still_has_until_it_is_let_go(vault: Vault) -> None:
    info = vault.allocate_own(3, UNIQUE, 100)
    stored(vault, 3, Version(0, 6), 6)
    stored(vault, 3, BASE, 7)
    file = os.open(info.path, os.O_RDONLY)
    try:
        assert 512 * os.fstat(file).st_blocks == info.total_bytes
        vault.set_aside(BASE, -1)
        left = vault.bytes_allocated
        vault.freed()
        assert left == 512 * os.fstat(file).st_blocks, "the other slot has no memory any more"
        assert info.total_bytes / 2 < left < info.total_bytes / 2 + 4 * 4096
        vault.limit_bytes = left + info.total_bytes - 1
        with pytest.raises(VaultFull, match=f"has {left} of the"):
            vault.allocate_own(3, UNIQUE, 100)
        assert str(vault.job_id) in Path("/proc/self/maps").read_text()
        vault.let_go()
        assert vault.bytes_allocated == 0 and vault.aside == {}
        vault.freed()
        assert 512 * os.fstat(file).st_blocks < 4 * 4096
        assert str(vault.job_id) not in Path("/proc/self/maps").read_text()
        vault.allocate_own(3, UNIQUE, 100)
    finally:
        os.close(file)


def test_letting_go_and_closing_leave_the_file_of_new_memory_alone_and_none_behind(tmp_path: Path) -> None:
    vault = Vault("aside", 0, str(tmp_path), CHUNK)
    stored(vault, 3, BASE, 7)
    vault.set_aside(BASE, -1)
    assert list(tmp_path.iterdir()) == [], "an agent that is killed leaves nothing of it"
    path = vault.allocate_own(3, UNIQUE, 100).path
    vault.let_go()
    SlotWriter(path).close()
    stored(vault, 3, BASE, 7)
    assert vault.set_aside(BASE, -1) == {3: ("own",)}, "it is not the one that was let go"
    vault.allocate_own(3, UNIQUE, 100)
    vault.close()
    assert list(tmp_path.iterdir()) == [] and vault.bytes_allocated == 0


def test_a_worker_that_still_has_the_memory_can_write_nothing_into_what_is_aside(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, UNIQUE, 100).path)
    assert write(vault, writer, 0, 7, 1)
    assert writer.open(0, 8, b"small") is not None
    assert vault.set_aside(BASE, -1) == {0: ("own",)}
    writer.buffer[:] = 9  # in the other slot, which it has open
    writer.complete()
    vault.set_epoch(5)
    for epoch in (0, 5):
        with pytest.raises(StaleEpoch):
            writer.open(epoch, 9, b"small")
    vault.find(0, BASE)[1].verify()
    with pytest.raises(NotHeld):
        vault.find(0, Version(0, 8))
    writer.close()


def test_who_reads_what_is_given_back_finds_that_it_is_over(vault: Vault) -> None:
    slot, other = stored(vault, 0, BASE, 1), stored(vault, 0, Version(0, 8), 2)
    turns = slot.turn, other.turn
    vault.set_aside(BASE, -1)
    assert slot.turn == turns[0] and slot.complete and slot.unique[-1] == 1
    assert other.turn != turns[1] and not other.complete and not other.damaged
    vault.let_go()
    assert slot.turn != turns[0] and not slot.complete and not slot.damaged
    vault.freed()
    assert not any(slot.unique), "the memory is no more"


def test_which_versions_of_a_generation_are_set_aside(vault: Vault) -> None:
    """Where the run is repeatable whichever each rank has, else those of one epoch."""
    for rank, epoch in ((0, 0), (1, 1), (2, 2)):
        stored(vault, rank, Version(epoch, 7), rank)
    base = Version(1, 7)
    assert vault.set_aside(base, -1).keys() == {0, 1}, "the third is of a later epoch"
    assert [vault.find(rank, base)[1].unique[0] for rank in (0, 1)] == [0, 1]
    for rank, epoch in ((0, 0), (1, 1)):
        stored(vault, rank, Version(epoch, 7), rank)
    assert vault.set_aside(Version(2, 7), 1).keys() == {1}


def test_a_copy_that_is_aside_and_changes_is_not_found_any_more(vault: Vault) -> None:
    slot = stored(vault, 0, BASE, 1)
    vault.set_aside(BASE, -1)
    slot.unique[5] ^= 1
    assert not slot.recheck() and vault.aside == {}
    with pytest.raises(NotHeld):
        vault.find(0, BASE)
