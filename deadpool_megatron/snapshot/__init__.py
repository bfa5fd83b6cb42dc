"""The snapshot: what of a coordinate's state is copied, when, and how it gets into the vault."""

from .cuda_engine import CudaCopyEngine
from .engine import CopyEngine, HostCopyEngine, slot_views
from .plan import ShardPlan
from .small import capture_host_rng, decode, encode, host_bytes, restore_host_rng
from .snapshotter import Pacing, Snapshotter

__all__ = ["CopyEngine", "CudaCopyEngine", "HostCopyEngine", "Pacing", "ShardPlan", "Snapshotter", "capture_host_rng"]
__all__ += ["decode", "encode", "host_bytes", "restore_host_rng", "slot_views"]
