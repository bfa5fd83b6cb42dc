"""What Megatron takes from APEX's compiled parts: its fused layer norm and the weight gradient's accumulation.

APEX's optimizers and ``amp_C`` are left out: where Transformer Engine is missing too, Megatron has torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deadpool_megatron.emulation.importing import module


class FusedLayerNormAffineFunction(torch.autograd.Function):  # type: ignore[misc]  # torch has no types for it
    """``apex.normalization.fused_layer_norm.FusedLayerNormAffineFunction``, computed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        normalized_shape: int | Sequence[int],
        eps: float,
        memory_efficient: bool = False,
    ) -> Tensor:
        ctx.shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        out, mean, rstd = torch.native_layer_norm(input.float(), ctx.shape, weight.float(), bias.float(), eps)
        ctx.save_for_backward(input, mean, rstd, weight, bias)
        return out.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, rstd, weight, bias = ctx.saved_tensors
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            grad.float(), input.float(), ctx.shape, mean, rstd, weight.float(), bias.float(), [True, True, True]
        )
        return dx.to(input.dtype), dw.to(weight.dtype), db.to(bias.dtype), None, None, None


def accumulate_weight_gradient(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """``main_grad += grad_output^T @ total_input`` over all leading dimensions, in float32."""
    x, dy = (each.reshape(-1, each.shape[-1]).float() for each in (total_input, grad_output))
    with torch.no_grad():
        main_grad.add_((dy.t() @ x).to(main_grad.dtype))


def install() -> None:
    """Before Megatron is imported, which looks for these modules then."""
    module(
        "fused_weight_gradient_mlp_cuda",
        wgrad_gemm_accum_fp32=accumulate_weight_gradient,
        wgrad_gemm_accum_fp16=accumulate_weight_gradient,
    )
    fused = module(
        "apex.normalization.fused_layer_norm", FusedLayerNormAffineFunction=FusedLayerNormAffineFunction, __path__=[]
    )
    normalization = module("apex.normalization", fused_layer_norm=fused, __path__=[])
    module("apex", normalization=normalization, __path__=[])
