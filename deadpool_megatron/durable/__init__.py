"""The durable tier: committed generations, drained from the vaults to a directory, for when memory cannot answer.

`format` says what lies there, `files` writes, seals, finds and reads it on a `Store`, `DrainerProcess` does the writing
for an agent in a process of its own, and `load_shards` brings a generation back into a vault. Knows vaults, and neither
agents nor Megatron.
"""

from .client import DrainerProcess
from .errors import Cancelled, Damaged, DurableError, NotFit
from .files import Found, find, prune, read_manifest, read_shard, remove_attempt, seal, write_shard
from .format import (
    FORMAT,
    MANIFEST,
    SMALL,
    Coordinate,
    Item,
    Layout,
    Manifest,
    ShardFile,
    directory_name,
    generation_of,
    shard_name,
)
from .lease import Lease, Owner, Taken, check_owner, take, this_process
from .loading import load_shards
from .orders import Answer, Cancel, Describe, Done, Drain, Seal, Stage, Staged, Take
from .pace import Pace
from .start import begin, go_on, open_directory, survey
from .store import LocalStore, ObjectStore, Store, open_store

__all__ = [
    "FORMAT",
    "MANIFEST",
    "SMALL",
    "Answer",
    "Cancel",
    "Cancelled",
    "Coordinate",
    "Damaged",
    "Describe",
    "Done",
    "Drain",
    "DrainerProcess",
    "DurableError",
    "Found",
    "Item",
    "Layout",
    "Lease",
    "LocalStore",
    "Manifest",
    "NotFit",
    "ObjectStore",
    "Owner",
    "Pace",
    "Seal",
    "ShardFile",
    "Stage",
    "Staged",
    "Store",
    "Take",
    "Taken",
    "begin",
    "check_owner",
    "directory_name",
    "find",
    "generation_of",
    "go_on",
    "load_shards",
    "open_directory",
    "open_store",
    "prune",
    "read_manifest",
    "read_shard",
    "remove_attempt",
    "seal",
    "shard_name",
    "survey",
    "take",
    "this_process",
    "write_shard",
]
