"""The durable tier: committed generations, drained from the vaults to a directory, for when memory cannot answer.

`format` says what lies there, `files` writes, seals, finds and reads it on a `Store`, `DrainerProcess` does the writing
for an agent in a process of its own, and `load_shards` brings a generation back into a vault. Knows vaults, and neither
agents nor Megatron.
"""

from .client import DrainerProcess
from .errors import DurableError, NoRoom, Unreachable, Unreadable
from .files import find
from .format import FORMAT, Coordinate, Item, Layout, Manifest, ShardFile, directory_name
from .lease import Lease, this_process
from .loading import load_constants, load_shards
from .orders import Answer, Cancel, Describe, Done, Drain, Seal, Stage, Staged, Take
from .start import begin, go_on
from .store import Store, open_store

__all__ = ["FORMAT", "Answer", "Cancel", "Coordinate", "Describe", "Done", "Drain", "DrainerProcess", "DurableError"]
__all__ += ["Item", "Layout", "Lease", "Manifest", "NoRoom", "Seal", "ShardFile", "Stage", "Staged", "Store", "Take"]
__all__ += ["Unreachable", "Unreadable", "begin", "directory_name", "find", "go_on", "load_constants", "load_shards"]
__all__ += ["open_store", "this_process"]
