"""Online 1x128 quantisation to e4m3: a program takes several groups of 128 numbers."""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.kernels.scales import empty_scales
from dsv3_plugin.kernels.triton_math import EXACT, divide, negative, reciprocal
from dsv3_plugin.ops.contract import require, require_matrix
from dsv3_plugin.ops.fp8 import E4M3
from dsv3_plugin.profile import ScaleFormat

_GROUPS = 32
# Below this scale a group is multiplied by the second number first, so that remainders stay normal.
_SMALL = tl.constexpr(2.0**-64)
_ENLARGE = tl.constexpr(2.0**64)
_INVERSE_OF_448 = tl.constexpr(0.002232142724096775)


@triton.jit
def _quotient(a, b, inverse):
    """a / b of a bf16 number, correctly rounded, with b's correctly rounded inverse: a product and one correction.

    Tried for all mantissas of bf16 and fp32. The signs are such that -0 stays -0.
    """
    guess = a * inverse
    return tl.fma(tl.fma(guess, b, negative(a)), negative(inverse), guess)


@triton.jit
def _smallest_or_one(amax, scale):
    return tl.where(amax == 0, 1.0, tl.maximum(scale, 1.1754943508222875e-38))


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
            scale = _smallest_or_one(amax, _quotient(amax, 448.0, _INVERSE_OF_448))
            enlarge = tl.where(scale < _SMALL, _ENLARGE, 1.0)
            divisor = scale * enlarge
            quotient = _quotient(wide * enlarge[:, None], divisor[:, None], reciprocal(divisor)[:, None])
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
