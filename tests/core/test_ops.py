"""The operations' contracts on a CPU, compared bit for bit.

Rows of every operation depend on nothing but themselves. Arithmetic that the contracts write out is done again in plain
Python, on exact fractions or on numpy's fp32 scalars. What a contract forbids has a twin here that does it, and whose
bits must differ: a comparison that could not fail would prove nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_plugin.config import DeepseekV3Config, YarnScaling
from dsv3_plugin.errors import InputError
from dsv3_plugin.ops import fp8, fused, mla_attention, tile
from dsv3_plugin.ops.combine import combine
from dsv3_plugin.ops.elementary import (
    EXP2_POLYNOMIAL,
    LOG2_E,
    LOG2_E_HIGH,
    LOG2_E_LOW,
    exp2_of_nonpositive,
    exp_of_nonpositive,
    fma,
    fold_sum,
    sigmoid,
    sum_row,
)
from dsv3_plugin.ops.fp8 import E4M3
from dsv3_plugin.ops.linear import grouped_linear, head_linear, linear
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.ops.rope import rope, rope_table
from dsv3_plugin.ops.router import SLICE, moe_router, route, router_linear
from dsv3_plugin.ops.silu_and_mul import silu_and_mul
from dsv3_plugin.profile import ScaleFormat

Tensor = torch.Tensor
FLOATS = (torch.float32, torch.bfloat16)
SCALE_FORMATS: tuple[ScaleFormat, ...] = ("ue8m0", "float32")
BF16_BITS, FP32_BITS = 8, 24
"""Bits of the significand."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns, so that zeros keep their signs and NaN equals itself."""
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def rounded(x: Fraction, bits: int = FP32_BITS) -> Fraction:
    """`x` rounded to nearest, ties to even, to `bits` of significand; fp32's and bf16's smallest normal exponent."""
    if x == 0:
        return x
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, -126) - bits + 1)
    return round(x / step) * step


# Rows


def row_operations(dtype: torch.dtype, columns: int, outputs: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Every operation as a function of rows [M, columns] alone."""
    weight = normal(outputs, columns, seed=1, dtype=dtype)
    yield "linear", lambda x: linear(x, weight)
    yield "linear to fp32", lambda x: linear(x, weight, out_dtype=torch.float32)
    heads = normal(4, outputs, columns // 4, seed=2, dtype=dtype)
    yield "head_linear", lambda x: head_linear(x.view(len(x), 4, -1), heads).flatten(1)
    yield "grouped_linear", lambda x: grouped_linear(x, torch.tensor([0, len(x)]), torch.stack((weight + 1, weight)))
    norm = normal(columns, seed=3, dtype=dtype)
    yield "rms_norm", lambda x: rms_norm(x, norm, 1e-6)
    yield "silu_and_mul", silu_and_mul
    yield "router_linear", lambda x: router_linear(x, weight)
    for scale_format in SCALE_FORMATS:
        pair = fp8.quantize_weight(weight, scale_format)
        yield f"fp8_linear {scale_format}", partial(quantized_linear, scale_format, *pair)


def quantized_linear(scale_format: ScaleFormat, weight: Tensor, weight_scale: Tensor, x: Tensor) -> Tensor:
    """Both operations of an FP8 projection."""
    return fp8.fp8_linear(*fp8.quantize_fp8(x, scale_format), weight, weight_scale)


OPERATIONS = [name for name, _ in row_operations(torch.float32, 128, 8)]


@pytest.mark.parametrize("columns", [128, 1024, 2048])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_row_is_independent_of_the_others(name: str, dtype: torch.dtype, columns: int) -> None:
    run = dict(row_operations(dtype, columns, 48))[name]
    x = normal(130, columns, dtype=dtype)
    whole = run(x)
    assert whole.isfinite().all() and whole.std() > 0
    for rows in (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129):
        assert same_bits(run(x[:rows]), whole[:rows]), f"the first {rows} rows"
    order = torch.randperm(len(x), generator=generator(4))
    assert same_bits(run(x[order]), whole[order]), "another order"
    assert same_bits(run(x[5:9]), whole[5:9]), "another place in the tile"
    neighbours = torch.full_like(x, torch.nan)
    neighbours[[0, 70]] = x[[0, 70]]
    assert same_bits(run(neighbours)[[0, 70]], whole[[0, 70]]), "NaN neighbours"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_number_of_rows_gives_the_same_linear(dtype: torch.dtype) -> None:
    for columns in (1024, 2048):
        x, weight = normal(130, columns, dtype=dtype), normal(128, columns, seed=1, dtype=dtype)
        whole = linear(x, weight)
        for rows in range(1, 131):
            assert same_bits(linear(x[:rows], weight), whole[:rows]), f"K = {columns}, {rows} rows"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_librarys_own_product_depends_on_the_number_of_rows(dtype: torch.dtype) -> None:
    """The twin: were this equal, the tests above could not fail, and tiles would be needless."""
    different = []
    for columns in (1024, 2048):
        for outputs in (48, 128):
            x, weight = normal(130, columns, dtype=dtype), normal(outputs, columns, seed=1, dtype=dtype)
            whole = torch.nn.functional.linear(x, weight)
            for rows in (1, 3, 5, 17, 34, 36, 40, 65, 100):
                if not same_bits(torch.nn.functional.linear(x[:rows], weight), whole[:rows]):
                    different.append((columns, outputs, rows))
    print(f"{dtype}: {len(different)} of 36 shapes: (K, N, M) = {different}")
    assert different


def test_another_tile_gives_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile is part of the arithmetic: a row of a bf16 product of 64 rows is not one of 16."""
    x, weight = normal(130, 1024, dtype=torch.bfloat16), normal(512, 1024, seed=1, dtype=torch.bfloat16)
    whole = linear(x, weight)
    monkeypatch.setattr(tile, "ROWS", 16)
    assert int((linear(x, weight) != whole).sum()) > 0


def test_linear_to_fp32_does_not_round() -> None:
    x, weight = normal(3, 256, dtype=torch.bfloat16), normal(100, 256, seed=1, dtype=torch.bfloat16)
    exact = x.double() @ weight.double().T
    wide = linear(x, weight, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert (wide - exact).abs().max() < 1e-4 < 1e-2 < (linear(x, weight) - exact).abs().max()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grouped_linear_is_one_linear_an_expert(dtype: torch.dtype) -> None:
    counts = torch.tensor([3, 0, 70, 1])
    x, weight = normal(74, 256, dtype=dtype), normal(4, 40, 256, seed=1, dtype=dtype)
    expected = torch.cat([linear(x[:3], weight[0]), linear(x[3:73], weight[2]), linear(x[73:], weight[3])])
    assert same_bits(grouped_linear(x, counts, weight), expected)
    assert grouped_linear(x[:0], torch.zeros(4, dtype=torch.int64), weight).shape == (0, 40)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_grouped_fp8_linear_is_one_fp8_linear_an_expert(scale_format: ScaleFormat) -> None:
    counts = torch.tensor([3, 0, 70, 1])
    x, x_scale = fp8.quantize_fp8(normal(74, 256), scale_format)
    pairs = [fp8.quantize_weight(normal(136, 256, seed=e), scale_format) for e in range(4)]
    weight, scale = torch.stack([w.view(torch.uint8) for w, _ in pairs]).view(E4M3), torch.stack([s for _, s in pairs])
    spans = [(0, slice(0, 3)), (2, slice(3, 73)), (3, slice(73, 74))]
    expected = torch.cat([fp8.fp8_linear(x[span], x_scale[span], weight[e], scale[e]) for e, span in spans])
    assert same_bits(fp8.grouped_fp8_linear(x, x_scale, counts, weight, scale), expected)


def test_head_linear_is_one_linear_a_head() -> None:
    x, weight = normal(70, 4, 32), normal(4, 24, 32, seed=1)
    out = head_linear(x, weight)
    assert all(same_bits(out[:, h], linear(x[:, h].contiguous(), weight[h])) for h in range(4))


# Elementary functions


def ulps(found: Tensor, exact: Tensor) -> Tensor:
    """Distance in units of the last place of an fp32 `found` from a float64 `exact`."""
    exponent = exact.abs().frexp().exponent - 1
    return (found.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 23)


def test_exp_is_within_three_ulp() -> None:
    sweep = torch.linspace(-87, 0, 2_000_001, dtype=torch.float64).float()
    patterns = torch.randint(0, 2**31, (1_000_000,), generator=generator(0)).to(torch.int32).view(torch.float32)
    x = torch.cat((sweep, -patterns[patterns <= 87]))
    worst = float(ulps(exp_of_nonpositive(x), x.double().exp()).max())
    print(f"exp: {worst:.3f} ulp at worst over {len(x)} numbers")
    assert 0.5 < worst <= 3


def test_exp_at_the_edges() -> None:
    x = torch.tensor([0.0, -0.0, -1e-30, -torch.inf, -87.00001, -1e30, -87.0, torch.nan])
    y = exp_of_nonpositive(x)
    assert y[:6].tolist() == [1.0] * 3 + [0.0] * 3
    assert 1.1e-38 < float(y[6]) < 1.7e-38
    assert y[7].isnan()


def written_out_exp(x: Tensor, step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """`exp_of_nonpositive` above -87, a `step` for each fused multiply-add."""
    n = (x.double() * LOG2_E_HIGH).round().float()
    f = step(x, torch.full_like(x, LOG2_E_HIGH), -n)
    f = step(x, torch.full_like(x, LOG2_E_LOW), f)
    return horner(f, step) * torch.ldexp(torch.ones_like(n), n.int())


def test_sigmoid_is_made_of_fused_steps_and_a_rounded_reciprocal() -> None:
    x = -torch.cat((normal(20_000) * 10, torch.linspace(-87, 87, 200_001))).abs().clamp(max=87)
    e = exp_of_nonpositive(x)
    assert same_bits(e, written_out_exp(x, fma))
    # The twin: product and sum rounded apart are another function.
    assert (e != written_out_exp(x, lambda a, b, c: a * b + c)).sum() > 10_000
    r = torch.from_numpy(np.float32(1) / (np.float32(1) + e.numpy()))
    assert same_bits(sigmoid(-x), r)
    assert same_bits(sigmoid(x)[x < 0], (e * r)[x < 0])
    # The twin: a quotient rounds once where the product of a reciprocal rounds twice.
    assert (sigmoid(x) != e / (1 + e)).sum() > 5_000


def test_exp2_is_within_two_ulp() -> None:
    patterns = torch.randint(0, 2**31, (1_000_000,), generator=generator(0)).to(torch.int32).view(torch.float32)
    sweep = torch.linspace(-125, 0, 2_000_001, dtype=torch.float64).float()
    x = torch.cat((sweep, -patterns[patterns <= 125]))
    worst = float(ulps(exp2_of_nonpositive(x), x.double().exp2()).max())
    print(f"exp2: {worst:.3f} ulp at worst over {len(x)} numbers")
    assert 0.5 < worst <= 2


def test_exp2_at_the_edges() -> None:
    x = torch.tensor([0.0, -0.0, -1e-30, -1.0, -2.0, -125.0, -125.00001, -1e30, -torch.inf, torch.nan])
    assert exp2_of_nonpositive(x).tolist() == [1, 1, 1, 0.5, 0.25, 2.0**-125, 0, 0, 0, 0]


def horner(f: Tensor, step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    p = torch.full_like(f, EXP2_POLYNOMIAL[0])
    for coefficient in EXP2_POLYNOMIAL[1:]:
        p = step(p, f, torch.full_like(f, coefficient))
    return p


def test_exp2_steps_are_fused_multiply_adds() -> None:
    x = -torch.rand(1_000_000, generator=generator(0)) / 2
    x = torch.cat((x, x * 2.0**-8, x * 2.0**-16, x * 2.0**-24))
    found = exp2_of_nonpositive(x)
    assert same_bits(found, horner(x, fma))
    # The twin: product and sum rounded apart are another function.
    assert (found != horner(x, lambda a, b, c: a * b + c)).sum() > 10_000


@pytest.mark.parametrize("function", [exp_of_nonpositive, sigmoid], ids=["exp", "sigmoid"])
def test_elementary_functions_ignore_the_shape(function: Callable[[Tensor], Tensor]) -> None:
    x = -(normal(131) * 20).abs()
    whole = function(x)
    for size in range(1, 131):
        assert same_bits(function(x[:size]), whole[:size])
        assert same_bits(function(x[size : size + 1]), whole[size : size + 1])


def test_sigmoid_is_within_four_ulp() -> None:
    x = torch.cat((torch.linspace(-87, 100, 1_000_001), normal(1_000_000, seed=1)))
    worst = float(ulps(sigmoid(x), x.double().sigmoid()).max())
    print(f"sigmoid: {worst:.3f} ulp at worst")
    assert 0.5 < worst <= 4
    edges = torch.tensor([0.0, -torch.inf, torch.inf, -1e30, 1e30, torch.nan])
    assert sigmoid(edges)[:5].tolist() == [0.5, 0.0, 1.0, 0.0, 1.0]
    assert sigmoid(edges)[5].isnan()


def plain_fold(values: list[np.float32], lanes: int) -> np.float32:
    """`fold_sum` as its docstring tells it, one addition after the other."""
    total = [np.float32(0)] * lanes
    for i, value in enumerate(values):
        total[i % lanes] = value if i < lanes else total[i % lanes] + value
    while lanes > 1:
        lanes //= 2
        total = [total[i] + total[i + lanes] for i in range(lanes)]
    return total[0]


@pytest.mark.parametrize("lanes", [64, 512])
@pytest.mark.parametrize("size", [1, 63, 64, 500, 512, 513, 2048])
def test_fold_sum_adds_in_its_order(size: int, lanes: int) -> None:
    x = normal(4, size) * 100
    expected = [plain_fold(list(row.numpy()), lanes) for row in x]
    assert fold_sum(x, lanes).flatten().tolist() == [float(value) for value in expected]


def test_another_order_gives_another_sum() -> None:
    x = normal(64, 2048)
    assert not torch.equal(fold_sum(x, 512), fold_sum(x, 256))
    assert not torch.equal(fold_sum(x, 512), fold_sum(x.flip(1), 512))


def plain_row_sum(values: list[np.float32]) -> np.float32:
    """`sum_row` as its docstring tells it, one addition after the other."""
    while len(values).bit_count() != 1:
        values = [*values, np.float32(0)]
    while len(values) > 1024:
        half = len(values) // 2
        values = [low + high for low, high in zip(values[:half], values[half:], strict=True)]
    while len(values) > 1:
        values = [left + right for left, right in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@pytest.mark.parametrize("size", [1, 2, 63, 64, 500, 512, 513, 1024, 1025, 2048, 7168])
def test_sum_row_adds_in_its_order(size: int) -> None:
    x = normal(4, size) * 100
    expected = [plain_row_sum(list(row.numpy())) for row in x]
    assert sum_row(x).flatten().tolist() == [float(value) for value in expected]


def test_another_order_of_a_row_gives_another_sum() -> None:
    x = normal(64, 2048)
    assert not torch.equal(sum_row(x), sum_row(x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)))
    assert not torch.equal(sum_row(x), sum_row(x.roll(1, 1)))


# Norm, activation, rotation


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm_in_plain_fp32(dtype: torch.dtype) -> None:
    eps, x, weight = 1e-6, normal(5, 700, dtype=dtype), normal(700, seed=1, dtype=dtype)
    out = rms_norm(x, weight, eps)
    for row, result in zip(x.float(), out, strict=True):
        values = list(row.numpy())
        mean = plain_row_sum([value * value for value in values]) / np.float32(700)
        factor = np.float32(1) / np.sqrt(mean + np.float32(eps))
        expected = [value * factor * w for value, w in zip(values, weight.float().numpy(), strict=True)]
        assert same_bits(result, torch.tensor(np.array(expected)).to(dtype))
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + eps).sqrt() * weight.double()
    assert ((out - exact).abs() / exact.abs()).max() < (2**-8 if dtype == torch.bfloat16 else 2**-21)


def test_rms_norm_rounds_once() -> None:
    """The twin: rounding to bf16 before the weight is multiplied, as Hugging Face does, gives other bits."""
    x, weight = normal(8, 512, dtype=torch.bfloat16), normal(512, seed=1, dtype=torch.bfloat16)
    twice = rms_norm(x, torch.ones_like(weight), 1e-6) * weight
    assert int((rms_norm(x, weight, 1e-6) != twice).sum()) > 100


def test_rms_norm_of_zeros_is_zero() -> None:
    assert rms_norm(torch.zeros(2, 64), torch.ones(64), 1e-6).tolist() == [[0.0] * 64] * 2


def test_silu_and_mul_against_float64() -> None:
    gate_up = normal(50, 512) * 4
    gate, up = gate_up.double().chunk(2, 1)
    exact = gate * gate.sigmoid() * up
    assert ((silu_and_mul(gate_up) - exact).abs() / exact.abs()).max() < 7 * 2**-24
    written_out = torch.from_numpy(gate_up[:, :256].numpy() * sigmoid(gate_up[:, :256]).numpy()) * gate_up[:, 256:]
    assert same_bits(silu_and_mul(gate_up), written_out)
    rounded_once = silu_and_mul(gate_up.bfloat16().float()).bfloat16()
    assert same_bits(silu_and_mul(gate_up.bfloat16()), rounded_once)
    swapped = torch.cat(gate_up.chunk(2, 1)[::-1], 1)
    assert not torch.equal(silu_and_mul(swapped), silu_and_mul(gate_up))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rope_in_plain_fp32(dtype: torch.dtype) -> None:
    x, angles = normal(6, 3, 8, dtype=dtype), normal(6, 4, seed=1)
    cos, sin = angles.cos(), angles.sin()
    out = rope(x, cos, sin)
    for (t, h, i), result in np.ndenumerate(out.float().numpy()):
        a, b = x[t, h, i - i % 2].float().numpy(), x[t, h, i - i % 2 + 1].float().numpy()
        c, s = cos[t, i // 2].numpy(), sin[t, i // 2].numpy()
        expected = torch.tensor(a * c - b * s if i % 2 == 0 else a * s + b * c).to(dtype)
        assert expected.item() == result
    assert not torch.equal(out, rope(x.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2), cos, sin))
    assert same_bits(rope(x, torch.ones_like(cos), torch.zeros_like(sin)), x)


MINIMAL = {
    "model_type": "deepseek_v3",
    "vocab_size": 16,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 500,
    "q_lora_rank": None,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


@pytest.mark.parametrize(
    "yarn", [None, YarnScaling(factor=40, original_max_position_embeddings=4096)], ids=["", "yarn"]
)
def test_no_length_changes_the_rotary_table(yarn: YarnScaling | None) -> None:
    config = DeepseekV3Config.from_dict(MINIMAL).model_copy(update={"rope_scaling": yarn})
    cos, sin = rope_table(config)
    longer = rope_table(config.model_copy(update={"max_position_embeddings": 5000}))
    assert cos.shape == (500, 8) and longer[0].shape == (5000, 8)
    assert same_bits(longer[0][:500], cos) and same_bits(longer[1][:500], sin)


# FP8


def power_of_two_scale(amax: Fraction) -> Fraction:
    """The smallest power of two, from 2**-126 up, that is at least amax / 448."""
    scale = Fraction(2) ** -126
    while scale < amax / 448:
        scale *= 2
    return scale


def test_power_of_two_scales_are_the_smallest_that_fit() -> None:
    amax = normal(300).abs() * torch.ldexp(torch.ones(300), torch.randint(-100, 100, (300,), generator=generator(1)))
    steps = torch.tensor([448 * 2.0**e for e in (-126, -120, -20, -1, 0, 1, 60, 118)])
    infinity = torch.tensor(torch.inf)
    borders = torch.cat((steps, steps.nextafter(infinity), steps.nextafter(-infinity), steps / 2 * 1.00001))
    tiny = torch.tensor([1e-45, 1e-38, 2.0**-126, 2.0**-118, 3.4028234663852886e38])
    amax = torch.cat((amax, borders, tiny))
    found = fp8.scale_for(amax, "ue8m0")
    for value, scale in zip(amax.tolist(), found.tolist(), strict=True):
        assert Fraction(scale) == power_of_two_scale(Fraction(value)), f"amax = {value}"


def test_fractional_scales_are_correctly_rounded() -> None:
    amax = normal(300).abs() * 1000
    for value, scale in zip(amax.tolist(), fp8.scale_for(amax, "float32").tolist(), strict=True):
        assert Fraction(scale) == rounded(Fraction(value) / 448)
    # The smallest scale: below it a power of two is no normal number.
    assert fp8.scale_for(torch.tensor([1e-40]), "float32").tolist() == [2.0**-126]


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_a_zero_block_has_scale_one(scale_format: ScaleFormat) -> None:
    x = torch.zeros(2, 256)
    x[1, 130] = 3.5
    quantized, scale = fp8.quantize_fp8(x, scale_format)
    assert scale[0].tolist() == [1.0, 1.0] and scale[1, 0] == 1
    assert scale[1, 1] == 3.5 / 448
    assert quantized[0].float().tolist() == [0.0] * 256
    # No floor but that one: a block of small numbers keeps them.
    small, scale = fp8.quantize_fp8(torch.full((1, 128), 1e-8), scale_format)
    assert (small.float() * scale).div(1e-8).sub(1).abs().max() < 2**-4
    assert fp8.quantize_weight(torch.zeros(130, 100), scale_format)[1].tolist() == [[1.0], [1.0]]


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    codes = torch.arange(0, 127, dtype=torch.uint8).view(E4M3)
    values = codes.float()
    assert values[-1] == 448 and bool((values.diff() > 0).all())
    middle = (values[1:] + values[:-1]) / 2
    even = torch.where(torch.arange(126) % 2 == 0, values[:-1], values[1:])
    assert torch.equal(fp8.to_e4m3(middle).float(), even)
    assert torch.equal(fp8.to_e4m3(middle.nextafter(torch.tensor(1e9))).float(), values[1:])
    assert torch.equal(fp8.to_e4m3(middle.nextafter(torch.tensor(-1.0))).float(), values[:-1])
    assert torch.equal(fp8.to_e4m3(-values).float(), -values)
    large = torch.tensor([448.0, 448.001, 464.0, 465.0, 1e30, torch.inf])
    assert fp8.to_e4m3(large).float().tolist() == [448.0] * 6
    assert fp8.to_e4m3(-large).float().tolist() == [-448.0] * 6


def test_activations_are_divided_by_their_scale() -> None:
    """Multiplying by a rounded reciprocal instead moves some of these quotients, all on a border, to the wrong side."""
    values = torch.arange(0, 127, dtype=torch.uint8).view(E4M3).float()
    middle = (values[1:] + values[:-1]) / 2
    even = torch.where(torch.arange(126) % 2 == 0, values[:-1], values[1:])
    scales = torch.arange(1, 400, 2).float().unsqueeze(1)
    x = torch.cat((middle, torch.tensor([448.0, 0.0]))) * scales
    quantized, found = fp8.quantize_fp8(x, "float32")
    assert torch.equal(found, scales)
    assert bool((quantized.float()[:, :126] == even).all())
    assert not torch.equal(fp8.to_e4m3(x * (1 / scales)).float(), quantized.float())


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_a_nan_activation_stays_visible(scale_format: ScaleFormat) -> None:
    x = normal(1, 256)
    x[0, 7] = torch.nan
    quantized, scale = fp8.quantize_fp8(x, scale_format)
    weight, weight_scale = fp8.quantize_weight(normal(4, 256, seed=1), scale_format)
    assert fp8.fp8_linear(quantized, scale, weight, weight_scale).isnan().all()


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantised_activations_are_within_half_a_step(dtype: torch.dtype, scale_format: ScaleFormat) -> None:
    x = normal(20, 384, dtype=dtype) * torch.logspace(-6, 6, 20).unsqueeze(1)
    quantized, scale = fp8.quantize_fp8(x.to(dtype), scale_format)
    error = (quantized.double().unflatten(1, (3, 128)) * scale.double().unsqueeze(-1)).flatten(1) - x.to(dtype).double()
    # Half a step: 2**-4 of a normal number, 2**-10 scales of a subnormal one.
    bound = torch.maximum(x.double().abs() * 2**-4, scale.double().repeat_interleave(128, 1) * 2**-10)
    assert (error.abs() / bound).max() < 1 + 1e-6
    assert quantized.float().abs().unflatten(1, (3, 128)).amax(-1).min() > (224 if scale_format == "ue8m0" else 447) - 8


@pytest.mark.parametrize("shape", [(128, 128), (130, 256), (300, 192), (1, 1)])
def test_a_weight_on_the_grid_survives_quantisation(shape: tuple[int, int]) -> None:
    """Blocks of e4m3 values times a power of two of their own are returned exactly, with those very scales."""
    blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
    values = torch.randint(0, 127, shape, generator=generator(0)).to(torch.uint8)
    values[::128, ::128] = 126  # 448 in each block, which makes its scale the power itself
    scale = torch.ldexp(torch.ones(blocks), torch.randint(-20, 20, blocks, generator=generator(1)))
    signs = torch.randint(0, 2, shape, generator=generator(2)) * 2 - 1
    weight = values.view(E4M3).float() * signs * fp8.expand_scale(scale, *shape)
    for scale_format in SCALE_FORMATS:
        quantized, found = fp8.quantize_weight(weight, scale_format)
        assert quantized.dtype == E4M3 and torch.equal(found, scale)
        assert torch.equal(fp8.dequantize_weight(quantized, found), weight)
    # With power-of-two scales bf16 holds the products too.
    assert torch.equal(weight.bfloat16().float(), weight)


def exact_fp8_linear(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *, fused: bool) -> list[float]:
    """The contract on fractions: e4m3 values are integers of 2**-9, so that a dot product is a sum of integers."""
    left = [[int(v * 512) for v in row] for row in x.float().tolist()]
    right = [[int(v * 512) for v in row] for row in weight.float().tolist()]
    results = []
    for m, a in enumerate(left):
        for n, b in enumerate(right):
            acc = Fraction(0)
            for k in range(len(a) // 128):
                span = slice(128 * k, 128 * k + 128)
                raw = rounded(Fraction(sum(i * j for i, j in zip(a[span], b[span], strict=True)), 2**18))
                scale = rounded(Fraction(x_scale[m, k].item()) * Fraction(weight_scale[n // 128, k].item()))
                acc = rounded(raw * scale + acc) if fused else rounded(rounded(raw * scale) + acc)
            results.append(float(rounded(acc, BF16_BITS)))
    return results


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_fp8_linear_is_the_exact_arithmetic(scale_format: ScaleFormat) -> None:
    x, x_scale = fp8.quantize_fp8(normal(3, 640) * torch.tensor([[1e-3], [1.0], [1e4]]), scale_format)
    weight, weight_scale = fp8.quantize_weight(normal(140, 640, seed=1), scale_format)
    found = fp8.fp8_linear(x, x_scale, weight, weight_scale)
    assert found.dtype == torch.bfloat16
    assert found.flatten().tolist() == exact_fp8_linear(x, x_scale, weight, weight_scale, fused=True)


def test_fp8_linear_fuses_the_multiplication_with_the_sum() -> None:
    """The second half of K undoes the first: a fused sum leaves the first rounding's error, an unfused one zero."""
    row, scale = fp8.quantize_fp8(normal(8, 128), "float32")
    x, x_scale = torch.cat((row.float(), -row.float()), 1).to(E4M3), scale.repeat(1, 2)
    half, half_scale = fp8.quantize_weight(normal(8, 128, seed=1), "float32")
    weight, weight_scale = torch.cat((half.float(), half.float()), 1).to(E4M3), half_scale.repeat(1, 2)
    found = fp8.fp8_linear(x, x_scale, weight, weight_scale).flatten().tolist()
    assert found == exact_fp8_linear(x, x_scale, weight, weight_scale, fused=True)
    assert exact_fp8_linear(x, x_scale, weight, weight_scale, fused=False) == [0.0] * 64
    assert sum(value != 0 for value in found) > 32
    ones = torch.ones_like(x_scale), torch.ones_like(weight_scale)
    assert fp8.fp8_linear(x, ones[0], weight, ones[1]).flatten().tolist() == [0.0] * 64


def test_fma_is_rounded_once() -> None:
    """Sums of which fp64 loses the last bits: rounding twice, first to fp64, fails in some."""
    draw = random.Random(0)
    a, b, c = [], [], []
    for _ in range(3000):
        # A product just beside the middle between two fp32 neighbours of c: 2**24 + 1 plus or minus very little.
        a.append(float(2**12 + draw.choice((0, 1)) * 2.0**-11))
        b.append(float(2.0**-12) * (1 + draw.choice((-1, 0, 1)) * 2.0**-23))
        c.append(float(draw.choice((-1, 1)) * (2**24 + 2 * draw.randrange(1000))) * 2.0 ** draw.choice((0, 4, 9)))
    a += [draw.gauss(0, 1) for _ in range(3000)]
    b += [draw.gauss(0, 1) for _ in range(3000)]
    c += [draw.gauss(0, 1) * 2.0 ** draw.randrange(-30, 30) for _ in range(3000)]
    left, right, addend = (torch.tensor(values, dtype=torch.float32) for values in (a, b, c))
    found = fma(left, right, addend)
    triples = zip(left.tolist(), right.tolist(), addend.tolist(), strict=True)
    expected = [float(rounded(Fraction(x) * Fraction(y) + Fraction(z))) for x, y, z in triples]
    assert found.tolist() == expected
    twice = (left.double() * right.double() + addend.double()).float()
    print(f"{sum(u != v for u, v in zip(twice.tolist(), expected, strict=True))} sums differ when rounded twice")
    assert twice.tolist() != expected


# Router and combine


def plain_route(
    scores: list[np.float32], bias: list[np.float32], k: int, n_group: int, topk_group: int, norm: bool, factor: float
) -> tuple[list[int], list[float]]:
    """The router of one token, by the rules: `sorted` is stable, so that ties keep the lower index."""
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(scores) // n_group
    groups = [range(g * size, (g + 1) * size) for g in range(n_group)]

    def group_score(g: int) -> np.float32:
        best = sorted((biased[e] for e in groups[g]), reverse=True)
        return best[0] + best[1]

    kept = (
        sorted(range(n_group), key=lambda g: -group_score(g))[:topk_group] if topk_group < n_group else range(n_group)
    )
    candidates = [e for g in sorted(kept) for e in groups[g]]
    chosen = sorted(sorted(candidates, key=lambda e: -biased[e])[:k])
    weights = [scores[e] for e in chosen]
    if norm:
        total = weights[0]
        for weight in weights[1:]:
            total = total + weight
        weights = [weight / (total + np.float32(1e-20)) for weight in weights]
    return chosen, [float(weight * np.float32(factor)) for weight in weights]


@pytest.mark.parametrize(
    ("experts", "k", "n_group", "topk_group", "norm", "factor"),
    [
        (16, 4, 4, 2, True, 2.5),
        (32, 8, 8, 4, True, 2.5),
        (12, 3, 1, 1, True, 2.446),
        (8, 2, 4, 1, False, 1.0),
        (8, 8, 2, 2, True, 1),
    ],
)
@pytest.mark.parametrize("shift", [0.0, -2.0], ids=["", "negative"])
def test_route_follows_the_rules(
    experts: int, k: int, n_group: int, topk_group: int, norm: bool, factor: float, shift: float
) -> None:
    """Half of the draws have few distinct logits and biases, so that ties decide."""
    for levels in (0, 3):
        logits, bias = normal(300, experts) * 2, normal(experts, seed=1) * 0.2
        if levels:
            logits, bias = (logits / 2).round().clamp(-levels, levels), (bias * 5).round() / 4
        bias = bias + shift
        ids, weights = route(
            logits,
            bias,
            num_experts_per_tok=k,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=norm,
            routed_scaling_factor=factor,
        )
        scores = sigmoid(logits).numpy()
        for row in range(300):
            expected = plain_route(list(scores[row]), list(bias.numpy()), k, n_group, topk_group, norm, factor)
            assert (ids[row].tolist(), weights[row].tolist()) == expected


ROUTE: dict[str, Any] = {
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def sum_in_slices(x: Tensor, weight: Tensor, size: int, order: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
    """The router's logits with slices of another size, or added in another order."""
    parts = zip(x.split(size, 1), weight.split(size, 1), strict=True)
    sums = [linear(a.contiguous(), b.contiguous(), out_dtype=torch.float32) for a, b in parts]
    total = torch.zeros(len(x), len(weight))
    for part in order(sums):
        total = total + part
    return total


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("depth", [2048, 2000])
def test_router_logits_are_sums_of_slices(dtype: torch.dtype, depth: int) -> None:
    x, weight = normal(70, depth, dtype=dtype), normal(16, depth, seed=1, dtype=dtype)
    logits = router_linear(x, weight)
    assert same_bits(logits, sum_in_slices(x, weight, SLICE, list))
    exact = x.double() @ weight.double().t()
    assert (logits - exact).abs().max() < 1e-3
    # The twins: slices of another size, and another order, give other bits.
    assert not torch.equal(logits, sum_in_slices(x, weight, 2 * SLICE, list))
    assert not torch.equal(logits, sum_in_slices(x, weight, SLICE, lambda sums: sums[::-1]))
    assert not torch.equal(logits, linear(x, weight, out_dtype=torch.float32))


def test_a_fused_operation_is_its_parts() -> None:
    """Each composition written out, and the rounding between its parts left away."""
    x, addend = normal(9, 384, dtype=torch.bfloat16), normal(9, 384, seed=1, dtype=torch.bfloat16)
    weight = normal(384, seed=2, dtype=torch.bfloat16)
    total, normalised, values, scales = fused.add_rms_norm_fp8(x, addend, weight, 1e-6, "float32")
    assert same_bits(total, (x.float() + addend.float()).bfloat16())
    assert same_bits(normalised, rms_norm(total, weight, 1e-6))
    expected = fp8.quantize_fp8(normalised, "float32")
    assert same_bits(values.view(torch.uint8), expected[0].view(torch.uint8)) and same_bits(scales, expected[1])
    found = fused.add_rms_norm(x, addend, weight, 1e-6)
    assert same_bits(found[0], total) and same_bits(found[1], normalised)
    assert same_bits(fused.rms_norm_fp8(total, weight, 1e-6, "float32")[1], scales)
    unrounded = rms_norm(x.float() + addend.float(), weight.float(), 1e-6)
    assert not torch.equal(fp8.quantize_fp8(unrounded, "float32")[1], scales)

    gate_up = normal(9, 512, dtype=torch.bfloat16)
    found, expected = fused.silu_and_mul_fp8(gate_up, "ue8m0"), fp8.quantize_fp8(silu_and_mul(gate_up), "ue8m0")
    assert same_bits(found[0].view(torch.uint8), expected[0].view(torch.uint8)) and same_bits(found[1], expected[1])

    rows = torch.tensor([3, 0, 3, 8])
    assert same_bits(fused.permute(x, rows), x[[3, 0, 3, 8]])
    moved = fused.permute_fp8(values, scales, rows)
    assert same_bits(moved[0].float(), values.float()[rows]) and same_bits(moved[1], scales[rows])

    router, bias = normal(16, 384, seed=3, dtype=torch.bfloat16), normal(16, seed=4) * 0.1
    found = moe_router(x, router, bias, **ROUTE)
    expected = route(router_linear(x, router), bias, **ROUTE)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def choose(logits: Tensor, bias: Tensor, k: int, n_group: int = 1, topk_group: int = 1) -> tuple[Tensor, Tensor]:
    return route(
        logits,
        bias,
        num_experts_per_tok=k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )


def test_ties_go_to_the_lower_expert_and_group() -> None:
    assert choose(torch.zeros(1, 8), torch.zeros(8), 3)[0].tolist() == [[0, 1, 2]]
    assert choose(torch.zeros(1, 8), torch.zeros(8), 3, 4, 2)[0].tolist() == [[0, 1, 2]]
    better_third_group = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0])
    assert choose(torch.zeros(1, 8), better_third_group, 3, 4, 2)[0].tolist() == [[0, 1, 4]]


def test_masked_groups_lose_against_negative_scores() -> None:
    """Were their score 0, experts of the groups left out would win."""
    bias = torch.tensor([-3.0, -3.0, -2.0, -2.0])
    ids, weights = choose(torch.zeros(1, 4), bias, 2, 2, 1)
    assert ids.tolist() == [[2, 3]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0, 1.0]])
    ids, weights = choose(logits, torch.tensor([-1.0, 1.0, 0.0, 0.5]), 2)
    expected = sigmoid(torch.tensor([0.0, 1.0]))
    assert ids.tolist() == [[1, 3]]
    assert torch.allclose(weights[0], expected / expected.sum(), rtol=1e-6)


def test_a_row_of_the_router_is_independent_of_the_others() -> None:
    logits, bias = normal(130, 16), normal(16, seed=1) * 0.1
    ids, weights = choose(logits, bias, 4, 4, 2)
    for rows in (1, 2, 15, 64, 65):
        some_ids, some_weights = choose(logits[:rows], bias, 4, 4, 2)
        assert torch.equal(some_ids, ids[:rows]) and same_bits(some_weights, weights[:rows])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_combine_adds_ascending_experts_then_the_shared_one(dtype: torch.dtype) -> None:
    tokens, k, width = 6, 4, 40
    expert_out, shared = normal(tokens * k, width, dtype=dtype), normal(tokens, width, seed=1, dtype=dtype)
    slots = torch.randperm(tokens * k, generator=generator(2)).view(tokens, k)
    weights = torch.rand(tokens, k, generator=generator(3))
    found = combine(expert_out, slots, weights, shared)
    for t in range(tokens):
        rows = [expert_out[slot].float().numpy() for slot in slots[t].tolist()]
        acc = weights[t, 0].numpy() * rows[0]
        for i in range(1, k):
            acc = acc + weights[t, i].numpy() * rows[i]
        assert same_bits(found[t], torch.tensor(acc + shared[t].float().numpy()).to(dtype))
    assert same_bits(combine(expert_out, slots[2:3], weights[2:3], shared[2:3]), found[2:3])
    if dtype == torch.float32:
        descending = combine(expert_out, slots.flip(1), weights.flip(1), shared)
        assert not torch.equal(descending, found)


# Attention

HEADS, LATENT, ROTARY = 2, 32, 8
SCALE = 0.3


def poisoned_pages(keys: list[Tensor], block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys [L, C] of each request on shuffled pages; every slot that holds no token is NaN. Returns (cache, table)."""
    counts = [-(-len(k) // block_size) for k in keys]
    order = torch.randperm(sum(counts) + 3, generator=generator(seed)).tolist()
    cache = torch.full((len(order), block_size, LATENT + ROTARY), torch.nan, dtype=keys[0].dtype)
    table = torch.full((len(keys), max(counts) + 1), len(order) - 1)
    for request, (own, count) in enumerate(zip(keys, counts, strict=True)):
        for i in range(count):
            block = table[request, i] = order.pop()
            part = own[i * block_size : (i + 1) * block_size]
            cache[block, : len(part)] = part
    return cache, table


def attend(queries: list[Tensor], keys: list[Tensor], block_size: int = 64, seed: int = 0) -> list[Tensor]:
    """The last tokens of each request, all in one batch."""
    cache, table = poisoned_pages(keys, block_size, seed)
    counts = [len(q) for q in queries]
    out = mla_attention.mla_attention(
        torch.cat(queries),
        cache,
        table,
        torch.tensor([len(k) for k in keys]),
        torch.tensor([0, *counts]).cumsum(0),
        kv_lora_rank=LATENT,
        scale=SCALE,
    )
    return list(out.split(counts))


def sequence(length: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries [L, H, C] and keys [L, C] of a whole sequence."""
    return (
        normal(length, HEADS, LATENT + ROTARY, seed=seed, dtype=dtype),
        normal(length, LATENT + ROTARY, seed=seed + 1000, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_pages_chunks_and_batch_mates_change_no_bit(block_size: int, dtype: torch.dtype) -> None:
    q, keys = sequence(200, 0, dtype)
    (whole,) = attend([q], [keys], block_size=200)
    assert whole.isfinite().all()
    assert same_bits(attend([q], [keys], block_size, seed=1)[0], whole), "shuffled pages"
    for chunks in ([1] * 200, [64, 64, 64, 8], [63, 1, 66, 70], [199, 1], [5, 195]):
        end, parts = 0, []
        for chunk in chunks:
            parts += attend([q[end : end + chunk]], [keys[: end + chunk]], block_size)
            end += chunk
        assert same_bits(torch.cat(parts), whole), f"chunks {chunks[:4]}"
    mates = [sequence(length, length, dtype) for length in (1, 65, 300)]
    others = [(mates[0][0], mates[0][1]), (mates[1][0][-3:], mates[1][1]), (mates[2][0][-70:], mates[2][1])]
    batch = [others[0], (q[-20:], keys), others[1], (q[:130], keys[:130]), others[2]]
    found = attend([b[0] for b in batch], [b[1] for b in batch], block_size, seed=2)
    assert same_bits(found[1], whole[-20:]) and same_bits(found[3], whole[:130]), "batch mates"
    for i, (mate_q, mate_keys) in zip((0, 2, 4), others, strict=True):
        assert same_bits(found[i], attend([mate_q], [mate_keys])[0])


def plain_attention(q: Tensor, keys: Tensor) -> Tensor:
    """One query [H, C] after all `keys` [L, C], split by split, block by block; only the matrix products are the
    library's.
    """
    f = np.float32

    def exp2(x: np.ndarray) -> np.ndarray:
        return exp2_of_nonpositive(torch.from_numpy(x)).numpy()

    def split_triple(keys: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        largest, total, output = np.full((HEADS, 1), -np.inf, f), np.zeros((HEADS, 1), f), np.zeros((HEADS, LATENT), f)
        for start in range(0, len(keys), 64):
            block = torch.zeros(64, LATENT + ROTARY)
            block[: len(keys) - start] = keys[start : start + 64].float()
            scores = tile.tiled_linear(q.float(), block).numpy()
            scores[:, len(keys) - start :] = -np.inf
            factor = f(SCALE * LOG2_E)
            # Products are exact in fp64; the second rounding of a difference shows once in 2**29.
            products = scores.astype(np.float64) * np.float64(factor)
            new = np.maximum(largest, (np.ceil(products.max(1, keepdims=True) / 8) * 8).astype(f))
            p, alpha = exp2((products - new).astype(f)), exp2(largest - new)
            p = torch.from_numpy(p).to(q.dtype).float().numpy()
            sums = np.array([[plain_fold(list(row), 64)] for row in p])
            values = block[:, :LATENT].t().contiguous()
            total = total * alpha + sums
            output = output * alpha + tile.tiled_linear(torch.from_numpy(p).to(q.dtype).float(), values).numpy()
            largest = new
        return largest, total, output

    largest, total, output = split_triple(keys[:1024])
    for start in range(1024, len(keys), 1024):
        behind = split_triple(keys[start : start + 1024])
        new = np.maximum(largest, behind[0])
        ours, theirs = exp2(largest - new), exp2(behind[0] - new)
        total, output = total * ours + behind[1] * theirs, output * ours + behind[2] * theirs
        largest = new
    return torch.from_numpy(output * (f(1) / total)).to(q.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_in_plain_fp32(dtype: torch.dtype) -> None:
    q, keys = sequence(150, 0, dtype)
    (out,) = attend([q], [keys], 16)
    for position in (0, 1, 62, 63, 64, 65, 127, 128, 149):
        assert same_bits(out[position], plain_attention(q[position], keys[: position + 1]))


# Queries that see the last key of a split, and those that see one or two of the next.
BORDERS = (1022, 1023, 1024, 1025, 2047, 2048, 2049, 3071, 3072)


@pytest.fixture(scope="module")
def long() -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of 3100 tokens, and the attention of all of them at once."""
    q, keys = sequence(3100, 0, torch.bfloat16)
    return q, keys, attend([q], [keys])[0]


def test_splits_in_plain_fp32(long: tuple[Tensor, Tensor, Tensor]) -> None:
    q, keys, whole = long
    for position in (*BORDERS, 3099):
        assert same_bits(whole[position], plain_attention(q[position], keys[: position + 1]))


def test_decode_chunks_and_batches_across_the_borders_of_splits(long: tuple[Tensor, Tensor, Tensor]) -> None:
    q, keys, whole = long
    for position in BORDERS:
        (alone,) = attend([q[position : position + 1]], [keys[: position + 1]])
        assert same_bits(alone[0], whole[position]), f"decode at {position}"
        (two,) = attend([q[position - 1 : position + 1]], [keys[: position + 1]], 16)
        assert same_bits(two, whole[position - 1 : position + 1]), f"verify at {position}"
        first, second = attend([q[:70], q[position - 65 : position + 1]], [keys[:70], keys[: position + 1]], seed=3)
        assert same_bits(first, whole[:70]) and same_bits(second, whole[position - 65 : position + 1])


def split_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter splits for fewer queries, as a kernel chooses that fills its card."""
    honest = mla_attention.attend

    def by_batch(queries: Tensor, *args: object) -> Tensor:
        monkeypatch.setattr(mla_attention, "SPLIT_KEYS", 1024 if len(queries) > 8 else 256)
        return honest(queries, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(mla_attention, "attend", by_batch)


@pytest.mark.parametrize("split", [512, 2048, 4096])
def test_another_split_gives_other_bits(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: where the keys are cut is part of the arithmetic, if only of its last bits."""
    q, keys = sequence(3100, 0, torch.float32)
    (honest,) = attend([q[-20:]], [keys])
    monkeypatch.setattr(mla_attention, "SPLIT_KEYS", split)
    (other,) = attend([q[-20:]], [keys])
    assert int((other != honest).sum()) > 20
    assert (other - honest).abs().max() < 1e-5


def test_splits_chosen_by_the_batch_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys = sequence(3100, 0, torch.float32)
    (honest,) = attend([q[-20:]], [keys])
    split_by_batch(monkeypatch)
    (many,) = attend([q[-20:]], [keys])
    assert same_bits(many, honest)
    (few,) = attend([q[-2:]], [keys])
    assert not same_bits(few, honest[-2:])


def test_another_order_of_the_fold_is_caught() -> None:
    q, keys = sequence(3100, 0, torch.float32)
    rows = q[-20:].flatten(0, 1)
    keys = torch.nn.functional.pad(keys, (0, 0, 0, -len(keys) % 64))
    a, b, c = (
        mla_attention.attend_split(rows, HEADS, 3080 - start, part, LATENT, SCALE, mla_attention.CPU_PRODUCTS)
        for start, part in zip((0, 1024, 2048), keys.split(1024), strict=False)
    )
    fold = mla_attention.fold
    left, right = fold(fold(a, b), c), fold(a, fold(b, c))
    assert int((left.output != right.output).sum()) > 100
    assert torch.allclose(left.output / left.total, right.output / right.total, rtol=1e-4, atol=1e-6)


def float64_attention(q: Tensor, keys: Tensor) -> Tensor:
    scores = torch.einsum("qhc,kc->hqk", q.double(), keys.double()) * SCALE
    future = torch.ones(len(q), len(keys), dtype=torch.bool).triu(len(keys) - len(q) + 1)
    return torch.einsum("hqk,kc->qhc", scores.masked_fill(future, -torch.inf).softmax(-1), keys[:, :LATENT].double())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_attention_against_float64(dtype: torch.dtype, bound: float) -> None:
    """Measured: 1.6e-6 and 9.2e-3, of values up to 3.1."""
    q, keys = sequence(300, 0, dtype)
    exact = float64_attention(q, keys)
    error = float((attend([q], [keys])[0] - exact).abs().max())
    print(f"{dtype}: {error:.2e} of {float(exact.abs().max()):.2f}")
    assert error < bound
    # One more key seen, or one fewer, is far outside.
    ahead = float64_attention(torch.cat((q, q[:1])), torch.cat((keys, keys[:1])))[1:]
    assert (ahead - exact).abs().max() > 10 * bound


@pytest.mark.parametrize("key_block", [16, 128])
def test_another_key_block_gives_other_bits(key_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a kernel that splits the keys in another way is another arithmetic."""
    q, keys = sequence(200, 0, torch.float32)
    (whole,) = attend([q], [keys])
    monkeypatch.setattr(mla_attention, "KEY_BLOCK", key_block)
    (other,) = attend([q], [keys])
    assert int((other != whole).sum()) > 100
    assert (other - whole).abs().max() < 1e-5


def test_large_scores_neither_overflow_nor_leak() -> None:
    """What rounds a probability rounds its sum: a key that is alone is returned as it is."""
    q, keys = sequence(130, 0, torch.bfloat16)
    keys[100] = q[-1, 0] * 1000
    (out,) = attend([q], [keys])
    assert out.isfinite().all()
    assert (out[-1, 0] - keys[100, :LATENT]).abs().max() == 0
    assert same_bits(out[:100], attend([q[:100]], [keys[:100]])[0])


def test_maxima_are_the_next_multiples_of_eight() -> None:
    """Up to 2**27 the next integer multiple, beyond the next fp32 number: never below the product."""
    x = normal(4000, seed=1) * torch.exp2(torch.linspace(-140, 29, 4000))
    y = normal(4000, seed=2)
    exact, found = x.double() * y.double(), mla_attention.step_above(x, y).double()
    assert (found >= exact).all() and (found % 8 == 0).all()
    assert (found - exact <= torch.clamp(exact.abs() * 2**-23, min=8)).all()
    assert (((x * y / 8).ceil() * 8).double() < exact).any(), "the twin: rounded once more than up"


def test_scores_that_fp32_barely_tells_apart() -> None:
    """The product of score and factor is not rounded before the maximum is subtracted: no probability exceeds one."""
    q, keys = sequence(70, 0, torch.bfloat16)
    keys[3] = q[-1, 0]
    q, keys = q * 2.0**12, keys * 2.0**12
    (out,) = attend([q], [keys])
    print("largest score in units of log 2:", float((q[-1, 0].float() @ keys[3].float()) * SCALE * LOG2_E))
    assert out.isfinite().all()
    assert same_bits(out[-1, 0], keys[3, :LATENT])


def test_attention_of_nothing() -> None:
    assert attend([torch.empty(0, HEADS, LATENT + ROTARY)], [normal(5, LATENT + ROTARY)])[0].shape == (0, HEADS, LATENT)


# Inputs that the contracts refuse: (message, call)

X = torch.zeros(2, 256)
HEADS_X = torch.zeros(2, 3, 8)
Q8, S8 = fp8.quantize_fp8(X, "ue8m0")
W8, WS8 = fp8.quantize_weight(torch.zeros(130, 256), "ue8m0")
CACHE = torch.zeros(4, 16, 40)
QUERIES = torch.zeros(3, 2, 40)


def attention_of(
    q: Tensor = QUERIES,
    cache: Tensor = CACHE,
    table: tuple[int, ...] = (0, 1),
    length: int = 20,
    starts: tuple[int, ...] = (0, 3),
    scale: float = 1.0,
) -> Tensor:
    return mla_attention.mla_attention(
        q, cache, torch.tensor([table]), torch.tensor([length]), torch.tensor(starts), kv_lora_rank=32, scale=scale
    )


REFUSED: list[tuple[str, Callable[[], object]]] = [
    (r"linear: x has shape \(2,\)", lambda: linear(X[:, 0].contiguous(), X)),
    (r"linear: x is torch.float64", lambda: linear(X.double(), X.double())),
    (r"linear: x of shape \(256, 2\) is not contiguous", lambda: linear(X.t(), torch.zeros(4, 2))),
    (r"linear: weight is torch.bfloat16", lambda: linear(X, X.bfloat16())),
    (r"linear: x has K=256, weight has K=128", lambda: linear(X, torch.zeros(4, 128))),
    (r"linear: out_dtype is torch.bfloat16", lambda: linear(X, X, out_dtype=torch.bfloat16)),
    (
        r"head_linear: x of shape \(2, 3, 8\).*\(4, 5, 8\)",
        lambda: head_linear(torch.zeros(2, 3, 8), torch.zeros(4, 5, 8)),
    ),
    (r"head_linear: weight is not", lambda: head_linear(HEADS_X, torch.zeros(3, 8, 5).transpose(1, 2))),
    (r"grouped_linear: weight is torch.bfloat16", lambda: grouped_linear(X, torch.tensor([2]), X.bfloat16()[None])),
    (r"grouped_linear: expert_counts sum to 3, x has 2", lambda: grouped_linear(X, torch.tensor([3]), X[None])),
    (r"quantize_fp8: K=200", lambda: fp8.quantize_fp8(torch.zeros(2, 200), "ue8m0")),
    (r"quantize_fp8: x is torch.float16", lambda: fp8.quantize_fp8(X.half(), "ue8m0")),
    (r"fp8_linear: x is torch.float32", lambda: fp8.fp8_linear(X, S8, W8, WS8)),
    (r"fp8_linear: weight is torch.float32", lambda: fp8.fp8_linear(Q8, S8, X, WS8)),
    (r"fp8_linear: x has K=256, weight has K=128", lambda: fp8.fp8_linear(Q8, S8, W8[:, :128].contiguous(), WS8)),
    (r"fp8_linear: x_scale has shape \(2, 1\)", lambda: fp8.fp8_linear(Q8, S8[:, :1], W8, WS8)),
    (r"fp8_linear: weight_scale has shape \(1, 2\)", lambda: fp8.fp8_linear(Q8, S8, W8, WS8[:1])),
    (r"rms_norm: weight is torch.bfloat16", lambda: rms_norm(X, torch.ones(256).bfloat16(), 1e-6)),
    (r"rms_norm: weight has shape \(255,\)", lambda: rms_norm(X, torch.ones(255), 1e-6)),
    (r"silu_and_mul: gate_up has an odd width 255", lambda: silu_and_mul(torch.zeros(2, 255))),
    (r"rope: x of shape \(2, 1, 8\).*\(2, 3\)", lambda: rope(torch.zeros(2, 1, 8), X[:, :3], X[:, :3])),
    (r"router_linear: x has K=256, weight has K=255", lambda: router_linear(X, torch.zeros(3, 255))),
    (r"router_linear: weight is torch.bfloat16", lambda: router_linear(X, X.bfloat16())),
    (r"add_rms_norm: x has shape \(2, 256\), addend \(1, 256\)", lambda: fused.add_rms_norm(X, X[:1], X[0], 1e-6)),
    (r"add_rms_norm: x is torch.float32, addend", lambda: fused.add_rms_norm(X, X.bfloat16(), X[0], 1e-6)),
    (r"route: logits is torch.bfloat16", lambda: choose(torch.zeros(1, 4).bfloat16(), torch.zeros(4), 2)),
    (r"route: e_score_correction_bias is torch.bfloat16", lambda: choose(X, torch.zeros(256).bfloat16(), 2)),
    (r"route: e_score_correction_bias is .*\(3,\)", lambda: choose(X, torch.zeros(3), 2)),
    (r"combine: slots .*\[2, 2\].*\[2, 3\]", lambda: combine(X, torch.zeros(2, 2).long(), torch.zeros(2, 3), X)),
    (r"combine: topk_weights is torch.bfloat16", lambda: combine(X, torch.zeros(2, 2).long(), X[:, :2].bfloat16(), X)),
    (r"mla_attention: q has shape \(3, 40\)", lambda: attention_of(q=QUERIES[:, 0])),
    (r"mla_attention: latent_cache has shape \(4, 16, 39\)", lambda: attention_of(cache=CACHE[..., :39])),
    (r"mla_attention: latent_cache is torch.bfloat16", lambda: attention_of(cache=CACHE.bfloat16())),
    (r"mla_attention: scale is 0.0, expected a positive", lambda: attention_of(scale=0.0)),
    (r"mla_attention: scale is nan", lambda: attention_of(scale=float("nan"))),
    (r"mla_attention: 1 seq_lens, 3 query_start_loc", lambda: attention_of(starts=(0, 1, 3))),
    (r"mla_attention: query_start_loc ends at 2, q has 3", lambda: attention_of(starts=(0, 2))),
    (r"mla_attention: query_start_loc .*\[1, 3\]", lambda: attention_of(starts=(1, 3))),
    (r"mla_attention: request 0 has seq_len 2 and 3 queries", lambda: attention_of(length=2)),
    (r"mla_attention: request 0 of 33 tokens needs 3 blocks of 16, .* has 2", lambda: attention_of(length=33)),
    (r"mla_attention: request 0 of 20 tokens has block 4 at 1, .* has 4", lambda: attention_of(table=(0, 4))),
    (r"mla_attention: request 0 of 20 tokens has block -1 at 1", lambda: attention_of(table=(0, -1))),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_a_wrong_input_is_named(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        call()


def test_the_inputs_beside_the_refused_ones_are_accepted() -> None:
    assert attention_of().shape == (3, 2, 32)
    assert fp8.fp8_linear(Q8, S8, W8, WS8).shape == (2, 130)


def test_several_threads_or_reduced_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tile.check_one_thread()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with pytest.raises(InputError, match="4 threads"):
        tile.check_one_thread()
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    with pytest.raises(InputError, match="'medium'"):
        tile.check_one_thread()
