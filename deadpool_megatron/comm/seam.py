"""The one place where torch makes process groups: `_new_process_group_helper`, which both `init_process_group` and
`new_group` call with final arguments. Wrapped here, so it does not matter who else wraps those two, in what order."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from deadpool_megatron.comm.inplace import c10d
from deadpool_megatron.comm.table import GroupRecord

Create = Callable[[], Any]


def watch_groups(on_group: Callable[[GroupRecord, Create], Any], is_standby: Callable[[], bool]) -> None:
    """From now on each group that torch makes goes through `on_group(record, create)`.

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
