"""Products in slices: each slice's own product, added by a tree, rounded once."""

from __future__ import annotations

import pytest
import torch
from bits import FLOATS, SCALE_FORMATS, normal, same_bits

from dsv3_plugin.ops.fp8_linear import fp8_linear
from dsv3_plugin.ops.linear import linear
from dsv3_plugin.ops.quantize import quantize_fp8, quantize_weight
from dsv3_plugin.ops.sliced_linear import sliced_fp8_linear, sliced_linear
from dsv3_plugin.profile import ScaleFormat


def test_no_slice_is_left_over() -> None:
    """A weight with half of the slices is no weight of a shorter sum."""
    with pytest.raises(ValueError, match="shorter"):
        sliced_linear(torch.ones(2, 4), torch.ones(3, 2), 4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_tree_adds_the_products_of_slices(dtype: torch.dtype) -> None:
    x, weight = normal(5, 512, dtype=dtype), normal(24, 512, seed=1, dtype=dtype)
    sums = [
        linear(x[:, k : k + 128].contiguous(), weight[:, k : k + 128].contiguous(), out_dtype=torch.float32)
        for k in range(0, 512, 128)
    ]
    expected = (sums[0] + sums[1]) + (sums[2] + sums[3])
    assert same_bits(sliced_linear(x, weight, 4, out_dtype=torch.float32), expected)
    assert same_bits(sliced_linear(x, weight, 4), expected.to(dtype))
    assert same_bits(sliced_linear(x, weight, 1, out_dtype=torch.float32), linear(x, weight, out_dtype=torch.float32))
    # The twins: from left to right, the slices in another order, and other slices: a CPU's library may add as some do.
    assert not same_bits(((sums[0] + sums[1]) + sums[2]) + sums[3], expected)
    assert not same_bits((sums[0] + sums[2]) + (sums[1] + sums[3]), expected)
    others = (sliced_linear(x, weight, slices, out_dtype=torch.float32) for slices in (2, 8, 16))
    assert any(not same_bits(other, expected) for other in others)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_the_same_in_fp8(scale_format: ScaleFormat) -> None:
    x = quantize_fp8(normal(5, 1024, dtype=torch.bfloat16), scale_format)
    weight = quantize_weight(normal(130, 1024, seed=1), scale_format)
    sums = [
        fp8_linear(*(part.chunk(4, 1)[i].contiguous() for part in (*x, *weight)), out_dtype=torch.float32)
        for i in range(4)
    ]
    expected = (sums[0] + sums[1]) + (sums[2] + sums[3])
    assert same_bits(sliced_fp8_linear(*x, *weight, 4, out_dtype=torch.float32), expected)
    assert same_bits(sliced_fp8_linear(*x, *weight, 4), expected.bfloat16())
    assert same_bits(sliced_fp8_linear(*x, *weight, 1), fp8_linear(*x, *weight))
    assert not same_bits(((sums[0] + sums[1]) + sums[2]) + sums[3], expected)


def test_a_ranks_slices_are_a_branch() -> None:
    x, weight = normal(5, 512, dtype=torch.bfloat16), normal(24, 512, seed=1, dtype=torch.bfloat16)
    halves = (
        sliced_linear(a.contiguous(), b.contiguous(), 4, out_dtype=torch.float32)
        for a, b in zip(x.chunk(2, 1), weight.chunk(2, 1), strict=True)
    )
    assert same_bits(sum(halves), sliced_linear(x, weight, 8, out_dtype=torch.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_sum_is_that_of_the_whole_product(dtype: torch.dtype) -> None:
    x, weight = normal(5, 512, dtype=dtype), normal(24, 512, seed=1, dtype=dtype)
    exact = x.double() @ weight.double().T
    assert (sliced_linear(x, weight, 8, out_dtype=torch.float32) - exact).abs().max() < 1e-4
