"""DeadPool inside a Megatron-LM tree: what patched lines call, and the patches themselves."""

from deadpool_megatron.intree.attach import attach

__all__ = ["attach"]
