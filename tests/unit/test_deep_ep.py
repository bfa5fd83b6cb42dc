"""Megatron's flexible dispatcher over the emulated buffers of DeepEP and HybridEP gives what its all-to-all gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emulated import assert_close, ranks_together

RANKS, EXPERTS, TOKENS, HIDDEN, TOPK = 2, 4, 6, 8, 2
BACKENDS = ("alltoall", "deepep", "hybridep")


def _layer(backend: str) -> Any:
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoEFlexTokenDispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    flex = backend != "alltoall"
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        expert_model_parallel_size=RANKS,
        moe_token_dispatcher_type="flex" if flex else "alltoall",
        add_bias_linear=False,
        moe_router_dtype="fp32",
        **({"moe_flex_dispatcher_backend": backend} if flex else {}),
    )
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    local = EXPERTS // RANKS
    first = parallel_state.get_expert_model_parallel_rank() * local
    kind = MoEFlexTokenDispatcher if flex else MoEAlltoAllTokenDispatcher
    return kind(local, [first + i for i in range(local)], config, get_default_pg_collection()), first


def _through(backend: str, rank: int) -> list[Any]:
    """Output and gradients of tokens that experts scale by 1, 2, 3, 4 and weigh by their probabilities."""
    import torch

    dispatcher, first = _layer(backend)
    torch.manual_seed(10 + rank)
    x = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)
    scores = torch.rand(TOKENS, EXPERTS, requires_grad=True)
    chosen = scores.detach().topk(TOPK, 1).indices
    routing_map = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, chosen, True)
    probs = scores * routing_map
    hidden, token_probs = dispatcher.dispatch_preprocess(x, routing_map, probs)
    hidden, permuted_probs = dispatcher.token_dispatch(hidden, token_probs)
    hidden, counts, permuted_probs = dispatcher.dispatch_postprocess(hidden, permuted_probs)
    factors = torch.arange(first + 1, first + 1 + EXPERTS // RANKS).repeat_interleave(counts)
    hidden = hidden * factors[:, None] * permuted_probs[:, None]
    out = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(hidden)))
    (out * torch.randn_like(out)).sum().backward()
    assert int(counts.sum()) == len(factors)
    return [out.detach(), x.grad, scores.grad]


def _padded_and_cut(rank: int) -> None:
    """HybridEP fills each expert's rows up to a multiple, and drops what is beyond a budget."""
    import torch
    from deep_ep import HybridEPBuffer
    from megatron.core import parallel_state

    buffer = HybridEPBuffer(parallel_state.get_expert_model_parallel_group(), HIDDEN, TOKENS, EXPERTS // RANKS)
    routing_map = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    routing_map[:3, 0] = routing_map[3:, 3] = True  # of each rank three tokens to the first expert, three to the last
    hidden = torch.full((TOKENS, HIDDEN), rank + 1.0)
    asked = {"hidden": hidden, "routing_map": routing_map, "probs": routing_map.float(), "num_of_experts_per_rank": 2}
    rows, probs, _, counts, handle = buffer.dispatch_with_permute(**asked, pad_multiple=4)
    assert counts.tolist() == ([8, 0] if rank == 0 else [0, 8]) and handle[-1] == 0
    assert rows[:, 0].tolist() == [1, 1, 1, 2, 2, 2, 0, 0] and probs.tolist() == [1] * 6 + [0] * 2
    back, back_probs = buffer.combine_with_unpermute(hidden=rows, probs=probs, handle=handle, pad_multiple=4)
    assert torch.equal(back, hidden) and torch.equal(back_probs, routing_map.float())
    rows, _, _, counts, handle = buffer.dispatch_with_permute(**asked, num_permuted_tokens=4)
    assert len(rows) == 4 and int(counts.sum()) == 4 and handle[-1] == 1
    back, _ = buffer.combine_with_unpermute(hidden=rows, handle=handle)
    dropped = (back[:, 0] == 0).sum().item()
    assert dropped == (0 if rank == 0 else 4), "of the second rank two tokens of three, at each expert"


def _captured(rank: int) -> None:
    """In a graph HybridEP's kernels go by the routes of each replay; without a budget none can be captured."""
    import pytest
    import torch
    from deep_ep import HybridEPBuffer
    from megatron.core import parallel_state

    from deadpool_megatron.emulation.graphs import Capture, CUDAGraph

    buffer = HybridEPBuffer(parallel_state.get_expert_model_parallel_group(), HIDDEN, TOKENS, EXPERTS // RANKS)
    hidden, probs = torch.zeros(TOKENS, HIDDEN), torch.zeros(TOKENS, EXPERTS)
    routing_map = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    asked = {"hidden": hidden, "routing_map": routing_map, "probs": probs, "num_of_experts_per_rank": 2}

    def through() -> tuple[torch.Tensor, ...]:
        rows, row_probs, _, counts, handle = buffer.dispatch_with_permute(**asked, num_permuted_tokens=8)
        back, back_probs = buffer.combine_with_unpermute(hidden=rows * 2, probs=row_probs, handle=handle)
        again, *_ = buffer.dispatch_with_permute(hidden=back, handle=handle, num_permuted_tokens=8)
        return rows, row_probs, counts, handle[-1].clone(), back, back_probs, again

    graph = CUDAGraph()
    with Capture(graph):
        results = through()
    graph.replay()  # the capture has computed it
    for seed in (3, 4):
        torch.manual_seed(seed + 10 * rank)
        hidden.copy_(torch.randn(TOKENS, HIDDEN))
        routing_map.copy_(torch.rand(TOKENS, EXPERTS) < 0.5)
        probs.copy_(torch.rand(TOKENS, EXPERTS) * routing_map)
        want = through()
        assert not any(torch.equal(here, there) for here, there in zip(results[:3], want[:3], strict=True))
        graph.replay()
        assert all(torch.equal(here, there) for here, there in zip(results, want, strict=True))
    with pytest.raises(RuntimeError, match="the host waits"), Capture(CUDAGraph()):
        buffer.dispatch_with_permute(**asked)


def _begun_anew(rank: int) -> None:
    """A recovery takes back an iteration that is being done again without a budget, and what a process has learned."""
    import torch
    from megatron.core.transformer.moe.paged_stash import PagedStashManager, paged_stash_reset

    from deadpool_megatron.megatron.reset import _forget_paged_stash

    layer = torch.nn.Module()
    layer.token_dispatcher, _ = _layer("hybridep")
    dispatcher, config = layer.token_dispatcher, layer.token_dispatcher.config
    layer.config = config
    _forget_paged_stash([layer])
    assert not config.moe_paged_stash, "no job of that sort"
    config.moe_expert_rank_capacity_factor = 1.5
    paged_stash_reset(config=config)
    learned = PagedStashManager.get_instance()
    assert learned.status == "capture"
    dispatcher._comm_manager.over_budget.fill_(True)  # as upstream's PagedStashRunner.prepare_for_rerun leaves it
    dispatcher._comm_manager.moe_expert_rank_capacity_factor, config.moe_paged_stash = None, False
    _forget_paged_stash([layer])
    assert dispatcher._comm_manager.moe_expert_rank_capacity_factor == 1.5 and config.moe_paged_stash
    assert not dispatcher.check_over_budget() and PagedStashManager.get_instance() is not learned


def _rank(rank: int, directory: str) -> None:
    from deadpool_megatron import emulation

    emulation.install()
    import torch
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS)
    _padded_and_cut(rank)
    _captured(rank)
    _begun_anew(rank)
    got = {backend: _through(backend, rank) for backend in BACKENDS}
    torch.save(got, f"{directory}/{rank}.pt")


def test_tokens_and_gradients_come_back_as_by_all_to_all_padded_cut_or_captured_where_asked(tmp_path: Path) -> None:
    import torch

    ranks_together(_rank, RANKS, tmp_path)
    for rank in range(RANKS):
        got = torch.load(tmp_path / f"{rank}.pt")
        for backend in BACKENDS[1:]:
            for here, there in zip(got[backend], got["alltoall"], strict=True):
                assert_close(here, there)
