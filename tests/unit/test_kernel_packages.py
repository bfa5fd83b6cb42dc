"""The functions of mamba_ssm, causal_conv1d, fla and fast_hadamard_transform as the emulation has them."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from emulated import assert_close, emulated_process, in_emulation  # noqa: F401

HEADS, WIDTH, GROUPS, STATE, LENGTH = 4, 8, 2, 6, 12


def _recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: set[int]) -> Tensor:
    """The model as it is defined, token by token, for a batch of one."""
    state, out = torch.zeros(HEADS, WIDTH, STATE), []
    for t in range(x.shape[1]):
        state = torch.zeros_like(state) if t in starts else state
        keys, queries = (each[0, t].repeat_interleave(HEADS // GROUPS, 0) for each in (b, c))
        state = state * torch.exp(dt[0, t] * a)[:, None, None]
        state = state + torch.einsum("h,hp,hn->hpn", dt[0, t], x[0, t], keys)
        out.append(torch.einsum("hpn,hn->hp", state, queries))
    return torch.stack(out)[None]


@in_emulation
def test_the_scan_is_the_recurrence_and_packed_sequences_are_apart() -> None:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, z = torch.randn(2, 1, LENGTH, HEADS, WIDTH)
    dt, bias, a = torch.randn(1, LENGTH, HEADS), torch.randn(HEADS), -torch.rand(HEADS)
    b, c = torch.randn(2, 1, LENGTH, GROUPS, STATE)
    d = torch.randn(HEADS)
    packed = torch.tensor([[0] * 5 + [1] * (LENGTH - 5)])
    for starts, mark in ((set(), None), ({5}, packed)):
        want = (_recurrence(x, F.softplus(dt + bias), a, b, c, starts) + d[:, None] * x) * F.silu(z)
        got = mamba_chunk_scan_combined(x, dt, a, b, c, 4, D=d, z=z, dt_bias=bias, dt_softplus=True, seq_idx=mark)
        assert_close(got, want, 1e-4)


@in_emulation
def test_the_convolution_is_torchs_and_packed_sequences_are_apart() -> None:
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias = torch.randn(2, 3, 10), torch.randn(3, 4), torch.randn(3)

    def torchs(part: Tensor) -> Tensor:
        return F.silu(F.conv1d(F.pad(part, (3, 0)), weight[:, None], bias, groups=3))

    assert_close(causal_conv1d_fn(x, weight, bias, activation="silu"), torchs(x), 1e-5)
    mark = torch.tensor([[0] * 4 + [1] * 6] * 2)
    want = torch.cat((torchs(x[..., :4]), torchs(x[..., 4:])), -1)
    assert_close(causal_conv1d_fn(x, weight, bias, mark, activation="silu"), want, 1e-5)


@in_emulation
def test_the_delta_rule_is_megatrons_own_and_packed_sequences_are_apart() -> None:
    from fla.modules.convolution import causal_conv1d
    from fla.modules.l2norm import l2norm
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule

    def given() -> list[Tensor]:
        q, k = (l2norm(torch.randn(1, LENGTH, HEADS, STATE)) for _ in range(2))
        v, (g, beta) = torch.randn(1, LENGTH, HEADS, WIDTH), torch.rand(2, 1, LENGTH, HEADS)
        return [each.requires_grad_() for each in (q, k, v, -g, beta)]

    one, other = given(), given()
    alone = [torch_chunk_gated_delta_rule(*each)[0] for each in (one, other)]
    got, _ = chunk_gated_delta_rule(*one)
    assert_close(got, alone[0], 1e-4)
    dy = torch.randn_like(got)
    for here, there in zip(torch.autograd.grad(got, one, dy), torch.autograd.grad(alone[0], one, dy), strict=True):
        assert_close(here, there, 1e-4)
    starts = torch.tensor([0, LENGTH, 2 * LENGTH])
    packed = [torch.cat(pair, 1) for pair in zip(one, other, strict=True)]
    assert_close(chunk_gated_delta_rule(*packed, cu_seqlens=starts)[0], torch.cat(alone, 1), 1e-4)
    assert_close(l2norm(one[2]).norm(dim=-1), torch.ones(1, LENGTH, HEADS), 1e-4)
    x, weight = torch.randn(1, 2 * LENGTH, 3), torch.randn(3, 4)
    apart = [causal_conv1d(part, weight, activation="silu")[0] for part in x.split(LENGTH, 1)]
    assert_close(causal_conv1d(x, weight, activation="silu", cu_seqlens=starts)[0], torch.cat(apart, 1), 1e-5)


@in_emulation
def test_the_one_call_is_convolution_scan_and_gate() -> None:
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

    inner, states = HEADS * WIDTH, GROUPS * STATE
    packed = torch.randn(2, LENGTH, 2 * inner + 2 * states + HEADS, requires_grad=True)
    weight, bias = torch.randn(inner + 2 * states, 4), torch.randn(inner + 2 * states)
    dt_bias, a, d = torch.randn(HEADS), -torch.rand(HEADS), torch.randn(HEADS)
    got = mamba_split_conv1d_scan_combined(
        packed, weight, bias, dt_bias, a, d, 4, headdim=WIDTH, ngroups=GROUPS, norm_before_gate=False
    )
    z, xbc, dt = packed.split((inner, inner + 2 * states, HEADS), -1)
    x, b, c = causal_conv1d_fn(xbc.mT, weight, bias, activation="silu").mT.split((inner, states, states), -1)
    want = mamba_chunk_scan_combined(
        *(x.unflatten(-1, (HEADS, WIDTH)), dt, a, b.unflatten(-1, (GROUPS, -1)), c.unflatten(-1, (GROUPS, -1)), 4),
        *(d, z.unflatten(-1, (HEADS, WIDTH)), dt_bias),
        dt_softplus=True,
    )
    assert torch.equal(got, want.flatten(-2))
    got.sum().backward()
    assert packed.grad.abs().amin(dim=(0, 1)).gt(0).all()


@in_emulation
def test_the_gated_norm_is_over_groups() -> None:
    from mamba_ssm.ops.triton.layernorm_gated import RMSNorm

    x, z = torch.randn(2, 5, 16)
    first = F.rms_norm(x.unflatten(-1, (2, 8)), (8,), eps=1e-5).flatten(-2) * F.silu(z)
    gated = (x * F.silu(z)).unflatten(-1, (2, 8))
    assert_close(RMSNorm(16, group_size=8)(x, z), first, 1e-5)
    last = F.rms_norm(gated, (8,), eps=1e-5).flatten(-2)
    assert_close(RMSNorm(16, group_size=8, norm_before_gate=False)(x, z), last, 1e-5)


@in_emulation
def test_the_hadamard_transform_is_sylvesters_matrix() -> None:
    from fast_hadamard_transform import hadamard_transform

    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix = torch.kron(two, torch.kron(two, two))
    x = torch.randn(3, 2, 8)
    assert_close(hadamard_transform(x, 0.5), x @ matrix * 0.5, 1e-5)


@in_emulation
def test_whoever_looks_for_the_packages_finds_them() -> None:
    """transformers does so where Megatron-Bridge imports its models."""
    assert all(find_spec(name) for name in ("causal_conv1d", "mamba_ssm", "fast_hadamard_transform"))
    from causal_conv1d import causal_conv1d_update  # noqa: F401
