"""Online 1x128 quantization to e4m3: a CTA takes several groups of 128 numbers."""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.kernels.triton.elementary import EXACT, divide, negative, reciprocal_guess
from dsv3_plugin.kernels.triton.scales import empty_scales
from dsv3_plugin.ops import quantize as contracts
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import ScaleFormat

_GROUPS = 32
_INVERSE_OF_448 = tl.constexpr(0.002232142724096775)


@triton.jit
def _divide_by_448(amax):
    """amax / 448 of a bf16 number, correctly rounded: a product and one correction. Tried for all mantissas."""
    guess = amax * _INVERSE_OF_448
    return tl.fma(tl.fma(guess, 448.0, negative(amax)), -_INVERSE_OF_448, guess)


@triton.jit
def _smallest_or_one(amax, scale):
    return tl.where(amax == 0, 1.0, tl.maximum(scale, 1.1754943508222875e-38))


@triton.jit
def _quotient_for_e4m3(wide, scale):
    """A number that e4m3 rounds as it rounds wide [G, 128] / scale [G], where wide is bf16 and scale its group's.

    The inverse is two numbers, so that the quotient has an error far below fp32's. It may be another fp32 number than
    the rounded quotient, but e4m3 sees no difference: 448 wide / amax either is a border between two e4m3 numbers or is
    2**-13 of it away. Tried for every bf16 amax and each smaller number. The first part is a bit too small, whatever
    the hardware's approximation; so the second has its sign, and -0 stays -0.
    """
    most = (reciprocal_guess(scale).to(tl.int32, bitcast=True) - 2).to(tl.float32, bitcast=True)
    rest = tl.fma(negative(scale), most, 1.0) * most
    return tl.fma(wide, most[:, None], wide * rest[:, None])


@triton.jit
def quantize_groups(wide, BF16: tl.constexpr, UE8M0: tl.constexpr):
    """wide fp32 [G, 128] to (e4m3 [G, 128], fp32 scales [G]). `BF16`: the numbers are bf16."""
    amax = tl.max(tl.abs(wide), 1)
    if UE8M0:
        bits = amax.to(tl.int32, bitcast=True)
        exponent = tl.maximum((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
        exponent = tl.where(amax == 0, 127, exponent)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        # The inverse of a power of two is exact, so a product is the quotient.
        quotient = wide * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    else:
        if BF16:
            scale = _smallest_or_one(amax, _divide_by_448(amax))
            quotient = _quotient_for_e4m3(wide, scale)
        else:
            scale = _smallest_or_one(amax, divide(amax, 448.0))
            quotient = divide(wide, scale[:, None])
    # The conversion clamps.
    return quotient.to(tl.float8e4nv), scale


@triton.jit
def _quantize(x, values, scales, groups, row_groups, scale_stride, GROUPS: tl.constexpr, UE8M0: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    offset = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = group < groups
    wide = tl.load(x + offset, mask=inside[:, None], other=0).to(tl.float32)
    quantized, scale = quantize_groups(wide, x.dtype.element_ty == tl.bfloat16, UE8M0)
    tl.store(values + offset, quantized, mask=inside[:, None])
    target = scales + group // row_groups + group % row_groups * scale_stride
    tl.store(target, scale, mask=inside)


@implements(contracts.quantize_fp8)
def quantize_fp8(x: torch.Tensor, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """x bf16 or fp32 [M, K] to (e4m3 [M, K], fp32 scales [M, K / 128]). Raises `InputError`."""
    op = "quantize_fp8"
    require_matrix(op, "x", x, (torch.bfloat16, torch.float32))
    require(x.shape[1] % FP8_BLOCK == 0, op, f"K={x.shape[1]} is not a multiple of {FP8_BLOCK}")
    values = torch.empty_like(x, dtype=E4M3)
    scales = empty_scales(x.shape[0], x.shape[1], x.device)
    groups = scales.numel()
    if groups:
        grid = (triton.cdiv(groups, _GROUPS),)
        _quantize[grid](
            x,
            values,
            scales,
            groups,
            scales.shape[1],
            scales.stride(1),
            _GROUPS,
            scale_format == "ue8m0",
            num_warps=4,
            **EXACT,
        )
    return values, scales
