"""Megatron's Triton kernels as the emulation has them give what Megatron computes without fusion."""

from __future__ import annotations

import pytest
import torch

from emulated import assert_close, emulated_process, in_emulation  # noqa: F401

ROTATED, KEPT, VALUE, HEADS, LONGEST = 8, 12, 10, 3, 16


class Ranks:
    """Stands for a context-parallel group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def angles() -> torch.Tensor:
    return torch.randn(LONGEST, 1, 1, ROTATED // 2).repeat(1, 1, 1, 2)


def unfused(x: torch.Tensor, freqs: torch.Tensor, lengths: torch.Tensor | None, rank: int, size: int) -> torch.Tensor:
    from megatron.core.models.common.embeddings import rope_utils

    if lengths is None:
        freqs = freqs[: x.shape[0]]
        return rope_utils._apply_rotary_pos_emb_bshd(x, freqs, mla_rotary_interleaved=True)
    return rope_utils._apply_rotary_pos_emb_thd(
        x, lengths, freqs, mla_rotary_interleaved=True, cp_group=Ranks(rank, size)
    )


@pytest.mark.parametrize(("packed", "rank", "size"), [(False, 0, 1), (True, 0, 1), (True, 0, 2), (True, 1, 2)])
@in_emulation
def test_rope_of_latent_attention(packed: bool, rank: int, size: int) -> None:
    from megatron.core.transformer import multi_latent_attention as mla

    torch.manual_seed(1)
    freqs = angles()
    lengths = torch.tensor([0, 8, 12], dtype=torch.int32) if packed else None
    shape = (12 // size, HEADS) if packed else (12, 2, HEADS)
    q = torch.randn(*shape, KEPT + ROTATED, requires_grad=True)
    kv = torch.randn(*shape, KEPT + VALUE, requires_grad=True)
    position = torch.randn(*shape[:-1], 1, ROTATED, requires_grad=True)

    query = mla.fused_apply_mla_rope_for_q(q, freqs.cos(), freqs.sin(), KEPT, ROTATED, lengths, rank, size)
    key, value = mla.fused_apply_mla_rope_for_kv(
        kv, position, freqs.cos(), freqs.sin(), ROTATED, KEPT, VALUE, lengths, rank, size
    )

    turned = unfused(position, freqs, lengths, rank, size).expand(*shape, ROTATED)
    wanted = (
        torch.cat((q[..., :KEPT], unfused(q[..., KEPT:], freqs, lengths, rank, size)), -1),
        torch.cat((kv[..., :KEPT], turned), -1),
        kv[..., KEPT:],
    )
    got = (query, key, value)
    grads = [torch.randn_like(each) for each in got]
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other)
    inputs = (q, kv, position)
    for one, other in zip(
        torch.autograd.grad(got, inputs, grads), torch.autograd.grad(wanted, inputs, grads), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize("multiple", [4, 16, 64])
@in_emulation
def test_the_map_of_routed_tokens_is_padded(multiple: int) -> None:
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.moe_utils import pad_routing_map

    torch.manual_seed(2)
    routed = torch.rand(40, 6) < torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
    assert torch.equal(
        token_dispatcher.fused_pad_routing_map(routed, multiple).bool(), pad_routing_map(routed.clone(), multiple)
    )
