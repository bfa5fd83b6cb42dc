"""An agent takes few cores, near the devices, and none that its workers need; workers keep all they could use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadpool_megatron.cluster.agent.pinning import Pinning, choose_cpus, cores, pin_threads
from deadpool_megatron.vault import parse_cpus

# Two sockets of 24 cores, two hardware threads each, numbered as Linux does.
CORES = [{n, n + 48} for n in range(48)]
NODES = {0: {*range(24), *range(48, 72)}, 1: {*range(24, 48), *range(72, 96)}}
ALL = set(range(96))


def _plain(count: int) -> list[set[int]]:
    return [{n} for n in range(count)]


def test_whole_cores_are_taken_at_the_end_of_each_numa_node_that_has_a_device() -> None:
    both = choose_cpus(CORES, [ALL] * 8, [0, 0, 0, 0, 1, 1, 1, 1], NODES)
    assert both == {21, 22, 23, 69, 70, 71, 45, 46, 47, 93, 94, 95}
    assert choose_cpus(CORES, [ALL] * 4, [1] * 4, NODES) == {45, 46, 47, 93, 94, 95}
    assert choose_cpus(CORES, [ALL], [-1], NODES) == {n + d for n in range(42, 48) for d in (0, 48)}


@pytest.mark.parametrize(("cpus", "workers", "taken"), [(1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 1, 2), (4, 2, 0),
                                                        (16, 7, 2), (16, 8, 0), (64, 8, 8)])  # fmt: skip
def test_each_worker_keeps_two_cores_or_the_agent_stays_where_it_is(cpus: int, workers: int, taken: int) -> None:
    chosen = choose_cpus(_plain(cpus), [set(range(cpus))] * workers, [-1], {})
    assert chosen == set(range(cpus - taken, cpus))


def test_cores_that_workers_are_bound_to_are_theirs() -> None:
    assert choose_cpus(_plain(8), [{6}, {7}], [-1], {}) == {4, 5}
    assert choose_cpus(_plain(8), [{6, 7}, {4, 5}, {2, 3}, {0, 1}], [-1], {}) == set()
    # Bound to a socket with room for all of them: the agent takes of it what they can spare.
    assert choose_cpus(CORES, [NODES[0]] * 4, [0] * 4, NODES) == {21, 22, 23, 69, 70, 71}
    assert choose_cpus(CORES, [NODES[0]] * 12, [0] * 12, NODES) == {45, 46, 47, 93, 94, 95}


def test_cores_that_fewer_workers_may_use_come_first() -> None:
    assert choose_cpus(_plain(16), [set(range(8, 16))], [-1], {}) == {6, 7}


def test_a_cpuset_without_the_devices_node_is_used_as_it_is() -> None:
    assert choose_cpus(_plain(8), [set(range(8))], [3], {3: {90, 91}}) == {6, 7}


def test_hardware_threads_of_a_core_are_found(tmp_path: Path) -> None:
    for cpu, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{siblings}\n")
    assert cores({0, 1, 2, 3, 9}, tmp_path) == [{0, 2}, {1, 3}, {9}]
    assert cores({1, 2}, tmp_path) == [{1}, {2}]  # a cpuset that has one thread of each


@pytest.fixture
def own_mask() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("needs two processors")
    yield before
    pin_threads(before)


def test_every_thread_is_bound(own_mask: set[int]) -> None:
    over, masks = threading.Event(), []
    waiting = threading.Thread(target=lambda: (over.wait(), masks.append(os.sched_getaffinity(0))))
    waiting.start()
    pin_threads({min(own_mask)})
    over.set()
    waiting.join()
    assert masks == [{min(own_mask)}] and os.sched_getaffinity(0) == {min(own_mask)}


def test_an_agent_is_pinned_once_all_its_workers_have_told_and_starts_others_unpinned(
    own_mask: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {max(own_mask)}
    seen: list[list[int]] = []

    def choose(allowed: object, workers: object, devices: object, nodes: object) -> set[int]:
        seen.append(list(devices))  # type: ignore[call-overload]
        return one

    monkeypatch.setattr("deadpool_megatron.cluster.agent.pinning.choose_cpus", choose)
    pinning = Pinning(2)
    assert not pinning.located(0, 1, [os.getpid()]) and os.sched_getaffinity(0) == own_mask
    assert pinning.located(1, 0, [os.getpid(), 1 << 30]) and os.sched_getaffinity(0) == one  # a worker that has ended
    assert not pinning.located(0, 1, []) and seen == [[1, 0]]
    later = Pinning(1)
    assert later.located(0, -1, []) and later.located(0, 1, []) and seen[1:] == [[-1], [1]], (
        "a device that comes up later"
    )
    told = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0), sep=',')"]
    assert parse_cpus(subprocess.check_output(told, text=True)) == one
    with pinning.unpinned():
        assert parse_cpus(subprocess.check_output(told, text=True)) == own_mask
    assert os.sched_getaffinity(0) == one


def test_without_slots_nothing_is_ever_pinned(own_mask: set[int]) -> None:
    pinning = Pinning(0)
    assert not pinning.located(0, 0, []) and os.sched_getaffinity(0) == own_mask
