"""Where an arena's pages are: huge ones where the kernel gives them, on the NUMA node of who writes them."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

_POPULATE_WRITE: Final = 23  # madvise(2), from Linux 5.14
_STEP: Final = 1 << 30
_SET_MEMPOLICY: Final = {"x86_64": 238, "aarch64": 237}
_DEFAULT, _PREFERRED, _INTERLEAVE = 0, 1, 3
_NODES: Final = Path("/sys/devices/system/node")
_DEVICES: Final = Path("/sys/bus/pci/devices")


def populated(fd: int, size: int) -> mmap.mmap:
    """Map a file and take all page faults now; in huge pages where shared memory allows them.

    They are there when ``/sys/kernel/mm/transparent_hugepage/shmem_enabled`` says ``advise`` (or more), or when the
    file system was mounted with ``huge=advise``. Memory that is not there is no error here, but one on first use.
    """
    mapped = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
    with suppress(OSError):  # a kernel without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    if _populate(mapped):
        return mapped
    mapped.close()
    return mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _populate(mapped: mmap.mmap) -> bool:
    """Whether all pages are there now.

    Not by `mmap.madvise`: that keeps the GIL, and no thread of an agent ran for the 12 s that 40 GB take. In steps,
    since the kernel holds the process's map of memory meanwhile.
    """
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    steps = range(0, len(mapped), _STEP)
    return all(madvise(start + at, min(_STEP, len(mapped) - at), _POPULATE_WRITE) == 0 for at in steps)


def give_back(mapped: mmap.mmap, start: int, size: int) -> bool:
    """Give pages of a mapped file back to its file system, which has a hole there; False where it cannot do that.

    Not by `mmap.madvise`, which keeps the GIL, and in steps, as `_populate`. ``start`` and ``size``: whole pages.
    """
    first = ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + start
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    steps = range(0, size, _STEP)
    return all(madvise(first + at, min(_STEP, size - at), mmap.MADV_REMOVE) == 0 for at in steps)


def huge_bytes(*paths: str) -> int:
    """How many bytes of this process's mappings of ``paths`` are in huge pages."""
    with open("/proc/self/smaps") as smaps:  # the kernel walks all pages for it: once
        mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read(), flags=re.MULTILINE)
    sizes = re.compile(r"^(?:Shmem|File)PmdMapped: *(\d+) kB$", re.MULTILINE)
    ours = [mapping for mapping in mappings if mapping.partition("\n")[0].endswith(paths)]
    return 1024 * sum(int(size) for mapping in ours for size in sizes.findall(mapping))


@cache
def numa_nodes(directory: Path = _NODES) -> dict[int, set[int]]:
    """The processors of each NUMA node that has memory; empty where the kernel does not say. Read once."""
    out: dict[int, set[int]] = {}
    with_memory = _numbers(directory / "has_memory")
    for path in directory.glob("node[0-9]*/cpulist"):
        node = int(path.parent.name.removeprefix("node"))
        if with_memory is None or node in with_memory:
            out[node] = _numbers(path) or set()
    return out


def _numbers(path: Path) -> set[int] | None:
    """A list in a file of the kernel's; None when there is no such file."""
    try:
        return parse_cpus(path.read_text())
    except OSError:
        return None


def parse_cpus(text: str) -> set[int]:
    """The numbers of a list as the kernel writes it, as in ``0-3,8``. Raises ValueError for anything else."""
    out: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        out |= set(range(int(first), int(last or first) + 1))
    return out


def numa_node_of_process() -> int:
    """The NUMA node that has all processors this process may run on; -1 without one, or where there is only one."""
    nodes = numa_nodes()
    mine = os.sched_getaffinity(0)
    inside = [node for node, cpus in nodes.items() if mine <= cpus]
    return inside[0] if len(inside) == 1 and len(nodes) > 1 else -1


def numa_node_of_device(bus_id: str, directory: Path = _DEVICES) -> int:
    """The NUMA node a PCI device (``0000:3b:00.0``) hangs on; -1 when it is not known, as on machines with one node."""
    try:
        return int((directory / bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return -1


@contextmanager
def on_numa_node(node: int) -> Iterator[bool]:
    """Memory that this thread takes inside comes from ``node`` first, or from all in turn when it is negative.

    Yields whether that could be asked for; a machine with one node has nothing to ask.
    """
    nodes = sorted(numa_nodes())
    wanted = [node] if node in nodes else nodes
    asked = len(nodes) > 1 and _policy(_PREFERRED if node in nodes else _INTERLEAVE, wanted)
    try:
        yield asked
    finally:
        if asked:
            _policy(_DEFAULT, [])


def _policy(mode: int, nodes: list[int]) -> bool:
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return False
    mask = ctypes.c_ulong(sum(1 << node for node in nodes))
    bits = 8 * ctypes.sizeof(mask) if nodes else 0
    call = ctypes.CDLL(None, use_errno=True).syscall
    return bool(call(ctypes.c_long(number), mode, ctypes.byref(mask) if nodes else None, ctypes.c_ulong(bits)) == 0)
