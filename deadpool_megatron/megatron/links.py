"""When training itself uses the links that copies would share: parameter gathers and gradient reductions."""

from __future__ import annotations

from typing import Any


class Links:
    """Says at each tick whether collectives of data parallelism run beside the pass that begins.

    With ``--overlap-param-gather`` parameters are gathered beside the first forward pass of each model chunk, with
    ``--overlap-grad-reduce`` gradients are reduced beside the backward pass of the last microbatch. Without overlap
    they run while no pass does, after the last tick and before the first.

    Args:
        model: Megatron's model chunks, wrapped for data parallelism.
    """

    def __init__(self, model: list[Any]) -> None:
        self._gathers = bool(model[0].ddp_config.overlap_param_gather)
        self._reduces = bool(model[0].ddp_config.overlap_grad_reduce)
        self._chunks = len(model)
        groups = [group for chunk in model for group in getattr(chunk, "bucket_groups", ())]
        self._group = groups[0] if groups else None
        self._forwards = 0

    def opened(self) -> bool:
        """A generation opens, and an iteration with it."""
        self._forwards = 0
        return False  # until the first forward pass nobody gathers

    def busy(self, backward: bool) -> bool:
        """A forward or backward pass begins."""
        if backward:
            # Set in all microbatches but the last by DistributedDataParallel.no_sync, which the schedules use.
            return self._reduces and self._group is not None and bool(self._group.is_last_microbatch)
        self._forwards += 1
        return self._gathers and self._forwards <= self._chunks
