"""What of Megatron is supported, by its flags, and the one clear line for what is not. Imports nothing of it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Final

from deadpool_megatron.compat import UserError


def _above_one(value: object) -> bool:
    return value not in (None, False, 1)


# Flag, attribute of Megatron's args, and when its value is one that DeadPool cannot carry through a swap yet.
_UNSUPPORTED: Final[tuple[tuple[str, str, Any], ...]] = (
    ("--use-megatron-fsdp", "use_megatron_fsdp", bool),
    ("--use-torch-fsdp2", "use_torch_fsdp2", bool),
    ("--cuda-graph-impl", "cuda_graph_impl", lambda v: v not in (None, "none", "full_iteration")),
    ("--enable-cuda-graph", "enable_cuda_graph", bool),
    ("--external-cuda-graph", "external_cuda_graph", bool),
    ("--optimizer-cuda-graph", "optimizer_cuda_graph", bool),
    ("--tp-comm-overlap (Transformer Engine userbuffers)", "tp_comm_overlap", bool),
    (
        "--optimizer",
        "optimizer",
        lambda v: v not in (None, "adam", "sgd", "lion", "muon", "dist_muon", "adaptive_muon"),
    ),
    (
        "--moe-token-dispatcher-type (DeepEP, HybridEP and NCCL EP: communicators of their own, which nothing aborts)",
        "moe_token_dispatcher_type",
        lambda v: v == "flex",
    ),
    ("--optimizer-cpu-offload", "optimizer_cpu_offload", bool),
    ("--fp8-recipe", "fp8_recipe", lambda v: v == "custom"),
    ("--fp4-recipe", "fp4_recipe", lambda v: v == "custom"),
    ("--fp4-param-gather", "fp4_param_gather", bool),
    ("--nccl-ub", "nccl_ub", bool),
    ("--use-sharp", "use_sharp", bool),
    ("--perform-rl-step", "perform_rl_step", bool),
    ("--inprocess-restart", "inprocess_restart", bool),
    ("--enable-ft-package", "enable_ft_package", bool),
    ("--vision-pretraining", "vision_pretraining", bool),
    ("--iterations-to-skip", "iterations_to_skip", bool),
    # Weights cut along an axis of their own (GTP): who holds which shard is not what the snapshot's arithmetic assumes.
    ("--tensor-parallel-num-weight-shards", "gtp_weight_remat_size", _above_one),
    ("--expert-tensor-parallel-num-weight-shards", "expert_gtp_weight_remat_size", _above_one),
)


# Environment variables that change what backend a process group of torch has, and why that one is not supported.
_UNSUPPORTED_SETTINGS: Final[tuple[tuple[str, str], ...]] = (
    ("TORCH_DIST_USE_NCCL2", "ProcessGroupNCCL2 is neither aborted nor re-formed"),
    ("TORCH_DISTRIBUTED_USE_TORCHCOMMS", "communicators of torchcomms are neither aborted nor re-formed"),
)


def check_environment(environ: Mapping[str, str]) -> None:
    """Raises UserError that names the first variable that selects process groups that are not supported."""
    for name, why in _UNSUPPORTED_SETTINGS:
        value = environ.get(name, "0")
        if value.lower() not in ("", "0", "false", "no", "off", "n"):
            raise UserError(
                f"{name}={value} is not supported with --deadpool: {why}; unset it, or run without --deadpool"
            )


def check_arguments(args: Namespace) -> None:
    """Raises UserError that names the flags of all modes that are not supported."""
    refused = []
    for flag, name, bad in _UNSUPPORTED:
        value = getattr(args, name, None)
        if bad(value):
            refused.append((flag, "" if value is True else f" (here: {value})"))
    if len(refused) == 1:
        ((flag, here),) = refused
        raise UserError(f"{flag} is not supported with --deadpool yet{here}; leave it out, or run without --deadpool")
    if refused:
        flags = ", ".join(flag + here for flag, here in refused)
        raise UserError(f"{flags} are not supported with --deadpool yet; leave them out, or run without --deadpool")
