"""The register of what the emulated extension offers: each function under its name in the compiled module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

KERNELS: dict[str, Callable[..., Any]] = {}


def offer[F: Callable[..., Any]](name: str, function: F) -> F:
    """Offer ``function`` under ``name``. As a kernel it records nothing for autograd."""
    offered: F = torch.no_grad()(function)
    KERNELS[name] = offered
    return offered


def kernel[F: Callable[..., Any]](function: F) -> F:
    """Offer ``function`` under its own name."""
    return offer(function.__name__, function)


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of ``function`` at ``x`` for the output's gradient ``grad``, in float32, by torch's autograd."""
    with torch.enable_grad():
        leaf = x.detach().float().requires_grad_()
        (answer,) = torch.autograd.grad(function(leaf), leaf, grad.detach().float())
    return answer
