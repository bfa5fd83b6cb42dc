"""What coordinator, agents and workers say about the durable tier."""

from __future__ import annotations

from deadpool_megatron.cluster.records.values import CoordinateInfo, OfNode, OfNodeInEpoch, Record, Value
from deadpool_megatron.durable import ShardFile

# ---- coordinator -> agents


class DrainShards(Record, frozen=True):
    """Write this node's shards of a committed version to the durable directory, over ``seconds`` (0: at once).

    ``version_epoch`` -1: whichever version of the generation this node has, of each rank.
    """

    name: str
    version_epoch: int
    generation: int
    seconds: float


class SealGeneration(Record, frozen=True):
    """Every shard is written: write the manifest, then remove older generations except those in ``keep``."""

    name: str
    epoch: int
    generation: int
    coordinates: list[CoordinateInfo]
    shards: list[ShardFile]
    keep: list[str]


class GiveUpDrain(Record, frozen=True):
    """An attempt to drain a generation is over; the node ``remover`` removes what there is of it."""

    name: str
    remover: int


class LoadShards(Record, frozen=True):
    """Before training: bring this node's shards of a durable generation into its vault, as versions of ``epoch``."""

    name: str
    generation: int
    epoch: int = 0


class Base(Value, frozen=True):
    """A generation in the nodes' memory that a job with another number of replicas begins with.

    ``epoch``: in which it was chosen. ``version_epoch``: in which it was written; -1: what each node has of the
    generation is the same, whenever it was.
    """

    epoch: int
    version_epoch: int
    generation: int


class InMemory(Value, frozen=True):
    """A `Base`, its coordinates, and by its ranks the nodes that hold the shard, and what never changes of the rank."""

    base: Base
    coordinates: list[CoordinateInfo]
    holders: list[list[int]]
    constants: list[list[int]]


class ResumeAt(Record, frozen=True):
    """Training begins with this generation, which every vault holds; -1: with none.

    No vault has it as the ranks need it where it is of another number of replicas: they read what they need of it, in
    the durable directory ``recut``, or in ``memory``.
    """

    generation: int
    recut: str = ""
    memory: InMemory | None = None


DurableOrder = DrainShards | SealGeneration | GiveUpDrain | LoadShards | ResumeAt

# ---- agent -> coordinator


class ShardsDrained(OfNode, frozen=True):
    """A node's part of a drain has ended; ``error`` is empty when all of its shards are written."""

    name: str
    shards: list[ShardFile]
    error: str


class GenerationSealed(OfNode, frozen=True):
    """The manifest is written, or is not (``error``; ``unsure``: it may be); ``problems`` are lesser ones."""

    name: str
    error: str
    problems: list[str]
    unsure: bool = False


class ShardsLoaded(OfNode, frozen=True):
    """A node has its shards of a durable generation in its vault, or could not read them (``error``)."""

    name: str
    error: str
    epoch: int = 0


class SetAside(OfNodeInEpoch, frozen=True):
    """Of which ranks of the `Base` that the start begins with this node holds the shard, and what never changes."""

    ranks: list[int]
    constants: list[int]


class PreemptionNotice(OfNode, frozen=True):
    """This node was told (SIGTERM) that the job has to leave the machine soon."""


DurableReport = ShardsDrained | GenerationSealed | ShardsLoaded | SetAside | PreemptionNotice

# ---- worker -> agent


class Described(Record, frozen=True):
    """Part ``part`` of ``parts`` of what a worker tells of its job, as JSON."""

    rank: int
    part: int
    parts: int
    data: bytes
