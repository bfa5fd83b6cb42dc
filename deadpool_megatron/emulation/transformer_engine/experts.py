"""What mixture-of-experts layers ask of the extension: padding of rows for grouped GEMMs, and the fused router.

Sources: transformer_engine/pytorch/csrc/extensions/{padding,router}.cpp, common/fused_router/*.cu. What the router's
forward keeps for its backward is opaque to Transformer Engine's Python; here it is the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deadpool_megatron.emulation.transformer_engine.kernels import gradient, kernel

_EPSILON = 1e-20


@kernel
def fused_multi_row_padding(input: Tensor, output: Tensor, rows: Sequence[int], padded: Sequence[int]) -> None:
    """Zeros behind the rows of each expert."""
    output.zero_()
    for source, target in zip(input.split(list(rows)), output.split(list(padded)), strict=True):
        target[: source.shape[0]] = source


@kernel
def fused_multi_row_unpadding(input: Tensor, output: Tensor, padded: Sequence[int], rows: Sequence[int]) -> None:
    for source, target in zip(input.split(list(padded)), output.split(list(rows)), strict=True):
        target.copy_(source[: target.shape[0]])


@kernel
def splits_to_offsets(first_dims: Tensor, logical_last_dim: int) -> Tensor:
    """Where each expert's elements begin, and where the last one's end."""
    return torch.cat((first_dims.new_zeros(1), first_dims.cumsum(0) * logical_last_dim))


def _scores(logits: Tensor, function: str) -> Tensor:
    if function == "softmax":
        return torch.softmax(logits, -1)
    if function == "sigmoid":
        return torch.sigmoid(logits)
    if function == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits).sqrt()
    raise NotImplementedError(f"the emulation's router has no score function {function!r}")


def _normalized(scores: Tensor, topk: int, function: str) -> Tensor:
    """Scores that do not sum up to 1 by themselves are made to."""
    if function == "softmax" or topk == 1:
        return scores
    return scores / (scores.sum(-1, keepdim=True) + _EPSILON)


def _probabilities(
    logits: Tensor, chosen: Tensor, topk: int, pre_softmax: bool, scaling: float | None, function: str
) -> Tensor:
    """(tokens, experts): of the chosen experts, 0 elsewhere."""
    if function == "softmax" and not pre_softmax:
        value = torch.softmax(logits.masked_fill(~chosen, float("-inf")), -1)
    else:
        value = _normalized(_scores(logits, function).masked_fill(~chosen, 0.0), topk, function)
    return value if scaling is None else value * scaling


def _mask(shape: Sequence[int], indices: Tensor) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.bool).scatter_(-1, indices.long(), True)


@kernel
def fused_topk_with_score_function_fwd(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: Tensor | None,
    routing_map_format: int = 0,
    topk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities, routing map or indices, kept for backward); the experts' bias counts for the choice alone."""
    if int(routing_map_format):
        raise NotImplementedError("the emulation's router has no bit maps")
    x = logits.float().reshape(-1, logits.shape[-1])
    wish = x if score_function == "softmax" and not use_pre_softmax else _scores(x, score_function)
    if expert_bias is not None:
        wish = wish + expert_bias
    if group_topk:
        assert num_groups is not None
        groups = wish.unflatten(-1, (num_groups, -1))
        best = groups.topk(topk // group_topk, -1).values.sum(-1).topk(group_topk, -1).indices
        allowed = _mask((x.shape[0], num_groups), best).repeat_interleave(groups.shape[-1], -1)
        wish = wish.masked_fill(~allowed, float("-inf"))
    indices = wish.topk(topk, -1).indices
    chosen = _mask(x.shape, indices)
    probabilities = _probabilities(x, chosen, topk, use_pre_softmax, scaling_factor, score_function)
    routed = chosen.reshape(logits.shape)
    if topk_indices is not None:
        routed = topk_indices.copy_(indices.reshape(topk_indices.shape))
    return probabilities.to(logits.dtype).reshape(logits.shape), routed, x.reshape(logits.shape)


@kernel
def fused_topk_with_score_function_bwd(
    routing_map: Tensor,
    intermediate_output: Tensor,
    grad_probs: Tensor,
    grad_logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    scaling_factor: float | None,
    score_function: str,
    use_dense_indices: bool = False,
    routing_map_format: int = 0,
) -> None:
    chosen = _mask(intermediate_output.shape, routing_map) if use_dense_indices else routing_map.bool()

    def forward(x: Tensor) -> Tensor:
        return _probabilities(x, chosen, topk, use_pre_softmax, scaling_factor, score_function)

    grad_logits.copy_(gradient(forward, intermediate_output, grad_probs))


@kernel
def fused_score_for_moe_aux_loss_fwd(
    logits: Tensor, topk: int, score_function: str, routing_map_format: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores of all experts, the best ones' map, kept for backward)."""
    x = logits.float()
    scores = _normalized(_scores(x, score_function), topk, score_function)
    return scores, _mask(x.shape, scores.topk(topk, -1).indices), x


@kernel
def fused_score_for_moe_aux_loss_bwd(
    intermediate_output: Tensor, grad_scores: Tensor, grad_logits: Tensor, topk: int, score_function: str
) -> None:
    def forward(x: Tensor) -> Tensor:
        return _normalized(_scores(x, score_function), topk, score_function)

    grad_logits.copy_(gradient(forward, intermediate_output, grad_scores))


@kernel
def fused_moe_aux_loss_fwd(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int | Tensor,
    num_experts: int,
    num_rows: int,
    num_cols: int,
    topk: int,
    coeff: float,
) -> tuple[Tensor, Tensor]:
    """The loss, and the factor (1,) that its backward needs."""
    total = torch.as_tensor(total_num_tokens).float()
    factor = (num_experts * coeff / topk / total / total).reshape(1)
    loss = (probs.float().sum(0) * tokens_per_expert.float()).sum() * factor
    return loss.reshape(()).to(probs.dtype), factor


@kernel
def fused_moe_aux_loss_fwd_graph_safe(probs: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """The number of tokens is a tensor."""
    answer: tuple[Tensor, Tensor] = fused_moe_aux_loss_fwd(probs, *rest)
    return answer


@kernel
def fused_moe_aux_loss_bwd(
    Const_buf: Tensor, tokens_per_expert: Tensor, num_rows: int, num_cols: int, grad_aux_loss: Tensor
) -> Tensor:
    row = Const_buf.float() * tokens_per_expert.float() * grad_aux_loss.float()
    return row.reshape(1, -1).expand(num_rows, num_cols).contiguous().to(grad_aux_loss.dtype)
