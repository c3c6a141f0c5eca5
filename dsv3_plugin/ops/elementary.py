"""Elementary functions and row sums whose bits are the same everywhere.

ATen's vectorised loops use another `exp` for the tail of a tensor than for its body, and its reductions
choose an order by shape. So the functions here are written out as IEEE-754 fp32 operations, each rounded once
(add, multiply, divide, square root, and fused multiply-add where it says so), which every CPU and GPU computes alike,
for any shape.
"""

from __future__ import annotations

import torch

LOG2_E = 1.44269504088896341
# log2 e as two fp32 numbers.
LOG2_E_HIGH = 1.4426950216293335
LOG2_E_LOW = 1.925963033500011e-08
# 2**f = 1 + f * P(f) on |f| <= 1/2: least largest relative error (9e-8 before rounding), coefficients as fp32 numbers.
EXP2_POLYNOMIAL = (
    0.001326472731307149,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
    1.0,
)
EXP2_UNDERFLOW = -125.0
EXP_UNDERFLOW = -87.0
FOLDED = 1024


def exp_of_nonpositive(x: torch.Tensor) -> torch.Tensor:
    """e**x for fp32 `x` <= 0, within 3 ulp: the exponential of the sigmoid. 0 below -87; NaN stays NaN.

    n = x * log2 e rounded to an integer and f = x * log2 e - n in two fused multiply-adds, log2 e in two parts; then
    the polynomial of `exp2_of_nonpositive`. In fp64 the first product and its difference from n are exact.
    """
    product = x.double() * LOG2_E_HIGH
    n = torch.round(product)
    f = fma(x, torch.full_like(x, LOG2_E_LOW), (product - n).float())
    # NaN has no integer; its power of two is irrelevant because the polynomial is NaN already.
    exponent = n.nan_to_num().clamp(EXP2_UNDERFLOW - 1, 0).to(torch.int32)
    power_of_two = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(x < EXP_UNDERFLOW, 0.0, _exp2_polynomial(f) * power_of_two)


def exp2_of_nonpositive(x: torch.Tensor) -> torch.Tensor:
    """2**x for fp32 `x` <= 0, within 2 ulp: the exponential of the softmax. 0 below -125 and for NaN; 2**0 is 1.

    n = x rounded to an integer, f = x - n, and a polynomial of f.
    """
    n = torch.round(x)
    p = _exp2_polynomial(x - n)
    seen = x >= EXP2_UNDERFLOW
    exponent = torch.where(seen, n, 0.0).to(torch.int32)
    return torch.where(seen, (p.view(torch.int32) + (exponent << 23)).view(torch.float32), 0.0)


def _exp2_polynomial(f: torch.Tensor) -> torch.Tensor:
    """2**f for fp32 |f| <= 1/2 (a little more does no harm): Horner's form, each step one fused multiply-add.

    Here a step is a product and a sum in fp64, rounded to fp32: for every fp32 number f in [-0.50001, 0.50001] that is
    the fused step's result (tried for all of them down to 2**-60).
    """
    wide = f.double()
    p = torch.full_like(f, EXP2_POLYNOMIAL[0])
    for coefficient in EXP2_POLYNOMIAL[1:]:
        p = (p.double() * wide + coefficient).float()
    return p


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e**-x) for fp32 `x`, within 4 ulp, without overflow.

    With e = e**-|x| and r = 1 / (1 + e), correctly rounded: r where x is not negative, e * r where it is.
    """
    e = exp_of_nonpositive(-x.abs())
    r = 1.0 / (1.0 + e)
    return torch.where(x < 0, e * r, r)


def divide(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """x / divisor of fp32 `x`, correctly rounded.

    The divisor is made a tensor: by a Python number torch divides on a CPU, and on a GPU multiplies by its reciprocal.
    """
    return x / x.new_full((), divisor)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of fp32 tensors, rounded once.

    The product is exact in fp64. The sum may not be; rounding it to odd (an inexact sum with an even last bit moves
    to the neighbour that lies towards the lost part) makes the second rounding to fp32 equal to a single one
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    lost = (product - (total - virtual)) + (addend - virtual)
    even = (total.view(torch.int64) & 1) == 0
    towards = torch.where(lost > 0, torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf))
    # `lost` is NaN where the sum is infinite or NaN already, and NaN compares false.
    inexact = lost.abs() > 0
    odd = torch.where(inexact & even, torch.nextafter(total, towards), total)
    return odd.float()


def fold_sum(x: torch.Tensor, lanes: int) -> torch.Tensor:
    """Sum the last dimension of fp32 `x` in a fixed order: shape [..., K] to [..., 1].

    K is zero-padded to a multiple of `lanes`, a power of two. Each lane adds its elements `lane, lane + lanes,
    lane + 2 * lanes, ...` in this order; then the upper half of the lanes is added to the lower half until one
    is left.
    """
    size = x.shape[-1]
    rows = -(-size // lanes)
    x = torch.nn.functional.pad(x, (0, rows * lanes - size)).unflatten(-1, (rows, lanes))
    total = x[..., 0, :]
    for i in range(1, rows):
        total = total + x[..., i, :]
    while lanes > 1:
        lanes //= 2
        total = total[..., :lanes] + total[..., lanes:]
    return total


def sum_row(x: torch.Tensor) -> torch.Tensor:
    """Sum the last dimension of fp32 `x` in a fixed order: shape [..., K] to [..., 1].

    K is zero-padded to a power of two. While more than `FOLDED` numbers are left, the upper half is added to the lower
    half; then neighbours are added to each other until one is left. So 128 threads that hold 8 neighbours of each 1024
    add what they hold first.
    """
    size = x.shape[-1]
    width = 1 << (size - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - size))
    while x.shape[-1] > FOLDED:
        lower, upper = x.chunk(2, dim=-1)
        x = lower + upper
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x
