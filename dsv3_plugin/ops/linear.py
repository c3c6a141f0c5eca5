"""Matrix products with unquantized weights: `linear`, `head_linear`, `grouped_linear`.

Contract: operands in the profile's dtype; one running fp32 accumulator over ascending K; one rounding to the
output dtype. On a CPU the sum over K is the library's for a tile of `tile.ROWS` rows. `head_linear_fp8` is by
definition `head_linear`, then `quantize_fp8`, the rounding between them included.

Gradients: y = x W^T gives dx = dy W and dW = dy^T x. dy is rounded to the operands' dtype, that of fp32 logits too, as
bf16 training has it; sums are fp32, and each gradient is rounded once, to its operand's dtype.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.drawing import MOST_PRODUCTS, Case, Sizes, experts, numbers, size_of_numbers, sizes
from dsv3_plugin.ops.operation import BoundKernels, matrix_operation
from dsv3_plugin.ops.products import Products
from dsv3_plugin.ops.quantize import quantize_fp8
from dsv3_plugin.profile import ScaleFormat


@matrix_operation(version=1, summary="x @ weight.T, fp32 sum over ascending K, one rounding")
def linear(
    products: Products, x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [M, K], weight [N, K] of one dtype, to [M, N].

    `out_dtype` is the operands' dtype or fp32; fp32 keeps the unrounded sum (router logits, the head's logits,
    slices of a sum).
    """
    require_matrix("linear", "x", x, products.dtypes)
    require_matrix("linear", "weight", weight, (x.dtype,))
    require(x.shape[1] == weight.shape[1], "linear", f"x has K={x.shape[1]}, weight has K={weight.shape[1]}")
    out_dtype = out_dtype or x.dtype
    fits = out_dtype in (x.dtype, torch.float32)
    require(fits, "linear", f"out_dtype is {out_dtype}, expected {x.dtype} or torch.float32")
    return products.linear(x, weight, out_dtype)


@matrix_operation(version=1, summary="one linear for each attention head")
def head_linear(products: Products, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, H, K], weight [H, N, K] of one dtype, to [M, H, N]: head h of x times head h of weight."""
    require(
        x.dim() == 3 and weight.dim() == 3 and x.shape[1] == weight.shape[0] and x.shape[2] == weight.shape[2],
        "head_linear",
        f"x of shape {tuple(x.shape)} does not fit weight of shape {tuple(weight.shape)}",
    )
    require(x.dtype in products.dtypes, "head_linear", f"x is {x.dtype}")
    require(weight.dtype == x.dtype, "head_linear", f"weight is {weight.dtype}, x is {x.dtype}")
    require(weight.is_contiguous(), "head_linear", "weight is not contiguous")
    heads = [products.linear(x[:, h].contiguous(), weight[h], x.dtype) for h in range(x.shape[1])]
    return torch.stack(heads, dim=1)


@matrix_operation(version=1, summary="head_linear, then quantize_fp8", fp8=True)
def head_linear_fp8(
    products: Products, x: torch.Tensor, weight: torch.Tensor, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, H, K], weight [H, N, K] of one dtype, to (e4m3 [M, H N], fp32 scales [M, H N / 128])."""
    return quantize_fp8(head_linear.on(products)(x, weight).flatten(1), scale_format)


@matrix_operation(version=1, summary="one linear for each expert over its rows")
def grouped_linear(
    products: Products, x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """x [M, K] sorted by expert, expert_counts [E] (integers, sum M), weight [E, N, K], to [M, N]."""
    require_matrix("grouped_linear", "x", x, products.dtypes)
    require(weight.dtype == x.dtype, "grouped_linear", f"weight is {weight.dtype}, x is {x.dtype}")
    groups = split_by_expert("grouped_linear", x, expert_counts)
    outputs = [products.linear(rows, weight[e], x.dtype) for e, rows in groups]
    return torch.cat(outputs) if outputs else x.new_empty(0, weight.shape[1])


def split_by_expert(op: str, x: torch.Tensor, expert_counts: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """The experts that have rows, in ascending order, each with its rows of x [M, K]."""
    counts = expert_counts.tolist()
    require(sum(counts) == x.shape[0], op, f"expert_counts sum to {sum(counts)}, x has {x.shape[0]} rows")
    return [(e, rows) for e, rows in enumerate(x.split(counts)) if len(rows)]


def product_gradients(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [M, N], x [M, K], weight [N, K] to (dx [M, K] and dW [N, K], of the wider dtype of x and weight)."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    grad = grad.to(dtype)
    return grad @ weight.to(dtype), grad.t() @ x.to(dtype)


class LinearFunction(torch.autograd.Function):
    """x [M, K] and weight [N, K] to what a kernel says of them, with the gradients of a product."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """By the kernel."""
        ctx.save_for_backward(x, weight)
        return kernel(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """By the library."""
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = product_gradients(grad, x, weight)
        return None, grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@linear.gradient
def _differentiable_linear(
    ops: BoundKernels, x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    return LinearFunction.apply(partial(ops[linear], out_dtype=out_dtype), x, weight)


class _HeadLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: BoundKernels, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return ops[head_linear](x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        by_head = grad.transpose(0, 1)
        return None, (by_head @ weight).transpose(0, 1), by_head.transpose(1, 2) @ x.transpose(0, 1)


@head_linear.gradient
def _differentiable_head_linear(ops: BoundKernels, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _HeadLinear.apply(ops, x, weight)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ops: BoundKernels, x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, expert_counts, weight)
        return ops[grouped_linear](x, expert_counts, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, expert_counts, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        grads = dict(split_by_expert("grouped_linear", grad, expert_counts))
        places = dict(split_by_expert("grouped_linear", grad_x, expert_counts))
        for e, rows in split_by_expert("grouped_linear", x, expert_counts):
            of_rows, grad_weight[e] = product_gradients(grads[e], rows, weight[e])
            places[e].copy_(of_rows)
        return None, grad_x, None, grad_weight


@grouped_linear.gradient
def _differentiable_grouped_linear(
    ops: BoundKernels, x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    return _GroupedLinear.apply(ops, x, expert_counts, weight)


@linear.cases
def _linear_case(rng: random.Random, at: Sizes) -> Case:
    """Depths that are no multiple of an instruction, columns that fill no tile, both output dtypes."""
    rows, columns, depth = sizes(rng, at)
    depth -= rng.choice((0, 0, 8, 120))
    size = size_of_numbers(rng)
    weight = numbers(rng, columns - rng.choice((0, 0, 8)), depth) * size
    return linear.case(numbers(rng, rows, depth) * size, weight, out_dtype=rng.choice((None, torch.float32)))


@head_linear.cases
def _head_linear_case(rng: random.Random, at: Sizes) -> Case:
    """x is a view with gaps, as the layers pass it."""
    rows, heads, depth = rng.choice(at.rows), rng.choice(at.heads), rng.choice(at.head_sizes)
    columns = min(rng.choice(at.head_sizes), max(32, MOST_PRODUCTS // (rows * heads * depth) // 32 * 32))
    size = size_of_numbers(rng)
    wide = numbers(rng, rows, heads, depth + 64) * size
    return head_linear.case(wide[..., :depth], numbers(rng, heads, columns, depth) * size)


@head_linear_fp8.cases
def _head_linear_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """Heads of one scale block, of two, and of half a one; both scale formats."""
    heads, depth, columns = 2 * rng.choice(at.heads), rng.choice(at.head_sizes), rng.choice((128, 128, 256, 64))
    rows = min(rng.choice(at.rows), max(1, MOST_PRODUCTS // (heads * depth * columns)))
    size = size_of_numbers(rng)
    x, weight = numbers(rng, rows, heads, depth) * size, numbers(rng, heads, columns, depth) * size
    return head_linear_fp8.case(x, weight, rng.choice(at.scale_formats))


@grouped_linear.cases
def _grouped_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Experts without rows, and one with all."""
    rows, columns, depth = sizes(rng, at)
    counts = experts(rng, at, rows)
    size = size_of_numbers(rng)
    x = numbers(rng, rows, depth) * size
    return grouped_linear.case(x, counts, numbers(rng, len(counts), columns, depth) * size)
