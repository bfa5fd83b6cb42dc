"""Unique state: what of a coordinate's state no other coordinate can give back, and how the rest is had from others.

A tensor that is this rank's alone is copied whole. Tensors that R ranks hold alike are laid end to end, and rank r of
them copies the r-th of R equal ranges of bytes; after a restore each range goes from its owner to the others
(`UniqueState.gather`). 16-bit model parameters are never copied: they follow from the main parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from megatron.core import parallel_state

from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.optimizer_state import StateTensor, bytes_a_parameter, prepare, state_tensors

_ALIGN: Final = 64
_GATHER_BYTES: Final = 32 << 20  # of one rank at a time, so that a restore needs little memory


type _Piece = tuple[str, torch.Tensor]
"""A name, and bytes of one tensor as a flat uint8 view of it."""


class _Shared:
    """The tensors that the ranks of one group hold alike, as one range of bytes cut into a part a rank."""

    def __init__(self, group: torch.distributed.ProcessGroup, tensors: list[StateTensor]) -> None:
        self.group = group
        self._bytes = [(each.name, _as_bytes(each)) for each in tensors]
        total = sum(view.numel() for _, view in self._bytes)
        size = group.size()
        self._ends = [total * (r + 1) // size // _ALIGN * _ALIGN for r in range(size - 1)] + [total]

    def part(self, rank: int, first: int = 0, count: int | None = None) -> list[_Piece]:
        """Pieces of the part of a rank of the group; ``first`` and ``count`` choose bytes of it."""
        begin = (self._ends[rank - 1] if rank else 0) + first
        end = self._ends[rank] if count is None else min(self._ends[rank], begin + count)
        return list(self._between(begin, end))

    def _between(self, begin: int, end: int) -> Iterator[_Piece]:
        at = 0
        for name, view in self._bytes:
            low, high = max(begin - at, 0), min(end - at, view.numel())
            if low < high:
                yield f"{name}[{low}:{high}]", view[low:high]
            at += view.numel()

    def gather(self) -> None:
        """Each rank's part to all ranks. Collective over the group; what the others hold is overwritten."""
        rank, size = self.group.rank(), self.group.size()
        lengths = [b - a for a, b in zip([0, *self._ends], self._ends, strict=False)]
        width = min(max(lengths), _GATHER_BYTES)
        if not width:
            return
        device = self._bytes[0][1].device
        mine = torch.zeros(width, dtype=torch.uint8, device=device)
        all_parts = [torch.zeros(width, dtype=torch.uint8, device=device) for _ in range(size)]
        for first in range(0, max(lengths), width):
            at = 0
            for _, view in self.part(rank, first, width) if first < lengths[rank] else ():
                mine[at : at + view.numel()].copy_(view)
                at += view.numel()
            torch.distributed.all_gather(all_parts, mine, group=self.group)
            for other in range(size):
                if other == rank or first >= lengths[other]:
                    continue
                at = 0
                for _, view in self.part(other, first, width):
                    view.copy_(all_parts[other][at : at + view.numel()])
                    at += view.numel()


def _as_bytes(each: StateTensor) -> torch.Tensor:
    if not each.tensor.is_contiguous():
        raise UserError(
            f"{each.name} is not contiguous, which is not supported with --deadpool without --use-distributed-optimizer"
        )
    return each.tensor.detach().view(-1).view(torch.uint8)


class UniqueState:
    """The unique state of one coordinate's optimizer. Makes what the first step would make lazily.

    Raises UserError, by name, for what is not supported.
    """

    def __init__(self, optimizer: Any) -> None:
        counters = prepare(optimizer)
        self._alone: list[tuple[str, torch.Tensor]] = []
        shared: dict[torch.distributed.ProcessGroup, list[StateTensor]] = {}
        for each in state_tensors(optimizer):
            if each.replicas is None:
                self._alone.append((each.name, each.tensor))
            else:
                shared.setdefault(each.replicas, []).append(each)
        self._alone += counters  # a few bytes a parameter tensor, so everybody keeps them
        self._shared = [_Shared(group, tensors) for group, tensors in shared.items()]

    def items(self) -> list[tuple[str, torch.Tensor]]:
        """Name and live tensor of everything to be copied, in an order that is the same wherever it is restored."""
        return [*self._alone, *(piece for one in self._shared for piece in one.part(one.group.rank()))]

    def gather(self) -> None:
        """Bring back what others have copied. Collective: every rank of the job calls it after a restore.

        A rank whose live state was kept gives and takes the same bits it has.
        """
        with torch.no_grad():
            for one in self._shared:
                one.gather()


def expected_bytes(model: list[Any], optimizer: Any) -> int:
    """What the arithmetic says this coordinate must copy: bytes a parameter, over the ranks that share it.

    12 bytes over the data-parallel size for Adam in mixed precision. Shards of the distributed optimizer differ from
    rank to rank by the padding of buckets, so compare sums over all coordinates.
    """
    dense = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    expert = parallel_state.get_expert_data_parallel_world_size()
    known: dict[tuple[int, bool], float] = {}
    total = 0.0
    for chunk in model:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                key = (parameter.dim(), getattr(parameter, "is_embedding_or_output_parameter", False))
                if key not in known:
                    known[key] = bytes_a_parameter(optimizer, parameter)
                shared_by = dense if getattr(parameter, "allreduce", True) else expert
                total += known[key] * parameter.numel() / shared_by
    return round(total)
