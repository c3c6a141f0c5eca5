"""The quotient of `kernels.quantize` is another fp32 number than x / scale at times, but never another e4m3 number."""

from __future__ import annotations

import pytest
import torch

from dsv3_plugin.ops.elementary import fma
from dsv3_plugin.ops.quantize import scale_for, to_e4m3

# Exponents of amax: subnormal, scales at and near the smallest, small, one, large, the largest.
EXPONENTS = (0, 1, 8, 9, 10, 60, 127, 200, 254)


def wrong(exponent: int, hardware_error: int, with_rest: bool = True) -> int:
    """How many numbers are rounded otherwise, of all bf16 numbers from each amax of an exponent down to 2**-27 of it.

    `hardware_error`: how many fp32 numbers the hardware's approximation lies beside the rounded inverse.
    """
    pattern = (exponent << 7) + torch.arange(exponent == 0, 128, dtype=torch.int32)
    amax = (pattern << 16).view(torch.float32)
    scale = scale_for(amax, "float32")
    guess = ((1 / scale.double()).float().view(torch.int32) + hardware_error).view(torch.float32)
    most = (guess.view(torch.int32) - 2).view(torch.float32)
    rest = fma(-scale, most, torch.ones_like(scale)) * most if with_rest else torch.zeros_like(scale)
    x = ((pattern[:, None] - torch.arange(27 * 128, dtype=torch.int32)).clamp_min(0) << 16).view(torch.float32)
    x = torch.stack([x, -x])
    quotient = fma(x, most[:, None].expand_as(x), x * rest[:, None])
    expected = to_e4m3(x / scale[:, None])
    return int((to_e4m3(quotient).view(torch.uint8) != expected.view(torch.uint8)).sum())


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_e4m3_is_that_of_the_rounded_quotient(exponent):
    for hardware_error in (-1, 0, 1):
        assert wrong(exponent, hardware_error) == 0


def test_one_number_for_the_inverse_is_not_enough():
    """Twin: borders between two e4m3 numbers are met exactly, and the sum of both parts decides them."""
    assert all(wrong(127, error, with_rest=False) > 0 for error in (-1, 0, 1, 2, 3))
