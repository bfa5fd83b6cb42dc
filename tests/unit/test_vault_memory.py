"""The promise: an arena's memory is there, where it should be, and what changes in it is noticed."""

from __future__ import annotations

import ctypes
import os
import queue
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deadpool_megatron.vault import Scrubber, SlotWriter, Vault, Version, huge_bytes, numa_nodes
from deadpool_megatron.vault import memory as placed

SIZE = 3 << 20


@pytest.fixture
def vault() -> Iterator[Vault]:
    made = Vault(f"m{os.getpid()}", 0, chunk_bytes=1 << 16)
    yield made
    made.close()


def _written(vault: Vault, rank: int = 0, generation: int = 1) -> SlotWriter:
    writer = SlotWriter(vault.allocate_own(rank, SIZE, 4096).path)
    writer.open(0, generation, b"small")
    writer.buffer[:] = rank + 1
    writer.complete()
    vault.checksum(rank)
    return writer


def _eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("where", ["small state", "first chunk", "last chunk"])
def test_a_bit_that_flips_in_memory_is_found_and_the_copy_is_not_held_any_more(vault: Vault, where: str) -> None:
    good, bad = _written(vault, 0), _written(vault, 1)
    arena = vault.arena(1, "own")
    assert arena is not None
    slot = arena.find(Version(0, 1))
    assert slot is not None
    view, at = {"small state": (slot.small, 2), "first chunk": (slot.unique, 0), "last chunk": (slot.unique, -1)}[where]
    view[at] ^= 1
    found: queue.Queue[tuple[int, str, Version]] = queue.Queue()
    scrubber = Scrubber(vault, 1 << 30, lambda *what: found.put(what))
    try:
        assert found.get(timeout=20) == (1, "own", Version(0, 1))
        passes = scrubber.passes
        _eventually(lambda: scrubber.passes >= passes + 2)
        assert found.empty(), "told once"
    finally:
        scrubber.stop()
    held = vault.holdings().ranks
    assert [h.generation for h in held[0]] == [1] and held[1] == ()
    vault.checksum(1)  # the agent's own sums must not bless it again
    assert vault.holdings().ranks[1] == ()
    # what is written next is held again
    assert bad.open(0, 2, b"small") is not None
    bad.complete()
    vault.checksum(1)
    assert [h.generation for h in vault.holdings().ranks[1]] == [2]
    good.close()
    bad.close()


def test_a_scrub_keeps_to_its_rate_and_stops_at_once(vault: Vault) -> None:
    _written(vault).close()
    scrubber = Scrubber(vault, SIZE // 4, lambda *what: pytest.fail("nothing is damaged"))
    time.sleep(2.5)
    assert scrubber.passes == 0, "reading 3 MiB takes 4 s at this rate"
    start = time.monotonic()
    scrubber.stop()
    assert time.monotonic() - start < 1.0


def test_a_slot_written_while_it_is_scrubbed_is_left_alone(vault: Vault) -> None:
    writer = _written(vault)
    scrubber = Scrubber(vault, 1 << 34, lambda *what: pytest.fail("nothing is damaged"))
    try:
        end = time.monotonic() + 2.5
        generation = 1
        while time.monotonic() < end:
            generation += 1
            vault.set_committed(0, generation - 1)
            assert writer.open(0, generation, b"small") is not None
            writer.buffer[:] = generation % 251
            writer.complete()
            vault.checksum(0)
    finally:
        scrubber.stop()
    assert [h.generation for h in vault.holdings().ranks[0]][-1] == generation
    writer.close()


def test_pages_are_huge_where_the_file_system_gives_them(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "huge=advise,size=64m", "none", str(tmp_path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system with huge pages cannot be mounted here: {done.stderr.strip()}")
    try:
        vault = Vault("h", 0, str(tmp_path))
        arena = vault.arena(0, vault.allocate_own(0, 16 << 20, 4096).kind)
        assert arena is not None
        huge = huge_bytes(arena.path)
        assert huge >= 24 << 20, f"only {huge} bytes of {arena.info.total_bytes} are in huge pages"
        vault.close()
    finally:
        del arena
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def _policy_now() -> int:
    mode = ctypes.c_int(-1)
    call = ctypes.CDLL(None).syscall
    number = {"x86_64": 239, "aarch64": 236}[os.uname().machine]
    assert call(ctypes.c_long(number), ctypes.byref(mode), None, ctypes.c_ulong(0), None, ctypes.c_ulong(0)) == 0
    return mode.value


def test_memory_is_asked_from_a_numa_node_only_while_an_arena_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = numa_nodes()
    if not nodes or os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("this kernel knows no NUMA nodes")
    assert set.union(*nodes.values()) >= os.sched_getaffinity(0)
    with placed.on_numa_node(0) as asked:
        assert asked == (len(nodes) > 1)
    # as on a machine with two: the kernel really gets the call, for its node 0
    monkeypatch.setattr(placed, "numa_nodes", lambda: {0: {0}, 1: {1}})
    with placed.on_numa_node(0) as asked:
        assert asked and _policy_now() == 1
    assert _policy_now() == 0
    assert placed.numa_node_of_process() in (-1, 0, 1)
