"""What to copy: the tensors of a coordinate's unique state, laid out in one range of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

_ALIGN: Final = 64
MIN_SLICE: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """One copy of the hot path: ``nbytes`` at ``offset`` of the shard are the bytes of ``tensor``.

    ``tensor`` is a flat uint8 view of one or several items, or, for an item that is not contiguous, the item itself.
    """

    offset: int
    nbytes: int
    tensor: torch.Tensor

    @property
    def end(self) -> int:
        """The byte of the shard after this segment."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class _Item:
    name: str
    tensor: torch.Tensor
    offset: int
    nbytes: int


class ShardPlan:
    """The layout of a shard.

    Each item starts at a multiple of 64 bytes. The layout depends only on names, order, shapes and dtypes, so the owner
    of a shard and its restorer agree whenever `digest` agrees. The tensors are kept: their storages must stay the
    ones that training updates in place.

    Args:
        items: (unique name, tensor) in an order that is the same wherever this shard is restored. Tensors may have any
            dtype, device, shape (0-dim too) and strides.
        slice_bytes: largest segment; at least 4 MiB, since a smaller one costs more in calls than it gains.

    Raises ValueError for a name that comes twice.
    """

    def __init__(self, items: Sequence[tuple[str, torch.Tensor]], slice_bytes: int = MIN_SLICE) -> None:
        names = [name for name, _ in items]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"shard items must have unique names; twice there: {', '.join(twice[:5])}")
        self.slice_bytes = max(slice_bytes, MIN_SLICE)
        self._items: list[_Item] = []
        offset = 0
        for name, tensor in items:
            nbytes = tensor.numel() * tensor.element_size()
            self._items.append(_Item(name, tensor.detach(), offset, nbytes))
            offset += -(-nbytes // _ALIGN) * _ALIGN
        self.nbytes: int = offset
        self.segments: tuple[Segment, ...] = tuple(_segments(self._items, self.slice_bytes))

    def digest(self) -> str:
        """SHA-256 over names, shapes, dtypes and offsets."""
        told = hashlib.sha256()
        for item in self._items:
            shape = "x".join(map(str, item.tensor.shape))
            told.update(f"{item.name}\0{shape}\0{item.tensor.dtype}\0{item.offset}\n".encode())
        return told.hexdigest()

    def items(self) -> Iterator[tuple[str, torch.Tensor, int, int]]:
        """Name, tensor, offset in the shard and bytes of every item, in the order of the shard."""
        for item in self._items:
            yield item.name, item.tensor, item.offset, item.nbytes

    def __len__(self) -> int:
        return len(self._items)


def _segments(items: Sequence[_Item], slice_bytes: int) -> list[Segment]:
    """Contiguous items that follow each other in one storage as in the shard become one run; runs become slices."""
    found: list[Segment] = []
    run: list[_Item] = []
    for item in items:
        if item.nbytes == 0:
            continue
        if not item.tensor.is_contiguous():
            found += _run(run, slice_bytes)
            run = []
            found.append(Segment(item.offset, item.nbytes, item.tensor))
        elif run and _follows(run[-1], item):
            run.append(item)
        else:
            found += _run(run, slice_bytes)
            run = [item]
    return found + _run(run, slice_bytes)


def _start(tensor: torch.Tensor) -> int:
    offset: int = tensor.storage_offset() * tensor.element_size()
    return offset


def _follows(before: _Item, item: _Item) -> bool:
    one, two = before.tensor, item.tensor
    return (
        one.device == two.device
        and one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
        and _start(one) + before.nbytes == _start(two)
        and before.offset + before.nbytes == item.offset
    )


def _run(run: Sequence[_Item], slice_bytes: int) -> list[Segment]:
    if not run:
        return []
    first = run[0]
    nbytes = run[-1].offset + run[-1].nbytes - first.offset
    flat = torch.empty(0, dtype=torch.uint8, device=first.tensor.device)
    flat.set_(first.tensor.untyped_storage(), _start(first.tensor), (nbytes,), (1,))
    return [
        Segment(first.offset + at, min(slice_bytes, nbytes - at), flat[at : at + slice_bytes])
        for at in range(0, nbytes, slice_bytes)
    ]
