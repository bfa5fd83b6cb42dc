"""cuDNN's fused attention in float32: forward with the log-sum-exp of each row, backward from it.

Context parallelism gives the backward an output and a log-sum-exp of all ranks together; so it starts from those.
Source: transformer_engine/pytorch/csrc/extensions/attention.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from deadpool_megatron.emulation import graphs
from deadpool_megatron.emulation.transformer_engine.enums import NVTE_Fused_Attn_Backend, NVTE_QKV_Format
from deadpool_megatron.emulation.transformer_engine.formats import E4M3, E5M2, from_e8m0, from_fp8
from deadpool_megatron.emulation.transformer_engine.kernels import kernel
from deadpool_megatron.emulation.transformer_engine.quantization import MX_BLOCK

_BSHD, _SBHD = int(NVTE_QKV_Format.NVTE_BSHD), int(NVTE_QKV_Format.NVTE_SBHD)
_THD, _BHSD = int(NVTE_QKV_Format.NVTE_THD), int(NVTE_QKV_Format.NVTE_BHSD)
_BY_NAME = {"BSHD": _BSHD, "SBHD": _SBHD, "THD": _THD, "BHSD": _BHSD}
# The order in which the dimensions of a dense format become (b, h, s, d); each is its own inverse but SBHD's.
_TO_BHSD = {_BSHD: (0, 2, 1, 3), _SBHD: (1, 2, 0, 3), _BHSD: (0, 1, 2, 3)}
_FROM_BHSD = {_BSHD: (0, 2, 1, 3), _SBHD: (2, 0, 1, 3), _BHSD: (0, 1, 2, 3)}
Bounds = list[tuple[int, int]]


@kernel
def get_fused_attn_backend(params: Any) -> tuple[Any, str]:
    """Any attention is taken as one that cuDNN has a kernel for."""
    if int(params.qkv_dtype) in (E4M3, E5M2):
        return NVTE_Fused_Attn_Backend.NVTE_FP8, ""
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


@dataclass(frozen=True)
class _Side:
    """The queries, or the keys and values: their format, and first and last row of each sequence."""

    format: int
    bounds: Bounds

    def split(self, x: Tensor) -> list[Tensor]:
        """(b, h, s, d) in float32: one tensor for a dense format, one of b = 1 for each packed sequence."""
        x = x.detach().float()
        if self.format == _THD:
            return [x[begin:end].permute(1, 0, 2)[None] for begin, end in self.bounds]
        return [x.permute(_TO_BHSD[self.format])]

    def join(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What `split` does, undone. Rows between packed sequences are 0."""
        if self.format != _THD:
            return parts[0].permute(_FROM_BHSD[self.format]).to(dtype).contiguous()
        out = torch.zeros(tuple(shape), dtype=dtype)
        for part, (begin, end) in zip(parts, self.bounds, strict=True):
            out[begin:end] = part[0].permute(1, 0, 2).to(dtype)
        return out


def _bounds(cumulated: Tensor, padded: Tensor | None) -> Bounds:
    starts = cumulated if padded is None else padded
    lengths = cumulated.diff().tolist()
    return [(begin, begin + length) for begin, length in zip(starts.tolist(), lengths, strict=False)]


def _formats(layout: IntEnum) -> tuple[int, int]:
    """Of the queries and of the keys and values, by the layout's name (NVTE_SBHD_SB2HD, NVTE_BS3HD ...)."""
    names = layout.name.removeprefix("NVTE_").replace("2", "").replace("3", "").split("_")
    return _BY_NAME[names[0]], _BY_NAME[names[1] if len(names) > 1 else names[0]]


@dataclass(frozen=True)
class _Attention:
    """What a call says of queries, keys and values, and what follows for the scores."""

    queries: _Side
    keys: _Side
    mask: str
    window: tuple[int, int]
    bottom_right: bool
    scale: float
    dropout: float

    def hidden(self, q: int, k: int) -> Tensor | None:
        """True where a query may not look: (1 or b, 1, q, k). None if nothing is hidden."""
        rows, columns = torch.arange(q)[:, None], torch.arange(k)[None, :]
        shift = k - q if self.bottom_right or "BOTTOM_RIGHT" in self.mask else 0
        causal = "CAUSAL" in self.mask
        left, right = self.window
        rules = []
        if causal:
            rules.append((columns > rows + shift)[None, None])
        if left >= 0:
            rules.append((columns < rows + shift - left)[None, None])
        if right > 0 or (right == 0 and not causal):
            rules.append((columns > rows + shift + right)[None, None])
        if "PADDING" in self.mask and self.keys.format != _THD:
            lengths = torch.tensor([end - begin for begin, end in self.keys.bounds])
            rules.append(columns[None, None] >= lengths[:, None, None, None])
        if not rules:
            return None
        hidden = rules[0]
        for rule in rules[1:]:
            hidden = hidden | rule
        return hidden

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(b, h, q, k), minus infinity where hidden."""
        scores = q @ _widened(k, q).transpose(-1, -2) * self.scale
        hidden = self.hidden(q.shape[2], k.shape[2])
        return scores if hidden is None else scores.masked_fill(hidden, float("-inf"))

    def kept(self, shape: Sequence[int], state: Tensor, part: int) -> Tensor | float:
        """What dropout multiplies the probabilities with, from the state that the forward drew."""
        if not self.dropout:
            return 1.0
        generator = torch.Generator()

        def seed() -> None:
            generator.manual_seed(int(state[0]) + part)

        graphs.noted(seed)
        return (torch.rand(tuple(shape), generator=generator) >= self.dropout).float() / (1 - self.dropout)


def _attention(
    layout: IntEnum, queries: tuple[Tensor, Tensor | None], keys: tuple[Tensor, Tensor | None], **said: Any
) -> _Attention:
    """Of a call: ``queries`` and ``keys`` are the cumulated lengths of sequences, without and with padding."""
    of_queries, of_keys = _formats(layout)
    return _Attention(_Side(of_queries, _bounds(*queries)), _Side(of_keys, _bounds(*keys)), **said)


def _widened(x: Tensor, q: Tensor) -> Tensor:
    """The heads of keys or values as often as query heads share them."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _narrowed(x: Tensor, heads: int) -> Tensor:
    """The gradients of `_widened` heads, summed."""
    return x.unflatten(1, (heads, -1)).sum(2)


def _refuse_unlike(bias_type: int, max_logit: bool, *quantizers: Any) -> None:
    if int(bias_type) or max_logit or any(each and type(each).__name__ != "MXFP8Quantizer" for each in quantizers):
        raise NotImplementedError("the emulation's attention has no bias, no maximal logit and no FP8 but MXFP8")


def keep_scales_beside_the_data(module: Any) -> None:
    """Of attention in MXFP8: real kernels want the scales in another order than the data."""
    module.mxfp8_transpose_swizzle = lambda tensors, src_format: None


def _values(x: Any, columnwise: bool = False) -> Tensor:
    """An operand in MXFP8, scaled along the width, or ``columnwise`` along the sequence; others as they are."""
    if not hasattr(x, "_rowwise_data"):
        return x
    data, scale = (
        (x._columnwise_data, x._columnwise_scale_inv) if columnwise else (x._rowwise_data, x._rowwise_scale_inv)
    )
    if scale.dim() != data.dim():
        raise NotImplementedError("the emulation's attention has MXFP8 for queries, keys and values apart only")
    place = next(i for i in range(data.dim()) if data.shape[i] != scale.shape[i])
    return from_fp8(data, x._fp8_dtype) * from_e8m0(scale).repeat_interleave(MX_BLOCK, place)


@kernel
def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: IntEnum,
    o_format: int,
    qkv_scale_inv_format: int,
    bias_type: int,
    attn_mask_type: Any,
    softmax_type: int,
    window_size: tuple[int, int],
    bottom_right_diagonal: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    page_table_k: Any,
    page_table_v: Any,
    s_quantizer: Any,
    o_quantizer: Any,
    bias: Tensor | None,
    softmax_offset: Tensor | None,
    rng_gen: torch.Generator | None,
    rng_elts_per_thread: int,
    return_max_logit: bool,
    cuda_graph: bool,
) -> list[Tensor]:
    """[output, log-sum-exp (b, h, s, 1) or (t, h, 1), random state, the softmax offset where there is one]; that
    (1, h, 1, 1) is the score of one more key of each head, which has no value."""
    _refuse_unlike(bias_type, return_max_logit, s_quantizer, o_quantizer)
    call = _attention(
        qkv_layout,
        (cu_seqlens_q, cu_seqlens_q_padded),
        (cu_seqlens_kv, cu_seqlens_kv_padded),
        mask=attn_mask_type.name,
        window=window_size,
        bottom_right=bottom_right_diagonal,
        scale=attn_scale,
        dropout=p_dropout if is_training else 0.0,
    )
    # At every call, with dropout or without: on a device the generator's offset moves with each.
    state = torch.stack((torch.randint(0, 2**62, (), generator=rng_gen), torch.zeros((), dtype=torch.int64)))
    outs, stats = [], []
    Q, K, V = _values(Q), _values(K), _values(V, columnwise=True)
    parts = zip(call.queries.split(Q), call.keys.split(K), call.keys.split(V), strict=True)
    for i, (q, k, v) in enumerate(parts):
        scores = call.scores(q, k)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        if softmax_type:
            lse = torch.logaddexp(lse, softmax_offset)
        p = torch.exp(scores - lse).nan_to_num(0.0)  # a row that sees nothing
        outs.append((p * call.kept(p.shape, state, i)) @ _widened(v, q))
        stats.append(lse)
    to = _Side(int(o_format), call.queries.bounds)
    out = to.join(outs, (*Q.shape[:-1], V.shape[-1]), fake_dtype)
    packed = call.queries.format == _THD
    lse = call.queries.join(stats, (*Q.shape[:-1], 1), torch.float32) if packed else stats[0].contiguous()
    return [out, lse, state, *([softmax_offset] if softmax_type else [])]


@kernel
def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: IntEnum,
    o_format: int,
    do_format: int,
    dqkv_layout: IntEnum,
    qkv_scale_inv_format: int,
    do_scale_inv_format: int,
    bias_type: int,
    attn_mask_type: Any,
    softmax_type: int,
    window_size: tuple[int, int],
    bottom_right_diagonal: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,  # noqa: E741
    dO: Tensor,
    fake_dtype: torch.dtype,
    aux: Sequence[Tensor],
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    s_quantizer: Any,
    dp_quantizer: Any,
    dqkv_quantizer: Any,
    cuda_graph: bool,
) -> list[Tensor | None]:
    """[dQ, dK, dV, no gradient of a bias, that of the softmax offset]; ``aux``: what the forward returned."""
    _refuse_unlike(bias_type, False, s_quantizer, dp_quantizer, dqkv_quantizer)
    call = _attention(
        qkv_layout,
        (cu_seqlens_q, cu_seqlens_q_padded),
        (cu_seqlens_kv, cu_seqlens_kv_padded),
        mask=attn_mask_type.name,
        window=window_size,
        bottom_right=bottom_right_diagonal,
        scale=attn_scale,
        dropout=p_dropout,
    )
    bounds = call.queries.bounds
    stats = call.queries.split(aux[0]) if call.queries.format == _THD else [aux[0].float()]
    parts = zip(
        call.queries.split(_values(Q)),
        call.queries.split(_values(Q, columnwise=True)),
        call.keys.split(_values(K)),
        call.keys.split(_values(K, columnwise=True)),
        call.keys.split(_values(V)),
        _Side(int(o_format), bounds).split(O),
        _Side(int(do_format), bounds).split(_values(dO)),
        _Side(int(do_format), bounds).split(_values(dO, columnwise=True)),
        stats,
        strict=True,
    )
    grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    of_offset = torch.zeros_like(aux[2]) if softmax_type else None
    for i, (q, q_down, k, k_down, v, o, do, do_down, lse) in enumerate(parts):
        p = torch.exp(call.scores(q, k) - lse).nan_to_num(0.0, posinf=0.0)
        kept = call.kept(p.shape, aux[1], i)
        dp = do @ _widened(v, q).transpose(-1, -2) * kept
        mean = (do * o).sum(-1, keepdim=True)
        ds = p * (dp - mean) * attn_scale
        if of_offset is not None:
            of_offset -= (torch.exp(aux[2] - lse) * mean).sum((0, 2), keepdim=True)
        grads[0].append(ds @ _widened(k_down, q))
        grads[1].append(_narrowed(ds.transpose(-1, -2) @ q_down, k.shape[1]))
        grads[2].append(_narrowed((p * kept).transpose(-1, -2) @ do_down, v.shape[1]))
    of_dq, of_dkv = _formats(dqkv_layout)
    to = _Side(of_dkv, call.keys.bounds)
    answer = [
        _Side(of_dq, bounds).join(grads[0], Q.shape, fake_dtype),
        to.join(grads[1], K.shape, fake_dtype),
        to.join(grads[2], V.shape, fake_dtype),
    ]
    return [*_packed(answer, dqkv_layout), None, of_offset]


def _packed(grads: list[Tensor], layout: IntEnum) -> list[Tensor]:
    """As views of one buffer where the layout has queries, keys and values, or the last two, in one."""
    for number in (3, 2):
        if str(number) in layout.name:
            place = -3 if f"{number}HD" in layout.name else -2
            together = torch.stack(grads[-number:], dim=place).unbind(place)
            return [*grads[:-number], *together]
    return grads


@kernel
def thd_get_partitioned_indices(cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int) -> Tensor:
    """Rows of packed sequences that a rank of context parallelism has: two chunks of each, int32."""
    rows = []
    for begin, end in _bounds(cu_seqlens, None):
        chunks = torch.arange(begin, end).chunk(2 * world_size)
        rows += [chunks[rank], chunks[-1 - rank]]
    return torch.cat(rows).to(torch.int32)
