"""The module ``deep_ep`` on the CPU: the buffers of DeepEP and HybridEP, as Megatron's ``fused_a2a`` uses them.

As on a device, a kernel here goes its own way between the ranks of a buffer (`link.Link`). Source of the calls:
deepseek-ai/DeepEP, ``deep_ep/buffer.py`` and, on its branch hybrid-ep, ``deep_ep/hybrid_ep_buffer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deadpool_megatron.emulation import graphs
from deadpool_megatron.emulation.importing import module
from deadpool_megatron.emulation.link import Link


class _Link(Link):
    """The way of a buffer's kernels."""

    def sum_back(self, parts: Sequence[Tensor], rows: Sequence[Tensor], number: int) -> Tensor:
        """Part ``r`` goes back to rank ``r``; what comes back for its ``number`` rows is added in float32, by rank."""
        out = parts[0].new_zeros(number, *parts[0].shape[1:], dtype=torch.float32)
        for where, part in zip(rows, self.exchange(parts), strict=True):
            out.index_add_(0, where, part.float())
        return out.to(parts[0].dtype)


class EventHandle:
    """``deep_ep.utils.EventHandle``: a moment on a stream."""


class EventOverlap:
    """``deep_ep.utils.EventOverlap``: here all is done when a call returns."""

    def __init__(self, event: EventHandle | None = None, extra_tensors: Any = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        """Nothing is left to wait for."""


class _Sent(NamedTuple):
    """A dispatch, for its combine: which rows went to each rank, how many came from each, how many rows there were."""

    rows: list[Tensor]
    came: list[int]
    number: int


class Buffer:
    """DeepEP's buffer: the tokens of a batch to the ranks of their experts, once a rank, and back."""

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, **_: Any) -> None:
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self._link = _Link(group)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Multiprocessors that kernels may take."""
        assert new_num_sms % 2 == 0, "the SM count must be even"

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        """How big a buffer has to be."""
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: hidden_bytes * ranks,
            get_rdma_buffer_size_hint=lambda hidden_bytes, ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, *_: Any, **__: Any
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        """Tokens by rank and by expert, and which token goes to which rank. No communication."""
        chosen = torch.zeros(len(topk_idx), num_experts + 1, dtype=torch.bool)
        chosen.scatter_(1, topk_idx.where(topk_idx >= 0, num_experts), True)
        chosen = chosen[:, :num_experts]
        in_rank = chosen.view(len(topk_idx), self._link.size, -1).any(2)
        return in_rank.sum(0).int(), None, chosen.sum(0).int(), in_rank, EventOverlap()

    def dispatch(
        self,
        x: Tensor,
        handle: _Sent | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        """Tokens by rank they come from; with indices among the experts here, -1 for experts elsewhere."""
        link = self._link
        if handle is not None:
            received = torch.cat(link.exchange([x[rows] for rows in handle.rows]))
            return received, None, None, None, None, EventOverlap()
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None
        rows = [is_token_in_rank[:, rank].nonzero()[:, 0] for rank in range(link.size)]
        came = link.exchange([x[each] for each in rows])
        local = len(num_tokens_per_expert) // link.size
        indices, weights = [], []
        for rank, each in enumerate(rows):
            there = topk_idx[each] - rank * local
            is_there = (there >= 0) & (there < local)
            indices.append(there.where(is_there, -1))
            weights.append(topk_weights[each].where(is_there, 0))
        received_indices = torch.cat(link.exchange(indices))
        per_expert = torch.bincount(received_indices[received_indices >= 0], minlength=local).tolist()
        sent = _Sent(rows, [len(part) for part in came], len(x))
        received_weights = torch.cat(link.exchange(weights))
        return torch.cat(came), received_indices, received_weights, per_expert, sent, EventOverlap()

    def combine(
        self, x: Tensor, handle: _Sent, topk_weights: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Rows back to where they come from, and added there; weights too."""

        def back(values: Tensor) -> Tensor:
            return self._link.sum_back(values.split(handle.came), handle.rows, handle.number)

        return back(x), None if topk_weights is None else back(topk_weights), EventOverlap()


@dataclass(slots=True)
class _Plan:
    """Which row goes where; a replay of the dispatch that has made it makes it anew."""

    rows: list[Tensor]
    came: list[int]
    number: int
    index: Tensor  # of each row for the experts: which received one it is; -1: padding
    expert: Tensor  # and for which expert here
    experts: int  # here


class _Handle(NamedTuple):
    """Of a dispatch with permutation. ``overflow`` is last, where Megatron looks for it."""

    plan: _Plan
    counts: Tensor  # by expert here
    overflow: Tensor


class HybridEPBuffer:
    """HybridEP's buffer: dispatch with permutation by expert, and combine with the opposite."""

    def __init__(
        self,
        group: Any,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        **_: Any,
    ) -> None:
        assert not use_fp8, "the emulation has no dispatch in FP8"
        self.group = group
        self._link = _Link(group)

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        scaling_factor: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        pad_multiple: int | None = None,
        num_permuted_tokens: int | None = None,
        non_blocking: bool = False,
        handle: _Handle | None = None,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[Any, ...]:
        """Rows by expert here, then rank they come from; each expert's filled up with zeros to ``pad_multiple``."""
        if num_permuted_tokens is None and graphs.is_capturing():
            raise RuntimeError("operation not permitted when stream is capturing: the host waits for counts")
        if handle is None:
            assert routing_map is not None and num_of_experts_per_rank is not None
            budget = None if num_permuted_tokens is None else int(num_permuted_tokens)
            handle = self._plan(routing_map, num_of_experts_per_rank, pad_multiple or 1, budget)
        out, out_probs = graphs.launched(self._dispatch, hidden, probs, handle.plan)
        return out, out_probs, None, handle.counts, handle

    def _dispatch(self, hidden: Tensor, probs: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor | None]:
        link, real = self._link, plan.index >= 0
        received = torch.cat(link.exchange([hidden[rows] for rows in plan.rows]))
        out = hidden.new_zeros(len(plan.index), hidden.shape[1])
        out[real] = received[plan.index[real]]
        out_probs = None
        if probs is not None:
            parts = zip(plan.rows, probs.split(plan.experts, 1), strict=True)
            grid = torch.cat(link.exchange([there[rows] for rows, there in parts]))
            out_probs = probs.new_zeros(len(plan.index))
            out_probs[real] = grid[plan.index[real], plan.expert[real]]
        return out, out_probs

    def _plan(self, routing_map: Tensor, experts: int, multiple: int, budget: int | None) -> _Handle:
        plan: _Plan | None = None

        def compute(routing_map: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal plan
            fresh, counts, overflow = self._planned(routing_map, experts, multiple, budget)
            if plan is None:
                plan = fresh
            else:
                plan.rows, plan.came, plan.index, plan.expert = fresh.rows, fresh.came, fresh.index, fresh.expert
            return counts, overflow

        counts, overflow = graphs.launched(compute, routing_map)
        assert plan is not None
        return _Handle(plan, counts, overflow)

    def _planned(
        self, routing_map: Tensor, experts: int, multiple: int, budget: int | None
    ) -> tuple[_Plan, Tensor, Tensor]:
        parts = routing_map.bool().split(experts, 1)
        rows = [part.any(1).nonzero()[:, 0] for part in parts]
        came = self._link.exchange([part[each].byte() for part, each in zip(parts, rows, strict=True)])
        chosen = torch.cat(came).bool()
        index, expert, counts = [], [], []
        for here in range(experts):
            mine = chosen[:, here].nonzero()[:, 0]
            padding = -len(mine) % multiple
            index += [mine, mine.new_full((padding,), -1)]
            counts.append(len(mine) + padding)
            expert.append(mine.new_full((counts[-1],), here))
        whole, whole_expert = torch.cat(index), torch.cat(expert)
        per_expert, overflow = torch.tensor(counts), torch.zeros(1, dtype=torch.int32)
        if budget is not None:
            overflow += len(whole) > budget
            filling = max(0, budget - len(whole))
            whole = torch.cat([whole[:budget], whole.new_full((filling,), -1)])
            whole_expert = torch.cat([whole_expert[:budget], whole_expert.new_zeros(filling)])
            ends = per_expert.cumsum(0).clamp(max=budget)
            per_expert = ends.diff(prepend=ends.new_zeros(1))
        plan = _Plan(rows, [len(e) for e in came], len(routing_map), whole, whole_expert, experts)
        return plan, per_expert, overflow

    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        probs: Tensor | None = None,
        handle: _Handle,
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What the experts here made of each row is added here, then goes back and is added there."""
        out, out_probs = graphs.launched(self._combine, hidden, probs, handle.plan)
        return out, out_probs

    def _combine(self, hidden: Tensor, probs: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor | None]:
        real, came = plan.index >= 0, sum(plan.came)
        summed = hidden.new_zeros(came, hidden.shape[1], dtype=torch.float32)
        summed.index_add_(0, plan.index[real], hidden[real].float())
        out = self._link.sum_back(summed.to(hidden.dtype).split(plan.came), plan.rows, plan.number)
        if probs is None:
            return out, None
        grid = probs.new_zeros(came, plan.experts)
        grid[plan.index[real], plan.expert[real]] = probs[real]
        out_probs = probs.new_zeros(plan.number, plan.experts * self._link.size)
        back = self._link.exchange(grid.split(plan.came))
        for there, rows, part in zip(out_probs.split(plan.experts, 1), plan.rows, back, strict=True):
            there[rows] = part
        return out, out_probs


def install() -> None:
    """Before Megatron is imported, which looks for this module then."""
    utils = module("deep_ep.utils", EventHandle=EventHandle, EventOverlap=EventOverlap)
    module("deep_ep", Buffer=Buffer, HybridEPBuffer=HybridEPBuffer, utils=utils, __path__=[])
