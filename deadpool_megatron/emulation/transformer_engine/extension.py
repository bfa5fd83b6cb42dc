"""The module ``transformer_engine_torch``: enumerations, kernels, a few facts, and a refusal of all the rest."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from typing import Any, NoReturn

from deadpool_megatron.emulation.device import constant
from deadpool_megatron.emulation.transformer_engine import (
    attention,
    dense,
    experts,
    optimizer,
    quantization,
    scales,
    userbuffers,
)
from deadpool_megatron.emulation.transformer_engine import enums as _enums
from deadpool_megatron.emulation.transformer_engine.kernels import KERNELS
from deadpool_megatron.emulation.transformer_engine.userbuffers import (  # noqa: F401 - the extension has them
    CommOverlap,
    CommOverlapCore,
    CommOverlapHelper,
    CommOverlapP2P,
)

_KERNEL_MODULES = (attention, dense, experts, optimizer, quantization, scales, userbuffers)

globals().update({name: value for name, value in vars(_enums).items() if name[0].isupper()})
globals().update(KERNELS)


class FP8TensorMeta:
    """A record of delayed scaling, which Transformer Engine fills."""

    def __init__(self) -> None:
        self.scale = self.scale_inv = self.amax_history = None


grouped_mlp_experimental = types.SimpleNamespace()


def get_cublasLt_version() -> int:
    """From 130300 on Transformer Engine splits the rows of grouped GEMMs on the device (a Blackwell's), as CUDA graphs
    need it; the emulation has that in 16 bits only, so it has to be asked for."""
    return int(os.environ.get("DEADPOOL_EMULATED_CUBLASLT", "130200"))


# Versions that allow every feature that Transformer Engine asks them about.
get_cudnn_version = constant(92400)
get_grouped_gemm_setup_workspace_size = constant(1)
get_num_cublas_streams = constant(4)
get_stream_priority_range = constant((0, -5))
device_supports_multicast = constant(True)
ubuf_built_with_mpi = constant(False)
nvte_built_with_cublasmp = constant(False)
ep_zero_copy_supported = constant(False)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"the emulation of CUDA has no transformer_engine_torch.{name}")

    return refuse
