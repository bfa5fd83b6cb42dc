"""The exchange of a backend inside a living group: everything sees the new one, the old one is destroyed."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as bindings
from torch.distributed import distributed_c10d as c10d

from deadpool_megatron.comm.inplace import InPlace, Replacement
from deadpool_megatron.comm.reports import ReformError

pytestmark = pytest.mark.versions(torch=True)

GLOO = dist.ProcessGroup.BackendType.GLOO
DEVICES = ["cpu", "cuda"]


def gloo_alone() -> Any:
    return bindings.ProcessGroupGloo(bindings.HashStore(), 0, 1)


def group_with(backend: Any) -> Any:
    group = c10d.ProcessGroup(bindings.HashStore(), 0, 1)
    for device in DEVICES:
        group._register_backend(torch.device(device), GLOO, backend)
    group._set_default_backend(GLOO)
    group._set_group_name("g")
    return group


def threads() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))


def test_this_torch_can_exchange() -> None:
    assert InPlace().exact


def test_every_way_to_the_backend_leads_to_the_new_one() -> None:
    group, new, store = group_with(gloo_alone()), gloo_alone(), bindings.HashStore()
    InPlace().replace(group, Replacement([(DEVICES, GLOO, new)], store, GLOO), fresh_group=False)
    assert all(group._get_backend(torch.device(device)) is new for device in DEVICES)
    assert group._backend_id(GLOO) == new_address(new)
    assert group.get_group_store() is store
    x = torch.ones(3)
    group.allreduce([x]).wait()


def new_address(backend: Any) -> int:
    from deadpool_megatron.comm.inplace import pointee

    return pointee(backend)


def test_dead_backends_end_with_their_threads_swap_after_swap() -> None:
    group, in_place = group_with(gloo_alone()), InPlace()
    before = threads()
    for _ in range(300):  # beyond the one-byte backend types
        donor = in_place.replace(
            group, Replacement([(DEVICES, GLOO, gloo_alone())], bindings.HashStore(), GLOO), fresh_group=False
        )
        del donor
    assert threads() <= before


def test_without_the_exchange_fresh_types_are_used_and_their_end_is_told() -> None:
    group, in_place = group_with(gloo_alone()), InPlace()
    in_place._layout = None
    fake = bindings.FakeProcessGroup._create_internal
    with pytest.raises(ReformError, match="used up"):
        for _ in range(300):
            new = fake(0, 1)
            in_place.replace(group, Replacement([(DEVICES, GLOO, new)], bindings.HashStore(), GLOO), fresh_group=False)
            assert group._get_backend(torch.device("cpu")) is new


def test_a_group_that_somebody_else_changed_is_refused_and_left_as_it_was() -> None:
    old = gloo_alone()
    group = group_with(old)
    group._register_backend(torch.device("meta"), GLOO, old)
    with pytest.raises(ReformError, match="by hand"):
        InPlace().replace(
            group, Replacement([(DEVICES, GLOO, gloo_alone())], bindings.HashStore(), GLOO), fresh_group=False
        )
    assert group._get_backend(torch.device("cpu")) is old
