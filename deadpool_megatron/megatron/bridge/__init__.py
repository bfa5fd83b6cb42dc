"""Megatron-Bridge's training loop (``megatron.bridge.training``), as a host."""

from deadpool_megatron.megatron.bridge.host import MegatronBridge

__all__ = ["MegatronBridge"]
