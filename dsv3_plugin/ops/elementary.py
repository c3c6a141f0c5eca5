"""Elementary functions and row sums whose bits are the same everywhere.

ATen's vectorised loops use another `exp` for the tail of a tensor than for its body, and its reductions
choose an order by shape. So the functions here are written out as IEEE-754 fp32 operations, each rounded once
(add, multiply, divide, square root, no fused multiply-add), which every CPU and GPU computes alike, for any shape.
"""

from __future__ import annotations

import torch

_LOG2_E = 1.44269504088896341
# ln 2 in two parts: the first has 9 significant bits, so its product with a small integer is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
# exp(r) = 1 + r + r^2 * P(r) on |r| <= ln(2) / 2 (Cephes, expf.c).
_EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_EXP_UNDERFLOW = -87.0
_EXP_OVERFLOW = 88.0

LOG2_E = _LOG2_E
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


def exp(x: torch.Tensor) -> torch.Tensor:
    """e**x for fp32 `x` of any shape, within 2 ulp; 0 below -87, clamped at e**88 above 88. NaN stays NaN."""
    clamped = x.clamp(_EXP_UNDERFLOW, _EXP_OVERFLOW)
    n = torch.round(clamped * _LOG2_E)
    r = (clamped - n * _LN2_HIGH) - n * _LN2_LOW
    p = torch.full_like(r, _EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = p * r + coefficient
    p = (p * (r * r) + r) + 1.0
    # NaN has no integer; its exponent is irrelevant because p is NaN already.
    exponent = torch.nan_to_num(n).to(torch.int32)
    power_of_two = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(x < _EXP_UNDERFLOW, torch.zeros_like(p), p * power_of_two)


def exp2_of_nonpositive(x: torch.Tensor) -> torch.Tensor:
    """2**x for fp32 `x` <= 0, within 2 ulp: the exponential of the softmax. 0 below -125 and for NaN; 2**0 is 1.

    n = x rounded to an integer, f = x - n, and a polynomial of f in Horner's form, each step one fused multiply-add.
    Here a step is a product and a sum in fp64, rounded to fp32: for every fp32 number f in [-1/2, 1/2] that is the
    fused step's result (tried for all of them down to 2**-60).
    """
    n = torch.round(x)
    f = (x - n).double()
    p = torch.full_like(x, EXP2_POLYNOMIAL[0])
    for coefficient in EXP2_POLYNOMIAL[1:]:
        p = (p.double() * f + coefficient).float()
    seen = x >= EXP2_UNDERFLOW
    exponent = torch.where(seen, n, 0.0).to(torch.int32)
    return torch.where(seen, (p.view(torch.int32) + (exponent << 23)).view(torch.float32), 0.0)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e**-x) for fp32 `x`, without overflow: e**-|x| is used on both sides of zero."""
    e = exp(-x.abs())
    return torch.where(x < 0, e, torch.ones_like(e)) / (1.0 + e)


def fold_sum(x: torch.Tensor, lanes: int = 512) -> torch.Tensor:
    """Sum the last dimension of fp32 `x` in a fixed order: shape [..., K] to [..., 1].

    K is zero-padded to a multiple of `lanes`, a power of two. Each lane adds its elements `lane, lane + lanes,
    lane + 2 * lanes, ...` in this order; then the upper half of the lanes is added to the lower half until one
    is left. `lanes` is small enough for one warp group of a GPU and large enough to keep it busy.
    """
    size = x.shape[-1]
    slices = -(-size // lanes)
    x = torch.nn.functional.pad(x, (0, slices * lanes - size)).unflatten(-1, (slices, lanes))
    total = x[..., 0, :]
    for i in range(1, slices):
        total = total + x[..., i, :]
    while lanes > 1:
        lanes //= 2
        total = total[..., :lanes] + total[..., lanes:]
    return total
