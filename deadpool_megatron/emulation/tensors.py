"""Tensors "on the device": factories, moves and type names answer for CUDA while everything stays on the CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.utils.data

from deadpool_megatron.emulation.device import CPU

_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "randint", "randperm", "eye", "linspace"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "as_tensor", "empty_strided"),
    *("scalar_tensor", "triu_indices", "tril_indices"),
)
_METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
_TYPES = ("Float", "Half", "BFloat16", "Double", "Int", "Long", "Short", "Byte", "Char", "Bool")


def _on_cpu(device: Any) -> Any:
    """The CPU for a CUDA device in any spelling (string, torch.device, bare index); anything else as it is."""
    if isinstance(device, str) and device.startswith("cuda"):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    return device


def _factory(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    setattr(owner, name, on_cpu)


def install() -> None:
    """Replace torch's factories, the moving methods of tensors and modules, and what pins memory."""
    for name in _FACTORIES:
        _factory(torch, name)
    for name in _METHODS:
        _factory(torch.Tensor, name)
    tensor: Any = torch.Tensor
    original_to = tensor.to
    original_type = tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return original_to(self, *(_on_cpu(a) for a in args), **kwargs)

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original_type(self, dtype, *args, **kwargs)

    def same(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    tensor.to = to
    tensor.type = type_
    tensor.cuda = same
    tensor.pin_memory = same
    tensor.is_cuda = property(lambda self: True)
    tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = same
    loader: Any = torch.utils.data.DataLoader
    original_init = loader.__init__

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["pin_memory"] = False
        original_init(self, *args, **kwargs)

    loader.__init__ = init
    for name in _TYPES:
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
