"""The snapshot: what of a coordinate's state is copied, when, and how it gets into the vault."""

from .cuda_engine import CudaCopyEngine, CudaCopyError
from .engine import CopyEngine, HostCopyEngine
from .plan import Segment, ShardPlan
from .small import SmallStateError, capture_host_rng, decode, encode, restore_host_rng
from .snapshotter import Pacing, SnapshotStats, Snapshotter

__all__ = [
    "CopyEngine",
    "CudaCopyEngine",
    "CudaCopyError",
    "HostCopyEngine",
    "Pacing",
    "Segment",
    "ShardPlan",
    "SmallStateError",
    "SnapshotStats",
    "Snapshotter",
    "capture_host_rng",
    "decode",
    "encode",
    "restore_host_rng",
]
