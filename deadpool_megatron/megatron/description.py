"""What a worker tells of itself for the durable tier: what job it is, and what its shard consists of."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any, Final

import msgspec
import torch

from deadpool_megatron import __version__
from deadpool_megatron.durable import Item, Layout, Piece
from deadpool_megatron.megatron.pieces import pieces_in
from deadpool_megatron.megatron.same_model import batch_of, model_of, other_settings
from deadpool_megatron.snapshot import ShardPlan

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


def _module() -> str:
    """By which name ``python -m`` was given the script; empty for a file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else ""


def describe_job(args: Mapping[str, Any]) -> bytes:
    """The job as JSON: ``model``, ``settings``, ``batch`` (`same_model`), ``command`` (for an export), ``versions``."""
    return msgspec.json.encode(
        {
            "model": model_of(args),
            "settings": other_settings(args),
            "batch": batch_of(args),
            "command": {
                "directory": os.getcwd(),
                "script": sys.argv[0],
                "module": _module(),
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


def layout_of(plan: ShardPlan, pieces: Mapping[str, tuple[Piece, ...]] = MappingProxyType({})) -> Layout:
    """The shard's tensors; ``pieces`` as of `pieces_of`."""
    items = []
    for name, tensor, offset, nbytes in plan.items():
        dtype = _DTYPES.get(tensor.dtype)
        shape = tuple(tensor.shape) if dtype is not None else (nbytes,)
        items.append(Item(name, dtype or "U8", shape, offset, nbytes, pieces_in(name, nbytes, pieces)))
    return Layout(plan.nbytes, plan.digest(), tuple(items))
