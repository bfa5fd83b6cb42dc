"""What two agents say to each other about shards, as typed records; `wire` carries them.

Unknown tags, unknown fields and values out of range are refused.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from .version import MAX_EPOCH, MAX_GENERATION

NO_DIRECT: Final = "no-direct-read"  # code of a Refusal: offer it again, but to be sent

Unsigned = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Word = Annotated[int, msgspec.Meta(ge=0)]  # msgpack integers end at 64 bits
Epoch = Annotated[int, msgspec.Meta(ge=0, le=MAX_EPOCH)]
Generation = Annotated[int, msgspec.Meta(ge=0, le=MAX_GENERATION)]
Text = Annotated[str, msgspec.Meta(max_length=1000)]
MAX_RUNS: Final = 1024
Runs = Annotated[list[tuple[Unsigned, Unsigned]], msgspec.Meta(max_length=MAX_RUNS)]


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a member may read a slot's bytes by itself: see `direct`.

    Attributes:
        agent: what the owner's nixl tells of itself and of the registered arena.
        number: of the registration.
        small, unique: addresses of the slot's two areas in the owner's process.
    """

    agent: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]
    number: Unsigned
    small: Unsigned
    unique: Unsigned


class _Frame(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    epoch: Epoch  # the sender's


class Begin(_Frame, frozen=True):
    """Owner to peer: keep this shard. ``kept`` and ``floor`` are the packed words the owner acts on.

    With a ``window`` the peer may read the payload from there by itself.
    """

    rank: Unsigned
    version_epoch: Epoch
    generation: Generation
    unique_bytes: Unsigned
    small_capacity: Unsigned
    small_bytes: Unsigned
    chunk_bytes: Unsigned
    kept: Word
    floor: Word
    window: Window | None = None


class Share(_Frame, frozen=True):
    """Owner to keeper of parity: add this part. ``part`` is the rank's place among the ranks of ``word``.

    The payload that follows is entry 0, the small state, then the chunks of the part; ``Begun.done`` says where the
    keeper stands already.
    """

    word: Word
    part: Annotated[int, msgspec.Meta(ge=0, le=63)]
    rank: Unsigned
    version_epoch: Epoch
    generation: Generation
    unique_bytes: Unsigned
    small_bytes: Unsigned
    chunk_bytes: Unsigned
    kept: Word
    floor: Word


class Begun(_Frame, frozen=True):
    """Peer to owner: go on, from entry ``done``; or, ``held``, that version is here and complete.

    ``direct``: no payload is to follow, I read it through the window and say what is `Taken`.
    """

    held: bool
    done: Unsigned = 0
    direct: bool = False


class Bytes(_Frame, frozen=True):
    """Owner to peer: entries ``first``... of the checksum table (0 is the small state) are due; payload follows.

    No payload where the peer reads by itself.
    """

    first: Unsigned
    sums: Annotated[list[Word], msgspec.Meta(min_length=1, max_length=1024)]


class Taken(_Frame, frozen=True):
    """Who reads by itself to whom it reads from: the first ``done`` entries are in and verified; told now and then.

    ``changed``: the next one is not what its checksum says. The owner answers with a `Sent`, or leaves.
    """

    done: Unsigned
    changed: bool = False


class Complete(_Frame, frozen=True):
    """Owner to peer: that was all, and the slot has not been opened again meanwhile."""


class Stored(_Frame, frozen=True):
    """Peer to owner: the version is complete and verified here."""


class Fetch(_Frame, frozen=True):
    """Restorer to holder: send this version. Part ``part`` of ``parts`` of its chunks; part 0 has the small state.

    With ``parity`` it is the parity of the word ``rank`` that is wanted, and its records in the place of a small state.
    ``direct``: I can read through a window. ``doubted``: it has arrived changed before.

    With ``runs`` (not with a part, and never through a window) only those entries of the checksum table are wanted, as
    ascending [first, end); entry 0 is the small state. No run at all asks for the sizes alone.
    """

    rank: Unsigned
    version_epoch: Epoch
    generation: Generation
    part: Annotated[int, msgspec.Meta(ge=0, le=63)]
    parts: Annotated[int, msgspec.Meta(ge=1, le=64)]
    parity: bool = False
    direct: bool = False
    doubted: bool = False
    runs: Runs | msgspec.UnsetType = msgspec.UNSET


class Found(_Frame, frozen=True):
    """Holder to restorer: sizes, and checksums of the part or the runs.

    The payload follows, or can be read through ``window``.
    """

    unique_bytes: Unsigned
    small_capacity: Unsigned
    small_bytes: Unsigned
    chunk_bytes: Unsigned
    sums: list[Word]
    window: Window | None = None


class Sent(_Frame, frozen=True):
    """Holder to restorer: that was all; ``intact`` unless the slot was opened again while it was sent."""

    intact: bool


class Echo(_Frame, frozen=True):
    """Send these bytes back: ``nbytes`` of payload follow, there and back, with their checksum ``sum``."""

    nbytes: Annotated[int, msgspec.Meta(ge=0, le=16 << 20)]
    sum: Word


class Refusal(_Frame, frozen=True):
    """The other side will not: ``code`` for programs, ``message`` for people."""

    code: Text
    message: Text


Frame = Begin | Share | Begun | Bytes | Taken | Complete | Stored | Fetch | Found | Sent | Echo | Refusal
