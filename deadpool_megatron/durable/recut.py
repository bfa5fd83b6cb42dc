"""A generation cut anew for another number of replicas: which bytes of which old shard a new one consists of.

Megatron's distributed optimizer cuts the buffer of each bucket into as many equal parts as there are replicas, so that
a parameter's range on a rank follows from the width. Each item of a shard says of which bytes of which tensor it
consists (`format.Piece`), the same at every width; here the pieces are matched.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import msgspec

from deadpool_megatron.vault import is_constants, owner_of

from .errors import NotFit
from .files import read_header, read_items
from .format import ConstantsFile, Coordinate, Item, Layout, Manifest, ShardFile, not_fit
from .store import Store

type Take = Callable[[int, memoryview], None]
type Put = Callable[[str, int, memoryview], None]


def fills(replicas: int, experts: int, instances: int) -> bool:
    """Whether so many replicas, times context parallelism, hold all experts (``experts``: expert parallelism) and are
    whole instances of the distributed optimizer."""
    return replicas % math.lcm(experts, instances) == 0


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


class Source(Protocol):
    """A generation of another number of replicas, and where its shards are.

    A holder is a rank, or that of a rank's constants (`vault.constants_of`). Everything blocks, and raises VaultError,
    or DurableError and OSError: `Damaged` or VaultError of `read` may come when all was taken, which is garbage then.

    Attributes:
        where: for messages.
        manifest: what the job told of itself; None: it is this same job.
    """

    where: str
    generation: int
    coordinates: Sequence[Coordinate]
    manifest: Manifest | None

    def small(self, rank: int) -> bytes:
        """A rank's small state."""

    def has_constants(self, rank: int) -> bool:
        """Whether something of a rank never changes."""

    def layout(self, holder: int) -> Layout:
        """What a shard, or constants, consist of."""

    def read(self, holder: int, ranges: Sequence[tuple[int, int]], take: Take) -> None:
        """Read ``ranges`` of the unique bytes, each from its first to before its last, ascending and apart.

        ``take``: given offsets in the unique bytes, and what is there, which it has until it returns; also of what is
        around the ranges.
        """

    def not_fit(self, why: str) -> str:
        """One line for the user: it is not this job's."""

    def close(self) -> None:
        """All was read that is wanted."""


class DirectorySource:
    """As `Source`, in a durable directory. To read something is to read its file once, whole, from start to end."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store, self._of = store, manifest
        self.where = f"{store.root}/{manifest.name}"
        self.generation = manifest.generation
        self.coordinates: Sequence[Coordinate] = manifest.coordinates
        self.manifest: Manifest | None = manifest

    def small(self, rank: int) -> bytes:
        """As `Source`."""
        return self._items(rank, lambda item, data: None)

    def has_constants(self, rank: int) -> bool:
        """As `Source`."""
        return self._of.shards[rank].constants is not None

    def layout(self, holder: int) -> Layout:
        """As `Source`."""
        return read_header(self._store, *self._file(holder)).layout

    def read(self, holder: int, ranges: Sequence[tuple[int, int]], take: Take) -> None:
        """As `Source`; takes one tensor at a time."""
        self._items(holder, lambda item, data: take(item.offset, data))

    def not_fit(self, why: str) -> str:
        """As `Source`."""
        return not_fit(self.generation, self._store.root, why)

    def close(self) -> None:
        """As `Source`."""

    def _items(self, holder: int, take: Callable[[Item, memoryview], None]) -> bytes:
        name, file = self._file(holder)
        return read_items(self._store, name, file, take)

    def _file(self, holder: int) -> tuple[str, ShardFile | ConstantsFile]:
        shard = self._of.shards[owner_of(holder) if is_constants(holder) else holder]
        if not is_constants(holder):
            return f"{self._of.name}/{shard.file}", shard
        assert shard.constants is not None
        return shard.constants.path, shard.constants


def read_recut(
    source: Source,
    ranks: Sequence[int],
    wanted: Layout,
    parameters: Collection[str],
    put: Put,
    alike: Callable[[str], bool] = lambda name: False,
) -> None:
    """Read a shard that is cut anew out of those of ``ranks``; nothing is read of one of which nothing is wanted.

    Args:
        ranks: of the generation, those that hold the same part of the model.
        parameters: as of `cut`.
        put: given an item of ``wanted``, where in it, and bytes, which it has until it returns.
        alike: whether items of this name are not cut, and come from the first of ``ranks``.

    Raises NotFit, and what a `Source` raises (what was put is garbage then).
    """
    whole = [item for item in wanted.items if alike(item.name)]
    rest = tuple(item for item in wanted.items if not alike(item.name))
    if rest and not any(item.pieces for item in rest):
        raise NotFit("this optimizer's state is not cut anew")
    layouts = [source.layout(rank) for rank in ranks]
    if not any(item.pieces for layout in layouts for item in layout.items):
        raise NotFit("it does not say what its shards consist of, as those of earlier versions do not")
    copies = cut(msgspec.structs.replace(wanted, items=rest), layouts, parameters)
    copies[0] += _as_they_are(whole, [item for item in layouts[0].items if alike(item.name)])
    for rank, layout, out in zip(ranks, layouts, copies, strict=True):
        _read(source, rank, layout, out, put)


def read_whole(source: Source, holder: int, layout: Layout, put: Put) -> None:
    """Read all items of a holder, whose layout it is. Otherwise as `read_recut`."""
    _read(source, holder, layout, _as_they_are(layout.items, layout.items), put)


def _as_they_are(wanted: Sequence[Item], there: Sequence[Item]) -> list[Copy]:
    sizes = {item.name: item.nbytes for item in there}
    for item in wanted:
        if (nbytes := sizes.pop(item.name, 0)) != item.nbytes:
            raise NotFit(f"{item.name} has {nbytes} bytes in it and {item.nbytes} here")
    if sizes:
        raise NotFit(f"{min(sizes)} is in it, and not in this job")
    return [Copy(item.name, 0, item.nbytes, item.name, 0) for item in wanted if item.nbytes]


def _read(source: Source, holder: int, layout: Layout, copies: Sequence[Copy], put: Put) -> None:
    if not copies:
        return
    offsets = {item.name: item.offset for item in layout.items}
    placed = sorted((offsets[copy.item] + copy.offset, copy) for copy in copies)
    ranges: list[tuple[int, int]] = []
    for begin, copy in placed:
        end = begin + copy.nbytes
        if ranges and begin <= ranges[-1][1]:
            begin, end = ranges[-1][0], max(end, ranges.pop()[1])
        ranges.append((begin, end))
    ends = [*itertools.accumulate((begin + copy.nbytes for begin, copy in placed), max)]

    def take(offset: int, data: memoryview) -> None:
        for at in range(bisect.bisect_right(ends, offset), len(placed)):
            begin, copy = placed[at]
            if begin >= offset + len(data):
                break
            first, last = max(begin, offset), min(begin + copy.nbytes, offset + len(data))
            if first < last:
                put(copy.to, copy.at + first - begin, data[first - offset : last - offset])

    source.read(holder, ranges, take)
