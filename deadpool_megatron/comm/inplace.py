"""Put another backend into a living ProcessGroup, and let the old one go.

torch (2.11-2.15) offers `_register_backend`, which adds: a backend that is in a group once is never released, and
under a backend type already taken the old one silently stays. So the old backend's threads, descriptors and
connections would stay for ever, and the one-byte backend types run out after 249 swaps.

`exchange` does what a C++ `std::swap` would: the group and a *donor* group (which owns the new backend under the
same devices and types) trade their owning pointers. Every pointer keeps exactly one owner, so reference counts stay
right by construction, and dropping the donor afterwards releases the old backend. Only words on the live chains of
the group's (donor's) own maps that hold the exact address of the old (new) backend are touched, all memory is
looked at through /proc/self/mem, which cannot fault, and `find_layout` proves the whole thing on throw-away groups
at start. Where it does not hold (another C++ library, another layout) `InPlace` falls back to
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
_GROUP_WORDS = 64  # looked through for the maps once, at start; a group has about 45
_MAP_WORDS = 7  # a std::unordered_map
_LOAD_FACTOR_ONE = 0x3F800000  # 1.0f, the default of every such map
_LONGEST_MAP = 64  # device types or backend types of one group
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


def _map_nodes(memory: Memory, address: int) -> list[int]:
    """Nodes of the std::unordered_map at `address` (libstdc++: buckets, bucket count, first node, size, load factor,
    next resize, single bucket; a node begins with the next one). Empty where there is no such map."""
    words = memory.words(address, _MAP_WORDS)
    if len(words) < _MAP_WORDS or words[4] & 0xFFFFFFFF != _LOAD_FACTOR_ONE or not 0 < words[3] <= _LONGEST_MAP:
        return []
    nodes: list[int] = []
    node = words[2]
    while node and len(nodes) <= words[3]:
        nodes.append(node)
        node = (memory.words(node, 1) or (0,))[0]
    return nodes if len(nodes) == words[3] else []


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a ProcessGroup keeps what it owns, in bytes from its start. Found and proven by `find_layout`."""

    maps: int  # deviceTypeToBackend_, and right behind it backendTypeToBackend_
    store: int

    def backend_places(self, memory: Memory, group: Any, backend: int) -> list[int]:
        """Addresses of the words that own the backend at address `backend` (node: next, key, pointer)."""
        at = pointee(group) + self.maps
        nodes = _map_nodes(memory, at) + _map_nodes(memory, at + 8 * _MAP_WORDS)
        return sorted(node + 16 for node in nodes if memory.words(node, 3)[2:] == (backend,))


def find_layout(memory: Memory) -> Layout | None:
    """Look for a group's owning words in two throw-away groups, trade their backends, and see that it worked.
    None where torch is laid out in an unknown way."""
    kind = c10d.ProcessGroup.BackendType.CUSTOM
    devices = [torch.device(name) for name in ("cpu", "cuda")]
    groups = [c10d.ProcessGroup(bindings.HashStore(), 0, 1) for _ in range(2)]
    backends = [bindings.FakeProcessGroup._create_internal(0, 1) for _ in range(2)]
    for group, backend in zip(groups, backends, strict=True):
        for device in devices:
            group._register_backend(device, kind, backend)
    words = memory.words(pointee(groups[0]), _GROUP_WORDS)
    owned = len(devices) + 1
    stores = [8 * i for i, word in enumerate(words) if word == pointee(groups[0].get_group_store())]
    for maps in range(0, 8 * len(words), 8):
        layout = Layout(maps, stores[0] if len(stores) == 1 else -1)
        places = [layout.backend_places(memory, g, pointee(b)) for g, b in zip(groups, backends, strict=True)]
        if [len(found) for found in places] == [owned, owned]:
            break
    else:
        return None
    _trade(*places)
    worked = all(
        group._get_backend(device) is backend and group._backend_id(kind) == pointee(backend)
        for group, backend in zip(groups, reversed(backends), strict=True)
        for device in devices
    )
    return layout if worked and layout.store >= 0 else None


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
        self._layout: Layout | None = None
        try:
            self._memory = Memory()
            self._layout = find_layout(self._memory)
        except OSError:
            pass  # no /proc/self/mem here
        self.exact = self._layout is not None
        self._next_type: dict[int, int] = {}  # by group's address, only without the exchange

    def replace(self, group: Any, new: Replacement, *, fresh_group: bool) -> Any:
        """Give `group` its new backends and store. Returns the donor: it owns what the group had; drop it to destroy
        that (blocks until the old backend's threads have ended, so not on the training thread).

        `fresh_group`: the group never had these backend types (a standby's fake group), so they are added.
        Raises ReformError when fresh types have run out.
        """
        donor = c10d.ProcessGroup(new.store, group.rank(), group.size())
        donor.bound_device_id = group.bound_device_id
        default_type = new.default_type
        for devices, kind, backend in new.backends:
            if self._layout is not None and not fresh_group:
                self._exchange_backend(self._layout, group, donor, devices, kind, backend)
                continue
            if not fresh_group:
                fresh = self._fresh_type(group)
                default_type = fresh if kind == new.default_type else default_type
                kind = fresh
            for device in devices:
                group._register_backend(torch.device(device), kind, backend)
        group._set_default_backend(default_type)
        if self._layout is not None:
            self._exchange_store(self._layout, group, donor)
        return donor

    def _fresh_type(self, group: Any) -> Any:
        number = self._next_type.get(pointee(group), _FIRST_FREE_TYPE)
        if number > _LAST_TYPE:
            raise ReformError(
                f"group {group.group_name!r} has used up torch's backend types; this worker must be restarted"
            )
        self._next_type[pointee(group)] = number + 1
        return c10d.ProcessGroup.BackendType(number)

    def _exchange_backend(
        self, layout: Layout, group: Any, donor: Any, devices: list[str], kind: Any, backend: Any
    ) -> None:
        for device in devices:
            donor._register_backend(torch.device(device), kind, backend)
        old = layout.backend_places(self._memory, group, group._backend_id(kind))
        fresh = layout.backend_places(self._memory, donor, pointee(backend))
        if len(old) != len(fresh) or len(old) != len(devices) + 1:
            raise ReformError(
                f"group {group.group_name!r}: found {len(old)} and {len(fresh)} places of its backend, "
                f"want {len(devices) + 1}; was a backend added to it by hand?"
            )
        _trade(old, fresh)
        if group._backend_id(kind) != pointee(backend):
            raise ReformError(f"group {group.group_name!r}: the new backend did not arrive in the group")

    def _exchange_store(self, layout: Layout, group: Any, donor: Any) -> None:
        places = [pointee(g) + layout.store for g in (group, donor)]
        stores = [pointee(g.get_group_store()) for g in (group, donor)]
        if [self._memory.words(place, 1) for place in places] == [(store,) for store in stores]:
            _trade(places[:1], places[1:])
