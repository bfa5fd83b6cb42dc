"""``--moe-permute-fusion``: the Triton functions of ``transformer_engine.pytorch.triton.permutation``, in torch.

The row map is opaque to Transformer Engine's Python, but for its shape (tokens, 2 * experts + 1): here its first
columns have, for each token and expert, the row of the permuted tensor, or -1.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """Rows in the order of experts, then of tokens."""
    mask = routing_map.bool()
    order = mask.t().reshape(-1).cumsum(0).sub(1).view(num_experts, num_tokens).t()
    rows = torch.full((num_tokens, num_experts * 2 + 1), -1, dtype=torch.int32)
    rows[:, :num_experts] = torch.where(mask, order, -1)
    rows[:, -1] = mask.sum(1)
    return rows


def _pairs(row_id_map: Tensor, num_experts: int, pad_offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and row of every pair that is routed."""
    rows = row_id_map[:, :num_experts].long()
    tokens, experts = (rows >= 0).nonzero(as_tuple=True)
    rows = rows[tokens, experts]
    return tokens, experts, rows if pad_offsets is None else rows + pad_offsets.long()[experts]


def permute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    scale: Tensor | None,
    pad_offsets: Tensor | None,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
    scale_hidden_dim: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(tokens in the experts' order, their scales, their probabilities)."""
    tokens, experts, rows = _pairs(row_id_map, num_experts, pad_offsets)
    out = inp.new_zeros((num_out_tokens, hidden_size))
    out[rows] = inp[tokens]
    new_scale = new_probs = None
    if scale is not None:
        new_scale = scale.new_zeros((num_out_tokens, scale_hidden_dim))
        new_scale[rows] = scale[tokens]
    if probs is not None:
        new_probs = probs.new_zeros(num_out_tokens)
        new_probs[rows] = probs[tokens, experts]
    return out, new_scale, new_probs


def unpermute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None,
    permuted_probs: Tensor | None,
    pad_offsets: Tensor | None,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
) -> tuple[Tensor, Tensor | None]:
    """(sum of each token's rows, weighted if ``merging_probs``; the probabilities by token and expert)."""
    tokens, experts, rows = _pairs(row_id_map, num_experts, pad_offsets)
    values = inp[rows].float()
    if merging_probs is not None:
        values = values * merging_probs[tokens, experts].float()[:, None]
    out = torch.zeros((num_tokens, hidden_size)).index_add_(0, tokens, values).to(inp.dtype)
    probs = None
    if permuted_probs is not None:
        probs = permuted_probs.new_zeros((num_tokens, num_experts))
        probs[tokens, experts] = permuted_probs[rows]
    return out, probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad: Tensor,
    row_id_map: Tensor,
    fwd_input: Tensor,
    merging_probs: Tensor,
    pad_offsets: Tensor | None,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
) -> tuple[Tensor, Tensor]:
    """(gradient of the rows, gradient of ``merging_probs``)."""
    tokens, experts, rows = _pairs(row_id_map, num_experts, pad_offsets)
    grad = fwd_output_grad[tokens].float()
    act = fwd_output_grad.new_zeros((num_out_tokens, hidden_size))
    act[rows] = (grad * merging_probs[tokens, experts].float()[:, None]).to(act.dtype)
    probs = merging_probs.new_zeros((num_tokens, num_experts))
    probs[tokens, experts] = (grad * fwd_input[rows].float()).sum(1).to(probs.dtype)
    return act, probs


def make_chunk_sort_map(split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int) -> Tensor:
    """For each row, where it goes when the chunks are put in the order of ``sorted_indices``."""
    chunks = torch.arange(num_tokens).split(split_sizes.tolist())
    sources = torch.cat([chunks[each] for each in sorted_indices.tolist()])
    targets = torch.empty(num_tokens, dtype=torch.int32)
    targets[sources] = torch.arange(num_tokens, dtype=torch.int32)
    return targets


def sort_chunks_by_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, num_tokens: int, hidden_size: int, is_forward: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows (and their probabilities) moved by the map, or back."""
    rows = row_id_map.long()

    def moved(x: Tensor) -> Tensor:
        if not is_forward:
            return x[rows]
        out = torch.empty_like(x)
        out[rows] = x
        return out

    return moved(inp), None if probs is None else moved(probs)


_FUNCTIONS = (
    make_row_id_map,
    permute_with_mask_map,
    unpermute_with_mask_map,
    unpermute_with_mask_map_bwd_with_merging_probs,
    make_chunk_sort_map,
    sort_chunks_by_map,
)


def replace(module: ModuleType) -> None:
    """Put them into Transformer Engine's module."""
    for function in _FUNCTIONS:
        setattr(module, function.__name__, torch.no_grad()(function))
