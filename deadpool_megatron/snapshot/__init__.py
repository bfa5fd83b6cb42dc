"""The snapshot: what of a coordinate's state is copied, when, and how it gets into the vault."""

from .cuda_engine import CudaCopyEngine
from .engine import CopyEngine, CopyError, HostCopyEngine, PinError, slot_views
from .pacing import Pacing
from .plan import ShardPlan
from .small import SmallStateError, capture_host_rng, decode, encode, host_bytes, restore_host_rng
from .snapshotter import Snapshotter

__all__ = [
    "CopyEngine",
    "CopyError",
    "CudaCopyEngine",
    "HostCopyEngine",
    "Pacing",
    "PinError",
    "ShardPlan",
    "SmallStateError",
    "Snapshotter",
    "capture_host_rng",
    "decode",
    "encode",
    "host_bytes",
    "restore_host_rng",
    "slot_views",
]
