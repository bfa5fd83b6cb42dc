"""What NCCL can and Gloo cannot: an all-gather of tensors whose sizes differ, as layer-wise optimizers do it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d


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


def install() -> None:
    """Put `all_gather` in place wherever it is looked up."""
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
