"""What a worker tells of itself for the durable tier: what job it is, and what its shard consists of."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Final

import msgspec
import torch

from deadpool_megatron import __version__
from deadpool_megatron.durable import Item, Layout
from deadpool_megatron.snapshot import ShardPlan

# Arguments that decide what a shard is: a durable generation fits a job only if all of them are the same.
_MODEL: Final = (
    "world_size",
    "data_parallel_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "padded_vocab_size",
    "position_embedding_type",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "moe_ffn_hidden_size",
    "params_dtype",
    "optimizer",
    "use_distributed_optimizer",
    "transformer_impl",
)

# The names that the safetensors format has for dtypes; bytes for any other.
_DTYPES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def describe_job(args: Mapping[str, Any]) -> bytes:
    """The job as JSON: ``model`` (what a shard depends on), ``command`` (for `deadpool export`), ``versions``."""
    return msgspec.json.encode(
        {
            "model": {name: _plain(args.get(name)) for name in _MODEL},
            "command": {
                "directory": os.getcwd(),
                "script": sys.argv[0],
                "arguments": sys.argv[1:],
                "slots_per_node": int(os.environ["LOCAL_WORLD_SIZE"]),
            },
            "versions": {
                "deadpool": __version__,
                "torch": str(torch.__version__),
                "megatron-core": metadata.version("megatron-core"),
            },
        }
    )


def describe_layout(plan: ShardPlan) -> bytes:
    """The shard's tensors as JSON (`durable.Layout`)."""
    items = []
    for name, tensor, offset, nbytes in plan.items():
        dtype = _DTYPES.get(tensor.dtype)
        shape = tuple(tensor.shape) if dtype is not None else (nbytes,)
        items.append(Item(name, dtype or "U8", shape, offset, nbytes))
    return msgspec.json.encode(Layout(plan.nbytes, plan.digest(), tuple(items)))
