"""Products whose sums are in slices of K, as `dsv3_plugin.ops.slices` says: `sliced_linear`, `sliced_fp8_linear`.

Contract: K is cut into equal slices, a power of two of them. Each slice's product is `linear`'s or `fp8_linear`'s, kept
in fp32. A binary tree adds the sums: neighbours first, then neighbouring pairs, each addition rounded to fp32. One
rounding to the output dtype. A part of the slices is a branch of the tree if it begins at a multiple of its length: its
fp32 sum is what a tensor-parallel rank gives away.

Gradients are those of the whole product.
"""

from __future__ import annotations

import random
from functools import partial

import torch

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.drawing import Case, Sizes, numbers, size_of_numbers, sizes
from dsv3_plugin.ops.fp8_linear import fp8_linear
from dsv3_plugin.ops.linear import LinearFunction, linear
from dsv3_plugin.ops.operation import BoundKernels, matrix_operation
from dsv3_plugin.ops.products import Products
from dsv3_plugin.ops.quantize import quantize_fp8, quantize_weight
from dsv3_plugin.ops.slices import tree_sum


def require_slices(op: str, depth: int, slices: int, block: int = 1) -> None:
    """Raise `InputError` unless K has so many equal slices, a power of two, of whole blocks."""
    require(slices > 0 and slices.bit_count() == 1, op, f"{slices} slices are no power of two")
    blocks = f" of whole blocks of {block}" * (block > 1)
    require(depth % (slices * block) == 0, op, f"K={depth} has no {slices} equal slices{blocks}")


def slices_of(x: torch.Tensor, slices: int) -> list[torch.Tensor]:
    """x [R, K] to `slices` of [R, K / slices]."""
    return [part.contiguous() for part in x.chunk(slices, 1)]


@matrix_operation(version=1, summary="a linear a slice of K, their fp32 sums added by a binary tree", sliced=True)
def sliced_linear(
    products: Products, x: torch.Tensor, weight: torch.Tensor, slices: int, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [M, K], weight [N, K] of one dtype, K in `slices` slices, to [M, N] of that dtype, or of fp32 if `out_dtype`
    says so.
    """
    require_slices("sliced_linear", x.shape[1], slices)
    product = partial(linear.on(products), out_dtype=torch.float32)
    sums = [product(*parts) for parts in zip(slices_of(x, slices), slices_of(weight, slices), strict=True)]
    return tree_sum(sums).to(out_dtype or x.dtype)


@matrix_operation(
    version=1, summary="an fp8_linear a slice of K, their fp32 sums added by a binary tree", fp8=True, sliced=True
)
def sliced_fp8_linear(
    products: Products,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    slices: int,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Quantized x [M, K] with scales [M, K / 128] times weight [N, K] with scales [ceil(N / 128), K / 128], K in
    `slices` slices, to [M, N] of bf16 or fp32.
    """
    require_slices("sliced_fp8_linear", x.shape[1], slices, FP8_BLOCK)
    product = partial(fp8_linear.on(products), out_dtype=torch.float32)
    operands = (slices_of(operand, slices) for operand in (x, x_scale, weight, weight_scale))
    return tree_sum([product(*parts) for parts in zip(*operands, strict=True)]).to(out_dtype)


@sliced_linear.gradient
def _differentiable_sliced_linear(
    ops: BoundKernels, x: torch.Tensor, weight: torch.Tensor, slices: int, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    # Its gradient comes in fp32 on any number of ranks: one rank rounds what several round behind their sum.
    kernel = partial(ops[sliced_linear], slices=slices, out_dtype=torch.float32)
    return LinearFunction.apply(kernel, x, weight).to(out_dtype or x.dtype)


_SLICES = (1, 2, 4, 8, 16)


@sliced_linear.cases
def _sliced_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Slices that are no multiple of an instruction; columns that fill no tile; both output dtypes."""
    rows, columns, depth = sizes(rng, at)
    slices = rng.choice(_SLICES)
    depth = max(slices * 8, depth - slices * rng.choice((0, 0, 8)))
    size = size_of_numbers(rng)
    weight = numbers(rng, columns - rng.choice((0, 0, 8)), depth) * size
    x = numbers(rng, rows, depth) * size
    return sliced_linear.case(x, weight, slices, out_dtype=rng.choice((None, torch.float32)))


@sliced_fp8_linear.cases
def _sliced_fp8_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Both scale formats and output dtypes; columns that fill no scale block."""
    rows, columns, depth = sizes(rng, at)
    slices = rng.choice([slices for slices in _SLICES if depth % (slices * FP8_BLOCK) == 0])
    scale_format = rng.choice(at.scale_formats)
    weight = quantize_weight(numbers(rng, columns - rng.choice((0, 0, 8)), depth), scale_format)
    x = quantize_fp8(numbers(rng, rows, depth), scale_format)
    out_dtype = rng.choice((torch.bfloat16, torch.float32))
    return sliced_fp8_linear.case(*x, *weight, slices, out_dtype=out_dtype)
