"""The format of a durable generation, without any I/O: a manifest, and one safetensors file a coordinate.

A generation is a directory of its own below the durable directory::

    generation-000000000040-1f0c2ab4-0/        generation, job, epoch: no two attempts share a name
        rank-00000.safetensors                 one a coordinate: its unique state by name, then its small state
        rank-00001.safetensors
        manifest.json                          written last: with it the generation is there, without it is nothing
    constants/<digest>.safetensors             what never changes, as frozen parameters: one file for all generations

``docs/durable.md`` describes every field.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import xxhash

from .errors import Damaged, DurableError

FORMAT: Final = "deadpool-durable/1"
MANIFEST: Final = "manifest.json"
CONSTANTS: Final = "constants"
SMALL: Final = "deadpool.small_state"
_MAX_HEADER: Final = 100_000_000  # as the safetensors library has it
_NAME: Final = re.compile(r"generation-(\d{12})-[A-Za-z0-9]+-\d+")


class _Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``nbytes`` bytes of ``tensor``, from its byte ``at`` on, whichever rank has them at a width of the job.

    ``tensor`` is ``parameter/kind``: state of one kind of a parameter of the model.
    """

    tensor: str
    at: int
    nbytes: int


class Item(_Value, frozen=True, omit_defaults=True):
    """One tensor of a shard: ``nbytes`` bytes at ``offset`` of the unique state. ``dtype`` as safetensors names it.

    ``pieces``: what it consists of, end to end, so that it can be cut anew (`recut`); empty where that cannot be.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...] = ()


class Layout(_Value, frozen=True):
    """What the unique state of one coordinate consists of; ``digest`` is that of `snapshot.ShardPlan`."""

    unique_bytes: int
    digest: str
    items: tuple[Item, ...]


class ConstantsFile(_Value, frozen=True):
    """What never changes of a coordinate; replicas, and all generations, have one file. Fields as in `ShardFile`."""

    nbytes: int
    xxh3_128: str
    layout: str

    @property
    def path(self) -> str:
        """Below the durable directory; named after the content."""
        return f"{CONSTANTS}/{self.xxh3_128}.safetensors"


# (manifests that were written before there were constants keep their digest)
class ShardFile(_Value, frozen=True, omit_defaults=True):
    """One coordinate's file: its size in bytes, its XXH3-128 in hexadecimal, and the digest of its layout."""

    rank: int
    file: str
    nbytes: int
    xxh3_128: str
    layout: str
    constants: ConstantsFile | None = None


class Coordinate(_Value, frozen=True, gc=False):
    """The parallel indices of one coordinate."""

    rank: int
    tp: int
    pp: int
    dp: int
    cp: int = 0
    ep: int = 0


class Manifest(_Value, frozen=True):
    """What a durable generation is, and what its files must be.

    ``job`` is what the training process told of itself: ``model`` (the arguments that decide what a shard is),
    ``settings`` (others, which a job that goes on from it may have changed), ``command`` (script, arguments and
    processes a node, for `deadpool export`) and ``versions``.
    """

    format: str
    generation: int
    epoch: int
    name: str
    written: str
    world_size: int
    coordinates: tuple[Coordinate, ...]
    shards: tuple[ShardFile, ...]
    job: dict[str, Any]
    digest: str = ""


_SAID: Final = 50  # differing settings that are named


def differing(manifest: Manifest, job: Mapping[str, Any], part: str) -> dict[str, tuple[Any, Any]]:
    """Of what both jobs tell of themselves: values in the durable generation and in the one that goes on from it."""
    there, here = manifest.job.get(part, {}), job.get(part, {})
    return {name: (there[name], here[name]) for name in there if name in here and there[name] != here[name]}


def settings_note(manifest: Manifest, job: Mapping[str, Any]) -> str:
    """One line for the user about settings that are not those of the generation; empty where all are."""
    others = [f"{name} {a} -> {b}" for name, (a, b) in differing(manifest, job, "settings").items()]
    if not others:
        return ""
    more = f" and {len(others) - _SAID} more" if len(others) > _SAID else ""
    return (
        f"not the settings of durable generation {manifest.generation}, which training goes on from: "
        f"{', '.join(others[:_SAID])}{more}"
    )


def not_fit(generation: int, directory: str, why: str) -> str:
    """One line for the user: a generation is not this job's."""
    return (
        f"durable generation {generation} in {directory} is not of this job: {why}; give the flags of that job, or "
        "another --deadpool-durable-dir, or turn it into a Megatron checkpoint (deadpool export) and --load that"
    )


def directory_name(generation: int, job: str, epoch: int) -> str:
    """The directory of one attempt to drain a generation; ``job`` are letters and digits."""
    return f"generation-{generation:012d}-{job}-{epoch}"


def generation_of(name: str) -> int | None:
    """The generation of a directory's name; None for other names."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def shard_name(rank: int) -> str:
    """The file of one coordinate."""
    return f"rank-{rank:05d}.safetensors"


# ---- manifest


def _digest(manifest: Manifest) -> str:
    plain = msgspec.json.encode(msgspec.structs.replace(manifest, digest=""), order="sorted")
    return xxhash.xxh3_128_hexdigest(plain)


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as readable JSON, its own digest in it."""
    sealed = msgspec.structs.replace(manifest, digest=_digest(manifest))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=1) + b"\n"


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Read and check a manifest. Raises Damaged; ``where`` is for its message."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as err:
        raise Damaged(f"{where} is not a manifest of {FORMAT}: {err}") from None
    if manifest.format != FORMAT:
        raise Damaged(f"{where} is of format {manifest.format!r}, this version reads {FORMAT!r}")
    if manifest.digest != _digest(manifest):
        raise Damaged(f"{where} has changed since it was written: its digest does not fit")
    ranks = [shard.rank for shard in manifest.shards]
    if ranks != list(range(manifest.world_size)) or [c.rank for c in manifest.coordinates] != ranks:
        raise Damaged(f"{where} does not list every rank from 0 to {manifest.world_size - 1} once")
    if any(shard.file != shard_name(shard.rank) for shard in manifest.shards):
        raise Damaged(f"{where} names files that no shard has")
    return manifest


# ---- one shard in memory

_TRAILER: Final = b"\0deadpool-layout"


def trailer_of(layout: Layout) -> bytes:
    """What follows the small state of a copy in memory, so that whoever holds the copy knows what it consists of."""
    packed = zlib.compress(msgspec.json.encode(layout))
    return packed + len(packed).to_bytes(4, "little") + _TRAILER


def split_small(stored: bytes) -> tuple[bytes, Layout | None]:
    """The small state, and the layout of `trailer_of` behind it; None where there is none. Raises Damaged."""
    if not stored.endswith(_TRAILER):
        return stored, None
    end = len(stored) - len(_TRAILER) - 4
    begin = end - int.from_bytes(stored[end : end + 4], "little")
    try:
        return stored[:begin], msgspec.json.decode(zlib.decompress(stored[begin:end]), type=Layout)
    except (zlib.error, msgspec.MsgspecError) as err:
        raise Damaged(f"what a shard consists of cannot be read: {err}") from None


def described(stored: bytes, what: str) -> tuple[bytes, Layout]:
    """As `split_small`, of a copy (``what``, in words) that has to say what it consists of. Raises DurableError."""
    small, layout = split_small(stored)
    if layout is None:
        raise DurableError(f"{what} does not say what it consists of")
    return small, layout


# ---- one shard's file


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The head of a shard's file. ``data`` is where its bytes begin in the file, ``nbytes`` the size of the file."""

    rank: int
    generation: int
    layout: Layout
    small_bytes: int
    data: int
    nbytes: int


def encode_header(rank: int, generation: int, layout: Layout, small_bytes: int) -> bytes:
    """The first bytes of a safetensors file: length, JSON header, spaces up to a multiple of 8.

    The tensors follow without gaps in the order of ``layout.items``, the small state last, as bytes (U8).
    """
    told = {
        "format": FORMAT,
        "rank": rank,
        "generation": generation,
        "unique_bytes": layout.unique_bytes,
        "layout": layout.digest,
        "offsets": [item.offset for item in layout.items],
        "pieces": [msgspec.to_builtins(item.pieces) for item in layout.items],
    }
    header: dict[str, Any] = {"__metadata__": {"deadpool": json.dumps(told)}}
    at = 0
    for item in layout.items:
        header[item.name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": [at, at + item.nbytes]}
        at += item.nbytes
    header[SMALL] = {"dtype": "U8", "shape": [small_bytes], "data_offsets": [at, at + small_bytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parse_header(start: bytes, rest: bytes, where: str) -> ShardHeader:
    """The reverse: ``start`` are the first 8 bytes, ``rest`` as many as those say. Raises Damaged."""
    try:
        header = json.loads(rest)
        told = json.loads(header.pop("__metadata__")["deadpool"])
        small = header.pop(SMALL)
        offsets: Sequence[int] = told["offsets"]
        items: list[Item] = []
        at = 0
        pieces = told.get("pieces", [()] * len(offsets))  # not in files of earlier versions
        for (name, entry), offset, made_of in zip(header.items(), offsets, pieces, strict=True):
            begin, end = entry["data_offsets"]
            if begin != at or end < begin or offset < 0 or offset + end - begin > told["unique_bytes"]:
                raise ValueError(f"tensor {name} is out of place")
            cut = msgspec.convert(made_of, tuple[Piece, ...])
            items.append(Item(name, entry["dtype"], tuple(entry["shape"]), offset, end - begin, cut))
            at = end
        begin, end = small["data_offsets"]
        if begin != at or end < begin:
            raise ValueError("the small state is out of place")
        layout = Layout(told["unique_bytes"], told["layout"], tuple(items))
        data = 8 + header_length(start, where)
        return ShardHeader(told["rank"], told["generation"], layout, end - begin, data, data + end)
    except (ValueError, KeyError, TypeError, AttributeError) as err:  # msgspec's are ValueErrors
        raise Damaged(f"{where} has no readable header: {err}") from None


def header_length(start: bytes, where: str) -> int:
    """How many bytes of header follow the first 8. Raises Damaged."""
    length = int.from_bytes(start, "little")
    if len(start) != 8 or length > _MAX_HEADER:
        raise Damaged(f"{where} is not a safetensors file")
    return length
