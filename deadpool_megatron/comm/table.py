"""The table of process groups, and how torch's groups get into it: all ranks must form the same ones, in one order."""

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deadpool_megatron.comm.connections import GlooDevice
from deadpool_megatron.comm.inplace import c10d

Create = Callable[[], Any]


@dataclass(slots=True)
class GroupRecord:
    """One process group as its creation asked for it. `group` is None on ranks that are not members."""

    name: str  # torch's own name of the group; it counts creations, so it is the same on all ranks
    ranks: tuple[int, ...]  # coordinates in group order: the group's rank i is coordinate ranks[i]
    desc: str
    backend: str
    """As asked for: "gloo", "nccl", "cpu:gloo,cuda:nccl", "undefined"."""
    backend_of_device: dict[str, str]  # device type -> backend name, after torch's defaults
    timeout: timedelta
    options: Any = None  # pg_options of the caller (ProcessGroupNCCL.Options) or None
    bound_device: torch.device | None = None
    group: Any = None
    real: bool = True  # False while a standby's group still carries the fake backend
    connected: int = 0  # epoch of the backend's connections
    connections: frozenset[int] = frozenset()
    """Inodes of its Gloo connections; perhaps of others that came up at the same time too."""
    devices: frozenset[GlooDevice] = frozenset()  # the Gloo devices those belong to

    @property
    def local(self) -> bool:
        """Made with use_local_synchronization: only its members know of it (torch hashes the name then)."""
        return not self.name.isdigit()


@dataclass(slots=True)
class GroupTable:
    """Groups in order of creation, those this rank is not in as well."""

    records: list[GroupRecord] = field(default_factory=list)

    def add(self, record: GroupRecord) -> None:
        if record.group is not None and any(known.group is record.group for known in self.records):
            return  # torch returned an existing group for the same tag and ranks
        self.records.append(record)

    def members(self, alive: Any) -> list[GroupRecord]:
        """Records of groups that this rank is in and that were not destroyed (`alive`: container of groups)."""
        return [record for record in self.records if record.group is not None and record.group in alive]

    def digest(self) -> str:
        """Hash over names, ranks, descriptions and backends. Equal on all ranks that made the same groups."""
        rows = [[r.name, r.ranks, r.desc, sorted(r.backend_of_device.items())] for r in self.records if not r.local]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def backend_of(record: GroupRecord, kind: str) -> Any:
    """The backend of this kind that is in the group now."""
    device = next(device for device, name in record.backend_of_device.items() if name == kind)
    return record.group._get_backend(torch.device(device))


def watch_groups(on_group: Callable[[GroupRecord, Create], Any], is_standby: Callable[[], bool]) -> None:
    """From now on each group that torch makes goes through `on_group(record, create)`.

    The one place where torch makes them is `_new_process_group_helper`, which both `init_process_group` and `new_group`
    call with final arguments. Wrapped here, so it does not matter who else wraps those two, in what order.

    `create()` makes the group as asked, or with the fake backend while `is_standby()`; it returns the group or torch's
    NON_GROUP_MEMBER. `on_group` returns what the caller shall get, as `create()` gave it.
    """
    native = c10d._new_process_group_helper
    signature = inspect.signature(native)

    @functools.wraps(native)
    def helper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        asked = bound.arguments
        backend = str(asked["backend"])
        ranks = tuple(asked["global_ranks_in_group"]) or tuple(range(asked["group_size"]))
        record = GroupRecord(
            name=str(asked["group_name"]),
            ranks=ranks,
            desc=asked["group_desc"] or "undefined",
            backend=backend,
            backend_of_device=dict(c10d.BackendConfig(c10d.Backend(backend)).get_device_backend_map()),
            timeout=asked["timeout"],
            options=asked["backend_options"],
            bound_device=asked["device_id"],
        )
        made: list[Any] = [None]

        def create() -> Any:
            if is_standby():
                record.real = False
                asked["backend"] = c10d.Backend(",".join(f"{device}:fake" for device in record.backend_of_device))
                asked["backend_options"] = asked["device_id"] = None
            made[0] = native(*bound.args, **bound.kwargs)
            group = made[0][0]
            if isinstance(group, c10d.ProcessGroup):
                record.group = group
                if not record.real:
                    pretend(record, c10d._world.pg_map[group][1])
            return group

        on_group(record, create)
        return made[0]

    c10d._new_process_group_helper = helper


def pretend(record: GroupRecord, store: Any) -> None:
    """Let torch's books say of the group what was asked for (a standby's fake groups answer as the survivors' do)."""
    c10d._world.pg_map[record.group] = (record.backend, store)
    c10d._world.pg_backend_config[record.group] = str(c10d.BackendConfig(c10d.Backend(record.backend)))


def no_rendezvous(is_standby: Callable[[], bool]) -> None:
    """While `is_standby()`, `init_process_group` meets nobody. Rank and world size come from its arguments or RANK and
    WORLD_SIZE: the coordinate to stand in for."""
    native = dist.init_process_group
    from torch.testing._internal.distributed.fake_pg import FakeStore

    @functools.wraps(native)
    def init_process_group(
        backend: str | None = None, init_method: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not is_standby():
            return native(backend, init_method, *args, **kwargs)
        bound = inspect.signature(native).bind(backend, None, *args, **kwargs)
        asked = bound.arguments
        asked["store"] = FakeStore()
        for name, variable in (("rank", "RANK"), ("world_size", "WORLD_SIZE")):
            if asked.get(name, -1) < 0:
                asked[name] = int(os.environ[variable])
        return native(*bound.args, **bound.kwargs)

    dist.init_process_group = c10d.init_process_group = init_process_group
