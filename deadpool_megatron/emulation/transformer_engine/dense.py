"""GEMMs, norms, activations, softmaxes, dropout and rotary embeddings, computed in float32.

Sources: transformer_engine/pytorch/csrc/extensions/{gemm,normalization,activation,softmax,apply_rope,dropout}.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deadpool_megatron.emulation import graphs
from deadpool_megatron.emulation.transformer_engine import userbuffers
from deadpool_megatron.emulation.transformer_engine.formats import TORCH_TYPES
from deadpool_megatron.emulation.transformer_engine.kernels import gradient, kernel, offer
from deadpool_megatron.emulation.transformer_engine.quantization import finish, flat, matrix

# NVTE_QKV_Format of tensors that rotary embeddings are given.
_SBHD, _THD = 1, 2


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _qgelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _srelu(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


def _product(a: Any, transa: bool, b: Any, transb: bool) -> Tensor:
    """The extension speaks of column-major matrices: D = op(B) op(A) of the row-major ones."""
    left, right = matrix(b, rowwise=not transb), matrix(a, rowwise=transa)
    return (left.t() if transb else left) @ (right.t() if transa else right)


@kernel
def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: int | None,
    bias: Tensor | None,
    bias_type: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, Tensor | None, Tensor | None, Tensor | None]:
    """(output, bias gradient, input of the GELU, extra output).

    With ``grad`` a bias means that its gradient is wanted, and ``gelu`` the backward of that function.
    """
    if comm_overlap is not None:
        userbuffers.before_gemm(comm_overlap, comm_type, bulk_overlap, extra_output)
    shape_a, shape_b = tuple(A.size()), tuple(B.size())
    lead = (flat(shape_b)[1],) if transB else shape_b[:-1]
    shape = (*lead, flat(shape_a)[0] if transA else flat(shape_a)[1])
    empty = 0 in shape_a or 0 in shape_b
    value = torch.zeros(flat(shape)) if empty else _product(A, transA, B, transB) * alpha
    dtype = TORCH_TYPES[int(output_dtype)] if output_dtype is not None else (A if D is None else D).dtype
    bias_grad = pre_gelu = None
    if bias is not None and grad:
        bias_grad = matrix(B, rowwise=not transB).sum(0).to(dtype)
    elif bias is not None:
        value = value + bias.float()
    if gelu and grad:
        assert gelu_in is not None
        value = gradient(_gelu, gelu_in.reshape(value.shape), value)
    elif gelu:
        pre_gelu = value.to(TORCH_TYPES[int(bias_type)]).reshape(shape)
        value = _gelu(value)
    value = value.reshape(shape).to(dtype)
    if not accumulate:
        D = finish(value, quantizer, D)
    else:
        assert D is not None
        if beta is not None and beta != 1.0:
            D.mul_(beta)
        D.add_(value.to(D.dtype))
    if comm_overlap is not None:
        userbuffers.after_gemm(comm_overlap, comm_type, bulk_overlap, D, extra_output)
    return D, bias_grad, pre_gelu, extra_output


@kernel
def te_general_grouped_gemm(
    A: Sequence[Any],
    transa: bool,
    B: Sequence[Any],
    transb: bool,
    D: Sequence[Tensor],
    D_type: int,
    m_splits: Sequence[int],
    bias: Sequence[Tensor] | None,
    bias_type: int,
    single_output: bool,
    pre_gelu_out: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Sequence[Tensor] | None:
    """One GEMM for each pair, into ``D`` (one tensor of all rows if ``single_output``).

    With ``grad`` the gradients of the biases are written into ``bias``.
    """
    row = 0
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        shape_a, shape_b = flat(a.size()), flat(b.size())
        shape = (shape_b[1] if transb else shape_b[0], shape_a[0] if transa else shape_a[1])
        if single_output:
            out = D[0].view(flat(D[0].shape))[row : row + shape[0]]
            row += shape[0]
        else:
            out = D[i].view(shape) if D[i].numel() else D[i]
        one_bias = bias[i] if bias and bias[i] is not None and bias[i].numel() else None
        if 0 in shape_a or 0 in shape_b:  # an expert without tokens
            if not accumulate:
                out.zero_()
            if one_bias is not None and grad:
                one_bias.zero_()
            continue
        value = _product(a, transa, b, transb)
        if one_bias is not None and grad:
            one_bias.copy_(matrix(b, rowwise=not transb).sum(0))
        elif one_bias is not None:
            value = value + one_bias.float()
        if accumulate:
            out.add_(value)
        else:
            out.copy_(value)
    return bias


# Grouped GEMMs whose rows are split by what is on the device.


@kernel
def splits_to_offsets_multi(
    split_sizes: Tensor,
    device: Any,
    *,
    strides: Sequence[int],
    include_leading_zero: Sequence[bool],
    dtypes: Sequence[torch.dtype],
    bulk_allocate: bool,
) -> tuple[Tensor, list[Tensor]]:
    """(the sizes, where each group ends in units of each stride, with the beginning of the first one or without)."""
    ends = torch.cat((split_sizes.new_zeros(1), split_sizes.cumsum(0)))
    said = zip(strides, include_leading_zero, dtypes, strict=True)
    return split_sizes, [(ends[0 if zero else 1 :] * stride).to(dtype) for stride, zero, dtype in said]


class _Groups:
    """The members of a GroupedTensorStorage in high precision, whose tensors are where they are when this is made.
    Rows behind the last member are nobody's."""

    def __init__(self, grouped: Any) -> None:
        self._rows = grouped.rowwise_data.detach().view(-1, grouped.logical_shape[-1])
        self._sizes = grouped.first_dims

    def __iter__(self) -> Iterator[Tensor]:
        ends = self._sizes.cumsum(0).tolist()
        return (self._rows[begin:end] for begin, end in zip([0, *ends], ends, strict=False))


@kernel
def te_general_grouped_gemm_for_discrete_in(
    A: Sequence[Any], transa: bool, B: Any, transb: bool, out: Any, bias: Any, bias_scale: Any, *_: Any
) -> Any:
    """Of each weight in ``A`` with its group of ``B``."""
    assert bias is None and bias_scale is None, "the emulation's grouped GEMM has no bias"
    groups, targets = _Groups(B), _Groups(out)

    def compute() -> None:
        for a, b, target in zip(A, groups, targets, strict=True):
            target.copy_(_product(a, transa, b, transb))

    graphs.noted(compute)
    return out


@kernel
def te_general_grouped_gemm_for_discrete_out(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    out: Sequence[Tensor],
    bias: Any,
    bias_scale: Any,
    alpha: Tensor,
    beta: Tensor,
    *_: Any,
) -> Sequence[Tensor]:
    """Of each group of ``A`` with its one of ``B``, added to ``beta`` times what is there: gradients of weights."""
    left, right = _Groups(A), _Groups(B)

    def compute() -> None:
        keep = float(beta[0])
        for a, b, target in zip(left, right, out, strict=True):
            value = _product(a, transa, b, transb)
            target.copy_(value if keep == 0 else target * keep + value)

    graphs.noted(compute)
    return out


# Norms: (output, mean, 1 / standard deviation), statistics in float32 for each row.


def _weight(weight: Tensor, zero_centered: bool) -> Tensor:
    weight = weight.detach().float()
    return weight + 1 if zero_centered else weight


def _norm_backward(
    dy: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, zero_centered: bool, centered: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of the input, in float32, and of gamma; ``centered``: the mean of ``x`` has been taken off."""
    hat = x * rsigma[:, None]
    dg = dy * _weight(gamma, zero_centered)
    dx = dg - hat * (dg * hat).mean(1, keepdim=True)
    if centered:
        dx = dx - dg.mean(1, keepdim=True)
    return dx * rsigma[:, None], (dy * hat).sum(0).to(gamma.dtype)


@kernel
def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Any,
    quantizer: Any,
    otype: int,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, Tensor, Tensor]:
    x = matrix(input)
    mean = x.mean(1)
    rstd = torch.rsqrt(((x - mean[:, None]) ** 2).mean(1) + eps)
    y = (x - mean[:, None]) * rstd[:, None] * _weight(weight, zero_centered_gamma)
    if bias is not None:
        y = y + bias.float()
    return finish(y.to(TORCH_TYPES[int(otype)]).reshape(input.shape), quantizer, out), mean, rstd


@kernel
def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, of gamma and of beta."""
    dy = matrix(dz)
    dx, dgamma = _norm_backward(dy, matrix(x) - mu[:, None], rsigma, gamma, zero_centered_gamma, centered=True)
    return dx.to(x.dtype).reshape(x.shape), dgamma, dy.sum(0).to(gamma.dtype)


@kernel
def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    otype: int,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:
    x = matrix(input)
    rstd = torch.rsqrt((x**2).mean(1) + eps)
    y = x * rstd[:, None] * _weight(weight, zero_centered_gamma)
    return finish(y.to(TORCH_TYPES[int(otype)]).reshape(input.shape), quantizer, out), None, rstd


@kernel
def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of gamma."""
    dx, dgamma = _norm_backward(matrix(dz), matrix(x), rsigma, gamma, zero_centered_gamma)
    return dx.to(x.dtype).reshape(x.shape), dgamma


@kernel
def rmsnorm_bwd_add(
    dz: Tensor, x: Tensor, add: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """As `rmsnorm_bwd`, with the gradient ``add`` of a residual branch added to the input's."""
    dx, dgamma = _norm_backward(matrix(dz), matrix(x), rsigma, gamma, zero_centered_gamma)
    return (dx + matrix(add)).to(x.dtype).reshape(x.shape), dgamma


# Activations: NAME(input, quantizer), dNAME(grad, input, quantizer), dbias_dNAME with the bias gradient before it.

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "qgelu": _qgelu,
    "relu": F.relu,
    "srelu": _srelu,
    "silu": F.silu,
}
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,
    "geglu": _gelu,
    "qgeglu": _qgelu,
    "reglu": F.relu,
    "sreglu": _srelu,
    "swiglu": F.silu,
}


def _gated(gate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return gate(first) * second

    return function


def _offer(name: str, function: Callable[[Tensor], Tensor]) -> None:
    def forward(input: Tensor, quantizer: Any = None) -> Any:
        return finish(function(input.float()).to(input.dtype), quantizer)

    def backward(grad: Tensor, fwd_input: Tensor, quantizer: Any = None) -> Any:
        return finish(gradient(function, fwd_input, grad).to(grad.dtype), quantizer)

    def with_bias(grad: Tensor, fwd_input: Tensor, quantizer: Any = None) -> tuple[Tensor, Any]:
        value = gradient(function, fwd_input, grad)
        return value.flatten(0, -2).sum(0).to(grad.dtype), finish(value.to(grad.dtype), quantizer)

    offer(name, forward)
    offer(f"d{name}", backward)
    offer(f"dbias_d{name}", with_bias)


for _name, _function in _PLAIN.items():
    _offer(_name, _function)
for _name, _function in _GATES.items():
    _offer(_name, _gated(_function))


def _scaled_swiglu(x: Tensor, scales: Tensor, interleaved: int) -> Tensor:
    """SwiGLU of ``x`` (..., 2 n) times the scales (...); ``interleaved``: blocks of so many columns of the gate and of
    what it gates come by turns, 0 for halves. float32."""
    if interleaved:
        x = x.unflatten(-1, (-1, 2, interleaved)).transpose(-3, -2).flatten(-3)
    return _gated(F.silu)(x.float()) * scales.float().unsqueeze(-1)


@kernel
def scaled_swiglu(input: Tensor, scales: Tensor, quantizer: Any, glu_interleave_size: int) -> Any:
    """SwiGLU with a scale for each row, the router's probability."""
    return finish(_scaled_swiglu(input, scales, glu_interleave_size).to(input.dtype), quantizer)


@kernel
def scaled_dswiglu(
    grad: Tensor, input: Tensor, scales: Tensor, quantizer: Any, glu_interleave_size: int, compute_scale_grad: bool
) -> tuple[Any, Tensor | None]:
    """Gradients of `scaled_swiglu`, of the input and of the scales."""
    dx = gradient(lambda x: _scaled_swiglu(x, scales, glu_interleave_size), input, grad)
    dscales = None
    if compute_scale_grad:
        unscaled = _scaled_swiglu(input, torch.ones_like(scales), glu_interleave_size)
        dscales = (grad.float() * unscaled).sum(-1).to(scales.dtype)
    return finish(dx.to(grad.dtype), quantizer), dscales


# Softmaxes of (batch, heads, queries, keys).


@kernel
def scaled_softmax_forward(x: Tensor, scale: float) -> Tensor:
    return torch.softmax(x.float() * scale, -1).to(x.dtype)


@kernel
def scaled_masked_softmax_forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """True in ``mask`` hides, by -10000 as upstream's kernel does it."""
    return torch.softmax((x.float() * scale).masked_fill(mask.bool(), -10000.0), -1).to(x.dtype)


@kernel
def scaled_aligned_causal_masked_softmax_forward(x: Tensor, scale: float) -> Tensor:
    """The last query sees the last key."""
    queries, keys = x.shape[-2:]
    later = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
    return torch.softmax((x.float() * scale).masked_fill(later, float("-inf")), -1).to(x.dtype)


offer("scaled_upper_triang_masked_softmax_forward", scaled_aligned_causal_masked_softmax_forward)


def _softmax_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    g, out = grad.float(), y.float()
    return (scale * out * (g - (g * out).sum(-1, keepdim=True))).to(y.dtype)


for _name in ("scaled", "scaled_masked", "scaled_aligned_causal_masked", "scaled_upper_triang_masked"):
    offer(f"{_name}_softmax_backward", _softmax_backward)


# Dropout. The mask is opaque to Transformer Engine: it only hands it back.


@kernel
def dropout_fwd(input: Tensor, dropout_probability: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    mask = (torch.rand(input.shape) >= dropout_probability).to(torch.uint8)
    return finish(input * mask / (1 - dropout_probability), output=out), mask


@kernel
def dropout_bwd(
    grad_output: Tensor, mask: Tensor, dropout_probability: float, grad_input: Tensor | None = None
) -> Tensor:
    answer: Tensor = finish(grad_output * mask / (1 - dropout_probability), output=grad_input)
    return answer


# Rotary position embeddings.


def _turned(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b) as (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _angles(freqs: Tensor, starts: Tensor | None, length: int, cp_size: int, cp_rank: int) -> Tensor:
    """(length, batch or 1, 1, width): with context parallelism those of the rank's two chunks of the sequence."""
    freqs = freqs.float().reshape(freqs.shape[0], 1, 1, freqs.shape[-1])
    if cp_size > 1:
        chunks = freqs[: length * cp_size].chunk(2 * cp_size)
        return torch.cat((chunks[cp_rank], chunks[-1 - cp_rank]))
    if starts is not None:
        return torch.cat([freqs[int(start) : int(start) + length] for start in starts], 1)
    return freqs[:length]


def _rope(
    x: Tensor,
    freqs: Tensor,
    starts: Tensor | None,
    qkv_format: int,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
    backward: bool,
) -> Tensor:
    if int(qkv_format) == _THD:
        assert cu_seqlens is not None
        sizes = (cu_seqlens.diff() // cp_size).tolist()
        parts = [
            _rope(each[:, None], freqs, None, _SBHD, interleaved, None, cp_size, cp_rank, backward)[:, 0]
            for each in x.split(sizes)
        ]
        return torch.cat(parts)
    y = x if int(qkv_format) == _SBHD else x.transpose(0, 1)
    angles = _angles(freqs, starts, y.shape[0], cp_size, cp_rank)
    width = angles.shape[-1]
    part, rest = y[..., :width].float(), y[..., width:]
    if backward:
        part = part * angles.cos() - _turned(part * angles.sin(), interleaved)
    else:
        part = part * angles.cos() + _turned(part, interleaved) * angles.sin()
    y = torch.cat((part.to(x.dtype), rest), -1)
    return (y if int(qkv_format) == _SBHD else y.transpose(0, 1)).contiguous()


offer("fused_rope_forward", partial(_rope, backward=False))
offer("fused_rope_backward", partial(_rope, backward=True))
