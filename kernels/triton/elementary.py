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
_LOG2_E_HIGH = tl.constexpr(elementary.LOG2_E_HIGH)
_LOG2_E_LOW = tl.constexpr(elementary.LOG2_E_LOW)
_EXP2_5, _EXP2_4, _EXP2_3, _EXP2_2, _EXP2_1, _EXP2_0 = (tl.constexpr(c) for c in elementary.EXP2_POLYNOMIAL)
_EXP2_UNDERFLOW = tl.constexpr(elementary.EXP2_UNDERFLOW)
_EXP_UNDERFLOW = tl.constexpr(elementary.EXP_UNDERFLOW)
_FOLDED = tl.constexpr(elementary.FOLDED)
_BITS_OF_ONE = tl.constexpr(0x3F800000)


@triton.jit
def exp_of_minus(x):
    """e**-x of fp32 `x` >= 0; NaN stays NaN.

    The rounding constant's low bits hold the integer n, which makes the power of two.
    """
    shifted = tl.fma(x, -_LOG2_E_HIGH, _ROUND)
    f = tl.fma(x, -_LOG2_E_HIGH, _ROUND - shifted)
    f = tl.fma(x, -_LOG2_E_LOW, f)
    power_of_two = ((shifted.to(tl.int32, bitcast=True) << 23) + _BITS_OF_ONE).to(tl.float32, bitcast=True)
    return tl.where(x > -_EXP_UNDERFLOW, 0.0, _exp2_polynomial(f) * power_of_two)


@triton.jit
def exp2_of_nonpositive(x):
    """2**x of fp32 `x` <= 0; 0 for NaN. Adding the integer part to the exponent is a product, never subnormal."""
    shifted = x + _ROUND
    p = _exp2_polynomial(x - (shifted - _ROUND))
    scaled = ((shifted.to(tl.int32, bitcast=True) << 23) + p.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(x >= _EXP2_UNDERFLOW, scaled, 0.0)


@triton.jit
def _exp2_polynomial(f):
    p = tl.fma(f, _EXP2_5, _EXP2_4)
    p = tl.fma(p, f, _EXP2_3)
    p = tl.fma(p, f, _EXP2_2)
    p = tl.fma(p, f, _EXP2_1)
    return tl.fma(p, f, _EXP2_0)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded; Triton's `/` is not."""
    return tl.math.div_rn(a, b)


@triton.jit
def negative(x):
    """-x. Triton's own subtracts from zero, which is an instruction, and no negation of zero."""
    return x * -1.0


@triton.jit
def widen(x):
    """bf16 `x` as fp32: two at a time, one instruction each; the compiler itself takes two for every other number."""
    return tl.inline_asm_elementwise(
        "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
    )


@triton.jit
def round_to_bf16(x):
    """fp32 `x` rounded to bf16, as fp32: two at a time, because the instruction for one is slow."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
        "=r,=r,r,r",
        [x],
        tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def reciprocal_guess(x):
    """1 / x of fp32 `x` between 2**-126 and 2**126 as the hardware has it: a neighbour of the fp32 number at most."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded, of fp32 `x` between 2**-100 and 2**100: one step of Newton's from the hardware's
    approximation, without a division's tests for other numbers. Tried for every mantissa.
    """
    guess = reciprocal_guess(x)
    return tl.fma(guess, tl.fma(negative(x), guess, 1.0), guess)


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x) of fp32 `x`."""
    e = exp_of_minus(tl.abs(x))
    r = reciprocal(1.0 + e)
    return tl.where(x < 0, e * r, r)


@triton.jit
def fold_sum(x, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Sum x [ROWS, LANES] over its lanes to [ROWS]: the upper half is added to the lower half until one is left.

    Each step is a reduction over an axis of two, which has one order whatever the layout.
    """
    if LANES == 1:
        return tl.reshape(x, (ROWS,))
    else:
        return fold_sum(tl.sum(tl.reshape(x, (ROWS, 2, LANES // 2)), 1), ROWS, LANES // 2)


@triton.jit
def sum_row(x, SIZE: tl.constexpr):
    """Sum x [SIZE], a power of two, to [1] in the order of `elementary.sum_row`.

    Each step is a reduction over an axis of two, which has one order whatever the layout.
    """
    if SIZE == 1:
        return x
    elif SIZE > _FOLDED:
        return sum_row(tl.sum(tl.reshape(x, (2, SIZE // 2)), 0), SIZE // 2)
    else:
        return sum_row(tl.sum(tl.reshape(x, (SIZE // 2, 2)), 1), SIZE // 2)
