"""What the extension's ``quantize``, ``dequantize`` and ``create_empty_quantized_tensor`` do, for five recipes.

A quantizer of Transformer Engine is a Python object (scale, amax, dtype, rowwise_usage, columnwise_usage, internal ...)
that asks the extension to make a tensor and to fill it. "Rowwise" data serve the GEMM that contracts the last
dimension, "columnwise" ones the GEMM that contracts the others. Scales that a device keeps in another order for its
tensor cores ("swizzled") keep theirs here.

Sources: transformer_engine/pytorch/csrc/quantizer.cpp and extensions/cast.cpp.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deadpool_megatron.emulation.transformer_engine.formats import (
    E4M3,
    FP4_MAX,
    FP8_MAX,
    TORCH_TYPES,
    from_e8m0,
    from_fp4,
    from_fp8,
    scale_from_amax,
    to_e8m0,
    to_fp4,
    to_fp8,
)
from deadpool_megatron.emulation.transformer_engine.kernels import kernel, offer

BLOCK, MX_BLOCK, FP4_BLOCK = 128, 32, 16
# The extension calls it from C++: whoever replaces torch's Python methods later is passed by.
_ALL_REDUCE = torch.distributed.ProcessGroup.allreduce


def flat(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix that a tensor of this shape stands for."""
    columns = shape[-1] if shape else 1
    return (math.prod(shape) // columns if columns else 0), columns


def ceil_to(n: int, multiple: int) -> int:
    """The first multiple that is not below ``n``."""
    return -(-n // multiple) * multiple


def tiles(x: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix in tiles, padded with zeros: (m, k) to (m / rows, rows, k / columns, columns)."""
    m, k = x.shape
    padded = torch.nn.functional.pad(x, (0, ceil_to(k, columns) - k, 0, ceil_to(m, rows) - m))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)


def max_over(group: Any, amax: Tensor) -> None:
    """The maximum over ``group``, in place. As in the extension a call of the ProcessGroup, past torch.distributed."""
    options = torch.distributed.AllreduceOptions()
    options.reduceOp = torch.distributed.ReduceOp.MAX
    _ALL_REDUCE(group, [amax], options).wait()


def _bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def _garbage(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Memory as a device gives it, with something else in it in each process: nobody may count on padding."""
    return torch.full(shape, 1 + os.getpid() % 200, dtype=dtype)


def _fit(scales: Tensor, values: Tensor) -> None:
    """``values`` into the corner of the padded ``scales``."""
    scales[: values.shape[0], : values.shape[1]] = values


class _Format:
    """One scheme: which buffers a tensor of it has, how a matrix gets into them, and how it is read.

    ``quantizers``, ``tensor`` and ``storage`` are Transformer Engine's classes.
    """

    quantizers: tuple[type, ...]
    tensor: type
    storage: type

    def empty(self, quantizer: Any, shape: tuple[int, ...]) -> dict[str, Any]:
        """The arguments that make a tensor of this shape, with the buffers that the quantizer's usages ask for."""
        raise NotImplementedError

    def write(self, quantizer: Any, x: Tensor, out: Any) -> None:
        """Quantize the float32 matrix ``x`` into the buffers of ``out``."""
        raise NotImplementedError

    def read(self, tensor: Any, rowwise: bool) -> Tensor:
        """The float32 matrix, from the data of this direction where there are two."""
        raise NotImplementedError

    def adapt(self, quantizer: Any, out: Any) -> None:
        """Give an existing tensor the buffers that the quantizer asks for and take those that it does not."""
        for name, value in vars(create(quantizer, tuple(out.size()), torch.float32, internal=True)).items():
            buffer = value is None or isinstance(value, Tensor)
            if buffer and (getattr(out, name, None) is None) != (value is None):
                setattr(out, name, value)


class _PerTensor(_Format):
    """FP8 with one scale: delayed scaling (the scale of before) and current scaling (that of this tensor)."""

    def __init__(self) -> None:
        from transformer_engine.pytorch.tensor import float8_tensor
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

        self._delayed = float8_tensor.Float8Quantizer
        self.quantizers = (self._delayed, float8_tensor.Float8CurrentScalingQuantizer)
        self.tensor, self.storage = float8_tensor.Float8Tensor, Float8TensorStorage

    def empty(self, quantizer: Any, shape: tuple[int, ...]) -> dict[str, Any]:
        # From Blackwell on a GEMM needs no transposed copy: there is one buffer for both directions.
        one = torch.cuda.get_device_capability() >= (10, 0)
        delayed = isinstance(quantizer, self._delayed)
        return {
            "data": _bytes(*shape) if one or quantizer.rowwise_usage else None,
            "data_transpose": _bytes(shape[-1], *shape[:-1]) if quantizer.columnwise_usage and not one else None,
            "fp8_scale_inv": 1 / quantizer.scale.detach().float().reshape(1) if delayed else torch.ones(1),
            "fp8_dtype": _type(quantizer),
        }

    def adapt(self, quantizer: Any, out: Any) -> None:
        super().adapt(quantizer, out)
        out._transpose_invalid = out._transpose is None
        out._fp8_dtype = _type(quantizer)

    def write(self, quantizer: Any, x: Tensor, out: Any) -> None:
        amax = x.abs().amax().reshape(1)
        if isinstance(quantizer, self._delayed):
            scale = quantizer.scale
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.reshape(())))  # empty: not wanted
        else:
            if quantizer.with_amax_reduction:
                max_over(quantizer._canonicalized_amax_reduction_group(), amax)
            largest = FP8_MAX[int(quantizer.dtype)]
            scale = scale_from_amax(amax, largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
        data = to_fp8(x * scale, quantizer.dtype)
        if out._data is not None:
            out._data.copy_(data.reshape(out._data.shape))
        if out._transpose is not None:
            out._transpose.copy_(data.t().reshape(out._transpose.shape))
        out._scale_inv.copy_((1 / scale).reshape(out._scale_inv.shape))

    def read(self, tensor: Any, rowwise: bool) -> Tensor:
        if tensor._data is not None:
            return from_fp8(tensor._data.reshape(flat(tensor._data.shape)), tensor._fp8_dtype) * tensor._scale_inv
        data = tensor._transpose.reshape(tensor._transpose.shape[0], -1)
        return (from_fp8(data, tensor._fp8_dtype) * tensor._scale_inv).t()


class _TwoCopies(_Format):
    """A format whose columnwise data are quantized by themselves, along the other dimension."""

    def read(self, tensor: Any, rowwise: bool) -> Tensor:
        if tensor._rowwise_data is None or tensor._columnwise_data is None:
            rowwise = tensor._rowwise_data is not None
        return self._read(tensor, rowwise)

    def _read(self, tensor: Any, rowwise: bool) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def _buffers(tensor: Any, rowwise: bool) -> tuple[Tensor, Tensor]:
        if rowwise:
            return tensor._rowwise_data, tensor._rowwise_scale_inv
        return tensor._columnwise_data, tensor._columnwise_scale_inv


class _Blockwise(_TwoCopies):
    """FP8 with a scale for each 1x128 or 128x128 elements. Columnwise data are transposed."""

    def __init__(self) -> None:
        from transformer_engine.pytorch.tensor import float8_blockwise_tensor as module
        from transformer_engine.pytorch.tensor.storage import float8_blockwise_tensor_storage as storage

        self.quantizers = (module.Float8BlockQuantizer,)
        self.tensor, self.storage = module.Float8BlockwiseQTensor, storage.Float8BlockwiseQTensorStorage

    def empty(self, quantizer: Any, shape: tuple[int, ...]) -> dict[str, Any]:
        two = quantizer.block_scaling_dim == 2

        def scales(m: int, k: int) -> Tensor:
            blocks = -(-k // BLOCK)
            shape = (-(-m // BLOCK), ceil_to(blocks, 4)) if two else (blocks, ceil_to(m, 4))
            return _garbage(*shape, dtype=torch.float32)

        rows, columns = flat(shape)
        row, column = quantizer.rowwise_usage, quantizer.columnwise_usage
        return {
            "rowwise_data": _bytes(*shape) if row else None,
            "rowwise_scale_inv": scales(rows, columns) if row else None,
            "columnwise_data": _bytes(shape[-1], *shape[:-1]) if column else None,
            "columnwise_scale_inv": scales(columns, rows) if column else None,
            "fp8_dtype": _type(quantizer),
            "is_2D_scaled": two,
        }

    def write(self, quantizer: Any, x: Tensor, out: Any) -> None:
        dtype, two = int(quantizer.dtype), quantizer.block_scaling_dim == 2
        for rowwise in (True, False):
            data, scales = self._buffers(out, rowwise)
            if data is None:
                continue
            matrix = x if rowwise else x.t()
            blocks = tiles(matrix, BLOCK if two else 1, BLOCK)
            amax = blocks.abs().amax(dim=(1, 3))
            scale = scale_from_amax(amax, FP8_MAX[dtype], quantizer.force_pow_2_scales, quantizer.amax_epsilon)
            values = (blocks * scale[:, None, :, None]).flatten(2).flatten(0, 1)[: matrix.shape[0], : matrix.shape[1]]
            data.copy_(to_fp8(values, dtype).reshape(data.shape))
            _fit(scales, 1 / scale if two else (1 / scale).t())

    def _read(self, tensor: Any, rowwise: bool) -> Tensor:
        data, scales = self._buffers(tensor, rowwise)
        data = data.reshape(flat(data.shape)) if rowwise else data.reshape(data.shape[0], -1)
        m, k = data.shape
        scales = scales.repeat_interleave(BLOCK, 0) if tensor._is_2D_scaled else scales.t()
        values = from_fp8(data, tensor._fp8_dtype) * scales.repeat_interleave(BLOCK, 1)[:m, :k]
        return values if rowwise else values.t()


class _Mxfp8(_TwoCopies):
    """FP8 with a power of two (E8M0) for each 1x32 elements rowwise, 32x1 columnwise. No data are transposed."""

    def __init__(self) -> None:
        from transformer_engine.pytorch.tensor import mxfp8_tensor as module
        from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage

        self.quantizers = (module.MXFP8Quantizer,)
        self.tensor, self.storage = module.MXFP8Tensor, MXFP8TensorStorage

    def empty(self, quantizer: Any, shape: tuple[int, ...]) -> dict[str, Any]:
        rows, columns = flat(shape)
        if rows % MX_BLOCK or columns % MX_BLOCK:
            raise RuntimeError(f"MXFP8 requires tensor dims that are divisible by {MX_BLOCK} (got shape={shape})")
        row, column = quantizer.rowwise_usage, quantizer.columnwise_usage
        return {
            "rowwise_data": _bytes(*shape) if row else None,
            "rowwise_scale_inv": _garbage(ceil_to(rows, 128), ceil_to(columns // MX_BLOCK, 4)) if row else None,
            "columnwise_data": _bytes(*shape) if column else None,
            "columnwise_scale_inv": _garbage(ceil_to(rows // MX_BLOCK, 4), ceil_to(columns, 128)) if column else None,
            "fp8_dtype": _type(quantizer),
            "with_gemm_swizzled_scales": quantizer.optimize_for_gemm,
        }

    def write(self, quantizer: Any, x: Tensor, out: Any) -> None:
        dtype = int(quantizer.dtype)
        square = getattr(quantizer, "with_2d_quantization", False)
        for rowwise in (True, False):
            data, scales = self._buffers(out, rowwise)
            if data is None:
                continue
            rows = 1 if rowwise and not square else MX_BLOCK
            columns = MX_BLOCK if rowwise or square else 1
            blocks = tiles(x, rows, columns)
            exponents = to_e8m0(blocks.abs().amax(dim=(1, 3)) / FP8_MAX[dtype])
            data.copy_(to_fp8(blocks / from_e8m0(exponents)[:, None, :, None], dtype).reshape(data.shape))
            if square:  # stored as often as the scales of single rows or columns would be
                exponents = exponents.repeat_interleave(MX_BLOCK, 0 if rowwise else 1)
            _fit(scales, exponents)

    def _read(self, tensor: Any, rowwise: bool) -> Tensor:
        data, scales = self._buffers(tensor, rowwise)
        data = data.reshape(flat(data.shape))
        m, k = data.shape
        scales = from_e8m0(scales).repeat_interleave(MX_BLOCK, 1 if rowwise else 0)[:m, :k]
        return from_fp8(data, tensor._fp8_dtype) * scales


def fp4_global_scale(amax: Tensor, largest: float = FP8_MAX[E4M3]) -> Tensor:
    """NVFP4's scale of a whole tensor from its amax; float32."""
    return torch.where(amax > 0, FP4_MAX * largest / amax, torch.ones_like(amax))


def fp4_scales(amaxes: Tensor, whole: Tensor, largest: float = FP8_MAX[E4M3]) -> Tensor:
    """NVFP4's scales of blocks, in E4M3, from their amaxes and the whole tensor's scale."""
    return (amaxes / FP4_MAX * whole).clamp(max=largest).to(torch.float8_e4m3fn)


class _Nvfp4(_TwoCopies):
    """FP4 (E2M1) with an E4M3 scale for each 1x16 or 16x16 elements under a float32 scale of the tensor.

    Columnwise data are transposed, and turned by a random Hadamard matrix first where the quantizer has one.
    """

    def __init__(self) -> None:
        from transformer_engine.pytorch.tensor import nvfp4_tensor as module
        from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage

        self.quantizers = (module.NVFP4Quantizer,)
        self.tensor, self.storage = module.NVFP4Tensor, NVFP4TensorStorage

    def empty(self, quantizer: Any, shape: tuple[int, ...]) -> dict[str, Any]:
        rows, columns = flat(shape)
        if rows % FP4_BLOCK or columns % FP4_BLOCK:
            raise RuntimeError(f"NVFP4 requires tensor dims that are divisible by {FP4_BLOCK} (got shape={shape})")

        def scales(m: int, k: int) -> Tensor:
            return _garbage(ceil_to(m, 128), ceil_to(k // FP4_BLOCK, 4))

        row, column = quantizer.rowwise_usage, quantizer.columnwise_usage
        return {
            "rowwise_data": _bytes(*shape[:-1], columns // 2) if row else None,
            "rowwise_scale_inv": scales(rows, columns) if row else None,
            "columnwise_data": _bytes(columns, rows // 2) if column else None,
            "columnwise_scale_inv": scales(columns, rows) if column else None,
            "amax_rowwise": torch.zeros(1) if row else None,
            "amax_columnwise": torch.zeros(1) if column else None,
            "fp4_dtype": _type(quantizer),
            "with_gemm_swizzled_scales": quantizer.optimize_for_gemm,
            "row_scaled_nvfp4": quantizer.row_scaled_nvfp4,
            "nvfp4_use_4over6": quantizer.nvfp4_use_4over6,
            "nvfp4_e4m3_max": quantizer.nvfp4_e4m3_max,
        }

    def write(self, quantizer: Any, x: Tensor, out: Any) -> None:
        if quantizer.nvfp4_use_4over6 or quantizer.row_scaled_nvfp4:
            raise NotImplementedError("the emulation has neither NVFP4 with 4over6 nor with row scaling")
        m, k = x.shape
        columns, amax = x.t(), x.abs().amax().reshape(1)
        amaxes = [amax, amax.clone()]
        if quantizer.with_rht:
            if out._columnwise_data is not None:
                turned = columns.reshape(k, m // FP4_BLOCK, FP4_BLOCK) @ quantizer.rht_matrix.float()
                columns = turned.bfloat16().float().reshape(k, m)
            amaxes[1] = columns.abs().amax().reshape(1)
        if quantizer.with_amax_reduction:
            for each in amaxes:
                max_over(quantizer._canonicalized_amax_reduction_group(), each)
        for rowwise, matrix, amax in ((True, x, amaxes[0]), (False, columns, amaxes[1])):
            data, scales = self._buffers(out, rowwise)
            if data is None:
                continue
            (out._amax_rowwise if rowwise else out._amax_columnwise).copy_(amax)
            largest = float(quantizer.nvfp4_e4m3_max)
            whole = fp4_global_scale(amax, largest)
            rows = FP4_BLOCK if quantizer.with_2d_quantization else 1
            blocks = tiles(matrix, rows, FP4_BLOCK)
            scale = fp4_scales(blocks.abs().amax(dim=(1, 3)), whole, largest)
            factor = torch.where(scale.float() > 0, whole / scale.float(), torch.zeros(()))
            values = (blocks * factor[:, None, :, None]).reshape(matrix.shape)
            data.copy_(to_fp4(values, quantizer.stochastic_rounding).reshape(data.shape))
            _fit(scales, scale.view(torch.uint8).repeat_interleave(rows, 0))

    def _read(self, tensor: Any, rowwise: bool) -> Tensor:
        data, scales = self._buffers(tensor, rowwise)
        amax = tensor._amax_rowwise if rowwise else tensor._amax_columnwise
        values = from_fp4(data.reshape(-1, data.shape[-1]))
        m, k = values.shape
        scales = from_fp8(scales, E4M3).repeat_interleave(FP4_BLOCK, 1)[:m, :k]
        values = values * scales * (amax / (FP4_MAX * tensor._nvfp4_e4m3_max))
        return values if rowwise else values.t()


def _type(quantizer: Any) -> Any:
    from transformer_engine.pytorch.constants import DType

    return DType.cast(quantizer.dtype)


@functools.cache
def _formats() -> tuple[_Format, ...]:
    # Not before Transformer Engine is imported: its modules import the extension.
    return (_PerTensor(), _Blockwise(), _Mxfp8(), _Nvfp4())


def _format_of(quantizer: Any) -> _Format:
    for each in _formats():
        if isinstance(quantizer, each.quantizers):
            return each
    raise NotImplementedError(f"the emulation has no {type(quantizer).__name__}")


def create(quantizer: Any, shape: tuple[int, ...], dtype: torch.dtype, internal: bool | None = None) -> Any:
    """An empty quantized tensor that stands for one of ``dtype``; a storage, which is no tensor, where ``internal``."""
    scheme = _format_of(quantizer)
    fields = {**scheme.empty(quantizer, shape), "quantizer": quantizer}
    if quantizer.internal if internal is None else internal:
        return scheme.storage(**fields, fake_dtype=dtype)
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    return scheme.tensor(shape=shape, stride=tuple(strides), dtype=dtype, device=torch.device("cpu"), **fields)


def matrix(tensor: Any, rowwise: bool = True) -> Tensor:
    """The float32 matrix (rows, columns) of any tensor, quantized or not."""
    for each in _formats():
        if isinstance(tensor, each.storage):
            return each.read(tensor, rowwise)
    return tensor.detach().reshape(flat(tensor.shape)).float()


def finish(value: Tensor, quantizer: Any = None, output: Any = None) -> Any:
    """What norms, activations and GEMMs do with their result: into ``output``, quantized, or as it is."""
    if quantizer is not None:
        return quantize(value, quantizer, output)
    return value if output is None else output.copy_(value)


@kernel
def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: Any = None, pin_memory: bool = False
) -> Any:
    return create(quantizer, tuple(shape), dtype)


@kernel
def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Into ``output``, or into a new tensor. A ``noop`` flag that is not 0 leaves the data as they are."""
    if output is None:
        output = create(quantizer, tuple(tensor.shape), tensor.dtype)
    else:
        _format_of(quantizer).adapt(quantizer, output)
    if tensor.numel() and (noop is None or not bool(noop.any())):
        _format_of(quantizer).write(quantizer, tensor.detach().reshape(flat(tensor.shape)).float(), output)
    return output


@kernel
def dequantize(input: Any, otype: int) -> Tensor:
    return matrix(input).to(TORCH_TYPES[int(otype)]).reshape(input.size())


@kernel
def bgrad_quantize(input: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The bias gradient (sum over the rows), and the gradient quantized."""
    bias = matrix(input).sum(0).to(input.dtype)
    return bias, finish(input, quantizer)


@kernel
def multi_tensor_quantize(tensors: Sequence[Tensor], quantizers: Sequence[Any]) -> list[Any]:
    return [quantize(each, quantizer) for each, quantizer in zip(tensors, quantizers, strict=True)]


@kernel
def split_quantize(
    tensor: Tensor, sections: Sequence[int], quantizers: Sequence[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    parts = torch.split(tensor.reshape(flat(tensor.shape)), list(sections))
    return [quantize(each, quantizer) for each, quantizer in zip(parts, quantizers, strict=True)]


@kernel
def fp8_transpose(input: Tensor, dtype: int, out: Tensor | None = None, *, output: Tensor | None = None) -> Tensor:
    """The bytes of (..., n) as (n, ...)."""
    out = out if out is not None else output
    answer = input.reshape(flat(input.shape)).t().reshape(input.shape[-1], *input.shape[:-1]).contiguous()
    return answer if out is None else out.copy_(answer.reshape(out.shape))


@kernel
def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    answer = tensor.transpose(0, 1).contiguous()
    return answer if out is None else out.copy_(answer)


@kernel
def swizzle_scales_for_gemm_(tensor: Any) -> None:
    if hasattr(tensor, "_with_gemm_swizzled_scales"):
        tensor._with_gemm_swizzled_scales = True


@kernel
def multi_tensor_swizzle_scales_for_gemm_(tensors: Sequence[Any], rowwise_usage: bool, columnwise_usage: bool) -> None:
    for tensor in tensors:
        swizzle_scales_for_gemm_(tensor)


offer("multi_tensor_swizzle_scales_for_gemm_unchecked_", multi_tensor_swizzle_scales_for_gemm_)
