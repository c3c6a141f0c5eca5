"""The gradient of an FP8 weight (DeepSeek-V3 report, sections 3.3.1 to 3.3.3): `quantize_fp8_columns`, `fp8_wgrad`.

dW = dY^T X is a sum over tokens, so both operands have one scale for 128 tokens of a column ("128x1 tiles"), and lie
transposed, as a tensor core reads them. Gradients are quantized from the profile's dtype. Activations were cached as
the forward multiplied them, in 1x128, and are quantized again from the numbers that they stand for.

An expert's tokens are cut into blocks of 128 from its first on; the last one is filled up with zeros. A dense layer is
one expert. The blocks of all experts lie one after the other; how many there can be, `most_blocks`, depends on the
number of tokens and experts alone, so that no count is read from a device. What is left of them holds zeros.

Contract of the scales and values: that of `quantize_fp8`, of 128 tokens of a column; a cached activation is its e4m3
value times its scale, rounded to fp32. Contract of the product: for each block in ascending order `raw` is the dot
product of its 128 tokens from zero, and then `acc = fma(raw, scale_grad * scale_x, acc)` in fp32 (the scales' product
is rounded first); one rounding at the end. An expert without tokens has zeros. The order of the sum is that of the
tokens, so a step repeats bit for bit, and tokens in another order give other bits.
"""

from __future__ import annotations

import random

import torch

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.drawing import MOST_PRODUCTS, Case, Sizes, experts, numbers
from dsv3_plugin.ops.elementary import fma
from dsv3_plugin.ops.linear import split_by_expert
from dsv3_plugin.ops.operation import matrix_operation, operation
from dsv3_plugin.ops.products import Products
from dsv3_plugin.ops.quantize import E4M3, quantize_fp8
from dsv3_plugin.profile import ScaleFormat


def most_blocks(tokens: int, num_experts: int) -> int:
    """Blocks that hold the tokens however they are spread over the experts."""
    return (tokens + (FP8_BLOCK - 1) * min(num_experts, tokens)) // FP8_BLOCK


@operation(version=1, summary="128x1 tiles of an expert's tokens to e4m3, transposed", fp8=True, training=True)
def quantize_fp8_columns(
    x: torch.Tensor, x_scale: torch.Tensor | None, expert_counts: torch.Tensor, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] sorted by expert, of bf16 or fp32, or of e4m3 with x_scale fp32 [M, K / 128]; expert_counts [E]; to
    (e4m3 [K, B * 128], fp32 scales [K, B]), B = `most_blocks(M, E)`.
    """
    op = "quantize_fp8_columns"
    require_columns(op, x, x_scale)
    wide = x.float()
    if x_scale is not None:
        wide = (wide.unflatten(1, (-1, FP8_BLOCK)) * x_scale.unsqueeze(-1)).flatten(1)
    blocks = wide.new_zeros(most_blocks(len(x), len(expert_counts)) * FP8_BLOCK, x.shape[1])
    first = 0
    for _, tokens in split_by_expert(op, wide, expert_counts):
        blocks[first : first + len(tokens)] = tokens
        first += -(-len(tokens) // FP8_BLOCK) * FP8_BLOCK
    return quantize_fp8(blocks.t().contiguous(), scale_format)


def require_columns(op: str, x: torch.Tensor, x_scale: torch.Tensor | None) -> None:
    """Require numbers, or e4m3 values with their scales."""
    if x_scale is None:
        require_matrix(op, "x", x, (torch.bfloat16, torch.float32))
        return
    require_matrix(op, "x", x, (E4M3,))
    require(x.shape[1] % FP8_BLOCK == 0, op, f"K={x.shape[1]} is not a multiple of {FP8_BLOCK}")
    expected = (len(x), x.shape[1] // FP8_BLOCK)
    require(tuple(x_scale.shape) == expected, op, f"x_scale has shape {tuple(x_scale.shape)}")


@matrix_operation(
    version=1,
    summary="block-scaled e4m3 product of each expert's gradients and activations, 128x1 by 128x1, summed over tokens",
    fp8=True,
    training=True,
)
def fp8_wgrad(
    products: Products,
    grad: torch.Tensor,
    grad_scale: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Of `quantize_fp8_columns`: grad [N, B * 128] with scales [N, B] and x [K, B * 128] with scales [K, B];
    expert_counts [E]; to [E, N, K] of bf16, or of fp32, which keeps the sum.
    """
    op = "fp8_wgrad"
    require_transposed(op, grad, grad_scale, x, x_scale)
    require(out_dtype in (torch.bfloat16, torch.float32), op, f"out_dtype is {out_dtype}")
    blocks = [-(-count // FP8_BLOCK) for count in expert_counts.tolist()]
    held = grad_scale.shape[1]
    require(sum(blocks) <= held, op, f"expert_counts are of {sum(blocks)} blocks, grad has {held}")
    out = torch.zeros(len(blocks), len(grad), len(x), dtype=torch.float32, device=grad.device)
    block = 0
    for e, count in enumerate(blocks):
        for _ in range(count):
            span = slice(block * FP8_BLOCK, (block + 1) * FP8_BLOCK)
            raw = products.fp8_linear(grad[:, span], x[:, span])
            out[e] = fma(raw, grad_scale[:, block, None] * x_scale[None, :, block], out[e])
            block += 1
    return out.to(out_dtype)


def require_transposed(
    op: str, grad: torch.Tensor, grad_scale: torch.Tensor, x: torch.Tensor, x_scale: torch.Tensor
) -> None:
    """Require two operands of as many whole blocks of tokens."""
    require_matrix(op, "grad", grad, (E4M3,))
    require_matrix(op, "x", x, (E4M3,))
    tokens = grad.shape[1]
    require(tokens % FP8_BLOCK == 0, op, f"grad has {tokens} tokens, which is not a multiple of {FP8_BLOCK}")
    require(x.shape[1] == tokens, op, f"grad has {tokens} tokens, x has {x.shape[1]}")
    blocks = tokens // FP8_BLOCK
    require(tuple(grad_scale.shape) == (len(grad), blocks), op, f"grad_scale has shape {tuple(grad_scale.shape)}")
    require(tuple(x_scale.shape) == (len(x), blocks), op, f"x_scale has shape {tuple(x_scale.shape)}")


@quantize_fp8_columns.cases
def _quantize_case(rng: random.Random, at: Sizes) -> Case:
    """Gradients, and activations from their 1x128 tiles; experts that fill no block; both scale formats."""
    x = numbers(rng, rng.choice(at.rows), rng.choice(at.depths)) * 2.0 ** rng.choice((-100, -20, 0, 0, 0, 20, 100))
    counts, scale_format = experts(rng, at, len(x)), rng.choice(at.scale_formats)
    if rng.random() < 0.5:
        return quantize_fp8_columns.case(*quantize_fp8(x, scale_format), counts, scale_format)
    return quantize_fp8_columns.case(x if rng.random() < 0.8 else x.float(), None, counts, scale_format)


@fp8_wgrad.cases
def _wgrad_case(rng: random.Random, at: Sizes) -> Case:
    """Experts without tokens, and one with all; weights whose rows fill no tile; both output dtypes."""
    rows = rng.choice(at.rows)
    counts, scale_format = experts(rng, at, rows), rng.choice(at.scale_formats)
    budget = MOST_PRODUCTS // (most_blocks(rows, len(counts)) * FP8_BLOCK)
    depth = min(rng.choice(at.depths), max(FP8_BLOCK, budget // 64 // FP8_BLOCK * FP8_BLOCK))
    columns = min(rng.choice(at.columns), max(64, budget // depth // 64 * 64)) - rng.choice((0, 0, 8))
    grad = numbers(rng, rows, columns) * 2.0 ** rng.choice((0, 0, -20))
    operands = (quantize_fp8_columns(each, None, counts, scale_format) for each in (grad, numbers(rng, rows, depth)))
    (grad, grad_scale), (x, x_scale) = operands
    out_dtype = rng.choice((torch.bfloat16, torch.float32))
    return fp8_wgrad.case(grad, grad_scale, x, x_scale, counts, out_dtype=out_dtype)
