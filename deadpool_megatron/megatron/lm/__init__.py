"""Megatron-LM's training loop (``megatron.training``), as a host."""

from deadpool_megatron.megatron.lm.host import MegatronLM

__all__ = ["MegatronLM"]
