"""A capture of Transformer Engine's graphs that breaks off leaves nothing behind for the next one."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from emulated import emulated_process, in_emulation  # noqa: F401


class _Breaks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cuda_graphs: list[Any] = []

    def forward(self, x: Any) -> Any:
        raise ConnectionError("the neighbour is gone")


@in_emulation
def test_a_broken_capture_leaves_the_classes_of_layers_as_they_were() -> None:
    from megatron.core.transformer import cuda_graphs
    from transformer_engine.pytorch import graph

    from deadpool_megatron.megatron.graphs import Graphs

    model, before = _Breaks(), _Breaks.__call__
    graphs = Graphs("transformer_engine", [model])
    assert not graphs.drop()
    cuda_graphs._set_capture_start()
    if cuda_graphs.FREEZE_GC:
        gc.freeze()
    with pytest.raises(ConnectionError):
        graph.make_graphed_callables((model,), ((torch.ones(2, requires_grad=True),),), num_warmup_iters=1)
    assert _Breaks.__call__ is not before and graph.is_graph_capturing() and cuda_graphs.is_graph_capturing()
    assert graphs.drop()
    assert _Breaks.__call__ is before
    assert not graph.is_graph_capturing()
    assert not cuda_graphs.is_graph_capturing()
    assert not cuda_graphs.FREEZE_GC or not gc.get_freeze_count()
    assert not graphs.drop()


@in_emulation
def test_what_a_process_has_learned_of_offloading_is_forgotten() -> None:
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager

    from deadpool_megatron.megatron import reset

    learned = PipelineOffloadManager.get_instance()
    learned._is_warmup = False
    reset._forget_offloading()
    assert PipelineOffloadManager.get_instance()._is_warmup
