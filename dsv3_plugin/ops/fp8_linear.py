"""Products of block-scaled FP8 numbers (`quantize`): `fp8_linear`, `grouped_fp8_linear`.

Contract: for each 128 of K in ascending order, `raw` is the dot product from zero, and then
`acc = fma(raw, scale_a * scale_b, acc)` in fp32 (the scales' product is rounded first); one rounding at the end.
On a CPU `raw` is the exact sum rounded once to fp32, so neither tile nor thread nor library can change it.

Training is through master weights, which are quantized in each pass (`autograd.fp8`), so there are no gradients here.
"""

from __future__ import annotations

import random

import torch

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.drawing import Case, Sizes, experts, numbers, sizes
from dsv3_plugin.ops.elementary import fma
from dsv3_plugin.ops.linear import split_by_expert
from dsv3_plugin.ops.operation import matrix_operation
from dsv3_plugin.ops.products import Products
from dsv3_plugin.ops.quantize import E4M3, quantize_fp8, quantize_weight


@matrix_operation(version=1, summary="block-scaled e4m3 product, 1x128 by 128x128", fp8=True)
def fp8_linear(
    products: Products,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Quantized x [M, K] with scales [M, K / 128] times weight [N, K] with scales [ceil(N / 128), K / 128], to [M, N]
    of bf16, or of fp32, which keeps the unrounded sum (`dsv3_plugin.ops.slices`).
    """
    op = "fp8_linear"
    require_matrix(op, "x", x, (E4M3,))
    require_matrix(op, "weight", weight, (E4M3,))
    rows, depth = x.shape
    require(depth % FP8_BLOCK == 0, op, f"K={depth} is not a multiple of {FP8_BLOCK}")
    require(weight.shape[1] == depth, op, f"x has K={depth}, weight has K={weight.shape[1]}")
    blocks = depth // FP8_BLOCK
    expected = (-(-weight.shape[0] // FP8_BLOCK), blocks)
    require(tuple(x_scale.shape) == (rows, blocks), op, f"x_scale has shape {tuple(x_scale.shape)}")
    require(tuple(weight_scale.shape) == expected, op, f"weight_scale has shape {tuple(weight_scale.shape)}")
    require(out_dtype in (torch.bfloat16, torch.float32), op, f"out_dtype is {out_dtype}")

    column_scale = weight_scale.repeat_interleave(FP8_BLOCK, 0)[: weight.shape[0]]
    acc = torch.zeros(rows, weight.shape[0], dtype=torch.float32, device=x.device)
    for k in range(blocks):
        span = slice(k * FP8_BLOCK, (k + 1) * FP8_BLOCK)
        raw = products.fp8_linear(x[:, span], weight[:, span])
        acc = fma(raw, x_scale[:, k, None] * column_scale[None, :, k], acc)
    return acc.to(out_dtype)


@matrix_operation(version=1, summary="one fp8_linear for each expert over its rows", fp8=True)
def grouped_fp8_linear(
    products: Products,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    """x [M, K] sorted by expert with scales [M, K / 128], expert_counts [E], weight [E, N, K] with scales [E, N /
    128, K / 128], to bf16 [M, N].
    """
    op = "grouped_fp8_linear"
    groups = zip(split_by_expert(op, x, expert_counts), split_by_expert(op, x_scale, expert_counts), strict=True)
    product = fp8_linear.on(products)
    outputs = [product(rows, scales, weight[e], weight_scale[e]) for (e, rows), (_, scales) in groups]
    return torch.cat(outputs) if outputs else x.new_empty(0, weight.shape[1], dtype=torch.bfloat16)


@fp8_linear.cases
def _fp8_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Both scale formats; columns that fill no scale block."""
    rows, columns, depth = sizes(rng, at)
    scale_format = rng.choice(at.scale_formats)
    weight = quantize_weight(numbers(rng, columns - rng.choice((0, 0, 8)), depth), scale_format)
    return fp8_linear.case(*quantize_fp8(numbers(rng, rows, depth), scale_format), *weight)


@grouped_fp8_linear.cases
def _grouped_fp8_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Both scale formats; experts without rows, and one with all."""
    rows, columns, depth = sizes(rng, at)
    counts = experts(rng, at, rows)
    scale_format = rng.choice(at.scale_formats)
    weights = [quantize_weight(numbers(rng, columns, depth), scale_format) for _ in counts]
    values, scales = (torch.stack(parts) for parts in zip(*weights, strict=True))
    x, x_scale = quantize_fp8(numbers(rng, rows, depth), scale_format)
    return grouped_fp8_linear.case(x, x_scale, counts, values, scales)
