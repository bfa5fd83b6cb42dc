"""Each function of the emulated ``transformer_engine_torch`` gives what torch, or Megatron without fusion, gives.

The formats of 8 and 4 bits are in test_te_formats.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deadpool_megatron.emulation.transformer_engine import extension as tex
from deadpool_megatron.emulation.transformer_engine import permutation
from deadpool_megatron.emulation.transformer_engine.kernels import KERNELS
from emulated import assert_close, emulated_process, in_emulation  # noqa: F401

FLOAT = 4  # DType.kFloat32


def test_no_kernel_is_without_a_test() -> None:
    here = Path(__file__)
    text = "".join(
        here.with_name(name).read_text() for name in (here.name, "test_te_formats.py", "test_te_userbuffers.py")
    )
    named = set(re.findall(r"tex\.(\w+)", text)) | {
        f"{prefix}{name}" for name in (*PLAIN, *GATED) for prefix in ("", "d", "dbias_d")
    }
    assert KERNELS.keys() - named == set()


def test_what_is_not_emulated_says_so() -> None:
    with pytest.raises(
        NotImplementedError, match=r"^the emulation of CUDA has no transformer_engine_torch.ep_dispatch$"
    ):
        tex.ep_dispatch(1)
    with pytest.raises(AttributeError):
        tex.__wrapped__  # noqa: B018


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def gradients(output: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad)


# ---- GEMMs


def gemm(a: Any, transa: bool, b: Any, transb: bool, out: Any = None, **more: Any) -> Any:
    """`generic_gemm` with what most calls leave alone."""
    defaults = {"quantizer": None, "dtype": FLOAT, "bias": None, "gelu": False, "gelu_in": None, "grad": False}
    given = defaults | more
    return tex.generic_gemm(
        *(a, transa, b, transb, out, given["quantizer"], given["dtype"], given["bias"], FLOAT, given["gelu"]),
        *(given["gelu_in"], given["grad"], torch.empty(0), 0, given.get("accumulate", False), False),
        alpha=given.get("alpha", 1.0),
        beta=given.get("beta"),
    )


@in_emulation
def test_a_linear_layer_from_gemms() -> None:
    x, w, bias, dy = leaf(3, 5, 8), leaf(6, 8), leaf(6), torch.randn(3, 5, 6)
    y = F.linear(x, w, bias)
    dx, dw, db = gradients(y, dy, x, w, bias)
    assert_close(gemm(w, True, x, False, bias=bias)[0], y)
    assert_close(gemm(w, False, dy, False)[0], dx)
    got, bias_grad, _, _ = gemm(x, False, dy, True, bias=bias, grad=True)
    assert_close(got, dw)
    assert_close(bias_grad, db)


@in_emulation
def test_a_gemm_accumulates_and_scales() -> None:
    a, b, out = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5, 6)
    want = out + b @ a.t()
    assert_close(gemm(a, True, b, False, out, accumulate=True, dtype=None)[0], want)
    assert_close(out, want)
    gemm(a, True, b, False, out, accumulate=True, alpha=2.0, beta=0.5)
    assert_close(out, 0.5 * want + 2 * b @ a.t())


@in_emulation
def test_a_gemm_with_gelu() -> None:
    x, w = leaf(5, 8), torch.randn(6, 8)
    before = F.linear(x, w)
    y = F.gelu(before, approximate="tanh")
    got, _, kept, _ = gemm(w, True, x, False, gelu=True)
    assert_close(got, y)
    assert_close(kept, before)
    dz, w2 = torch.randn(5, 4), torch.randn(4, 6)
    (want,) = gradients(F.linear(y, w2), dz, before)
    assert_close(gemm(w2, False, dz, False, gelu=True, gelu_in=kept, grad=True)[0], want)


@in_emulation
def test_a_gemm_of_nothing_and_one_into_a_tensor() -> None:
    assert gemm(torch.randn(6, 8), True, torch.randn(0, 8), False)[0].shape == (0, 6)
    a, b, out = torch.randn(6, 8), torch.randn(5, 8), torch.empty(5, 6, dtype=torch.bfloat16)
    assert gemm(a, True, b, False, out, dtype=None)[0] is out
    assert torch.equal(out, (b @ a.t()).bfloat16())


def grouped(a: Any, transa: bool, b: Any, transb: bool, out: list[Tensor], **more: Any) -> Any:
    given = {"bias": None, "single": False, "grad": False, "accumulate": False} | more
    return tex.te_general_grouped_gemm(
        *(a, transa, b, transb, out, FLOAT, [], given["bias"], FLOAT, given["single"], None, given["grad"]),
        *(None, 0, given["accumulate"], False, 0),
    )


@in_emulation
def test_grouped_gemms_of_experts_one_without_tokens() -> None:
    rows = [3, 0, 2]
    x = [torch.randn(n, 8) for n in rows]
    w, bias = [torch.randn(6, 8) for _ in rows], [torch.randn(6) for _ in rows]
    want = [F.linear(*each) for each in zip(x, w, bias, strict=True)]
    together = [torch.empty(sum(rows), 6)]
    grouped(w, True, x, False, together, bias=bias, single=True)
    assert_close(together[0], torch.cat(want))
    dy = [torch.randn(n, 6) for n in rows]
    dw, db = [torch.randn(6, 8) for _ in rows], [torch.full((6,), 7.0) for _ in rows]
    expected = [old + d.t() @ each for old, d, each in zip(dw, dy, x, strict=True)]
    grouped(x, False, dy, True, dw, bias=db, grad=True, accumulate=True)
    for got, each in zip(dw, expected, strict=True):
        assert_close(got, each)
    for got, d in zip(db, dy, strict=True):
        assert_close(got, d.sum(0))
    fresh = [torch.full((6, 8), 7.0) for _ in rows]
    grouped(x, False, dy, True, fresh)
    assert_close(fresh[1], torch.zeros(6, 8))


@in_emulation
def test_grouped_gemms_whose_rows_are_split_on_the_device_follow_the_splits_of_each_replay() -> None:
    """What calls `tex.te_general_grouped_gemm_for_discrete_in`, `tex.te_general_grouped_gemm_for_discrete_out` and
    `tex.get_grouped_gemm_setup_workspace_size` is Transformer Engine's own Python."""
    from transformer_engine.pytorch.cpp_extensions.gemm import general_grouped_gemm_for_grouped_tensor as grouped
    from transformer_engine.pytorch.tensor.storage.grouped_tensor_storage import GroupedTensorStorage

    from deadpool_megatron.emulation.graphs import Capture, CUDAGraph

    x, w = torch.randn(7, 8), [torch.randn(6, 8) for _ in range(3)]
    sizes, out, dx = torch.tensor([3, 0, 2]), torch.zeros(7, 6), torch.zeros(7, 8)
    dw = [torch.ones(6, 8) for _ in w]

    def storage(data: Tensor) -> Any:
        return GroupedTensorStorage(
            shape=tuple(data.shape), dtype=data.dtype, num_tensors=3, data=data.view(-1), first_dims=sizes
        )

    graph = CUDAGraph()
    with Capture(graph):  # tex.te_general_grouped_gemm_for_discrete_in and tex.te_general_grouped_gemm_for_discrete_out
        grouped(w, storage(x), storage(out))
        grouped(w, storage(out), storage(dx), layout="NN")
        grouped(storage(x), storage(out), dw, layout="NT", accumulate=True)
    graph.replay()  # the capture has computed it
    for rows in ([3, 0, 2], [1, 4, 2]):
        sizes.copy_(torch.tensor(rows))
        for each in (out, dx, *dw):
            each.fill_(1)
        graph.replay()
        begin = 0
        for n, each, grad in zip(rows, w, dw, strict=True):
            part = slice(begin, begin := begin + n)
            assert_close(out[part], x[part] @ each.t())
            assert_close(dx[part], out[part] @ each)
            assert_close(grad, 1 + out[part].t() @ x[part])
        assert bool((out[begin:] == 1).all()), "rows behind the last group are nobody's"
    same, (ends, starts) = tex.splits_to_offsets_multi(
        sizes, None, strides=[1, 8], include_leading_zero=[False, True], dtypes=[torch.int32, torch.int64],
        bulk_allocate=True,
    )  # fmt: skip
    assert torch.equal(same, sizes) and ends.tolist() == [1, 5, 7] and starts.tolist() == [0, 8, 40, 56]
    assert (ends.dtype, starts.dtype) == (torch.int32, torch.int64)


# ---- norms, activations, softmaxes, dropout


@pytest.mark.parametrize("zero_centered", [False, True])
@in_emulation
def test_norms(zero_centered: bool) -> None:
    x, weight, bias, dy = leaf(3, 5, 8), leaf(8), leaf(8), torch.randn(3, 5, 8)
    gamma = weight + 1 if zero_centered else weight
    y = F.layer_norm(x, (8,), gamma, bias, 1e-5)
    got, mean, rstd = tex.layernorm_fwd(x, weight, bias, 1e-5, None, None, FLOAT, 0, zero_centered)
    assert_close(got, y)
    wants = gradients(y, dy, x, weight, bias)
    for got, want in zip(tex.layernorm_bwd(dy, x, mean, rstd, weight, 0, zero_centered), wants, strict=True):
        assert_close(got, want)
    y = F.rms_norm(x, (8,), gamma, 1e-5)
    got, nothing, rstd = tex.rmsnorm_fwd(x, weight, 1e-5, None, None, FLOAT, 0, zero_centered)
    assert nothing is None
    assert_close(got, y)
    wants = gradients(y, dy, x, weight)
    for got, want in zip(tex.rmsnorm_bwd(dy, x, rstd, weight, 0, zero_centered), wants, strict=True):
        assert_close(got, want)
    residual = torch.randn_like(dy)
    got, _ = tex.rmsnorm_bwd_add(dy, x, residual, rstd, weight, 0, zero_centered)
    assert_close(got, wants[0] + residual)


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    "qgelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
    "srelu": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": lambda x: 1 / (1 + torch.exp(-x)),
    "geglu": PLAIN["gelu"],
    "qgeglu": PLAIN["qgelu"],
    "reglu": PLAIN["relu"],
    "sreglu": PLAIN["srelu"],
    "swiglu": PLAIN["silu"],
}


@pytest.mark.parametrize("name", [*PLAIN, *GATED])
@in_emulation
def test_activations(name: str) -> None:
    x = leaf(3, 5, 8)
    y = PLAIN[name](x) if name in PLAIN else GATED[name](x[..., :4]) * x[..., 4:]
    assert_close(getattr(tex, name)(x, None), y)
    dy = torch.randn_like(y)
    (want,) = gradients(y, dy, x)
    assert_close(getattr(tex, f"d{name}")(dy, x, None), want)
    bias, dx = getattr(tex, f"dbias_d{name}")(dy, x, None)
    assert_close(dx, want)
    assert_close(bias, want.sum((0, 1)))


@pytest.mark.parametrize("interleaved", [0, 2])
@in_emulation
def test_a_gate_with_a_scale_for_each_row(interleaved: int) -> None:
    x, scales = leaf(3, 5, 8), leaf(3, 5)
    gate, gated = (x[..., [0, 1, 4, 5]], x[..., [2, 3, 6, 7]]) if interleaved else (x[..., :4], x[..., 4:])
    y = PLAIN["silu"](gate) * gated * scales[..., None]
    assert_close(tex.scaled_swiglu(x, scales, None, interleaved), y)
    dy = torch.randn_like(y)
    for got, want in zip(
        tex.scaled_dswiglu(dy, x, scales, None, interleaved, True), gradients(y, dy, x, scales), strict=True
    ):
        assert_close(got, want)
    assert tex.scaled_dswiglu(dy, x, scales, None, interleaved, False)[1] is None


@in_emulation
def test_softmaxes() -> None:
    x, dy = leaf(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    mask = torch.rand(2, 1, 4, 4) < 0.3
    mask[..., 0] = False
    cases = [
        (tex.scaled_softmax_forward(x, 0.5), tex.scaled_softmax_backward, None),
        (tex.scaled_masked_softmax_forward(x, mask, 0.5), tex.scaled_masked_softmax_backward, mask),
        (
            tex.scaled_upper_triang_masked_softmax_forward(x, 0.5),
            tex.scaled_upper_triang_masked_softmax_backward,
            later,
        ),
        (
            tex.scaled_aligned_causal_masked_softmax_forward(x, 0.5),
            tex.scaled_aligned_causal_masked_softmax_backward,
            later,
        ),
    ]
    for got, backward, hidden in cases:
        scores = x * 0.5
        want = torch.softmax(scores if hidden is None else scores.masked_fill(hidden, float("-inf")), -1)
        assert_close(got, want)
        assert_close(backward(dy, got, 0.5), gradients(want, dy, x)[0])
    long = tex.scaled_aligned_causal_masked_softmax_forward(torch.zeros(1, 1, 2, 4), 1.0)
    assert_close(long[0, 0], torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0], [0.25] * 4]))


@in_emulation
def test_dropout_keeps_the_mean_and_its_backward_the_mask() -> None:
    x = torch.ones(10000)
    y, mask = tex.dropout_fwd(x, 0.25)
    assert torch.allclose(y.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(tex.dropout_bwd(x, mask, 0.25), y)
    out = torch.empty(10000)
    assert tex.dropout_fwd(x, 0.25, out)[0] is out


# ---- rotary embeddings: against complex numbers


def turned(x: Tensor, freqs: Tensor, interleaved: bool) -> Tensor:
    """(s, b, h, d) by the angles (s, width)."""
    width = freqs.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    if interleaved:
        pairs, angles = part.unflatten(-1, (-1, 2)), freqs[:, 0::2]
    else:
        pairs, angles = torch.stack(part.chunk(2, -1), -1), freqs[:, : width // 2]
    spun = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    answer = torch.view_as_real(spun)
    answer = answer.flatten(-2) if interleaved else torch.cat(answer.unbind(-1), -1)
    return torch.cat((answer, rest), -1)


def rope_angles(interleaved: bool, length: int = 8, width: int = 6) -> Tensor:
    base = torch.outer(torch.arange(length).float(), 0.3 ** torch.arange(width // 2).float())
    return base.repeat_interleave(2, -1) if interleaved else torch.cat((base, base), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@in_emulation
def test_rotary_embeddings(interleaved: bool) -> None:
    freqs = rope_angles(interleaved)
    x, dy = leaf(8, 2, 3, 8), torch.randn(8, 2, 3, 8)
    want = turned(x, freqs, interleaved)
    (dx,) = gradients(want, dy, x)
    sbhd, bshd, thd = 1, 0, 2
    emb = freqs[:, None, None]
    assert_close(tex.fused_rope_forward(x, emb, None, sbhd, interleaved, None, 1, 0), want)
    assert_close(tex.fused_rope_backward(dy, emb, None, sbhd, interleaved, None, 1, 0), dx)
    flipped = tex.fused_rope_forward(x.transpose(0, 1), emb, None, bshd, interleaved, None, 1, 0)
    assert_close(flipped, want.transpose(0, 1))
    # Two packed sequences of 3 and 5, each from angle 0 on.
    packed = x[:, 0].detach()
    parts = [turned(each[:, None], freqs[: len(each)], interleaved)[:, 0] for each in packed.split([3, 5])]
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    assert_close(tex.fused_rope_forward(packed, emb, None, thd, interleaved, bounds, 1, 0), torch.cat(parts))
    # A rank of context parallelism has the first and the last of the chunks, or two in the middle.
    for rank, rows in ((0, [0, 1, 6, 7]), (1, [2, 3, 4, 5])):
        got = tex.fused_rope_forward(x[rows], emb, None, sbhd, interleaved, None, 2, rank)
        assert_close(got, want[rows])
    starts = torch.tensor([0, 3])
    got = tex.fused_rope_forward(x[:4], emb, starts, sbhd, interleaved, None, 1, 0)
    assert_close(got[:, 1], turned(x[:4, 1:], freqs[3:7], interleaved)[:, 0])


# ---- attention: against torch's own


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: str, fmt: str, mask: str = "NVTE_NO_MASK", **more: Any
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], list[Tensor]]]:
    """(output, log-sum-exp, random state, backward)."""
    given = {"window": (-1, -1), "dropout": 0.0, "cu_q": None, "cu_k": None, "scale": q.shape[-1] ** -0.5} | more
    offset = given.get("offset")
    softmax = 0 if offset is None else 2  # learnable
    seq, batch = {"BSHD": (1, 0), "SBHD": (0, 1), "THD": (0, 0), "BHSD": (2, 0)}[fmt]
    cu_q, cu_k = (
        bounds if bounds is not None else torch.arange(x.shape[batch] + 1, dtype=torch.int32) * x.shape[seq]
        for bounds, x in ((given["cu_q"], q), (given["cu_k"], k))
    )
    form, mode = tex.NVTE_QKV_Format[f"NVTE_{fmt}"], tex.NVTE_Mask_Type[mask]
    lay = tex.NVTE_QKV_Layout[f"NVTE_{layout}"]
    out, lse, state, *rest = tex.fused_attn_fwd(
        *(q.shape[seq], k.shape[seq], True, given["scale"], given["dropout"], True, lay, form, form, 0, mode, softmax),
        *(given["window"], False, cu_q, cu_k, q, k, v, q.dtype, None, None, None, None, None, None, None, offset),
        *(None, 0, False, False),
    )

    def backward(grad: Tensor) -> list[Tensor]:
        grads: list[Tensor] = tex.fused_attn_bwd(
            *(q.shape[seq], k.shape[seq], given["scale"], given["dropout"], True, lay, form, form, lay, form, form),
            *(0, mode, softmax, given["window"], False, True, cu_q, cu_k, q, k, v, out, grad, q.dtype),
            *([lse, state, *rest], None, None, None, None, None, False),
        )
        assert grads[3] is None and (grads[4] is None) == (offset is None)
        return grads[:3] if offset is None else [*grads[:3], grads[4]]

    return out, lse, state, backward


def reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=causal, enable_gqa=True)


TO_BHSD = {"BSHD": (0, 2, 1, 3), "SBHD": (1, 2, 0, 3), "BHSD": (0, 1, 2, 3)}
FROM_BHSD = {"BSHD": (0, 2, 1, 3), "SBHD": (2, 0, 1, 3), "BHSD": (0, 1, 2, 3)}


@pytest.mark.parametrize("mask", ["NVTE_NO_MASK", "NVTE_CAUSAL_MASK"])
@pytest.mark.parametrize("fmt", ["BSHD", "SBHD", "BHSD"])
@in_emulation
def test_attention_with_shared_key_heads(fmt: str, mask: str) -> None:
    q, k, v = (leaf(2, heads, 6, 8) for heads in (4, 2, 2))
    want = reference(q, k, v, causal=mask == "NVTE_CAUSAL_MASK")
    grad = torch.randn_like(want)
    there = [x.detach().permute(FROM_BHSD[fmt]).contiguous() for x in (q, k, v, grad)]
    out, lse, _, backward = attend(*there[:3], "_".join([fmt] * 3), fmt, mask)
    assert_close(out.permute(TO_BHSD[fmt]), want)
    assert lse.shape == (2, 4, 6, 1)
    for got, expected in zip(backward(there[3]), gradients(want, grad, q, k, v), strict=True):
        assert_close(got.permute(TO_BHSD[fmt]), expected)


@in_emulation
def test_attention_with_an_offset_in_its_softmax() -> None:
    """As of GPT-OSS: one more key of each head, whose score is learned and whose value is nothing."""
    q, k, v, offset = leaf(2, 3, 6, 8), leaf(2, 3, 6, 8), leaf(2, 3, 6, 8), leaf(1, 3, 1, 1)
    scores = q @ k.transpose(-1, -2) * 8**-0.5
    p = torch.softmax(torch.cat((scores, offset.expand(2, 3, 6, 1)), -1), -1)[..., :-1]
    want, grad = p @ v, torch.randn(2, 3, 6, 8)
    there = [x.detach() for x in (q, k, v)]
    out, _, _, backward = attend(*there, "BHSD_BHSD_BHSD", "BHSD", offset=offset.detach())
    assert_close(out, want)
    for got, expected in zip(backward(grad), gradients(want, grad, q, k, v, offset), strict=True):
        assert_close(got, expected)


@in_emulation
def test_attention_in_a_window_and_with_padding() -> None:
    q, k, v = (leaf(2, 3, 6, 8) for _ in range(3))
    rows, columns = torch.arange(6)[:, None], torch.arange(6)[None]
    near = (columns <= rows) & (columns >= rows - 2)
    out, *_ = attend(q, k, v, "BHSD_BHSD_BHSD", "BHSD", "NVTE_CAUSAL_MASK", window=(2, 0))
    assert_close(out, reference(q, k, v, near))
    out, *_ = attend(q, k, v, "BHSD_BHSD_BHSD", "BHSD", window=(1, 1))
    assert_close(out, reference(q, k, v, (columns - rows).abs() <= 1))
    short = torch.tensor([0, 4, 10], dtype=torch.int32)  # lengths 4 and 6
    out, *_ = attend(q, k, v, "BHSD_BHSD_BHSD", "BHSD", "NVTE_PADDING_MASK", cu_q=short, cu_k=short)
    allowed = columns < torch.tensor([4, 6])[:, None, None, None]
    assert_close(out, reference(q, k, v, allowed))
    # Fewer queries than keys: the last query sees the last key, or the first the first.
    few = q[:, :, :2].detach()
    out, *_ = attend(few, k, v, "BHSD_BHSD_BHSD", "BHSD", "NVTE_CAUSAL_BOTTOM_RIGHT_MASK")
    assert_close(out, reference(few, k, v, columns <= rows[:2] + 4))


@in_emulation
def test_attention_over_packed_sequences() -> None:
    q, k, v = (leaf(9, 3, 8) for _ in range(3))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    parts = [
        reference(*(x[a:b].permute(1, 0, 2)[None] for x in (q, k, v)), causal=True)[0].permute(1, 0, 2)
        for a, b in ((0, 4), (4, 9))
    ]
    want = torch.cat(parts)
    grad = torch.randn_like(want)
    out, lse, _, backward = attend(q, k, v, "THD_THD_THD", "THD", "NVTE_PADDING_CAUSAL_MASK", cu_q=bounds, cu_k=bounds)
    assert_close(out, want)
    assert lse.shape == (9, 3, 1)
    for got, expected in zip(backward(grad), gradients(want, grad, q, k, v), strict=True):
        assert_close(got, expected)


@in_emulation
def test_dropout_in_attention_is_the_same_in_its_backward() -> None:
    q, k, v = leaf(2, 3, 8, 8), leaf(2, 3, 8, 8), leaf(2, 3, 8, 8)
    torch.manual_seed(7)
    dropped, _, state, _ = attend(q, k, torch.eye(8).expand(2, 3, 8, 8), "BHSD_BHSD_BHSD", "BHSD", dropout=0.4)
    torch.manual_seed(7)
    out, _, again, backward = attend(q, k, v, "BHSD_BHSD_BHSD", "BHSD", dropout=0.4)
    assert torch.equal(state, again)
    p = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1)
    assert 0.2 < (dropped == 0).float().mean().item() < 0.6
    want = p * ((dropped != 0).float() / 0.6) @ v
    assert_close(out, want)
    grad = torch.randn_like(want)
    for got, expected in zip(backward(grad), gradients(want, grad, q, k, v), strict=True):
        assert_close(got, expected)
    _, _, other, _ = attend(q, k, v, "BHSD_BHSD_BHSD", "BHSD", dropout=0.4)
    assert not torch.equal(other, state)


@in_emulation
def test_gradients_come_in_one_buffer_where_the_layout_has_one() -> None:
    qkv = torch.randn(6, 2, 3, 3, 8)  # (s, b, 3, h, d)
    *_, backward = attend(*qkv.unbind(2), "SB3HD", "SBHD", "NVTE_CAUSAL_MASK")
    dq, dk, dv = backward(torch.randn(6, 2, 3, 8))
    assert dq.untyped_storage().data_ptr() == dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr()
    q, kv = torch.randn(6, 2, 3, 8), torch.randn(6, 2, 3, 2, 8)
    *_, backward = attend(q, *kv.unbind(3), "SBHD_SBH2D", "SBHD", "NVTE_CAUSAL_MASK")
    dq, dk, dv = backward(torch.randn(6, 2, 3, 8))
    assert dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr() != dq.untyped_storage().data_ptr()
    for dtype, backend in ((tex.DType.kBFloat16, "F16_arbitrary_seqlen"), (tex.DType.kFloat8E4M3, "FP8")):
        answer, _ = tex.get_fused_attn_backend(SimpleNamespace(qkv_dtype=dtype))
        assert answer == tex.NVTE_Fused_Attn_Backend[f"NVTE_{backend}"]


@in_emulation
def test_attention_that_is_not_emulated_is_refused() -> None:
    q = torch.randn(2, 3, 6, 8)
    lay, form = tex.NVTE_QKV_Layout.NVTE_BHSD_BHSD_BHSD, tex.NVTE_QKV_Format.NVTE_BHSD
    with pytest.raises(NotImplementedError, match="no bias"):
        tex.fused_attn_fwd(*[None] * 6, lay, form, form, 1, None, 0, *[None] * 4, q, q, q, *[None] * 13)


@in_emulation
def test_rows_of_packed_sequences_under_context_parallelism() -> None:
    bounds = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert tex.thd_get_partitioned_indices(bounds, 12, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert tex.thd_get_partitioned_indices(bounds, 12, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


# ---- optimizers


def adam_case(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    start = torch.randn(7, 5)
    return {"p": start.to(dtype), "m": torch.zeros(7, 5), "v": torch.zeros(7, 5)}


def stepped(make: Any, start: Tensor, grads: list[Tensor]) -> Tensor:
    p = start.float().clone().requires_grad_()
    optimizer = make([p])
    for grad in grads:
        p.grad = grad.float().clone()
        optimizer.step()
    return p.detach()


def adam(params: list[Tensor], decoupled: bool = True) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(params, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def settings(step: int, mode: int = 1) -> tuple[Any, ...]:
    return 0.01, 0.9, 0.95, 1e-8, step, mode, 1, 0.1


@pytest.mark.parametrize("decoupled", [True, False])
@in_emulation
def test_adam(decoupled: bool) -> None:
    case, grads = adam_case(), [torch.randn(7, 5) for _ in range(4)]
    want = stepped(lambda ps: adam(ps, decoupled), case["p"], grads)
    for step, grad in enumerate(grads, 1):
        lists = [[grad], [case["p"]], [case["m"]], [case["v"]]]
        tex.multi_tensor_adam(2048, torch.zeros(1), lists, *settings(step, int(decoupled)))
    assert_close(case["p"], want)


@in_emulation
def test_adam_with_main_parameters() -> None:
    case, grads = adam_case(torch.bfloat16), [torch.randn(7, 5).bfloat16() for _ in range(4)]
    main = case["p"].float()
    want = stepped(adam, main, grads)
    for step, grad in enumerate(grads, 1):
        lists = [[grad], [case["p"]], [case["m"]], [case["v"]], [main]]
        tex.multi_tensor_adam(2048, torch.zeros(1), lists, *settings(step))
    assert_close(main, want)
    assert torch.equal(case["p"], main.bfloat16())


@in_emulation
def test_adam_whose_main_parameters_are_kept_as_remainders() -> None:
    case, grads = adam_case(torch.bfloat16), [torch.randn(7, 5) for _ in range(4)]
    plain = {name: each.clone() for name, each in case.items()}
    main, remainder = case["p"].float(), torch.zeros(7, 5, dtype=torch.int16)
    for step, grad in enumerate(grads, 1):
        lists = [[grad], [case["p"]], [case["m"]], [case["v"]], [remainder]]
        tex.multi_tensor_adam_param_remainder(2048, torch.zeros(1), lists, *settings(step))
        lists = [[grad], [plain["p"]], [plain["m"]], [plain["v"]], [main]]
        tex.multi_tensor_adam(2048, torch.zeros(1), lists, *settings(step))
        high = case["p"].view(torch.int16).int() - (remainder < 0).int()
        kept = ((high << 16) | (remainder.int() & 0xFFFF)).view(torch.float32)
        assert torch.equal(kept, main)  # no bit is lost


@in_emulation
def test_adam_of_fp8_parameters() -> None:
    case, grad = adam_case(), torch.randn(7, 5)
    main, scale, amax, inverse = case["p"].clone(), torch.tensor([16.0]), torch.zeros(1), torch.zeros(1)
    want = stepped(adam, main, [grad])
    data = torch.zeros(7, 5, dtype=torch.uint8)
    lists = [[grad], [data], [case["m"]], [case["v"]], [main], [scale], [amax], [inverse]]
    tex.multi_tensor_adam_fp8(2048, torch.zeros(1), lists, *settings(1), 7)
    assert_close(main, want)
    assert torch.equal(data.view(torch.float8_e4m3fn).float(), (main * 16).to(torch.float8_e4m3fn).float())
    assert amax.item() == main.abs().max().item()
    assert inverse.item() == 1 / 16


@in_emulation
def test_adam_that_graphs_can_capture() -> None:
    case, grad = adam_case(), torch.randn(7, 5)
    want = stepped(adam, case["p"], [grad])
    numbers = (torch.tensor(0.01), 0.9, 0.95, 1e-8, torch.tensor(1), 1, 1, 0.1, torch.tensor([0.5]))
    lists = [[grad * 2], [case["p"]], [case["m"]], [case["v"]]]
    before = case["p"].clone()
    tex.multi_tensor_adam_capturable(2048, torch.ones(1), lists, *numbers)
    assert torch.equal(case["p"], before)  # the flag is set: nothing happens
    main = [before.clone()]
    again = [[grad * 2], [before.bfloat16()], [torch.zeros(7, 5)], [torch.zeros(7, 5)], main]
    tex.multi_tensor_adam_capturable_master(2048, torch.zeros(1), again, *numbers)
    assert_close(main[0], want)
    tex.multi_tensor_adam_capturable(2048, torch.zeros(1), lists, *numbers)
    assert_close(case["p"], want)
    assert_close(lists[0][0], grad)


@in_emulation
def test_norms_and_scales_of_lists() -> None:
    xs = [torch.randn(3, 4), torch.randn(5).bfloat16()]
    flag = torch.zeros(1, dtype=torch.int32)
    whole = torch.cat([x.float().reshape(-1) for x in xs])
    total, each = tex.multi_tensor_l2norm(2048, flag, [xs], True)
    assert_close(total, whole.norm().reshape(1))
    assert_close(each, torch.stack([x.float().norm() for x in xs]))
    total, nothing = tex.multi_tensor_unscale_l2norm(2048, flag, [xs], torch.tensor([0.5]), False)
    assert_close(total, 0.5 * whole.norm().reshape(1))
    assert nothing.numel() == 0
    outs = [torch.empty(3, 4), torch.empty(5)]
    tex.multi_tensor_scale(2048, flag, [xs, outs], 2.0)
    tex.multi_tensor_scale_tensor(2048, flag, [outs, outs], torch.tensor(0.5))
    for x, out in zip(xs, outs, strict=True):
        assert_close(out, x)
    assert not flag.any()
    tex.multi_tensor_scale(2048, flag, [[torch.tensor([float("inf")])], [torch.empty(1)]], 2.0)
    assert flag.all()
    flag.zero_()
    tex.multi_tensor_l2norm(2048, flag, [[torch.tensor([float("nan")])]])
    assert flag.all()


# ---- experts


@in_emulation
def test_rows_of_experts_are_padded() -> None:
    x = torch.randn(5, 4)
    padded, back = torch.full((8, 4), 7.0), torch.empty(5, 4)
    tex.fused_multi_row_padding(x, padded, [2, 0, 3], [4, 0, 4])
    want = torch.cat((x[:2], torch.zeros(2, 4), x[2:], torch.zeros(1, 4)))
    assert torch.equal(padded, want)
    tex.fused_multi_row_unpadding(padded, back, [4, 0, 4], [2, 0, 3])
    assert torch.equal(back, x)
    assert tex.splits_to_offsets(torch.tensor([2, 0, 3]), 4).tolist() == [0, 8, 8, 20]


ROUTERS = [
    {"score_function": "softmax"},
    {"score_function": "softmax", "use_pre_softmax": True, "scaling_factor": 2.5},
    {"score_function": "softmax", "use_pre_softmax": True, "num_groups": 4, "group_topk": 2},
    {"score_function": "sigmoid", "biased": True, "scaling_factor": 2.5},
    {"score_function": "sigmoid", "biased": True, "num_groups": 4, "group_topk": 2},
    {"score_function": "sqrtsoftplus"},
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: "-".join(map(str, r.values())))
@in_emulation
def test_the_fused_router_is_megatrons(router: dict[str, Any]) -> None:
    # tex.fused_topk_with_score_function_fwd and tex.fused_topk_with_score_function_bwd through both Pythons
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    router = dict(router)
    bias = torch.randn(8) if router.pop("biased", False) else None
    logits = torch.randn(16, 8)
    results = []
    for fused in (False, True):
        x = logits.clone().requires_grad_()
        probs, chosen = topk_routing_with_score_function(x, 4, expert_bias=bias, fused=fused, **router)
        weights = torch.linspace(-1, 2, probs.numel()).view_as(probs)
        results.append((probs, chosen, *gradients(probs, weights, x)))
    (want, chosen, dx), (got, mine, my_dx) = results
    assert torch.equal(mine, chosen)
    assert_close(got, want)
    assert_close(my_dx, dx)


@in_emulation
def test_the_fused_router_takes_indices_and_refuses_bit_maps() -> None:
    logits, indices = torch.randn(16, 8), torch.empty(16, 2, dtype=torch.int64)
    arguments = (logits, 2, False, None, None, None, "softmax", None)
    probs, routed, kept = tex.fused_topk_with_score_function_fwd(*arguments, 0, indices)
    assert routed is indices
    assert torch.equal(indices.sort().values, logits.topk(2).indices.sort().values)
    by_map, by_index = torch.empty(16, 8), torch.empty(16, 8)
    grad = torch.randn(16, 8)
    tex.fused_topk_with_score_function_bwd(indices, kept, grad, by_index, 2, False, None, "softmax", True)
    tex.fused_topk_with_score_function_bwd(probs > 0, kept, grad, by_map, 2, False, None, "softmax")
    assert torch.equal(by_map, by_index)
    with pytest.raises(NotImplementedError, match="no bit maps"):
        tex.fused_topk_with_score_function_fwd(*arguments, 1)
    with pytest.raises(NotImplementedError, match="no score function 'tanh'"):
        tex.fused_topk_with_score_function_fwd(logits, 2, False, None, None, None, "tanh", None)


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
@in_emulation
def test_fused_auxiliary_losses_are_megatrons(function: str) -> None:
    # tex.fused_score_for_moe_aux_loss_fwd, tex.fused_score_for_moe_aux_loss_bwd,
    # tex.fused_moe_aux_loss_fwd_graph_safe and tex.fused_moe_aux_loss_bwd through both Pythons
    from megatron.core.transformer.moe import moe_utils

    logits, tokens = torch.randn(16, 8), torch.randint(1, 9, (8,))
    results = []
    for fused in (False, True):
        x = logits.clone().requires_grad_()
        routed, scores = moe_utils.compute_routing_scores_for_aux_loss(x, 2, function, fused=fused)
        loss = moe_utils.switch_load_balancing_loss_func(scores, tokens, 16, 2, 8, 0.01, fused=fused)
        results.append((routed, scores, loss, *gradients(loss, torch.tensor(3.0), x)))
    want, got = results
    assert torch.equal(got[0].bool(), want[0])
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        assert_close(mine, theirs)
    loss, _ = tex.fused_moe_aux_loss_fwd(want[1], tokens, 16, 8, 16, 8, 2, 0.01)
    assert_close(loss, want[2])


@pytest.mark.parametrize("padded", [False, True])
@in_emulation
def test_fused_permutation_is_megatrons(padded: bool) -> None:
    from megatron.core.transformer.moe import moe_utils

    routed = torch.zeros(12, 4, dtype=torch.bool).scatter_(1, torch.rand(12, 4).topk(2, 1).indices, True)
    tokens, weights = torch.randn(12, 6), torch.rand(12, 4)
    counts = routed.sum(0)
    results = []
    for fused in (False, True):
        x, p = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
        align = 8 if padded and fused else 0
        rows, probs, order, offsets, sizes = moe_utils.permute(
            x, routed, p, num_out_tokens=24, fused=fused, tokens_per_expert=counts, align_size=align
        )
        assert probs is not None
        if align:
            assert (sizes % 8 == 0).all()
            assert rows.shape[0] == sizes.sum()
        values = torch.tanh(rows) * probs[:, None]
        back = moe_utils.unpermute(values, order, x.shape, fused=fused, routing_map=routed, pad_offsets=offsets)
        merged = moe_utils.unpermute(
            torch.tanh(rows), order, x.shape, probs=p, fused=fused, routing_map=routed, pad_offsets=offsets
        )
        out = back + 0.5 * merged
        results.append((back, merged, *gradients(out, torch.linspace(-1, 1, 72).view(12, 6), x, p)))
    for want, got in zip(*results, strict=True):
        assert_close(got, want)


@in_emulation
def test_fused_sorting_of_chunks_is_megatrons() -> None:
    from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs

    x, probs, order = torch.randn(9, 4), torch.rand(9), torch.tensor([2, 0, 3, 1])
    sizes = torch.tensor([3, 2, 0, 4])
    results = []
    for fused in (False, True):
        leaves = x.clone().requires_grad_(), probs.clone().requires_grad_()
        out, moved = sort_chunks_by_idxs(leaves[0], sizes, order, leaves[1], fused=fused)
        total = (out * torch.arange(9)[:, None]).sum() + (moved * torch.arange(9)).sum()
        results.append((out, moved, *torch.autograd.grad(total, leaves)))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


@in_emulation
def test_scales_are_permuted_with_the_tokens() -> None:
    routed = torch.tensor([[1, 0], [0, 1], [1, 1]])
    rows = permutation.make_row_id_map(routed, 3, 2)
    tokens, scales = torch.randn(3, 4), torch.randn(3, 2)
    out, moved, probs = permutation.permute_with_mask_map(tokens, rows, None, scales, None, 3, 2, 4, 4, 2)
    assert torch.equal(out, tokens[[0, 2, 1, 2]])
    assert torch.equal(moved, scales[[0, 2, 1, 2]])
    assert probs is None


# ---- what Megatron takes from apex


@in_emulation
def test_apex_fused_layer_norm() -> None:
    from apex.normalization.fused_layer_norm import FusedLayerNormAffineFunction

    x, weight, bias = leaf(3, 5, 8), leaf(8), leaf(8)
    dy = torch.randn(3, 5, 8)
    want = F.layer_norm(x, (8,), weight, bias, 1e-5)
    got = FusedLayerNormAffineFunction.apply(x, weight, bias, (8,), 1e-5)
    assert_close(got, want)
    for mine, theirs in zip(gradients(got, dy, x, weight, bias), gradients(want, dy, x, weight, bias), strict=True):
        assert_close(mine, theirs)
    assert FusedLayerNormAffineFunction.apply(x.bfloat16(), weight, bias, 8, 1e-5).dtype == torch.bfloat16


@in_emulation
def test_apex_accumulation_of_weight_gradients() -> None:
    import fused_weight_gradient_mlp_cuda as apex

    x, dy, total = torch.randn(3, 5, 8), torch.randn(3, 5, 6), torch.randn(6, 8)
    for accumulate in (apex.wgrad_gemm_accum_fp32, apex.wgrad_gemm_accum_fp16):
        want = total + dy.reshape(15, 6).t() @ x.reshape(15, 8)
        accumulate(x, dy, total)
        assert_close(total, want)
