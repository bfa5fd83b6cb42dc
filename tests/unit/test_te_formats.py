"""FP8, MXFP8 and NVFP4 under the emulation: numbers, the tensors that Transformer Engine's quantizers make, layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deadpool_megatron.emulation.transformer_engine import extension as tex
from deadpool_megatron.emulation.transformer_engine import formats
from emulated import assert_close, emulated_process, in_emulation  # noqa: F401

EMULATED = {"DEADPOOL_EMULATED_CAPABILITY": "10.0"}  # MXFP8 and NVFP4 ask for it
E4M3 = 7


# ---- numbers


def test_fp8_is_cut_off_at_its_largest_number() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 447.0, 1e6, -1e6, 2.0**-9, 1.0625])
    want = [0.0, 1.0, -1.0, 448.0, 448.0, -448.0, 2.0**-9, 1.0]
    assert formats.from_fp8(formats.to_fp8(x, E4M3), E4M3).tolist() == want
    assert formats.from_fp8(formats.to_fp8(torch.tensor([1e9]), 8), 8).item() == 57344.0


def test_every_exponent_byte_is_its_power_and_comes_back() -> None:
    codes = torch.arange(1, 255, dtype=torch.uint8)
    powers = formats.from_e8m0(codes)
    assert powers[126].item() == 1.0
    assert torch.equal(powers, torch.tensor([2.0 ** (code - 127) for code in range(1, 255)]))
    assert torch.equal(formats.to_e8m0(powers), codes)
    assert formats.to_e8m0(torch.tensor([1.0001, 3.0, 0.0, float("nan")])).tolist() == [128, 129, 0, 255]


def test_every_fp4_code_is_its_number_and_comes_back() -> None:
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    data = torch.tensor([low | high << 4 for high in range(16) for low in range(16)], dtype=torch.uint8)
    values = formats.from_fp4(data).view(256, 2)
    signed = [*numbers, *(-n for n in numbers)]
    assert values.tolist() == [[signed[low], signed[high]] for high in range(16) for low in range(16)]
    assert torch.equal(formats.to_fp4(values.reshape(-1)), data)


def test_fp4_rounds_to_the_nearest_and_ties_to_the_even_code() -> None:
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = torch.linspace(-7, 7, 5601)[:-1]
    got = formats.from_fp4(formats.to_fp4(x))
    distance = (x.abs()[:, None] - numbers).abs()
    assert torch.equal(
        got.abs(), numbers[distance.argmin(1)].where(distance.sort().values.diff()[:, 0] > 1e-6, got.abs())
    )
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0])
    assert formats.from_fp4(formats.to_fp4(ties)).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0]


def test_stochastic_rounding_is_right_on_average() -> None:
    for value in (0.1, 0.9, 2.75, 5.9):
        got = formats.from_fp4(formats.to_fp4(torch.full((40000,), value), stochastic=True))
        assert got.unique().numel() == 2
        assert got.mean().item() == pytest.approx(value, rel=0.05)


def test_scales() -> None:
    amax = torch.tensor([448.0, 100.0, 0.0, float("inf"), 1e-45, float("nan")])
    largest = torch.finfo(torch.float32).max
    want = [1.0, torch.tensor(4.48).item(), 1.0, 1.0, largest, 1.0]
    assert formats.scale_from_amax(amax, 448.0).tolist() == want
    assert formats.scale_from_amax(amax[:2], 448.0, power_of_two=True).tolist() == [1.0, 4.0]
    assert formats.scale_from_amax(torch.tensor([1e-9]), 448.0, epsilon=1.0).item() == 448.0


# ---- tensors


def quantizer(name: str, columnwise: bool = True, **more: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

    usage = {"rowwise": True, "columnwise": columnwise}
    kind = tex.DType.kFloat8E4M3
    made: dict[str, Callable[[], Any]] = {
        "delayed": lambda: Float8Quantizer(torch.tensor([8.0]), torch.zeros(1), kind, **usage, **more),
        "current": lambda: Float8CurrentScalingQuantizer(kind, device=torch.device("cpu"), **usage, **more),
        "block 1x128": lambda: Float8BlockQuantizer(kind, block_scaling_dim=1, **usage, **more),
        "block 128x128": lambda: Float8BlockQuantizer(kind, block_scaling_dim=2, **usage, **more),
        "mxfp8": lambda: MXFP8Quantizer(kind, **usage, **more),
        "nvfp4": lambda: NVFP4Quantizer(**usage, **more),
    }
    return made[name]()


# What a number may be off by, relative to the largest of its block.
SCHEMES = {
    "delayed": 1 / 16,
    "current": 1 / 16,
    "block 1x128": 1 / 16,
    "block 128x128": 1 / 16,
    "mxfp8": 1 / 16,
    "nvfp4": 1 / 6,
}


@pytest.mark.parametrize("name", SCHEMES)
@in_emulation
def test_a_tensor_is_quantized_and_read(name: str) -> None:
    x = torch.randn(4, 64, 256)
    got = tex.quantize(x, quantizer(name))
    assert got.shape == x.shape
    back = tex.dequantize(got, tex.DType.kFloat32)
    assert torch.equal(got.float(), back)
    assert ((back - x).abs() <= SCHEMES[name] * x.abs().amax() + 1e-6).all()
    # What a device has is what the format can hold: quantizing it again with the same scales changes nothing.
    assert_close(tex.quantize(back, quantizer(name)).float(), back, 1e-6)


@pytest.mark.parametrize("name", SCHEMES)
@in_emulation
def test_both_directions_stand_for_the_same_numbers(name: str) -> None:
    from deadpool_megatron.emulation.transformer_engine.quantization import matrix

    x = torch.randn(256, 384)
    got = tex.quantize(x, quantizer(name))
    rows, columns = matrix(got, rowwise=True), matrix(got, rowwise=False)
    assert rows.shape == columns.shape == x.shape
    assert_close(columns, x, SCHEMES[name])
    only = quantizer(name)
    only.set_usage(rowwise=False, columnwise=True)
    assert torch.equal(matrix(tex.quantize(x, only), rowwise=True), columns)  # the copy that is there serves


@pytest.mark.parametrize("name", SCHEMES)
@in_emulation
def test_a_quantized_tensor_is_filled_anew_with_the_usages_asked_for(name: str) -> None:
    made = quantizer(name)
    x, y = torch.randn(128, 256), torch.randn(128, 256)
    out = tex.create_empty_quantized_tensor(made, (128, 256), torch.float32)
    assert tex.quantize(x, made, out) is out
    want = tex.quantize(x, quantizer(name)).float()
    assert torch.equal(out.float(), want)
    tex.quantize(y, made, out, torch.ones(1))  # the no-op flag
    assert torch.equal(out.float(), want)
    made.set_usage(rowwise=True, columnwise=False)
    tex.quantize(y, made, out)
    assert getattr(out, "_columnwise_data", None) is None
    made.set_usage(rowwise=True, columnwise=True)
    tex.quantize(y, made, out)
    if not name.startswith(("delayed", "current")):  # from Blackwell on these have one buffer
        assert out._columnwise_data is not None
    assert torch.equal(out.float(), tex.quantize(y, quantizer(name)).float())


@in_emulation
def test_scales_follow_blocks() -> None:
    x = torch.randn(256, 256)
    x[:128, 128:] *= 1e5
    for name in ("block 1x128", "block 128x128", "mxfp8"):
        got = tex.quantize(x, quantizer(name)).float()
        # A block of small numbers is as exact beside a block of large ones.
        assert ((got - x).abs()[:128, :128] <= x[:128, :128].abs().max() / 16).all(), name
    one = tex.quantize(x, quantizer("current")).float()
    assert (one[:128, :128] == 0).float().mean() > 0.1


@in_emulation
def test_delayed_scaling_uses_the_scale_of_before_and_notes_the_amax() -> None:
    made = quantizer("delayed")
    got = tex.quantize(torch.tensor([[3.0] * 16] * 16), made)
    assert made.amax.item() == 3.0
    assert got._scale_inv.item() == 1 / 8
    assert torch.equal(formats.from_fp8(got._data, E4M3), torch.full((16, 16), 24.0))
    tex.quantize(torch.ones(16, 16), made)
    assert made.amax.item() == 3.0  # the largest since it was last taken


@in_emulation
def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="divisible by 32"):
        tex.quantize(torch.zeros(32, 33), quantizer("mxfp8"))
    with pytest.raises(RuntimeError, match="divisible by 16"):
        tex.quantize(torch.zeros(8, 16), quantizer("nvfp4"))


@in_emulation
def test_the_columns_of_nvfp4_are_turned_by_a_hadamard_matrix() -> None:
    from deadpool_megatron.emulation.transformer_engine.quantization import matrix

    x = torch.randn(64, 32).bfloat16()
    made = quantizer("nvfp4", with_rht=True, with_post_rht_amax=True)
    got = tex.quantize(x, made)
    turn = made.rht_matrix.float()
    want = (x.float().t().reshape(32, 4, 16) @ turn).reshape(32, 64).t()
    assert_close(matrix(got, rowwise=False), want, 1 / 6)
    assert_close(turn @ turn.t(), torch.eye(16), 1e-2)
    assert_close(matrix(got, rowwise=True), x, 1 / 6)


@in_emulation
def test_what_goes_with_quantizing() -> None:
    x = torch.randn(2, 32, 64)
    bias, data = tex.bgrad_quantize(x, quantizer("mxfp8"))
    assert_close(bias, x.sum((0, 1)))
    assert torch.equal(data.float(), tex.quantize(x, quantizer("mxfp8")).float())
    assert tex.bgrad_quantize(x, None)[1] is x
    two = tex.multi_tensor_quantize([x, x], [quantizer("current"), quantizer("mxfp8")])
    assert torch.equal(two[1]._rowwise_data, data._rowwise_data)
    parts = tex.split_quantize(x, [32, 32], [quantizer("current"), quantizer("current")])
    assert_close(torch.cat([part.float() for part in parts]), x.reshape(64, 64), 1 / 16)
    raw = torch.randint(0, 255, (2, 3, 4), dtype=torch.uint8)
    assert torch.equal(tex.fp8_transpose(raw, E4M3), raw.permute(2, 0, 1))
    out = torch.empty(4, 2, 3, dtype=torch.uint8)
    assert tex.fp8_transpose(raw, E4M3, out=out) is out
    assert torch.equal(out, raw.permute(2, 0, 1))
    assert torch.equal(tex.swap_first_dims(raw), raw.transpose(0, 1))
    amax = torch.zeros(1)
    tex.compute_amax(x, amax)
    assert amax.item() == x.abs().max().item()
    swizzled = (
        tex.swizzle_scales_for_gemm_,
        lambda each: tex.multi_tensor_swizzle_scales_for_gemm_([each], True, True),
        lambda each: tex.multi_tensor_swizzle_scales_for_gemm_unchecked_([each], True, True),
    )
    for swizzle in swizzled:
        each = tex.quantize(x, quantizer("mxfp8"))
        swizzle(each)
        assert each._with_gemm_swizzled_scales
        assert torch.equal(each.float(), data.float())


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@in_emulation
def test_histories_of_amaxes(algorithm: str) -> None:
    histories = [torch.tensor([[0.0, 0.0], [7.0, 0.0], [1.0, 0.0]]), torch.zeros(3, 1)]
    scales = [torch.ones(2), torch.ones(1)]
    tex.fused_amax_and_scale_update_after_reduction(
        torch.tensor([2.0, 0.0, 4.0]), histories, scales, algorithm, E4M3, 1.0
    )
    first = 7.0 if algorithm == "max" else 2.0
    assert_close(scales[0], torch.tensor([448.0 / first / 2, 1.0]))
    assert scales[1].item() == 448.0 / 4 / 2
    assert histories[0][:, 0].tolist() == [0.0, 1.0, 2.0]  # the oldest is gone, the new one is the last
    assert histories[1].flatten().tolist() == [0.0, 0.0, 4.0]


# ---- --fp8-param-gather: pieces of a weight cast by themselves are the whole cast at once


@in_emulation
def test_pieces_of_a_weight_in_blocks() -> None:
    weight = torch.randn(200, 300)
    whole = tex.quantize(weight, quantizer("block 128x128"))
    amax, got = torch.zeros(2, 4), torch.zeros(200 * 300, dtype=torch.uint8)  # padded, as scales are
    pieces = list(itertools.pairwise([0, 7777, 30000, 60000]))
    for begin, end in pieces:
        part = torch.zeros(2, 4)
        piece = weight.flatten()[begin:end]
        tex.fp8_block_scaling_compute_partial_amax(piece, part, 200, 300, begin, 128)
        amax = torch.maximum(amax, part)
    scale, inverse = torch.empty(2, 4), torch.empty(2, 4)
    tex.multi_tensor_compute_scale_and_scale_inv(2048, None, [[amax], [scale], [inverse]], 448.0, True, 0.0)
    assert torch.equal(inverse[:, :3], whole._rowwise_scale_inv[:, :3])
    for begin, end in pieces:
        tex.fp8_block_scaling_partial_cast(
            weight.flatten()[begin:end], got[begin:end], scale, 200, 300, begin, 128, E4M3
        )
    assert torch.equal(got.view(200, 300), whole._rowwise_data)


@in_emulation
def test_pieces_of_a_weight_in_mxfp8() -> None:
    weight = torch.randn(64, 96)
    whole = tex.quantize(weight, quantizer("mxfp8"))
    amaxes = [torch.zeros(64, 3), torch.zeros(2, 96)]
    pieces = list(itertools.pairwise([0, 1000, 4001, 6144]))
    for begin, end in pieces:
        parts = [torch.zeros(64, 3), torch.zeros(2, 96)]
        tex.mxfp8_scaling_compute_partial_amax(weight.flatten()[begin:end], *parts, 64, 96, begin)
        amaxes = [torch.maximum(a, b) for a, b in zip(amaxes, parts, strict=True)]
    inverses = [torch.zeros(64, 3, dtype=torch.uint8), torch.zeros(2, 96, dtype=torch.uint8)]
    tex.multi_tensor_compute_scale_inv_e8m0(2048, None, [amaxes, inverses])
    assert torch.equal(inverses[0], whole._rowwise_scale_inv[:64, :3])
    assert torch.equal(inverses[1], whole._columnwise_scale_inv[:2, :96])
    outs = [torch.zeros(6144, dtype=torch.uint8) for _ in range(2)]
    for begin, end in pieces:
        tex.mxfp8_scaling_partial_cast(
            weight.flatten()[begin:end], *(out[begin:end] for out in outs), *inverses, 64, 96, begin
        )
    assert torch.equal(outs[0].view(64, 96), whole._rowwise_data)
    assert torch.equal(outs[1].view(64, 96), whole._columnwise_data)


@in_emulation
def test_pieces_of_a_weight_in_nvfp4() -> None:
    weight = torch.randn(64, 96)
    whole = tex.quantize(weight, quantizer("nvfp4", with_2d_quantization=True))
    amax, largest = torch.zeros(4, 6), torch.zeros(1)
    pieces = list(itertools.pairwise([0, 1000, 4001, 6144]))  # 4001: in the middle of a byte
    for begin, end in pieces:
        part, part_largest = torch.zeros(4, 6), torch.zeros(1)
        tex.nvfp4_multi_tensor_compute_partial_amax(
            [weight.flatten()[begin:end]], [part], [part_largest], [64], [96], [begin], 16
        )
        amax, largest = torch.maximum(amax, part), torch.maximum(largest, part_largest)
    scale, global_scale, target_amax = torch.empty(4, 6), torch.empty(1), torch.empty(1)
    target = torch.empty_like(whole._rowwise_scale_inv)
    tex.nvfp4_compute_global_scale(largest, global_scale)
    tex.nvfp4_multi_tensor_fused_scale(
        [amax], [largest], [scale], [target], [target_amax], [4], [6], [target.shape[0]], 16
    )
    assert torch.equal(target[:64, :6], whole._rowwise_scale_inv[:64, :6])
    assert torch.equal(target_amax, whole._amax_rowwise)
    got = torch.zeros(64 * 96 // 2, dtype=torch.uint8)
    for begin, end in reversed(pieces):
        tex.nvfp4_multi_tensor_2d_partial_cast(
            *([weight.flatten()[begin:end]], [got[begin // 2 : (end + 1) // 2]], [scale], [global_scale]),
            *([64], [96], [begin], 16),
        )
    assert torch.equal(got.view(64, 48), whole._rowwise_data)
    turned, turned_scales = torch.empty(96, 32, dtype=torch.uint8), torch.empty_like(whole._columnwise_scale_inv)
    tex.nvfp4_2d_multi_tensor_transpose([got], [turned], [target], [turned_scales], [64], [96])
    assert torch.equal(turned, whole._columnwise_data)
    assert torch.equal(turned_scales[:96, :4], whole._columnwise_scale_inv[:96, :4])


# ---- Transformer Engine's own layers on it, against torch


def recipe(name: str) -> Any:
    from transformer_engine.common import recipe as recipes

    return {
        "none": lambda: None,
        "current": recipes.Float8CurrentScaling,
        "delayed": recipes.DelayedScaling,
        "block": recipes.Float8BlockScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
        "nvfp4": recipes.NVFP4BlockScaling,
    }[name]()


# The worst relative error (norm) of output and gradients that the format allows.
LAYERS = {"none": 0.01, "current": 0.12, "delayed": 0.12, "block": 0.08, "mxfp8": 0.08, "nvfp4": 0.4}


def error(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@pytest.mark.parametrize("name", LAYERS)
@in_emulation
def test_a_layer_of_transformer_engine_is_torchs(name: str) -> None:
    import transformer_engine.pytorch as te

    torch.manual_seed(3)
    layer = te.LayerNormLinear(128, 256, params_dtype=torch.bfloat16, device="cpu")
    x = torch.randn(64, 2, 128, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(64, 2, 256, dtype=torch.bfloat16)
    recipe_ = recipe(name)
    with te.autocast(enabled=recipe_ is not None, recipe=recipe_):
        for _ in range(2):  # the second time delayed scaling has scales
            for each in (x, *layer.parameters()):
                each.grad = None
            got = layer(x)
            got.backward(y)
    leaves = [each.detach().float().requires_grad_() for each in (x, *layer.parameters())]
    names = ["x", *(key for key, _ in layer.named_parameters())]
    by_name = dict(zip(names, leaves, strict=True))
    normed = F.layer_norm(by_name["x"], (128,), by_name["layer_norm_weight"], by_name["layer_norm_bias"])
    want = F.linear(normed, by_name["weight"], by_name["bias"])
    want.backward(y.float())
    assert error(got, want) < LAYERS[name]
    for key, mine in zip(names, (x, *layer.parameters()), strict=True):
        assert error(mine.grad, by_name[key].grad) < LAYERS[name], key


# ---- attention


@in_emulation
def test_attention_in_mxfp8_is_that_in_sixteen_bits_but_for_its_operands_rounding() -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import MXFP8BlockScaling

    length, heads, groups, width = 128, 8, 4, 32
    attention = te.DotProductAttention(heads, width, num_gqa_groups=groups, attn_mask_type="causal", qkv_format="sbhd")
    given = [torch.randn(length, 1, n, width).bfloat16().requires_grad_() for n in (heads, groups, groups)]
    dy = torch.randn(length, 1, heads * width).bfloat16()

    def through(**recipe: Any) -> list[Tensor]:
        with te.fp8_autocast(**recipe):
            out = attention(*given)
        return [out.float(), *(each.float() for each in torch.autograd.grad(out, given, dy))]

    plain, rounded = through(enabled=False), through(enabled=True, fp8_recipe=MXFP8BlockScaling(fp8_dpa=True))
    assert type(attention.quantizers["scaling_fwd"][0]).__name__ == "MXFP8Quantizer"
    for want, got in zip(plain, rounded, strict=True):
        off = float((want - got).norm() / want.norm())
        assert 1e-3 < off < 0.1, "rounded to some three bits, and no other numbers"
