"""Which processors an agent runs on: a few near its workers' devices, which the workers do not need.

Workers may still run everywhere they were allowed to: they are started with the mask the agent began with. A drainer
that is started later stays with the agent.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from deadpool_megatron.vault import numa_nodes, parse_cpus

_SHARE: Final = 8  # one core of so many of a NUMA node is the agent's,
_LEAST: Final = 2  # but no fewer than these: one for the loop with its heartbeats, one for the vault's threads
_PER_WORKER: Final = 2  # cores that each worker keeps for itself: the training thread, and all its other threads
_TOPOLOGY: Final = Path("/sys/devices/system/cpu")


def cores(cpus: Set[int], directory: Path = _TOPOLOGY) -> list[frozenset[int]]:
    """``cpus`` by physical core, in ascending order; each its own where the kernel does not say."""
    found: set[frozenset[int]] = set()
    for cpu in cpus:
        try:
            siblings = parse_cpus((directory / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text())
        except (OSError, ValueError):
            siblings = {cpu}
        found.add(frozenset((siblings | {cpu}) & cpus))
    return sorted(found, key=min)


def choose_cpus(
    allowed: Sequence[Set[int]], workers: Sequence[Set[int]], devices: Collection[int], nodes: Mapping[int, Set[int]]
) -> set[int]:
    """The processors for an agent; none where its workers would be squeezed.

    Taken are cores that few workers may use, the last ones first, on each NUMA node that has a worker's device.

    Args:
        allowed: cores that the node may use, each a set of processors.
        workers: processors each worker may use; of them two cores are left for each worker.
        devices: NUMA node of each worker's device, -1 where it is not known.
        nodes: processors of each NUMA node.
    """
    masks = Counter(frozenset(mask) for mask in workers)

    def left(mask: Set[int], taken: Collection[Set[int]] = ()) -> int:
        """Cores of ``mask`` that are not taken, beyond those that workers with no others need."""
        needed = _PER_WORKER * sum(count for other, count in masks.items() if other <= mask)
        return sum(1 for core in allowed if core & mask and core not in taken) - needed

    roomy = [mask for mask in masks if left(mask) >= _LEAST]
    free = [core for core in allowed if not any(core & mask for mask in masks if mask not in roomy)]
    free.sort(key=lambda core: (sum(count for mask, count in masks.items() if core & mask), -min(core)))
    near = sorted({device for device in devices if nodes.get(device)})
    groups = [[core for core in free if core <= nodes[device]] for device in near]
    chosen: list[Set[int]] = []
    for group in [group for group in groups if group] or [free]:
        chosen += group[: max(_LEAST, len(group) // _SHARE)]
    if len(chosen) < _LEAST or any(left(mask, chosen) < 0 for mask in roomy):
        return set()
    return set().union(*chosen)


def pin_threads(cpus: Set[int]) -> None:
    """Bind every thread of this process, and with them all that they start. Raises OSError where that is refused."""
    done: set[str] = set()
    while new := set(os.listdir("/proc/self/task")) - done:  # one that was started meanwhile has its maker's old mask
        for thread in new:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cpus)
        done |= new


class Pinning:
    """Pins an agent once, when all its workers have told where their devices are. Used by the agent's thread only.

    Args:
        slots: how many workers there are; 0: it is never pinned.

    Attributes:
        cpus: the processors the agent is pinned to; empty while it is not.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._before = os.sched_getaffinity(0)
        self._devices: dict[int, int] = {}
        self.cpus: set[int] = set()

    def located(self, local: int, numa: int, pids: Collection[int]) -> bool:
        """Worker ``local`` has its device on NUMA node ``numa`` (-1: not known yet). True when the agent is pinned now.

        ``pids`` are the workers' process ids: one that is bound to processors of its own has them for itself.
        """
        waited = len(self._devices) < self._slots or self._devices.get(local, numa) < 0 <= numa
        self._devices[local] = numa
        if not waited or len(self._devices) < self._slots:
            return False
        masks = []
        for pid in pids:
            with suppress(ProcessLookupError):
                masks.append(os.sched_getaffinity(pid))
        chosen = choose_cpus(cores(self._before), masks, self._devices.values(), numa_nodes())
        if chosen:
            with suppress(OSError):  # a cpuset that is another one by now, a sandbox: then it stays where it is
                pin_threads(chosen)
                self.cpus = chosen
        return bool(self.cpus)

    @contextmanager
    def unpinned(self) -> Iterator[None]:
        """What this thread starts inside may run wherever the agent could when it began."""
        if not self.cpus:
            yield
            return
        with suppress(OSError):
            os.sched_setaffinity(0, self._before)
        try:
            yield
        finally:
            with suppress(OSError):
                os.sched_setaffinity(0, self.cpus)
