"""Amaxes and scales by themselves, and the casts of parts of weights: ``--fp8-param-gather``, ``--fp4-param-gather``.

Sources: transformer_engine/pytorch/csrc/extensions/recipe.cpp, multi_tensor/compute_scale.cpp, fp8_partial_cast.cpp,
nvfp4_2d_partial_cast.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deadpool_megatron.emulation.transformer_engine.formats import (
    E4M3,
    FP8_MAX,
    from_e8m0,
    from_fp4,
    scale_from_amax,
    to_e8m0,
    to_fp4,
    to_fp8,
)
from deadpool_megatron.emulation.transformer_engine.kernels import kernel
from deadpool_megatron.emulation.transformer_engine.quantization import (
    FP4_BLOCK,
    MX_BLOCK,
    fp4_global_scale,
    fp4_scales,
    tiles,
)


@kernel
def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(tensor.abs().amax().float().reshape(amax.shape))


@kernel
def fused_amax_and_scale_update_after_reduction(
    buffer: Tensor, histories: Sequence[Tensor], scales: Sequence[Tensor], algorithm: str, dtype: int, margin: float
) -> None:
    """Delayed scaling at the end of an iteration: the reduced amaxes go into the histories, the scales follow them.

    Args:
        buffer: all amaxes, one history's after the other's; empty if they are in the histories already.
        histories: (length, n) each. Row 0, where the quantizers write, is 0 afterwards.
        scales: (n,) each.
        algorithm: ``max`` over the history, or ``most_recent``.
    """
    sizes = [history.shape[1] for history in histories]
    parts = buffer.split(sizes) if buffer.numel() else [None] * len(sizes)
    for part, history, scale in zip(parts, histories, scales, strict=True):
        if part is not None:
            history[0].copy_(part)
        amax = history.amax(0) if algorithm == "max" else history[0].clone()
        history.copy_(torch.roll(history, -1, 0))
        history[0].zero_()
        new = (FP8_MAX[int(dtype)] / amax / 2.0**margin).clamp(max=torch.finfo(torch.float32).max)
        scale.copy_(torch.where((amax > 0) & torch.isfinite(amax), new, scale))


@kernel
def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], largest: float, power_of_two: bool, epsilon: float
) -> None:
    """Lists: amaxes, scales, inverse scales."""
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(scale_from_amax(amax, largest, power_of_two, epsilon))
        inverse.copy_(1 / scale)


@kernel
def multi_tensor_compute_scale_inv_e8m0(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], *rest: Any
) -> None:
    """Lists: amaxes, exponents."""
    for amax, inverse in zip(*lists, strict=True):
        inverse.copy_(to_e8m0(amax.float() / FP8_MAX[E4M3]).reshape(inverse.shape))


# --fp8-param-gather, --fp4-param-gather: a rank of the distributed optimizer holds elements [start, start + n) of a
# weight of (h, w).


def _placed(part: Tensor, start: int, h: int, w: int) -> Tensor:
    whole = torch.zeros(h * w)
    whole[start : start + part.numel()] = part.detach().float().reshape(-1)
    return whole.view(h, w)


def _piece(scales: Tensor, rows: int, columns: int, h: int, w: int, start: int, n: int) -> Tensor:
    """The scale of each element of the piece, from scales of ``rows`` x ``columns`` elements."""
    wide = scales.repeat_interleave(rows, 0)[:h].repeat_interleave(columns, 1)[:, :w]
    return wide.reshape(-1)[start : start + n]


@kernel
def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, h: int, w: int, start: int, block: int
) -> None:
    """Into the corner of ``amax``, which is padded as scales are."""
    blocks = tiles(_placed(tensor, start, h, w).abs(), block, block).amax(dim=(1, 3))
    amax[: blocks.shape[0], : blocks.shape[1]] = blocks


@kernel
def fp8_block_scaling_partial_cast(
    inp: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start: int, block: int, out_dtype: int
) -> None:
    x = inp.float().reshape(-1)
    scaled = x * _piece(scale, block, block, h, w, start, x.numel())
    out.copy_(to_fp8(scaled, out_dtype).reshape(out.shape))


@kernel
def mxfp8_scaling_compute_partial_amax(
    input: Tensor, amax_rowwise: Tensor, amax_colwise: Tensor, rows: int, cols: int, start: int
) -> None:
    whole = _placed(input, start, rows, cols).abs()
    amax_rowwise[:rows, : cols // MX_BLOCK].copy_(tiles(whole, 1, MX_BLOCK).amax(dim=(1, 3)))
    amax_colwise[: rows // MX_BLOCK, :cols].copy_(tiles(whole, MX_BLOCK, 1).amax(dim=(1, 3)))


@kernel
def mxfp8_scaling_partial_cast(
    input: Tensor, out_row: Tensor, out_col: Tensor, inv_row: Tensor, inv_col: Tensor, rows: int, cols: int, start: int
) -> None:
    x = input.float().reshape(-1)
    for out, inverse, block in ((out_row, inv_row, (1, MX_BLOCK)), (out_col, inv_col, (MX_BLOCK, 1))):
        scales = _piece(from_e8m0(inverse), *block, rows, cols, start, x.numel())
        out.copy_(to_fp8(x / scales, E4M3).reshape(out.shape))


@kernel
def nvfp4_multi_tensor_compute_partial_amax(
    inputs: Sequence[Tensor],
    amaxes: Sequence[Tensor],
    global_amaxes: Sequence[Tensor],
    heights: Sequence[int],
    widths: Sequence[int],
    starts: Sequence[int],
    block: int,
) -> None:
    for x, amax, whole, *where in zip(inputs, amaxes, global_amaxes, heights, widths, starts, strict=True):
        h, w, start = where
        amax.copy_(tiles(_placed(x, start, h, w).abs(), block, block).amax(dim=(1, 3)))
        whole.copy_(x.detach().float().abs().amax())


@kernel
def nvfp4_compute_global_scale(amax: Tensor, scale: Tensor) -> None:
    scale.copy_(fp4_global_scale(amax))


@kernel
def nvfp4_multi_tensor_fused_scale(
    amaxes: Sequence[Tensor],
    global_amaxes: Sequence[Tensor],
    scales: Sequence[Tensor],
    target_scales: Sequence[Tensor],
    target_amaxes: Sequence[Tensor],
    tile_rows: Sequence[int],
    tile_columns: Sequence[int],
    padded_rows: Sequence[int],
    block: int,
) -> None:
    """Of each weight: float32 scales by tile, for the cast, and the tensor's own bytes and amax."""
    for amax, whole, scale, bytes_, target in zip(
        amaxes, global_amaxes, scales, target_scales, target_amaxes, strict=True
    ):
        made = fp4_scales(amax, fp4_global_scale(whole))
        scale.copy_(made.float())
        wide = made.view(torch.uint8).repeat_interleave(block, 0)[: bytes_.shape[0]]
        bytes_.zero_()
        bytes_[: wide.shape[0], : wide.shape[1]] = wide
        target.copy_(whole.reshape(target.shape))


@kernel
def nvfp4_multi_tensor_2d_partial_cast(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    global_scales: Sequence[Tensor],
    heights: Sequence[int],
    widths: Sequence[int],
    starts: Sequence[int],
    block: int,
) -> None:
    """Two values are in a byte: one of another rank's, at either end, stays as it is."""
    for x, out, scale, whole, *where in zip(
        inputs, outputs, scales, global_scales, heights, widths, starts, strict=True
    ):
        h, w, start = where
        factor = torch.where(scale > 0, whole / scale, torch.zeros(()))
        values = x.detach().float().reshape(-1) * _piece(factor, block, block, h, w, start, x.numel())
        before, after = start % 2, (start + x.numel()) % 2
        old = from_fp4(out.reshape(-1))
        out.copy_(to_fp4(torch.cat((old[:before], values, old[old.numel() - after :]))).reshape(out.shape))


@kernel
def nvfp4_2d_multi_tensor_transpose(
    rowwise: Sequence[Tensor],
    columnwise: Sequence[Tensor],
    rowwise_scales: Sequence[Tensor],
    columnwise_scales: Sequence[Tensor],
    rows: Sequence[int],
    columns: Sequence[int],
) -> None:
    """The columnwise copies of weights with a scale for each 16x16: the same values, turned."""
    for data, turned, scales, turned_scales, m, k in zip(
        rowwise, columnwise, rowwise_scales, columnwise_scales, rows, columns, strict=True
    ):
        values = torch.stack((data.reshape(m, -1) & 15, data.reshape(m, -1) >> 4), -1).reshape(m, k).t()
        turned.copy_((values[:, 0::2] | (values[:, 1::2] << 4)).reshape(turned.shape))
        wide = scales[:m:FP4_BLOCK, : k // FP4_BLOCK].t().repeat_interleave(FP4_BLOCK, 0)
        turned_scales.zero_()
        turned_scales[: wide.shape[0], : wide.shape[1]] = wide
