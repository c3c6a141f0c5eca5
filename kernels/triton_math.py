"""The elementary functions of `dsv3_plugin.ops.elementary` for Triton kernels, bit for bit.

A kernel that uses them is launched with `**EXACT`: products and sums stay separate IEEE operations. Division and square
root are the correctly rounded ones; rounding to an integer adds and subtracts 1.5 * 2**23.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import triton
import triton.language as tl

from dsv3_plugin.ops import elementary

EXACT = {"enable_fp_fusion": False}
"""Launch options under which a * b + c rounds twice, as the contracts say; an explicit `tl.fma` still rounds once."""

_ROUND = tl.constexpr(12582912.0)
_LOG2_E = tl.constexpr(1.44269504088896341)
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_UNDERFLOW = tl.constexpr(-87.0)
_EXP2_5, _EXP2_4, _EXP2_3, _EXP2_2, _EXP2_1, _EXP2_0 = (tl.constexpr(c) for c in elementary.EXP2_POLYNOMIAL)
_EXP2_UNDERFLOW = tl.constexpr(elementary.EXP2_UNDERFLOW)


@triton.jit
def exp_of_nonpositive(x):
    """e**x of fp32 `x` <= 0, the only ones that softmax and sigmoid need; nothing to clamp: below -87 it is replaced.

    The rounding constant's low bits hold n, so adding them to the exponent of p multiplies it by 2**n: never a
    subnormal number, because e**-87 is none.
    """
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = (p * (r * r) + r) + 1.0
    scaled = ((shifted.to(tl.int32, bitcast=True) << 23) + p.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(x < _UNDERFLOW, 0.0, scaled)


@triton.jit
def exp2_of_nonpositive(x):
    """2**x of fp32 `x` <= 0; 0 for NaN. The integer part is added to the exponent as in `exp_of_nonpositive`."""
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)
    p = tl.fma(f, _EXP2_5, _EXP2_4)
    p = tl.fma(p, f, _EXP2_3)
    p = tl.fma(p, f, _EXP2_2)
    p = tl.fma(p, f, _EXP2_1)
    p = tl.fma(p, f, _EXP2_0)
    scaled = ((shifted.to(tl.int32, bitcast=True) << 23) + p.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(x >= _EXP2_UNDERFLOW, scaled, 0.0)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded; Triton's `/` is not."""
    return tl.math.div_rn(a, b)


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x) of fp32 `x`."""
    e = exp_of_nonpositive(-tl.abs(x))
    return divide(tl.where(x < 0, e, 1.0), 1.0 + e)


@triton.jit
def fold_sum(x, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Sum x [ROWS, LANES] over its lanes to [ROWS]: the upper half is added to the lower half until one is left.

    Each step is a reduction over an axis of two, which has one order whatever the layout.
    """
    if LANES == 1:
        return tl.reshape(x, (ROWS,))
    else:
        return fold_sum(tl.sum(tl.reshape(x, (ROWS, 2, LANES // 2)), 1), ROWS, LANES // 2)
