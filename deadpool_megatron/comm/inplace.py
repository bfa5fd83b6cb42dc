"""Put another backend into a living ProcessGroup, and let the old one go.

torch (2.11-2.14) offers `_register_backend`, which adds: a backend that is in a group once is never released, and
under a backend type already taken the old one silently stays. So the old backend's threads, descriptors and
connections would stay for ever, and the one-byte backend types run out after 249 swaps.

`exchange` does what a C++ `std::swap` would: the group and a *donor* group (which owns the new backend under the
same devices and types) trade their owning pointers. Every pointer keeps exactly one owner, so reference counts stay
right by construction, and dropping the donor afterwards destroys the old backend. The places are found by value:
only words that hold the exact address of the old (new) backend inside the group's (donor's) own maps are touched,
all memory is looked at through /proc/self/mem, which cannot fault, and `self_test` proves the whole thing on
throw-away groups at start. Where it does not hold (another C++ library, another layout) `InPlace` falls back to
fresh backend types: works, but bounded, and dead backends stay.
"""

import ctypes
import os
import struct
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.distributed_c10d as _torch_c10d
from torch._C import _distributed_c10d as _bindings

from deadpool_megatron.comm.reports import ReformError

c10d: Any = _torch_c10d
bindings: Any = _bindings

_OBJECT_HEAD = object.__basicsize__
_GROUP_WORDS = 80  # more than sizeof(ProcessGroup) in any version seen (about 45 words)
_CHAIN = 32  # nodes of one hash map: device types or backend types of one group
_FIRST_FREE_TYPE = 16  # above torch's own backend types
_LAST_TYPE = 255  # they are one byte


def pointee(bound: Any) -> int:
    """Address of the C++ object inside a pybind11 instance (first word after the Python object head)."""
    return int(ctypes.c_uint64.from_address(id(bound) + _OBJECT_HEAD).value)


class Memory:
    """Reads this process's memory without ever faulting."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._pid = os.getpid()

    def words(self, address: int, count: int) -> tuple[int, ...]:
        """Up to `count` 8-byte words at `address`; fewer, or none, where nothing is mapped."""
        if address <= 0 or address >= 1 << 63 or self._pid != os.getpid():
            return ()
        try:
            data = os.pread(self._fd, 8 * count, address)
        except OSError:
            return ()
        return struct.unpack(f"={len(data) // 8}Q", data[: len(data) // 8 * 8])


def _backend_places(memory: Memory, group: Any, backend_address: int) -> list[int]:
    """Addresses of the words in the group's two hash maps that own the backend (node: next, key, pointer, ...)."""
    places: set[int] = set()
    for word in memory.words(pointee(group), _GROUP_WORDS):
        node = word
        for _ in range(_CHAIN):
            if node % 8 or not (words := memory.words(node, 3))[2:]:
                break
            if words[2] == backend_address:
                places.add(node + 16)
            node = words[0]
    return sorted(places)


def _store_places(memory: Memory, group: Any, store_address: int) -> list[int]:
    base = pointee(group)
    return [base + 8 * i for i, w in enumerate(memory.words(base, _GROUP_WORDS)) if w == store_address]


def _trade(left: list[int], right: list[int]) -> None:
    for a, b in zip(left, right, strict=True):
        x, y = ctypes.c_uint64.from_address(a), ctypes.c_uint64.from_address(b)
        x.value, y.value = y.value, x.value


@dataclass(frozen=True, slots=True)
class Replacement:
    """New backends for one group: (device types, backend type, backend) for each distinct backend, and the store."""

    backends: list[tuple[list[str], Any, Any]]
    store: Any
    default_type: Any


class InPlace:
    """Replaces backends of ProcessGroups. `exact` tells whether the exchange is available (else fresh types)."""

    def __init__(self) -> None:
        self._memory: Memory | None
        try:
            self._memory = Memory()
        except OSError:
            self._memory = None
        self.exact = self._memory is not None and self._self_test(self._memory)
        self._next_type: dict[str, int] = {}  # by group, only without the exchange

    @staticmethod
    def _self_test(memory: Memory) -> bool:
        kind = c10d.ProcessGroup.BackendType.CUSTOM
        groups = [c10d.ProcessGroup(bindings.HashStore(), 0, 1) for _ in range(2)]
        backends = [bindings.FakeProcessGroup._create_internal(0, 1) for _ in range(2)]
        for group, backend in zip(groups, backends, strict=True):
            for device in ("cpu", "cuda"):
                group._register_backend(torch.device(device), kind, backend)
        places = [_backend_places(memory, g, pointee(b)) for g, b in zip(groups, backends, strict=True)]
        if [len(found) for found in places] != [3, 3]:  # two devices and one type
            return False
        _trade(*places)
        return all(
            group._get_backend(torch.device(device)) is backend and group._backend_id(kind) == pointee(backend)
            for group, backend in zip(groups, reversed(backends), strict=True)
            for device in ("cpu", "cuda")
        )

    def replace(self, group: Any, new: Replacement, *, fresh_group: bool) -> Any:
        """Give `group` its new backends and store. Returns the donor: it owns what the group had; drop it to destroy
        that (blocks until the old backend's threads have ended, so not on the training thread).

        `fresh_group`: the group never had these backend types (a standby's fake group), so they are added.
        Raises ReformError when fresh types have run out.
        """
        donor = c10d.ProcessGroup(new.store, group.rank(), group.size())
        donor.bound_device_id = group.bound_device_id
        for devices, kind, backend in new.backends:
            if fresh_group or not self.exact:
                if not fresh_group:
                    kind = self._fresh_type(group.group_name)
                for device in devices:
                    group._register_backend(torch.device(device), kind, backend)
            else:
                self._exchange_backend(group, donor, devices, kind, backend)
        group._set_default_backend(new.default_type)
        if self._memory is not None and self.exact:
            old, fresh = (_store_places(self._memory, g, pointee(g.get_group_store())) for g in (group, donor))
            if len(old) == len(fresh) == 1:
                _trade(old, fresh)
        return donor

    def _fresh_type(self, name: str) -> Any:
        number = self._next_type.get(name, _FIRST_FREE_TYPE)
        if number > _LAST_TYPE:
            raise ReformError(f"group {name!r} has used up torch's backend types; this worker must be restarted")
        self._next_type[name] = number + 1
        return c10d.ProcessGroup.BackendType(number)

    def _exchange_backend(self, group: Any, donor: Any, devices: list[str], kind: Any, backend: Any) -> None:
        assert self._memory is not None
        for device in devices:
            donor._register_backend(torch.device(device), kind, backend)
        old = _backend_places(self._memory, group, group._backend_id(kind))
        fresh = _backend_places(self._memory, donor, pointee(backend))
        if len(old) != len(fresh) or len(old) != len(devices) + 1:
            raise ReformError(
                f"group {group.group_name!r}: found {len(old)} and {len(fresh)} places of its backend, "
                f"want {len(devices) + 1}; was a backend added to it by hand?"
            )
        _trade(old, fresh)
        if group._backend_id(kind) != pointee(backend):
            raise ReformError(f"group {group.group_name!r}: the new backend did not arrive in the group")
