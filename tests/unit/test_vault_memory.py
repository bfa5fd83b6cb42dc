"""The promise: an arena's memory is there, where it should be, and what changes in it is noticed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deadpool_megatron.vault import Scrubber, SlotWriter, Vault, Version, fetch, huge_bytes, numa_nodes
from deadpool_megatron.vault import memory as placed
from waiting import until

SIZE = 3 << 20


@pytest.fixture
def vault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vault]:
    monkeypatch.setattr("deadpool_megatron.vault.scrub._REST_S", 0.05)
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
        assert found.get() == (1, "own", Version(0, 1))
        passes = scrubber.passes
        until(lambda: scrubber.passes >= passes + 2, "two passes")
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


def test_a_scrub_keeps_to_its_rate(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = 1000.0  # no pause within a pass is so long
    monkeypatch.setattr("deadpool_megatron.vault.scrub._REST_S", rest)
    _written(vault).close()
    waited: list[float] = []
    rests: list[int] = []

    def wait(seconds: float) -> bool:
        started.wait()
        if seconds == rest:
            rests.append(scrubber.passes)
        waited.append(seconds)
        return len(rests) > 1

    started = threading.Event()
    scrubber = Scrubber(vault, SIZE // 4, lambda *what: pytest.fail("damaged"), lambda: sum(waited), wait)
    started.set()
    scrubber._thread.join()
    assert rests == [0, 1], "one pass"
    assert 3.9 < sum(waited[1:-1]) < 4.1, "reading 3 MiB takes 4 s at this rate"
    assert max(waited[1:-1]) < 0.2, "spread over them"


def test_a_scrub_stops_at_once_although_it_is_far_ahead_of_its_rate(vault: Vault) -> None:
    _written(vault).close()
    scrubber = Scrubber(vault, 1e-6, lambda *what: pytest.fail("nothing is damaged"))  # type: ignore[arg-type]
    until(lambda: scrubber._due > time.monotonic() + 1e6, "a pause of weeks")
    scrubber.stop()
    assert scrubber.passes == 0


def test_a_slot_written_while_it_is_scrubbed_is_left_alone(vault: Vault) -> None:
    writer = _written(vault)
    scrubber = Scrubber(vault, 1 << 34, lambda *what: pytest.fail("nothing is damaged"))
    try:
        generation = 1
        while scrubber.passes < 2:
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


@pytest.mark.timeout(60)
def test_other_threads_run_while_memory_is_cleared() -> None:
    size, seen = 64 << 20, set[int]()
    while len(seen) < 2:  # a second look in the middle of it (for which this thread may get no processor)
        seen.clear()
        fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
        os.ftruncate(fd, size)
        clearing = threading.Thread(target=lambda fd=fd: placed.populated(fd, size).close())
        clearing.start()
        while clearing.is_alive():
            seen.add(512 * os.fstat(fd).st_blocks)
        seen -= {0, size}
        clearing.join()
        assert 512 * os.fstat(fd).st_blocks == size
        os.close(fd)


def test_pages_are_huge_where_the_file_system_gives_them(mounted: Callable[[str], Path]) -> None:
    vault = Vault("h", 0, str(mounted("huge=advise,size=64m")))
    arena = vault.arena(0, vault.allocate_own(0, 16 << 20, 4096).kind)
    assert arena is not None
    huge = huge_bytes(arena.path)
    assert huge >= 24 << 20, f"only {huge} bytes of {arena.info.total_bytes} are in huge pages"
    vault.close()


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


def _fake_nodes(root: Path, cpus: dict[int, str], has_memory: str | None) -> Path:
    """A tree as /sys/devices/system/node has it."""
    for node, text in cpus.items():
        (root / f"node{node}").mkdir(parents=True)
        (root / f"node{node}" / "cpulist").write_text(text + "\n")
    if has_memory is not None:
        (root / "has_memory").write_text(has_memory + "\n")
    return root


def test_nodes_are_read_as_the_kernel_writes_them_and_those_without_memory_are_none(tmp_path: Path) -> None:
    tree = _fake_nodes(tmp_path / "a", {0: "0-3,8", 1: "4-7,9-11", 2: "", 16: "12"}, "0-1,16")
    assert numa_nodes(tree) == {0: {0, 1, 2, 3, 8}, 1: {4, 5, 6, 7, 9, 10, 11}, 16: {12}}
    # memory without processors (of an accelerator, or CXL) is a node; an older kernel says nothing of memory
    assert numa_nodes(_fake_nodes(tmp_path / "b", {0: "0-1", 1: ""}, "0-1")) == {0: {0, 1}, 1: set()}
    assert numa_nodes(_fake_nodes(tmp_path / "c", {0: "0-1"}, None)) == {0: {0, 1}}
    assert numa_nodes(tmp_path / "none") == {}


def test_the_node_of_a_device_is_that_of_its_pci_address(tmp_path: Path) -> None:
    for name, node in (("0000:3b:00.0", "1"), ("0000:86:00.0", "-1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numa_node").write_text(node + "\n")
    assert placed.numa_node_of_device("0000:3B:00.0", tmp_path) == 1
    assert placed.numa_node_of_device("0000:86:00.0", tmp_path) == -1
    assert placed.numa_node_of_device("0000:ff:00.0", tmp_path) == -1


def test_memory_a_spare_takes_for_a_shard_it_fetches_is_near_its_own_device(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arena is made by the fetch, in the agent, which has no device: it goes by what the parked worker has said."""
    asked: list[int] = []

    @contextlib.contextmanager
    def noting(node: int) -> Iterator[bool]:
        asked.append(node)
        yield False

    monkeypatch.setattr("deadpool_megatron.vault.vault.on_numa_node", noting)
    holder = Vault(f"n{os.getpid()}", 1, chunk_bytes=1 << 16)
    try:
        _written(holder, 3).close()
        vault.set_near(3, 1)
        fetch(vault, bytes(32), holder, 3, 0, Version(0, 1))
        vault.allocate_peer(3, SIZE, 4096)
        _written(vault, 4).close()
        vault.drop(4)
        vault.allocate_own(4, SIZE, 4096, 5)
    finally:
        holder.close()
    assert asked[1:] == [1, -1, -1, 5], "the shard near the device; what is kept for others, and unnamed, anywhere"
