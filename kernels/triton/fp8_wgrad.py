"""The gradient of an FP8 weight: tiles of 128 tokens quantized and transposed, and their block-scaled product.

A CTA of the quantizer takes one block of tokens and some columns. A CTA of the product takes a tile of one expert's
gradient and walks that expert's blocks in order; none of them counts on the host.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.kernels.triton.elementary import EXACT
from dsv3_plugin.kernels.triton.quantize import quantize_groups
from dsv3_plugin.kernels.triton.scales import empty_scales, with_contiguous_columns
from dsv3_plugin.kernels.triton.tiles import find_group
from dsv3_plugin.ops import fp8_wgrad as contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.fp8_wgrad import most_blocks, require_columns, require_transposed
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import ScaleFormat

_COLUMNS = 32


class Tile(NamedTuple):
    """Rows of the gradient and of x, as they lie transposed, of a CTA's tile, and how it is launched."""

    rows: int
    columns: int
    warps: int
    stages: int


TILE = Tile(128, 128, 8, 3)


@triton.jit
def _quantize_columns(
    x,
    x_scale,
    counts,
    values,
    scales,
    width,
    tokens,
    row_stride,
    block_stride,
    scale_stride,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    UE8M0: tl.constexpr,
):
    block = tl.program_id(1)
    group, first_row, rows, tile = find_group(counts, block, GROUPS, PADDED, 128)
    local = tile * 128 + tl.arange(0, 128)
    # A block behind the last is one of no rows.
    inside = (local < rows) & (group < GROUPS)
    row = (first_row + local).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = inside[:, None] & (column < width)[None, :]
    wide = tl.load(x + row[:, None] * width + column[None, :], mask=wanted, other=0.0).to(tl.float32)
    if x_scale is not None:
        scale = x_scale + row[:, None] * row_stride + (column // 128)[None, :] * block_stride
        wide = wide * tl.load(scale, mask=wanted, other=0.0)
    quantized, scale = quantize_groups(tl.trans(wide), x.dtype.element_ty == tl.bfloat16, UE8M0)
    target = values + column[:, None].to(tl.int64) * tokens + block * 128 + tl.arange(0, 128)[None, :]
    tl.store(target, quantized, mask=(column < width)[:, None])
    tl.store(scales + column + block.to(tl.int64) * scale_stride, scale, mask=column < width)


@implements(contracts.quantize_fp8_columns)
def quantize_fp8_columns(
    x: torch.Tensor, x_scale: torch.Tensor | None, expert_counts: torch.Tensor, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] sorted by expert, of bf16 or fp32, or of e4m3 with x_scale fp32 [M, K / 128]; expert_counts integers
    [E]; to (e4m3 [K, B * 128], fp32 scales [K, B], a transposed view). Raises `InputError`.

    That the counts sum to M is not checked: they stay on the device.
    """
    op = "quantize_fp8_columns"
    require_columns(op, x, x_scale)
    _require_counts(op, expert_counts)
    (rows, width), groups = x.shape, len(expert_counts)
    blocks = most_blocks(rows, groups)
    values = torch.empty(width, blocks * FP8_BLOCK, dtype=E4M3, device=x.device)
    scales = empty_scales(width, blocks * FP8_BLOCK, x.device)
    if values.numel():
        grid = (triton.cdiv(width, _COLUMNS), blocks)
        _quantize_columns[grid](
            x,
            x_scale,
            expert_counts,
            values,
            scales,
            width,
            blocks * FP8_BLOCK,
            *(x_scale.stride() if x_scale is not None else (0, 0)),
            scales.stride(1),
            groups,
            triton.next_power_of_2(groups),
            _COLUMNS,
            scale_format == "ue8m0",
            num_warps=4,
            **EXACT,
        )
    return values, scales


@triton.jit
def _fp8_wgrad(
    grad,
    grad_scale,
    x,
    x_scale,
    counts,
    out,
    rows,
    columns,
    tokens,
    grad_scale_stride,
    x_scale_stride,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert = tl.program_id(1)
    index = tl.arange(0, PADDED)
    blocks = (tl.load(counts + index, mask=index < GROUPS, other=0).to(tl.int32) + 127) // 128
    first = tl.sum(tl.where(index < expert, blocks, 0), 0)
    count = tl.sum(tl.where(index == expert, blocks, 0), 0)

    column_tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < columns
    k = first.to(tl.int64) * 128 + tl.arange(0, 128)
    grad_tile = grad + row[:, None].to(tl.int64) * tokens + k[None, :]
    x_tile = x + column[:, None].to(tl.int64) * tokens + k[None, :]
    grad_scale += first.to(tl.int64) * grad_scale_stride + row
    x_scale += first.to(tl.int64) * x_scale_stride + column
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(count):
        a = tl.load(grad_tile, mask=row_inside[:, None], other=0.0)
        b = tl.load(x_tile, mask=column_inside[:, None], other=0.0)
        of_grad = tl.load(grad_scale, mask=row_inside, other=0)
        of_x = tl.load(x_scale, mask=column_inside, other=0)
        acc = tl.fma(tl.dot(a, tl.trans(b)), of_grad[:, None] * of_x[None, :], acc)
        grad_tile += 128
        x_tile += 128
        grad_scale += grad_scale_stride
        x_scale += x_scale_stride
    target = out + (expert.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@implements(contracts.fp8_wgrad)
def fp8_wgrad(
    grad: torch.Tensor,
    grad_scale: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Of `quantize_fp8_columns`: grad e4m3 [N, B * 128] with scales fp32 [N, B] and x e4m3 [K, B * 128] with scales
    fp32 [K, B]; expert_counts integers [E]; to [E, N, K] of bf16 or fp32. Raises `InputError`.

    That the counts are those of the blocks is not checked: they stay on the device.
    """
    op = "fp8_wgrad"
    require_transposed(op, grad, grad_scale, x, x_scale)
    _require_counts(op, expert_counts)
    require(out_dtype in (torch.bfloat16, torch.float32), op, f"out_dtype is {out_dtype}")
    (rows, tokens), columns, groups = grad.shape, len(x), len(expert_counts)
    out = torch.empty(groups, rows, columns, dtype=out_dtype, device=grad.device)
    if out.numel():
        grad_scale, x_scale = with_contiguous_columns(grad_scale), with_contiguous_columns(x_scale)
        grid = (triton.cdiv(rows, TILE.rows) * triton.cdiv(columns, TILE.columns), groups)
        _fp8_wgrad[grid](
            grad,
            grad_scale,
            x,
            x_scale,
            expert_counts,
            out,
            rows,
            columns,
            tokens,
            grad_scale.stride(1),
            x_scale.stride(1),
            groups,
            triton.next_power_of_2(groups),
            TILE.rows,
            TILE.columns,
            num_warps=TILE.warps,
            num_stages=TILE.stages,
        )
    return out


def _require_counts(op: str, expert_counts: torch.Tensor) -> None:
    require(expert_counts.dim() == 1, op, f"expert_counts has shape {tuple(expert_counts.shape)}")
    fits = expert_counts.dtype in (torch.int32, torch.int64)
    require(fits, op, f"expert_counts is {expert_counts.dtype}, not integers")
