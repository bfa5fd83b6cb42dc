"""Numbers of 8 and 4 bits, on float32 tensors.

Sources: Transformer Engine's common/cast and common/recipe; OCP Microscaling Formats (MX) 1.0 for E8M0 and E2M1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# transformer_engine_torch.DType, by number.
E4M3, E5M2 = 7, 8
TORCH_TYPES = {
    0: torch.uint8,
    2: torch.int32,
    4: torch.float32,
    5: torch.float16,
    6: torch.bfloat16,
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
}
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
FP4_MAX = 6.0
_FLOAT_MAX = torch.finfo(torch.float32).max
_E8M0_BIAS = 127
# The sizes that E2M1 has, in the order of their codes, and where one ends and the next begins.
_FP4_SIZES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4_BORDERS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def to_fp8(x: Tensor, dtype: int) -> Tensor:
    """Bytes (uint8) of ``x`` in E4M3 or E5M2, cut off at the largest number: torch's cast makes NaN beyond it."""
    largest = FP8_MAX[int(dtype)]
    return x.clamp(-largest, largest).to(TORCH_TYPES[int(dtype)]).view(torch.uint8)


def from_fp8(data: Tensor, dtype: int) -> Tensor:
    """The float32 values of bytes."""
    return data.view(TORCH_TYPES[int(dtype)]).float()


def scale_from_amax(amax: Tensor, largest: float, power_of_two: bool = False, epsilon: float = 0.0) -> Tensor:
    """The scale that brings ``amax`` to ``largest``: at most the largest float32, 1 where amax is 0 or not finite.

    Args:
        power_of_two: round the scale down to a power of two.
        epsilon: amaxes below count as this.
    """
    amax = amax.float().clamp(min=epsilon) if epsilon else amax.float()
    scale = (largest / amax).clamp(max=_FLOAT_MAX)
    scale = torch.where((amax == 0) | ~torch.isfinite(amax), torch.ones_like(scale), scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return scale


def to_e8m0(x: Tensor) -> Tensor:
    """The exponent byte of ``x`` (not negative), rounded up to a power of two; 255 is NaN."""
    mantissa, exponent = torch.frexp(x)
    code = torch.where(mantissa > 0.5, exponent, exponent - 1) + _E8M0_BIAS
    code = torch.where(x == 0, torch.zeros_like(code), code.clamp(0, 254))
    return torch.where(torch.isnan(x), torch.full_like(code, 255), code).to(torch.uint8)


def from_e8m0(code: Tensor) -> Tensor:
    """The powers of two (float32) of exponent bytes."""
    return torch.ldexp(torch.ones(code.shape), code.int() - _E8M0_BIAS)


def to_fp4(x: Tensor, stochastic: bool = False) -> Tensor:
    """E2M1, two values a byte, the lower half first: (..., n) to (..., n / 2) uint8.

    Rounds to the nearest, ties to the even code, or at random in proportion to the distances.
    """
    size = x.abs().clamp(max=FP4_MAX)
    if stochastic:
        code = torch.searchsorted(_FP4_SIZES, size, right=True).sub(1).clamp(0, 6)
        gap = _FP4_SIZES[code + 1] - _FP4_SIZES[code]
        code = code + (torch.rand_like(size) < (size - _FP4_SIZES[code]) / gap)
    else:
        code = torch.searchsorted(_FP4_BORDERS, size)
        tie = (code < 7) & (size == _FP4_BORDERS[code.clamp(max=6)])
        code = code + (tie & (code % 2 == 1))
    code = (code | (torch.signbit(x).long() << 3)).to(torch.uint8)
    return code[..., 0::2] | (code[..., 1::2] << 4)


def from_fp4(data: Tensor) -> Tensor:
    """The float32 values: (..., n / 2) uint8 to (..., n)."""
    code = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2).long()
    return torch.where(code >= 8, -_FP4_SIZES[code & 7], _FP4_SIZES[code & 7])
