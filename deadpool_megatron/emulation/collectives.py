"""torch.distributed on Gloo where Megatron and Transformer Engine count on what NCCL alone does."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d


def _on_gloo(name: str) -> None:
    """``init_process_group`` / ``new_group`` with Gloo in the place of NCCL, wherever they are looked up."""
    original = getattr(c10d, name)
    place = list(inspect.signature(original).parameters).index("backend")

    @functools.wraps(original)
    def on_gloo(*args: Any, **kwargs: Any) -> Any:
        backend = args[place] if len(args) > place else kwargs.get("backend")
        # WORLD without a backend would get one for every device type; a subgroup without one gets that of WORLD.
        chosen_by_device = backend is None and name == "init_process_group"
        if chosen_by_device or (isinstance(backend, str) and "nccl" in backend.lower()):
            if len(args) > place:
                args = (*args[:place], "gloo", *args[place + 1 :])
            else:
                kwargs["backend"] = "gloo"
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        return original(*args, **kwargs)

    setattr(c10d, name, on_gloo)
    setattr(dist, name, on_gloo)


class _Gathering:
    """The work of an all-gather into padded tensors; waiting for it cuts them to size."""

    def __init__(self, work: Any, padded: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
        self._work = work
        self._padded = padded
        self._wanted = wanted

    def wait(self, *args: Any) -> bool:
        """As `Work.wait`."""
        done: bool = self._work.wait(*args)
        with torch.no_grad():
            for whole, part in zip(self._padded, self._wanted, strict=True):
                part.view(-1).copy_(whole[: part.numel()])
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _gather_unlike_sizes() -> None:
    """What NCCL can and Gloo cannot: an all-gather of tensors whose sizes differ, as layer-wise optimizers do it."""
    native = c10d.all_gather

    @functools.wraps(native)
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        sizes = {each.numel() for each in tensor_list}
        if len(sizes) < 2:
            return native(tensor_list, tensor, group, async_op)
        padded = [each.new_zeros(max(sizes)) for each in tensor_list]
        mine = tensor.new_zeros(max(sizes))
        with torch.no_grad():
            mine[: tensor.numel()].copy_(tensor.reshape(-1))
        work = native(padded, mine, group, True)
        if work is None:  # this rank is not in the group
            return None
        gathering = _Gathering(work, padded, tensor_list)
        if async_op:
            return gathering
        gathering.wait()
        return None

    for module in (c10d, dist):
        module.all_gather = all_gather


class _Works:
    """Several works as one."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self, *args: Any) -> bool:
        """As `Work.wait`, for all of them."""
        return all([work.wait(*args) for work in self._works])

    def is_completed(self) -> bool:
        """As `Work.is_completed`, for all of them."""
        return all(work.is_completed() for work in self._works)


def _gather_unlike_types() -> None:
    """A coalesced all-gather of tensors of several types: Gloo casts all of them to one, NCCL does not.

    Megatron gathers FP8 bytes and BF16 parameters in one.
    """
    # The second name is that of torch before 2.13.
    for name in ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"):
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, _by_type(getattr(dist.ProcessGroup, name)))


def _by_type(native: Any) -> Any:
    @functools.wraps(native)
    def by_type(self: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        places: dict[torch.dtype, list[int]] = {}
        for place, each in enumerate(outputs):
            places.setdefault(each.dtype, []).append(place)
        if len(places) < 2:
            return native(self, outputs, inputs, *args, **kwargs)
        return _Works(
            [
                native(self, [outputs[i] for i in group], [inputs[i] for i in group], *args, **kwargs)
                for group in places.values()
            ]
        )

    return by_type


def _wait_twice() -> None:
    """A second wait for a send or receive returns, as NCCL's; with Gloo it blocks for ever."""
    work = torch._C._distributed_c10d.Work
    native = work.wait
    done: weakref.WeakSet[Any] = weakref.WeakSet()

    @functools.wraps(native)
    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self in done:
            return True
        answer = native(self, *args, **kwargs)
        done.add(self)
        return answer

    work.wait = wait


def _coalesce_without_device() -> None:
    """``_coalescing_manager`` with a device means NCCL's own coalescing; without one Gloo can do it."""
    native = c10d._coalescing_manager

    @functools.wraps(native)
    def without_device(group: Any = None, device: Any = None, async_ops: bool | None = False) -> Any:
        return native(group, None, async_ops)

    c10d._coalescing_manager = without_device
    dist._coalescing_manager = without_device


def install() -> None:
    """Replace them in torch.distributed."""
    for name in ("init_process_group", "new_group"):
        _on_gloo(name)
    _gather_unlike_sizes()
    _gather_unlike_types()
    _wait_twice()
    _coalesce_without_device()
