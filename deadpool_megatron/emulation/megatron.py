"""What the emulation changes in Megatron's modules, once they are imported."""

from __future__ import annotations

import functools
import logging
from typing import Any

from deadpool_megatron.emulation import graphs, megatron_kernels
from deadpool_megatron.emulation.importing import after_import


def _without_helpers(module: Any) -> None:
    # The wheel has the dataset helpers compiled, but upstream's function runs `make`, whose Makefile it lacks.
    module.compile_helpers = lambda: None


def _captures_layers(module: Any) -> None:
    # The emulated graphs replay whatever generator was in use: none needs to be registered with them first.
    module._ensure_generator_state_is_cudagraph_safe = lambda generator: generator
    record = module._CudagraphGlobalRecord
    native = record.create_cudagraphs.__func__

    @functools.wraps(native)
    def create_cudagraphs(cls: type) -> Any:
        with graphs.captured_with_samples():
            return native(cls)

    record.create_cudagraphs = classmethod(create_cudagraphs)


def _rotates(module: Any) -> None:
    module.fused_apply_mla_rope_for_q = megatron_kernels.fused_apply_mla_rope_for_q
    module.fused_apply_mla_rope_for_kv = megatron_kernels.fused_apply_mla_rope_for_kv


def _pads(module: Any) -> None:
    module.fused_pad_routing_map = megatron_kernels.fused_pad_routing_map


def _binds_nothing(module: Any) -> None:
    # It binds the process to the processors beside its device.
    module.set_ideal_affinity_for_current_gpu = lambda: None


def _offloads(module: Any) -> None:
    # It takes a tensor that is not on a device for one on the host already.
    from torch.nn import Parameter

    def is_on_device(tensor: Any) -> bool:
        return not isinstance(tensor, Parameter)

    module.ChunkOffloadHandler._can_manage_tensor_for_offload = staticmethod(is_on_device)


def install() -> None:
    """Register the changes; modules that are imported already are changed at once."""
    after_import("megatron.core.datasets.utils", _without_helpers)
    after_import("megatron.core.transformer.cuda_graphs", _captures_layers)
    after_import("megatron.core.fusions.fused_mla_yarn_rope_apply", _rotates)
    after_import("megatron.core.fusions.fused_pad_routing_map", _pads)
    after_import("megatron.core.pipeline_parallel.utils", _binds_nothing)
    after_import("megatron.core.pipeline_parallel.fine_grained_activation_offload", _offloads)
    # It warns at every fork of the tracker that device and CPU generator are one; here they are, by design.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
