"""Root-mean-square normalisation, the same with what stands before and behind it in a layer, and its gradient.

Contract of `rms_norm`: fp32 throughout. The squares are summed by `elementary.sum_row`; the factor is
1 / sqrt(mean + eps), a square root and a division, both correctly rounded; x times factor, times weight, one rounding
to the input's dtype. (Hugging Face rounds x * factor to bf16 before the weight: two roundings.)

The others are by definition operations one after the other, rounding to the profile's dtype between them included.
A kernel saves launches and the way through memory, never a rounding.

Contract of `rms_norm_gradient`: in fp32, each step rounded, with the factor r of `rms_norm`, n = x r and h = grad *
weight: r (h - n m) for x, where m is the mean of h n by `elementary.sum_row`. For the weight the products grad * n are
added up over rows, `ROW_CHUNK` of them from zero in ascending order, then those sums from zero in ascending order. One
rounding to the inputs' dtype. So a step repeats bit for bit, and a card may sum chunks at the same time.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F

from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.drawing import Case, Sizes, numbers
from dsv3_plugin.ops.elementary import divide, sum_row
from dsv3_plugin.ops.operation import BoundKernels, operation
from dsv3_plugin.ops.quantize import quantize_fp8
from dsv3_plugin.profile import ScaleFormat

ROW_CHUNK = 64


@operation(version=2, summary="x / rms(x) * weight in fp32, one rounding")
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [M, K], weight [K] of one dtype, to [M, K] of that dtype."""
    require_matrix("rms_norm", "x", x, (torch.float32, torch.bfloat16))
    require(weight.dtype == x.dtype, "rms_norm", f"weight is {weight.dtype}, x is {x.dtype}")
    require(tuple(weight.shape) == (x.shape[1],), "rms_norm", f"weight has shape {tuple(weight.shape)}")
    wide = x.float()
    return (wide * _factor(wide, eps) * weight.float()).to(x.dtype)


def _factor(wide: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms of each row of fp32 [M, K], to [M, 1]."""
    mean = divide(sum_row(wide * wide), wide.shape[1])
    # In fp64: ATen's vectorised fp32 root is off by an ulp in 0.6 % of its results.
    return 1.0 / torch.sqrt((mean + eps).double()).float()


@operation(version=1, summary="residual sum, then rms_norm")
def add_rms_norm(
    x: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, addend [M, K], weight [K] of one dtype, to (x + addend, its `rms_norm`), [M, K] of that dtype each."""
    op = "add_rms_norm"
    require(x.shape == addend.shape, op, f"x has shape {tuple(x.shape)}, addend {tuple(addend.shape)}")
    require(x.dtype == addend.dtype, op, f"x is {x.dtype}, addend is {addend.dtype}")
    total = x + addend
    return total, rms_norm(total, weight, eps)


@operation(version=1, summary="rms_norm, then quantize_fp8", fp8=True)
def rms_norm_fp8(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], weight [K] of one dtype, to (e4m3 [M, K], fp32 scales [M, K / 128])."""
    return quantize_fp8(rms_norm(x, weight, eps), scale_format)


@operation(version=1, summary="residual sum, then rms_norm, then quantize_fp8", fp8=True)
def add_rms_norm_fp8(
    x: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor, eps: float, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, addend [M, K], weight [K] of one dtype, to what `add_rms_norm` gives and its second part quantized: (e4m3 [M,
    K], fp32 scales [M, K / 128]).
    """
    total, normalised = add_rms_norm(x, addend, weight, eps)
    return total, normalised, *quantize_fp8(normalised, scale_format)


@operation(version=1, summary="the gradients of rms_norm in fp32, weights' over chunks of 64 rows", training=True)
def rms_norm_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [M, K] of `rms_norm`'s result, x [M, K] and weight [K] as it took them, of one dtype, to the gradients of x
    [M, K] and weight [K], of that dtype.
    """
    require_gradient(grad, x, weight, (torch.float32, torch.bfloat16))
    wide, of_out = x.float(), grad.float()
    factor = _factor(wide, eps)
    normalised, h = wide * factor, of_out * weight.float()
    mean = divide(sum_row(h * normalised), x.shape[1])
    of_x = factor * (h - normalised * mean)
    products = F.pad(of_out * normalised, (0, 0, 0, -len(x) % ROW_CHUNK)).unflatten(0, (-1, ROW_CHUNK))
    of_weight = _in_order(_in_order(products.transpose(0, 1)))
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


def _in_order(terms: torch.Tensor) -> torch.Tensor:
    """Their sum over the first dimension, from zero on."""
    total = terms.new_zeros(terms.shape[1:])
    for term in terms:
        total = total + term
    return total


def require_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Require what `rms_norm_gradient` takes, of one of these dtypes."""
    op = "rms_norm_gradient"
    require_matrix(op, "x", x, dtypes)
    require_matrix(op, "grad", grad, (x.dtype,))
    require(grad.shape == x.shape, op, f"grad has shape {tuple(grad.shape)}, x {tuple(x.shape)}")
    require(weight.dtype == x.dtype, op, f"weight is {weight.dtype}, x is {x.dtype}")
    require(tuple(weight.shape) == (x.shape[1],), op, f"weight has shape {tuple(weight.shape)}")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: BoundKernels, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ops, ctx.eps = ops, eps
        return ops[rms_norm](x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, *ctx.ops[rms_norm_gradient](grad.contiguous(), *ctx.saved_tensors, ctx.eps), None


@rms_norm.gradient
def _differentiable_rms_norm(ops: BoundKernels, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _RMSNorm.apply(ops, x, weight, eps)


@add_rms_norm.gradient
def _differentiable_add_rms_norm(
    ops: BoundKernels, x: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + addend
    return total, _differentiable_rms_norm(ops, total, weight, eps)


@rms_norm.cases
def _rms_norm_case(rng: random.Random, at: Sizes) -> Case:
    """Widths that fill no block of 128, and no power of two."""
    width = rng.choice(at.depths) + rng.choice((0, 64, 72))
    return rms_norm.case(numbers(rng, rng.choice(at.rows), width), numbers(rng, width), 1e-6)


@add_rms_norm.cases
def _add_rms_norm_case(rng: random.Random, at: Sizes) -> Case:
    """The same behind a sum."""
    (x, weight, eps), _ = rms_norm.draw(rng, at)
    return add_rms_norm.case(x, numbers(rng, *x.shape), weight, eps)


@rms_norm_fp8.cases
def _rms_norm_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """Widths of whole scale blocks, no power of two; both scale formats."""
    width = rng.choice(at.depths) + rng.choice((0, 128))
    x, weight = numbers(rng, rng.choice(at.rows), width), numbers(rng, width)
    return rms_norm_fp8.case(x, weight, 1e-6, rng.choice(at.scale_formats))


@add_rms_norm_fp8.cases
def _add_rms_norm_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """The same behind a sum."""
    (x, weight, eps, scale_format), _ = rms_norm_fp8.draw(rng, at)
    return add_rms_norm_fp8.case(x, numbers(rng, *x.shape), weight, eps, scale_format)


@rms_norm_gradient.cases
def _gradient_case(rng: random.Random, at: Sizes) -> Case:
    """Rows that fill no chunk; gradients of the sizes that losses have."""
    (x, weight, eps), _ = rms_norm.draw(rng, at)
    return rms_norm_gradient.case(numbers(rng, *x.shape) * 2.0 ** rng.choice((0, 0, -20)), x, weight, eps)
