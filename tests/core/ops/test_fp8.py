"""Scales, e4m3 values and fp8 products, on exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from bits import FLOATS, SCALE_FORMATS, generator, normal, same_bits
from plain import BF16_BITS, rounded

from dsv3_plugin.ops import fp8_linear as fp8
from dsv3_plugin.ops import quantize
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import ScaleFormat

Tensor = torch.Tensor


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
    found = quantize.scale_for(amax, "ue8m0")
    for value, scale in zip(amax.tolist(), found.tolist(), strict=True):
        assert Fraction(scale) == power_of_two_scale(Fraction(value)), f"amax = {value}"


def test_fractional_scales_are_correctly_rounded() -> None:
    amax = normal(300).abs() * 1000
    for value, scale in zip(amax.tolist(), quantize.scale_for(amax, "float32").tolist(), strict=True):
        assert Fraction(scale) == rounded(Fraction(value) / 448)
    # The smallest scale: below it a power of two is no normal number.
    assert quantize.scale_for(torch.tensor([1e-40]), "float32").tolist() == [2.0**-126]


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_a_zero_block_has_scale_one(scale_format: ScaleFormat) -> None:
    x = torch.zeros(2, 256)
    x[1, 130] = 3.5
    quantized, scale = quantize.quantize_fp8(x, scale_format)
    assert scale[0].tolist() == [1.0, 1.0] and scale[1, 0] == 1
    assert scale[1, 1] == 3.5 / 448
    assert quantized[0].float().tolist() == [0.0] * 256
    # No floor but that one: a block of small numbers keeps them.
    small, scale = quantize.quantize_fp8(torch.full((1, 128), 1e-8), scale_format)
    assert (small.float() * scale).div(1e-8).sub(1).abs().max() < 2**-4
    assert quantize.quantize_weight(torch.zeros(130, 100), scale_format)[1].tolist() == [[1.0], [1.0]]


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    codes = torch.arange(0, 127, dtype=torch.uint8).view(E4M3)
    values = codes.float()
    assert values[-1] == 448 and bool((values.diff() > 0).all())
    middle = (values[1:] + values[:-1]) / 2
    even = torch.where(torch.arange(126) % 2 == 0, values[:-1], values[1:])
    assert torch.equal(quantize.to_e4m3(middle).float(), even)
    assert torch.equal(quantize.to_e4m3(middle.nextafter(torch.tensor(1e9))).float(), values[1:])
    assert torch.equal(quantize.to_e4m3(middle.nextafter(torch.tensor(-1.0))).float(), values[:-1])
    assert torch.equal(quantize.to_e4m3(-values).float(), -values)
    large = torch.tensor([448.0, 448.001, 464.0, 465.0, 1e30, torch.inf])
    assert quantize.to_e4m3(large).float().tolist() == [448.0] * 6
    assert quantize.to_e4m3(-large).float().tolist() == [-448.0] * 6


def test_activations_are_divided_by_their_scale() -> None:
    """Multiplying by a rounded reciprocal instead moves some of these quotients, all on a border, to the wrong side."""
    values = torch.arange(0, 127, dtype=torch.uint8).view(E4M3).float()
    middle = (values[1:] + values[:-1]) / 2
    even = torch.where(torch.arange(126) % 2 == 0, values[:-1], values[1:])
    scales = torch.arange(1, 400, 2).float().unsqueeze(1)
    x = torch.cat((middle, torch.tensor([448.0, 0.0]))) * scales
    quantized, found = quantize.quantize_fp8(x, "float32")
    assert torch.equal(found, scales)
    assert bool((quantized.float()[:, :126] == even).all())
    assert not torch.equal(quantize.to_e4m3(x * (1 / scales)).float(), quantized.float())


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_a_nan_activation_stays_visible(scale_format: ScaleFormat) -> None:
    x = normal(1, 256)
    x[0, 7] = torch.nan
    quantized, scale = quantize.quantize_fp8(x, scale_format)
    weight, weight_scale = quantize.quantize_weight(normal(4, 256, seed=1), scale_format)
    assert fp8.fp8_linear(quantized, scale, weight, weight_scale).isnan().all()


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantized_activations_are_within_half_a_step(dtype: torch.dtype, scale_format: ScaleFormat) -> None:
    x = normal(20, 384, dtype=dtype) * torch.logspace(-6, 6, 20).unsqueeze(1)
    quantized, scale = quantize.quantize_fp8(x.to(dtype), scale_format)
    error = (quantized.double().unflatten(1, (3, 128)) * scale.double().unsqueeze(-1)).flatten(1) - x.to(dtype).double()
    # Half a step: 2**-4 of a normal number, 2**-10 scales of a subnormal one.
    bound = torch.maximum(x.double().abs() * 2**-4, scale.double().repeat_interleave(128, 1) * 2**-10)
    assert (error.abs() / bound).max() < 1 + 1e-6
    assert quantized.float().abs().unflatten(1, (3, 128)).amax(-1).min() > (224 if scale_format == "ue8m0" else 447) - 8


@pytest.mark.parametrize("shape", [(128, 128), (130, 256), (300, 192), (1, 1)])
def test_a_weight_on_the_grid_survives_quantization(shape: tuple[int, int]) -> None:
    """Blocks of e4m3 values times a power of two of their own are returned exactly, with those very scales."""
    blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
    values = torch.randint(0, 127, shape, generator=generator(0)).to(torch.uint8)
    values[::128, ::128] = 126  # 448 in each block, which makes its scale the power itself
    scale = torch.ldexp(torch.ones(blocks), torch.randint(-20, 20, blocks, generator=generator(1)))
    signs = torch.randint(0, 2, shape, generator=generator(2)) * 2 - 1
    weight = values.view(E4M3).float() * signs * quantize.expand_scale(scale, *shape)
    for scale_format in SCALE_FORMATS:
        quantized, found = quantize.quantize_weight(weight, scale_format)
        assert quantized.dtype == E4M3 and torch.equal(found, scale)
        assert torch.equal(quantize.dequantize_weight(quantized, found), weight)
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
    x, x_scale = quantize.quantize_fp8(normal(3, 640) * torch.tensor([[1e-3], [1.0], [1e4]]), scale_format)
    weight, weight_scale = quantize.quantize_weight(normal(140, 640, seed=1), scale_format)
    found = fp8.fp8_linear(x, x_scale, weight, weight_scale)
    assert found.dtype == torch.bfloat16
    assert found.flatten().tolist() == exact_fp8_linear(x, x_scale, weight, weight_scale, fused=True)


def test_fp8_linear_fuses_the_multiplication_with_the_sum() -> None:
    """The second half of K undoes the first: a fused sum leaves the first rounding's error, an unfused one zero."""
    row, scale = quantize.quantize_fp8(normal(8, 128), "float32")
    x, x_scale = torch.cat((row.float(), -row.float()), 1).to(E4M3), scale.repeat(1, 2)
    half, half_scale = quantize.quantize_weight(normal(8, 128, seed=1), "float32")
    weight, weight_scale = torch.cat((half.float(), half.float()), 1).to(E4M3), half_scale.repeat(1, 2)
    found = fp8.fp8_linear(x, x_scale, weight, weight_scale).flatten().tolist()
    assert found == exact_fp8_linear(x, x_scale, weight, weight_scale, fused=True)
    assert exact_fp8_linear(x, x_scale, weight, weight_scale, fused=False) == [0.0] * 64
    assert sum(value != 0 for value in found) > 32
    ones = torch.ones_like(x_scale), torch.ones_like(weight_scale)
    assert fp8.fp8_linear(x, ones[0], weight, ones[1]).flatten().tolist() == [0.0] * 64


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_grouped_fp8_linear_is_one_fp8_linear_an_expert(scale_format: ScaleFormat) -> None:
    counts = torch.tensor([3, 0, 70, 1])
    x, x_scale = quantize.quantize_fp8(normal(74, 256), scale_format)
    pairs = [quantize.quantize_weight(normal(136, 256, seed=e), scale_format) for e in range(4)]
    weight, scale = torch.stack([w.view(torch.uint8) for w, _ in pairs]).view(E4M3), torch.stack([s for _, s in pairs])
    spans = [(0, slice(0, 3)), (2, slice(3, 73)), (3, slice(73, 74))]
    expected = torch.cat([fp8.fp8_linear(x[span], x_scale[span], weight[e], scale[e]) for e, span in spans])
    assert same_bits(fp8.grouped_fp8_linear(x, x_scale, counts, weight, scale), expected)


def test_experts_without_rows_have_none() -> None:
    counts = torch.zeros(2, dtype=torch.int64)
    weight, weight_scale = quantize.quantize_weight(torch.zeros(2, 256, 128), "ue8m0")
    out = fp8.grouped_fp8_linear(*quantize.quantize_fp8(torch.zeros(0, 128), "ue8m0"), counts, weight, weight_scale)
    assert out.shape == (0, 256) and out.dtype == torch.bfloat16
