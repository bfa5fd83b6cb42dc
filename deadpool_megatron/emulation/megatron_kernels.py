"""Megatron's own Triton kernels in torch, differentiable. Triton's interpreter runs them, at seconds a call.

Sources: megatron/core/fusions/fused_mla_yarn_rope_apply.py, fused_pad_routing_map.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deadpool_megatron.emulation.transformer_engine.attention import thd_get_partitioned_indices


def _rows(table: Tensor, cu_seqlens: Tensor | None, length: int, cp_rank: int, cp_size: int) -> Tensor:
    """The rows of (max length, 1, 1, width) that belong to the tokens, with the tokens' dimensions: one or two."""
    if cu_seqlens is None:
        return table[:length].float()
    places = torch.cat([torch.arange(size) for size in cu_seqlens.diff().tolist()])
    if cp_size > 1:
        places = places[thd_get_partitioned_indices(cu_seqlens, len(places), cp_size, cp_rank)]
    return table[places].float().squeeze(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs turned by their angles, first halves before second ones."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    (cos_a, cos_b), (sin_a, sin_b) = cos.chunk(2, -1), sin.chunk(2, -1)
    return torch.cat((a * cos_a - b * sin_a, b * cos_b + a * sin_b), -1).to(x.dtype)


def fused_apply_mla_rope_for_q(
    t: Tensor,
    cos: Tensor,
    sin: Tensor,
    qk_head_dim: int,
    emb_dim: int,
    cu_seqlens_q: Tensor | None = None,
    cp_rank: int = 0,
    cp_size: int = 1,
    rotary_interleaved: bool = False,
) -> Tensor:
    """(s, b, h, qk_head_dim + emb_dim), or (t, h, ...) of packed sequences, with the last ``emb_dim`` rotated."""
    cos, sin = (_rows(table, cu_seqlens_q, t.shape[0], cp_rank, cp_size) for table in (cos, sin))
    return torch.cat((t[..., :qk_head_dim], _rotated(t[..., qk_head_dim:], cos, sin)), -1)


def fused_apply_mla_rope_for_kv(
    kv: Tensor,
    k_pos_emb: Tensor,
    cos: Tensor,
    sin: Tensor,
    emb_dim: int,
    k_dim: int,
    v_dim: int,
    cu_seqlens_kv: Tensor | None = None,
    cp_rank: int = 0,
    cp_size: int = 1,
    rotary_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Keys (..., h, k_dim + emb_dim), whose last part, rotated, all heads share, and values (..., h, v_dim)."""
    cos, sin = (_rows(table, cu_seqlens_kv, kv.shape[0], cp_rank, cp_size) for table in (cos, sin))
    key, value = kv.split((k_dim, v_dim), -1)
    position = _rotated(k_pos_emb, cos, sin).expand(*key.shape[:-1], emb_dim)
    return torch.cat((key, position), -1), value.contiguous()


def fused_pad_routing_map(routing_map: Tensor, pad_multiple: int) -> Tensor:
    """(tokens, experts) of 0 and 1, with the first zeros of each expert set until its sum is a multiple."""
    flags = routing_map.bool()
    missing = -flags.sum(0) % pad_multiple
    return (flags | ((~flags).cumsum(0) <= missing)).int()
