"""The durable tier: committed generations, drained from the vaults to a directory, for when memory cannot answer.

`format` says what lies there, `files` writes, seals, finds and reads it on a `Store`, `DrainerProcess` does the writing
for an agent in a process of its own, and `load_shards` brings a generation back into a vault. Knows vaults, and neither
agents nor Megatron.
"""

from .client import DrainerProcess
from .errors import DurableError, NoRoom, NotFit, Unreachable, Unreadable
from .files import find, read_manifest
from .format import (
    FORMAT,
    Coordinate,
    Item,
    Layout,
    Manifest,
    Piece,
    ShardFile,
    described,
    differing,
    directory_name,
    not_fit,
    settings_note,
    split_small,
    trailer_of,
)
from .lease import Lease, this_process
from .loading import load_constants, load_shards
from .orders import Answer, Cancel, Done, Drain, Seal, Stage, Staged, Take
from .recut import DirectorySource, Source, fills, read_recut, read_whole
from .start import Survey, begin, go_on
from .store import Store, open_store

__all__ = ["FORMAT", "Answer", "Cancel", "Coordinate", "DirectorySource", "Done", "Drain", "DrainerProcess"]
__all__ += ["DurableError", "Item", "Layout", "Lease", "Manifest", "NoRoom", "NotFit", "Piece", "Seal", "ShardFile"]
__all__ += ["Source", "Stage", "Staged", "Store", "Survey", "Take", "Unreachable", "Unreadable", "begin", "described"]
__all__ += ["differing", "directory_name", "fills", "find", "go_on", "load_constants", "load_shards", "not_fit"]
__all__ += ["open_store", "read_manifest", "read_recut", "read_whole", "settings_note", "split_small", "this_process"]
__all__ += ["trailer_of"]
