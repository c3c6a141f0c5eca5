"""Products with bf16 weights: K ascends in one fp32 accumulator, so that a tile's shape is a choice of speed alone."""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.kernels.triton.elementary import EXACT
from dsv3_plugin.kernels.triton.quantize import quantize_fp8, quantize_groups
from dsv3_plugin.kernels.triton.scales import empty_scales
from dsv3_plugin.kernels.triton.tiles import find_group
from dsv3_plugin.ops import linear as contracts
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import ScaleFormat


class Tile(NamedTuple):
    """Rows, columns and depth of a CTA's tile, and how it is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def _dot_rows(
    x,
    weight,
    row_offset,
    row_inside,
    column,
    columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """fp32 [ROWS, COLUMNS]: rows of x at offsets `row_offset` [ROWS] times rows `column` [COLUMNS] of weight."""
    k = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_tile = x + row_offset[:, None] + k[None, :]
    w_tile = weight + column[None, :].to(tl.int64) * depth + k[:, None]
    for start in range(0, depth, DEPTH):
        inside = k < depth - start
        a = tl.load(x_tile, mask=row_inside[:, None] & inside[None, :], other=0)
        b = tl.load(w_tile, mask=(column < columns)[None, :] & inside[:, None], other=0)
        acc = tl.dot(a, b, acc)
        x_tile += DEPTH
        w_tile += DEPTH
    return acc


@triton.jit
def _linear(
    x,
    weight,
    out,
    rows,
    columns,
    depth,
    x_row_stride,
    x_head_stride,
    out_row_stride,
    out_head_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    # Bands of row tiles, so that CTAs that run together share their tiles of x and weight in the L2 cache.
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    band = tile // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = tile % (BAND * column_tiles)
    row = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
    column = (within // height) * COLUMNS + tl.arange(0, COLUMNS)
    acc = _dot_rows(
        x + head * x_head_stride,
        weight + head * columns * depth,
        row.to(tl.int64) * x_row_stride,
        row < rows,
        column,
        columns,
        depth,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    target = out + head * out_head_stride + row[:, None].to(tl.int64) * out_row_stride + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _head_linear_fp8(
    x,
    weight,
    values,
    scales,
    rows,
    depth,
    x_row_stride,
    x_head_stride,
    blocks,
    scale_stride,
    BLOCKS_A_HEAD: tl.constexpr,
    UE8M0: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A CTA's columns are one of the `blocks` of 128 that have a scale."""
    block = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 128)
    acc = _dot_rows(
        x + block // BLOCKS_A_HEAD * x_head_stride,
        weight + block * 128 * depth,
        row.to(tl.int64) * x_row_stride,
        row < rows,
        column,
        128,
        depth,
        ROWS,
        128,
        DEPTH,
    )
    quantized, scale = quantize_groups(acc.to(tl.bfloat16).to(tl.float32), True, UE8M0)
    target = values + (row[:, None].to(tl.int64) * blocks + block) * 128 + column[None, :]
    tl.store(target, quantized, mask=(row < rows)[:, None])
    tl.store(scales + row + block * scale_stride, scale, mask=row < rows)


@triton.jit
def _grouped_linear(
    x,
    counts,
    weight,
    out,
    columns,
    depth,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    group, first_row, rows, tile = find_group(counts, tl.program_id(1), GROUPS, PADDED, ROWS)
    if group < GROUPS:
        local = tile * ROWS + tl.arange(0, ROWS)
        row = (first_row + local).to(tl.int64)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        acc = _dot_rows(
            x,
            weight + group.to(tl.int64) * columns * depth,
            row * depth,
            local < rows,
            column,
            columns,
            depth,
            ROWS,
            COLUMNS,
            DEPTH,
        )
        target = out + row[:, None] * columns + column[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=(local < rows)[:, None] & (column < columns)[None, :])


def choose_tile(rows: int, columns: int) -> Tile:
    """A tile for `rows` rows of x and `columns` rows of weight; any choice gives the same bits."""
    if rows <= 16 or (rows <= 128 and columns <= 1024):
        return Tile(16, 16, 256, 4, 5) if columns <= 4096 else Tile(16, 32 if columns <= 8192 else 64, 256, 4, 4)
    if rows <= 32:
        return Tile(32, 32 if columns <= 8192 else 64, 128, 4, 5)
    if rows <= 64:
        return Tile(64, 64, 128, 4, 4)
    if columns <= 1024:
        return Tile(128, 64, 64, 4, 4)
    if rows <= 256 and columns <= 16384:
        return Tile(64, 128, 64, 4, 4)
    return Tile(128, 256, 64, 8, 3)


def check(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """Refuse what a kernel of `linear` cannot read; the output's dtype. Raises `InputError`."""
    require_matrix("linear", "x", x, (torch.bfloat16,))
    require_matrix("linear", "weight", weight, (torch.bfloat16,))
    require(x.shape[1] == weight.shape[1], "linear", f"x has K={x.shape[1]}, weight has K={weight.shape[1]}")
    out_dtype = out_dtype or x.dtype
    require(out_dtype in (torch.bfloat16, torch.float32), "linear", f"out_dtype is {out_dtype}, not bf16 or fp32")
    return out_dtype


@implements(contracts.linear)
def linear(x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """x bf16 [M, K], weight bf16 [N, K], to [M, N] of bf16, or of fp32 if `out_dtype` says so. Raises `InputError`."""
    out_dtype = check(x, weight, out_dtype)
    (rows, depth), columns = x.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    if rows:
        _launch(x, weight, out, (rows, 1, columns, depth), (depth, 0), (columns, 0), choose_tile(rows, columns))
    return out


def choose_head_tile(rows: int, depth: int) -> Tile:
    """A tile for `rows` rows of every head; any choice gives the same bits. Depths are short: not many stages."""
    if rows <= 16:
        return Tile(16, 64, 64, 4, 2) if depth <= 128 else Tile(16, 128, 128, 4, 4)
    if rows <= 64:
        height = 32 if rows <= 32 else 64
        return Tile(height, 128, 64, 4, 1) if depth <= 128 else Tile(height, 128, 128, 4, 4 if rows <= 32 else 3)
    return Tile(128, 128, 64, 8, 2 if depth <= 128 else 3)


@implements(contracts.head_linear)
def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x bf16 [M, H, K], any strides but 1 in K, weight bf16 [H, N, K], to bf16 [M, H, N]. Raises `InputError`."""
    require_heads("head_linear", x, weight)
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    multiply_heads(x, weight, out)
    return out


@implements(contracts.head_linear_fp8)
def head_linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """x bf16 [M, H, K], any strides but 1 in K, weight bf16 [H, N, K], to (e4m3 [M, H N], fp32 scales [M, H N / 128]).

    Raises `InputError`. Heads that share a scale with others are multiplied, then quantized: two kernels.
    """
    require_heads("head_linear_fp8", x, weight)
    (rows, heads, depth), columns = x.shape, weight.shape[1]
    if columns % FP8_BLOCK:
        return quantize_fp8(head_linear(x, weight).flatten(1), scale_format)
    values = torch.empty(rows, heads * columns, dtype=E4M3, device=x.device)
    scales = empty_scales(rows, heads * columns, x.device)
    if rows:
        tile = choose_head_tile(rows, depth)
        _head_linear_fp8[(triton.cdiv(rows, tile.rows), scales.shape[1])](
            x,
            weight,
            values,
            scales,
            rows,
            depth,
            *x.stride()[:2],
            scales.shape[1],
            scales.stride(1),
            columns // FP8_BLOCK,
            scale_format == "ue8m0",
            tile.rows,
            tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **EXACT,
        )
    return values, scales


def require_heads(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Refuse what a product of heads cannot read. Raises `InputError`."""
    require(
        x.dim() == 3 and weight.dim() == 3 and x.shape[1] == weight.shape[0] and x.shape[2] == weight.shape[2],
        op,
        f"x of shape {tuple(x.shape)} does not fit weight of shape {tuple(weight.shape)}",
    )
    require(x.dtype == weight.dtype == torch.bfloat16, op, f"x is {x.dtype}, weight is {weight.dtype}, expected bf16")
    require(x.stride(2) == 1, op, f"x has stride {x.stride(2)} in its last dimension, expected 1")
    require(weight.is_contiguous(), op, "weight is not contiguous")


def multiply_heads(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """`head_linear` of checked arguments to out bf16 [M, H, N], any strides but 1 in N."""
    (rows, heads, depth), columns = x.shape, weight.shape[1]
    if rows:
        shape = rows, heads, columns, depth
        strides = (x.stride(0), x.stride(1)), (out.stride(0), out.stride(1))
        _launch(x, weight, out, shape, *strides, choose_head_tile(rows, depth))


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    shape: tuple[int, int, int, int],
    x_strides: tuple[int, int],
    out_strides: tuple[int, int],
    tile: Tile,
) -> None:
    rows, heads, columns, depth = shape
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), heads)
    _linear[grid](
        x,
        weight,
        out,
        rows,
        columns,
        depth,
        *x_strides,
        *out_strides,
        tile.rows,
        tile.columns,
        tile.depth,
        BAND=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@implements(contracts.grouped_linear)
def grouped_linear(x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x bf16 [M, K] sorted by expert, expert_counts integers [E], weight bf16 [E, N, K], to bf16 [M, N].

    Raises `InputError`. That the counts sum to M is not checked: they stay on the device.
    """
    op = "grouped_linear"
    require_matrix(op, "x", x, (torch.bfloat16,))
    require(weight.dtype == torch.bfloat16, op, f"weight is {weight.dtype}, expected torch.bfloat16")
    require(weight.is_contiguous(), op, f"weight of shape {tuple(weight.shape)} is not contiguous")
    (rows, depth), (groups, columns, _) = x.shape, weight.shape
    require(weight.shape[2] == depth, op, f"x has K={depth}, weight has K={weight.shape[2]}")
    require(tuple(expert_counts.shape) == (groups,), op, f"expert_counts has shape {tuple(expert_counts.shape)}")
    out = x.new_empty(rows, columns)
    if rows:
        tile = choose_tile(max(1, rows // groups), columns * groups)
        grid = (triton.cdiv(columns, tile.columns), rows // tile.rows + min(groups, rows))
        _grouped_linear[grid](
            x,
            expert_counts,
            weight,
            out,
            columns,
            depth,
            groups,
            triton.next_power_of_2(groups),
            tile.rows,
            tile.columns,
            tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
