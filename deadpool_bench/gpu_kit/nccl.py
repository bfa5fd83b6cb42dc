"""libnccl.so with its code for one kind of device alone, so that it is small enough to be carried along.

Device code lies in sections of *fat binaries*: containers of elements, each a header and the code of one architecture.
A container keeps the elements of the wanted one and is as long as they are; the rest of its place is zeros, which
compress to nothing. Sections, symbols and addresses stay as they are, and so do containers without the wanted one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MAGIC: Final = 0xBA55ED50
_CONTAINER: Final = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all elements
_ELEMENT: Final = struct.Struct("<HHIQ")  # kind (1: PTX, 2: machine code), version, bytes of header, of code
_ARCHITECTURE_AT: Final = 28  # in the header of an element
_MACHINE_CODE: Final = 2
_CODE, _RELOCATABLE = ".nv_fatbin", "__nv_relfatbin"


class NotPruned(ValueError):
    """The file is not what is expected; one line."""


def _sections(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each section of a 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise NotPruned("not a 64-bit ELF file")
    (at,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, at + size * number) for number in range(count)]
    text = headers[names][4]
    for name, _, _, _, offset, length in headers:
        yield data[text + name : data.index(b"\0", text + name)].decode(), offset, length


def _keep(data: bytearray, at: int, end: int, sm: int, relocatable: bool) -> tuple[int, int]:
    """Prune the containers of a section, in place; how many have code for ``sm``, and how many stay as they are."""
    pruned = left = 0
    while at < end:
        magic, version, header, size = _CONTAINER.unpack_from(data, at)
        if magic != _MAGIC:
            at += 8  # containers are aligned
            continue
        element, stop = at + header, at + header + size
        kept = b""
        while element < stop:
            kind, _, bytes_of_header, bytes_of_code = _ELEMENT.unpack_from(data, element)
            following = element + bytes_of_header + bytes_of_code
            (architecture,) = struct.unpack_from("<I", data, element + _ARCHITECTURE_AT)
            if kind == _MACHINE_CODE and architecture == sm and not relocatable:
                kept += data[element:following]
            element = following
        pruned += bool(kept)
        if kept or relocatable:  # relocatable code was linked already
            data[at + header : stop] = kept + bytes(size - len(kept))
            _CONTAINER.pack_into(data, at, magic, version, header, len(kept))
        else:
            left += 1
        at = stop
    return pruned, left


def prune(source: Path, target: Path, sm: int) -> str:
    """Write ``source`` to ``target`` with the code of ``sm`` (90: Hopper) alone; a line about it. Raises NotPruned."""
    data = bytearray(source.read_bytes())
    sections = {name: (offset, size) for name, offset, size in _sections(bytes(data))}
    if _CODE not in sections:
        raise NotPruned(f"{source}: no section {_CODE}, so no device code")
    counts = [
        _keep(data, offset, offset + size, sm, name == _RELOCATABLE)
        for name, (offset, size) in sections.items()
        if name in (_CODE, _RELOCATABLE)
    ]
    pruned, left = (sum(each) for each in zip(*counts, strict=True))
    if not pruned:
        raise NotPruned(f"{source}: nothing in it is for sm_{sm}")
    target.write_bytes(data)
    size = len(data) - data.count(0)
    return f"{target}: {size / 1e6:.0f} MB that are not zero of {len(data) / 1e6:.0f}; {left} containers left whole"
