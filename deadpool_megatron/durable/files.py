"""Durable generations on a store: write a shard, seal a generation, find the newest, read a shard back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from .errors import Damaged, DurableError
from .format import (
    MANIFEST,
    ConstantsFile,
    Item,
    Layout,
    Manifest,
    ShardFile,
    ShardHeader,
    decode_manifest,
    encode_header,
    encode_manifest,
    generation_of,
    header_length,
    parse_header,
    shard_name,
)
from .store import Store

_BLOCK = 4 << 20

type _Place = Callable[[ShardHeader], tuple[Callable[[Item], memoryview], memoryview]]
"""Given the header, says where the bytes of each item go, asked in their order, and those of the small state."""


@dataclass(frozen=True, slots=True)
class Found:
    """What lies in a durable directory: complete generations, newest first, and why others do not count, by name."""

    complete: tuple[Manifest, ...]
    damaged: dict[str, str]

    @property
    def broken(self) -> dict[int, str]:
        """Generations that are there and cannot be used, newest first, and why."""
        whole = {m.generation for m in self.complete}
        numbers = {name: generation_of(name) for name in sorted(self.damaged, reverse=True)}
        return {n: self.damaged[name] for name, n in numbers.items() if n is not None and n not in whole}

    def __str__(self) -> str:
        """Every generation that is there, newest first."""
        there = {m.generation: "" for m in self.complete} | dict.fromkeys(self.broken, " (cannot be read)")
        return ", ".join(f"{n}{there[n]}" for n in sorted(there, reverse=True)) or "none"


class _Digest:
    """The digest and length of a file's blocks, taken as they pass."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.nbytes = 0

    def update(self, block: memoryview | bytes) -> None:
        self._hash.update(block)
        self.nbytes += len(block)

    def each[Block: memoryview | bytes](self, blocks: Iterable[Block]) -> Iterator[Block]:
        for block in blocks:
            self.update(block)
            yield block

    @property
    def hex(self) -> str:
        return self._hash.hexdigest()


def write_shard(
    store: Store,
    directory: str,
    rank: int,
    generation: int,
    layout: Layout,
    unique: memoryview,
    small: bytes,
    moved: Callable[[int], None] = lambda nbytes: None,
    verify: Callable[[], None] = lambda: None,
) -> ShardFile:
    """Write one coordinate's file.

    Args:
        unique: the unique state as it lies in the vault, ``layout.unique_bytes`` bytes.
        moved: called with the bytes of each block that was written; what it raises ends the file.
        verify: called when all is written, and before the file has its name; what it raises ends the file.

    Raises OSError, and the file is not there then, or goes with the attempt.
    """
    if len(unique) != layout.unique_bytes:
        raise DurableError(f"rank {rank}'s shard has {len(unique)} bytes, its layout says {layout.unique_bytes}")
    told, name = _Digest(), shard_name(rank)

    def blocks() -> Iterable[memoryview | bytes]:
        yield from told.each(_blocks(encode_header(rank, generation, layout, len(small)), layout, unique, small))
        verify()

    _write(store, f"{directory}/{name}", blocks(), moved)
    return ShardFile(rank, name, told.nbytes, told.hex, layout.digest)


def write_constants(
    store: Store, layout: Layout, unique: memoryview, moved: Callable[[int], None] = lambda nbytes: None
) -> ConstantsFile:
    """Write what never changes, unless the store has it: its file is named after its content. As `write_shard`.

    What the store has is read whole: a damaged file would stay for all generations that come. One that cannot be read
    may be whole, and is left alone.
    """
    told = _Digest()
    blocks = [*told.each(_blocks(encode_header(0, 0, layout, 0), layout, unique, b""))]
    file = ConstantsFile(told.nbytes, told.hex, layout.digest)
    if not _has(store, file, moved):
        _write(store, file.path, _as_told(blocks, file), moved)
    return file


def _as_told(blocks: Iterable[memoryview | bytes], file: ConstantsFile) -> Iterable[memoryview | bytes]:
    """The blocks, which may change in memory after their digest was made. Raises DurableError."""
    told = _Digest()
    yield from told.each(blocks)
    if told.hex != file.xxh3_128:
        raise DurableError(f"{file.path} has changed in memory while it was written")


def _has(store: Store, file: ConstantsFile, moved: Callable[[int], None]) -> bool:
    if store.size(file.path) != file.nbytes:
        return False
    told = _Digest()
    try:
        with contextlib.closing(store.open(file.path)) as there:
            for _ in told.each(iter(lambda: there.read(_BLOCK), b"")):
                moved(0)
    except FileNotFoundError:
        return False
    except OSError as err:
        raise OSError(f"{store.root}/{file.path} cannot be read: {err}") from None
    return told.hex == file.xxh3_128


def _write(
    store: Store, name: str, blocks: Iterable[memoryview | bytes], moved: Callable[[int], None] = lambda nbytes: None
) -> None:
    writing = store.create(name)
    try:
        for block in blocks:
            writing.write(block)
            moved(len(block))
        writing.commit()
    except BaseException:
        writing.abort()
        raise


def _blocks(header: bytes, layout: Layout, unique: memoryview, small: bytes) -> Iterable[memoryview | bytes]:
    yield header
    for item in layout.items:
        for at in range(item.offset, item.offset + item.nbytes, _BLOCK):
            yield unique[at : min(at + _BLOCK, item.offset + item.nbytes)]
    yield small


def seal(store: Store, manifest: Manifest) -> None:
    """Write the manifest: from its rename on the generation is there. Raises OSError."""
    _write(store, f"{manifest.name}/{MANIFEST}", [encode_manifest(manifest)])


def remove_attempt(store: Store, directory: str) -> None:
    """Remove a generation, its manifest first, so that at no moment a part of it looks whole. Raises OSError."""
    store.remove_file(f"{directory}/{MANIFEST}")
    store.remove(directory)


def prune(store: Store, newest: str, keep: Sequence[str]) -> list[str]:
    """Remove what is older than ``newest`` and not to be kept: old generations, and attempts that never were sealed.

    What has a manifest that cannot be read, of another version perhaps, is nobody's to remove. Returns what could not
    be removed and why; that is no reason to stop.
    """
    limit = generation_of(newest)
    problems: list[str] = []
    for name in store.directories():
        generation = generation_of(name)
        if generation is None or limit is None or name == newest or name in keep or generation > limit:
            continue
        try:
            with contextlib.suppress(FileNotFoundError):
                _manifest(store, name)
            remove_attempt(store, name)
        except Damaged:
            continue
        except OSError as err:
            problems.append(f"{store.root}/{name} could not be removed: {err}")
    return problems


def _manifest(store: Store, directory: str) -> Manifest:
    where = f"{store.root}/{directory}/{MANIFEST}"
    with contextlib.closing(store.open(f"{directory}/{MANIFEST}")) as file:
        manifest = decode_manifest(file.read(), where)
    if manifest.name != directory or manifest.generation != generation_of(directory):
        raise Damaged(f"{where} belongs to {manifest.name}")
    return manifest


def read_manifest(store: Store, directory: str) -> Manifest:
    """The manifest of one directory; its files must be there with their sizes. Raises Damaged, OSError."""
    manifest = _manifest(store, directory)
    files = {f"{directory}/{shard.file}": shard.nbytes for shard in manifest.shards}
    files |= {shard.constants.path: shard.constants.nbytes for shard in manifest.shards if shard.constants is not None}
    for name, nbytes in files.items():
        size = store.size(name)
        if size != nbytes:
            there = "missing" if size is None else f"{size} bytes instead of {nbytes}"
            raise Damaged(f"{store.root}/{name}: {there}")
    return manifest


def find(store: Store) -> Found:
    """All complete generations. What has no manifest was never finished and is passed over. Raises OSError."""
    complete: list[Manifest] = []
    damaged: dict[str, str] = {}
    for name in store.directories():
        if generation_of(name) is None:
            continue
        try:
            complete.append(read_manifest(store, name))
        except FileNotFoundError:
            continue
        except DurableError as err:
            damaged[name] = str(err)
    complete.sort(key=lambda m: (m.generation, m.written, m.epoch), reverse=True)
    return Found(tuple(complete), damaged)


def read_shard(
    store: Store,
    directory: str,
    shard: ShardFile,
    place: Callable[[ShardHeader], tuple[memoryview, memoryview]],
    check: Callable[[], None] = lambda: None,
) -> ShardHeader:
    """Read one coordinate's file into memory, and compare all of it with its digest.

    Args:
        place: given the header, returns where to put things: the unique state (``layout.unique_bytes`` bytes, every
            item at its offset) and the small state (``small_bytes`` bytes).
        check: called before each block; what it raises ends the reading.

    Raises Damaged (the memory holds garbage then), OSError.
    """
    return _read(store, f"{directory}/{shard.file}", shard, _in_one_range(place), check)


def read_items(
    store: Store, name: str, told_of: ShardFile | ConstantsFile, take: Callable[[Item, memoryview], None]
) -> bytes:
    """Read the file ``name`` an item at a time, with no more memory than the largest one; returns its small state.

    Args:
        take: given each item and its bytes, which it has until it returns.

    Raises Damaged, when all has been taken, for a file that has changed; OSError.
    """
    memory, small = bytearray(), bytearray()
    read: Item | None = None  # its bytes are in ``memory``

    def hand_over() -> None:
        if read is not None:
            take(read, memoryview(memory)[: read.nbytes])

    def next_one(item: Item) -> memoryview:
        nonlocal read
        hand_over()
        read = item
        return memoryview(memory)[: item.nbytes]

    def place(header: ShardHeader) -> tuple[Callable[[Item], memoryview], memoryview]:
        nonlocal memory, small
        memory = bytearray(max((item.nbytes for item in header.layout.items), default=0))
        small = bytearray(header.small_bytes)
        return next_one, memoryview(small)

    _read(store, name, told_of, place, lambda: None)
    hand_over()
    return bytes(small)


def read_header(store: Store, name: str, told_of: ShardFile | ConstantsFile) -> ShardHeader:
    """What the file ``name`` consists of. Raises Damaged, OSError."""
    where = f"{store.root}/{name}"
    with contextlib.closing(store.open(name)) as file:
        start = file.read(8)
        rest = bytearray()
        while len(rest) < (length := header_length(start, where)) and (block := file.read(length - len(rest))):
            rest += block
    header = parse_header(start, bytes(rest), where)
    _check(header, told_of, where)
    return header


def _check(header: ShardHeader, told_of: ShardFile | ConstantsFile, where: str) -> None:
    rank = told_of.rank if isinstance(told_of, ShardFile) else 0
    if header.rank != rank or header.layout.digest != told_of.layout or header.nbytes != told_of.nbytes:
        raise Damaged(f"{where} is not the file its manifest describes")


def read_constants(
    store: Store,
    file: ConstantsFile,
    place: Callable[[ShardHeader], tuple[memoryview, memoryview]],
    check: Callable[[], None] = lambda: None,
) -> ShardHeader:
    """Read what never changes, as `read_shard`."""
    return _read(store, file.path, file, _in_one_range(place), check)


def _in_one_range(place: Callable[[ShardHeader], tuple[memoryview, memoryview]]) -> _Place:
    def each(header: ShardHeader) -> tuple[Callable[[Item], memoryview], memoryview]:
        unique, small = place(header)
        return lambda item: unique[item.offset : item.offset + item.nbytes], small

    return each


def _read(
    store: Store, name: str, told_of: ShardFile | ConstantsFile, place: _Place, check: Callable[[], None]
) -> ShardHeader:
    where = f"{store.root}/{name}"
    told = _Digest()
    with contextlib.closing(store.open(name)) as file:

        def fill(view: memoryview) -> None:
            while view:
                check()
                block = file.read(min(_BLOCK, len(view)))
                if not block:
                    raise Damaged(f"{where} ends {len(view)} bytes early")
                view[: len(block)] = block
                told.update(view[: len(block)])  # as it lies in memory
                view = view[len(block) :]

        start = bytearray(8)
        fill(memoryview(start))
        rest = bytearray(header_length(bytes(start), where))
        fill(memoryview(rest))
        header = parse_header(bytes(start), bytes(rest), where)
        _check(header, told_of, where)
        place_of, small = place(header)
        for item in header.layout.items:
            fill(place_of(item))
        fill(small)
    if told.hex != told_of.xxh3_128:
        raise Damaged(f"{where} has changed since it was written: its checksum does not fit")
    return header
