"""A generation cut anew for another number of replicas: which bytes of which old shard a new one consists of.

Megatron's distributed optimizer cuts the buffer of each bucket into as many equal parts as there are replicas, so that
a parameter's range on a rank follows from the width. Each item of a shard says of which bytes of which tensor it
consists (`format.Piece`), the same at every width; here the pieces are matched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from .errors import Damaged, NotFit
from .files import read_header, read_items
from .format import Item, Layout, Manifest, ShardFile
from .store import Store


class Copy(NamedTuple):
    """``nbytes`` at ``offset`` of an old shard's ``item`` go to byte ``at`` of the new shard's item ``to``."""

    item: str
    offset: int
    nbytes: int
    to: str
    at: int


class _Held(NamedTuple):
    begin: int
    end: int
    shard: int
    item: str
    offset: int


def cut(wanted: Layout, shards: Sequence[Layout], parameters: Collection[str]) -> list[list[Copy]]:
    """Of each old shard, what goes into the wanted one. What several of them hold comes from the first.

    ``parameters`` are all of the new model, also those of which ``wanted`` has nothing, and tensors of them that may be
    another rank's. Raises NotFit, with the name of the first tensor that cannot be put together, or that nobody would
    take.
    """
    held: dict[str, list[_Held]] = {}
    for index, layout in enumerate(shards):
        for item in layout.items:
            offset = 0
            for piece in item.pieces:
                end = piece.at + piece.nbytes
                held.setdefault(piece.tensor, []).append(_Held(piece.at, end, index, item.name, offset))
                offset += piece.nbytes
    _none_left(wanted, held, parameters)
    out: list[list[Copy]] = [[] for _ in shards]
    for item in wanted.items:
        at = 0
        for piece in item.pieces:
            begin, end = piece.at, piece.at + piece.nbytes
            while begin < end:
                # (a tensor is on a few ranks of one pipeline stage: looking through them all is no work)
                one = next((one for one in held.get(piece.tensor, ()) if one.begin <= begin < one.end), None)
                if one is None:
                    raise NotFit(f"no shard has byte {begin} of {piece.tensor}")
                nbytes = min(end, one.end) - begin
                out[one.shard].append(Copy(one.item, one.offset + begin - one.begin, nbytes, item.name, at))
                begin, at = begin + nbytes, at + nbytes
        if at != item.nbytes:
            raise NotFit(f"{item.name} cannot be cut anew")
    return out


def _none_left(wanted: Layout, held: Collection[str], parameters: Collection[str]) -> None:
    """What only the old job has, as layers that are gone, makes another model of what is there."""
    here = {piece.tensor for item in wanted.items for piece in item.pieces}
    taken = {_parameter(tensor) for tensor in here}
    for tensor in held:
        parameter = _parameter(tensor)
        if parameter not in parameters or (parameter in taken and tensor not in here and tensor not in parameters):
            raise NotFit(f"{tensor} is in it, and not in this job")


def _parameter(tensor: str) -> str:
    return tensor.partition("/")[0]


def read_recut(
    store: Store,
    manifest: Manifest,
    ranks: Sequence[int],
    wanted: Layout,
    parameters: Collection[str],
    put: Callable[[str, int, memoryview], None],
) -> None:
    """Read a shard that is cut anew out of those of ``ranks``, one tensor of one of them at a time.

    Args:
        ranks: of the generation, those that hold the same part of the model.
        parameters: as of `cut`.
        put: given an item of ``wanted``, where in it, and bytes, which it has until it returns.

    Blocks for the disk; only files with something wanted are read. Raises NotFit, Damaged (what was put is garbage
    then), OSError.
    """
    if wanted.items and not any(item.pieces for item in wanted.items):
        raise NotFit("this optimizer's state is not cut anew")
    shards = [manifest.shards[rank] for rank in ranks]
    layouts = [_layout(store, manifest, shard) for shard in shards]
    if not any(item.pieces for layout in layouts for item in layout.items):
        raise NotFit("it does not say what its shards consist of, as those of earlier versions do not")
    copies = cut(wanted, layouts, parameters)
    for shard, out in zip(shards, copies, strict=True):
        by_item: dict[str, list[Copy]] = {}
        for copy in out:
            by_item.setdefault(copy.item, []).append(copy)

        def take(item: Item, data: memoryview, by_item: dict[str, list[Copy]] = by_item) -> None:
            for copy in by_item.get(item.name, ()):
                put(copy.to, copy.at, data[copy.offset : copy.offset + copy.nbytes])

        if by_item:
            read_items(store, manifest.name, shard, take)


def _layout(store: Store, manifest: Manifest, shard: ShardFile) -> Layout:
    header = read_header(store, manifest.name, shard)
    if header.layout.digest != shard.layout:
        raise Damaged(f"{store.root}/{manifest.name}/{shard.file} is not the file its manifest describes")
    return header.layout
