"""Compiled packages of other people that Megatron takes a few functions from, in torch, differentiable by autograd.

mamba_ssm and causal_conv1d (``megatron/core/ssm/mamba_mixer.py``), fla (gated delta nets), fast_hadamard_transform
(sparse attention). Only what training calls. The scan takes memory with the square of the sequence's length, as the
real one does in its chunks.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deadpool_megatron.emulation.importing import module


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Any = None,
    return_final_states: bool = False,
    final_states_out: Any = None,
    activation: str | None = None,
) -> Tensor:
    """(batch, channels, length) with each channel's (width) weights; sequences of a pack are apart by ``seq_idx``."""
    if initial_states is not None or return_final_states:
        raise NotImplementedError("the emulation has causal_conv1d_fn for training only, without states")
    width, length = weight.shape[-1], x.shape[-1]
    padded = F.pad(x.float(), (width - 1, 0))
    marks = None if seq_idx is None else F.pad(seq_idx, (width - 1, 0), value=-1)
    out = torch.zeros_like(x, dtype=torch.float32)
    for k in range(width):
        part = padded[..., k : k + length]
        if marks is not None:
            part = part * (marks[:, k : k + length] == seq_idx).unsqueeze(1)
        out = out + part * weight[:, k, None].float()
    if bias is not None:
        out = out + bias[:, None].float()
    return (F.silu(out) if activation in ("silu", "swish") else out).to(x.dtype)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Any = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor:
    """Mamba 2's state-space model, (batch, length, heads, width).

    Args:
        x: (batch, length, heads, width); ``z``, the gate, too.
        dt: (batch, length, heads).
        A: (heads).
        B, C: (batch, length, groups, state).
        D: (heads) or (heads, width).
        seq_idx: (batch, length), which sequence of a pack a token is of.
    """
    if initial_states is not None or return_final_states:
        raise NotImplementedError("the emulation has mamba_chunk_scan_combined for training only, without states")
    heads, length = x.shape[2], x.shape[1]
    steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    steps = (F.softplus(steps) if dt_softplus else steps).clamp(*dt_limit)
    decay = (steps * A.float()).cumsum(1).transpose(1, 2)  # (batch, heads, length)
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if seq_idx is not None:
        seen = seen & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    weights = (decay[..., :, None] - decay[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    b, c = (each.float().repeat_interleave(heads // each.shape[2], 2) for each in (B, C))
    weights = weights * torch.einsum("blhn,bmhn->bhlm", c, b)
    y = torch.einsum("bhlm,bmhp->blhp", weights, x.float() * steps[..., None])
    if D is not None:
        y = y + x.float() * (D if D.dim() == 2 else D[:, None]).float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Any = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """The convolution, the scan and the gate: (batch, length, z | x | B | C | dt) to (batch, length, inner width)."""
    if rmsnorm_weight is not None or outproj_weight is not None:
        raise NotImplementedError("the emulation has mamba_split_conv1d_scan_combined without norm and projection")
    width = headdim or D.shape[1]
    heads = dt_bias.shape[0]
    inner = heads * width
    z, xbc, dt = zxbcdt.split((inner, conv1d_weight.shape[0], heads), -1)
    xbc = causal_conv1d_fn(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, b, c = xbc.transpose(1, 2).split((inner, *[(conv1d_weight.shape[0] - inner) // 2] * 2), -1)
    y = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, width)),
        dt,
        A,
        b.unflatten(-1, (ngroups, -1)),
        c.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, width)),
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    return y.flatten(-2)


class RMSNorm(torch.nn.Module):  # type: ignore[misc]  # torch has no types for it
    """``mamba_ssm.ops.triton.layernorm_gated.RMSNorm``: over groups of ``group_size``, gated by ``z``."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size or hidden_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Of x's shape and dtype."""
        value, gate = x.float(), None if z is None else F.silu(z.float())
        if gate is not None and not self.norm_before_gate:
            value = value * gate
        groups = value.unflatten(-1, (-1, self.group_size))
        value = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        value = value * self.weight.float()
        return (value * gate if gate is not None and self.norm_before_gate else value).to(x.dtype)


def hadamard_transform(x: Tensor, scale: float = 1.0) -> Tensor:
    """Each last dimension, a power of two, times Sylvester's matrix, times ``scale``."""
    size = x.shape[-1]
    value = x.float().reshape(-1, size)
    half = 1
    while half < size:
        a, b = value.unflatten(-1, (-1, 2, half)).unbind(-2)
        value = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return (value * scale).reshape(x.shape).to(x.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """``fla.modules.convolution.causal_conv1d``: (batch, length, channels)."""
    seq_idx = None
    if cu_seqlens is not None:
        seq_idx = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())[None]
    rows = x.transpose(1, 2)
    out = causal_conv1d_fn(rows, weight, bias, seq_idx, initial_state, output_final_state, activation=activation)
    return out.transpose(1, 2), None


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``fla.modules.l2norm.l2norm``: each last dimension to length 1."""
    value = x.float()
    return (value * torch.rsqrt(value.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """``fla.ops.gated_delta_rule.chunk_gated_delta_rule``, token after token (arXiv 2412.06464, section 3.1).

    Args:
        q, k: (batch, length, heads, width).
        v: (batch, length, heads, width of values), as what is returned.
        g: (batch, length, heads), logarithms of the decay.
        beta: (batch, length, heads), how much of a value is written.
        cu_seqlens: where the sequences of a pack begin, and the last one ends; batch is 1 then.
    """
    if initial_state is not None or output_final_state:
        raise NotImplementedError("the emulation has chunk_gated_delta_rule for training only, without states")
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    begins = {0} if cu_seqlens is None else {*cu_seqlens.tolist()}
    queries, keys, values = q.float() * scale, k.float(), v.float()
    decay, write = g.float().exp(), beta.float()
    state, out = q.new_zeros(()), []
    for t in range(q.shape[1]):
        if t in begins:
            state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
        state = state * decay[:, t, :, None, None]
        seen = torch.einsum("bhk,bhkv->bhv", keys[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", keys[:, t], (values[:, t] - seen) * write[:, t, :, None])
        out.append(torch.einsum("bhk,bhkv->bhv", queries[:, t], state))
    return torch.stack(out, 1).to(v.dtype), None


def _varlen_states(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the emulation has no causal_conv1d_varlen_states: it is for inference")


_MODULES: dict[str, dict[str, Any]] = {
    "causal_conv1d": {
        "causal_conv1d_fn": causal_conv1d_fn,
        "causal_conv1d_update": None,  # of a decoder: for whoever only imports it
        "__version__": "1.6.0",
    },
    "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": _varlen_states},
    "mamba_ssm": {"__version__": "2.3.0"},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNorm},
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
    },
    "fla": {},
    "fla.modules": {},
    "fla.modules.convolution": {"causal_conv1d": causal_conv1d},
    "fla.modules.l2norm": {"l2norm": l2norm},
    "fla.ops": {},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
    "fast_hadamard_transform": {"hadamard_transform": hadamard_transform},
}


def install() -> None:
    """Before Megatron is imported, which looks for these modules then."""
    for name, members in _MODULES.items():
        # (transformers asks for the spec)
        made = module(name, **members, __path__=[], __spec__=ModuleSpec(name, None, is_package=True))
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, made)
