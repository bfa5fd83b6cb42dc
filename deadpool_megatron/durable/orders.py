"""What an agent and its drainer say to each other: typed, one JSON object a line, over the drainer's stdin, stdout."""

from __future__ import annotations

import signal
from typing import Final

import msgspec

from .format import Manifest, ShardFile

# A batch system's signals go to every process of the job; the agent ends its drainer when it is time.
DEAF_TO: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class _Record(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class Stage(_Record, frozen=True):
    """A coordinate lives on this node: make its staging memory (``nbytes``).

    ``ranks``: how many the job has, in this and other orders; shards of another number are others.
    """

    rank: int
    nbytes: int
    ranks: int = 0


class Unstage(_Record, frozen=True):
    """The coordinate lives here no more: give its staging memory back."""

    rank: int


class Take(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One coordinate to be drained: the arena file, and the version in it.

    ``constants``: the arena file of what never changes; empty where there is none.
    """

    rank: int
    path: str
    epoch: int
    generation: int
    constants: str = ""


class Drain(_Record, frozen=True):
    """Write the shards of one generation into ``directory/name``, over ``seconds`` (0: as fast as it goes).

    ``job``: whose the directory must be; empty: anybody's. The same in a `Seal` and a `Cancel`.
    """

    directory: str
    name: str
    seconds: float
    shards: tuple[Take, ...]
    job: str = ""
    ranks: int = 0


class Seal(_Record, frozen=True):
    """All shards are written: write the manifest, then remove what is older and not to be kept."""

    directory: str
    manifest: Manifest
    keep: tuple[str, ...]
    job: str = ""


class Cancel(_Record, frozen=True):
    """Whatever belongs to ``name`` is not wanted any more; with ``remove`` its directory goes too."""

    directory: str
    name: str
    remove: bool
    job: str = ""


Order = Stage | Unstage | Drain | Seal | Cancel


class Staged(_Record, frozen=True):
    """All shards of ``name`` are copied out: their slots may be overwritten (also sent when the copy failed)."""

    name: str


class Done(_Record, frozen=True):
    """A `Drain` (``sealed`` False) or a `Seal` has ended. ``error`` is one line, empty when all went well.

    ``unusable``: the holder (rank, or of a rank's constants) whose version in the vault was the reason, since it is not
    there or has changed; -1: none.
    ``unsure``: nobody knows whether a `Seal` was carried out, since its process has ended.
    """

    name: str
    sealed: bool
    shards: tuple[ShardFile, ...] = ()
    error: str = ""
    problems: tuple[str, ...] = ()
    unusable: int = -1
    unsure: bool = False


Answer = Staged | Done
