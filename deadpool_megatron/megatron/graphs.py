"""Captured CUDA graphs let go before communicators are aborted; all ranks capture them anew in the next ``train``."""

from __future__ import annotations

import gc
import sys
from typing import Any, Final

_MEGATRON: Final = "megatron.core.transformer.cuda_graphs"
_ENGINE: Final = "transformer_engine.pytorch.graph"
_GRAPHS: Final = "cuda_graphs"  # of a layer, by its microbatch


class Graphs:
    """Of this rank, of whichever kind ``--cuda-graph-impl`` has made.

    A graph holds the collectives of groups that are gone. It also goes where it holds none: a spare has to capture,
    which may communicate (its warm-up runs the layers), and then all ranks have to.

    Args:
        impl: the value of that flag.
        model: list of model chunks (DDP).
    """

    def __init__(self, impl: str | None, model: list[Any]) -> None:
        # Forward and backward passes of an iteration are one graph.
        self.whole_iterations: Final = impl == "full_iteration"
        self._of_layers: Final = impl == "transformer_engine"
        modules = [module for chunk in model for module in chunk.modules()] if self._of_layers else []
        self._layers = [module for module in modules if _GRAPHS in vars(module)]
        # Transformer Engine puts another in their place while it captures.
        self._calls: dict[Any, Any] = {kind: kind.__call__ for kind in map(type, self._layers)}

    def drop(self) -> bool:
        """Before the abort is waited for: NCCL's commDestroySync polls until all graphs that hold the communicator are
        gone. And before ``train`` makes new ones, which would leave these behind with their memory pools.

        Returns whether a capture has been broken off, which has moved scales of FP8 and random numbers.
        """
        if self.whole_iterations:
            _drop_whole_iterations()
        if not self._of_layers:
            return False
        for layer in self._layers:
            _drop_of(layer)
        if not sys.modules[_MEGATRON].is_graph_capturing():
            return False
        for kind, call in self._calls.items():
            kind.__call__ = call
        _end_capture()
        return True


def _drop_whole_iterations() -> None:
    """Source: upstream's FullCudaGraphWrapper.reset_cuda_graph; its state is the class's, and wrappers come and go with
    ``train`` and ``evaluate``."""
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper

    for stage in FullCudaGraphWrapper.cuda_graph:
        FullCudaGraphWrapper.cuda_graph[stage] = None
        FullCudaGraphWrapper.result[stage] = None
        FullCudaGraphWrapper.curr_iteration[stage] = 0


def _drop_of(layer: Any) -> None:
    """Source: upstream's TECudaGraphHelper.delete_cuda_graphs; the helper itself goes with the ``train`` that broke."""
    for graph in layer.cuda_graphs:
        if hasattr(graph, "reset"):  # Transformer Engine 2.10 or newer
            graph.reset()
    layer.cuda_graphs = []
    layer.cuda_graph_manual_hooks = []


def _end_capture() -> None:
    """A capture that broke off has not said that it is over, to Megatron, Transformer Engine and the collector."""
    megatron = sys.modules[_MEGATRON]
    megatron._set_capture_end()
    sys.modules[_ENGINE].set_capture_end()
    if megatron.FREEZE_GC:
        gc.unfreeze()
