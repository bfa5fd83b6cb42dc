"""The promise: a shard that is given back is whole and unchanged, and memory is there when it is granted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deadpool_megatron.vault import (
    Arena,
    ChecksumMismatch,
    NotHeld,
    SlotWriter,
    StaleEpoch,
    Vault,
    VaultError,
    VaultFull,
    Version,
    clean_leftovers,
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
