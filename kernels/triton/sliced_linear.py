"""Products whose sums are in slices of K: each slice has CTAs of its own, and a second kernel adds their sums.

With few rows more CTAs read a weight faster than one CTA a tile can; with many the slices' sums go to memory and back,
a number of rows at a time.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.kernels.triton import fp8_linear, linear
from dsv3_plugin.ops import sliced_linear as contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.sliced_linear import require_slices


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr):
    """A CTA's rows [ROWS] and columns [COLUMNS]; in bands of row tiles, so that CTAs that run together share in L2."""
    tile = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    band = tile // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = tile % (BAND * column_tiles)
    row = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
    return row, (within // height) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _sliced_linear(
    x,
    weight,
    out,
    rows,
    columns,
    depth,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """Sums of slices, `size` of K each, to out [slices, rows, columns]."""
    gdc_launch_dependents()
    row, column = _place(rows, columns, ROWS, COLUMNS, BAND)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[None, :]
    first = tl.program_id(1) * size
    k = tl.arange(0, DEPTH)
    x_tile = x + row[:, None].to(tl.int64) * depth + (first + k)[None, :]
    w_tile = weight + column[None, :].to(tl.int64) * depth + (first + k)[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, DEPTH):
        inside = k < size - start
        a = tl.load(x_tile, mask=row_inside & inside[None, :], other=0)
        b = tl.load(w_tile, mask=column_inside & inside[:, None], other=0)
        acc = tl.dot(a, b, acc)
        x_tile += DEPTH
        w_tile += DEPTH
    target = out + (tl.program_id(1) * rows + row[:, None]).to(tl.int64) * columns + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=row_inside & column_inside)


@triton.jit
def _sliced_fp8_linear(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    rows,
    columns,
    depth,
    blocks,
    row_stride,
    block_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    BAND: tl.constexpr,
):
    """The same of fp8 numbers, `blocks` times 128 of K a slice; tiles lie in one 128-row scale block of the weight."""
    gdc_launch_dependents()
    row, column = _place(rows, columns, ROWS, COLUMNS, BAND)
    row_inside, column_inside = row < rows, column < columns
    first = tl.program_id(1) * blocks
    k = first * 128 + tl.arange(0, 128)[None, :]
    x_tile = x + row[:, None].to(tl.int64) * depth + k
    w_tile = weight + column[:, None].to(tl.int64) * depth + k
    x_scale += row.to(tl.int64) * row_stride + first * block_stride
    weight_scale += tl.min(column, 0) // 128 * (depth // 128) + first
    acc = tl.zeros((COLUMNS, ROWS) if WEIGHT_FIRST else (ROWS, COLUMNS), tl.float32)
    # The compiler pipelines the operands' loads but not the scales', which are therefore read one block ahead.
    next_x = tl.load(x_scale, mask=row_inside, other=0)
    next_weight = tl.load(weight_scale)
    for block in range(blocks):
        a = tl.load(x_tile, mask=row_inside[:, None], other=0.0)
        b = tl.load(w_tile, mask=column_inside[:, None], other=0.0)
        scale = next_x * next_weight
        following = tl.minimum(block + 1, blocks - 1)
        next_x = tl.load(x_scale + following * block_stride, mask=row_inside, other=0)
        next_weight = tl.load(weight_scale + following)
        if WEIGHT_FIRST:
            acc = tl.fma(tl.dot(b, tl.trans(a)), tl.broadcast_to(scale[None, :], (COLUMNS, ROWS)), acc)
        else:
            acc = tl.fma(tl.dot(a, tl.trans(b)), tl.broadcast_to(scale[:, None], (ROWS, COLUMNS)), acc)
        x_tile += 128
        w_tile += 128
    at = (tl.program_id(1) * rows + row).to(tl.int64) * columns
    if WEIGHT_FIRST:
        target, inside = at[None, :] + column[:, None], row_inside[None, :] & column_inside[:, None]
    else:
        target, inside = at[:, None] + column[None, :], row_inside[:, None] & column_inside[None, :]
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tree(sums, stride, inside, COUNT: tl.constexpr):
    """The branch of COUNT slices that begins at `sums`, each `stride` behind the one before."""
    if COUNT == 1:
        return tl.load(sums, mask=inside, other=0)
    else:
        half: tl.constexpr = COUNT // 2
        return _tree(sums, stride, inside, half) + _tree(sums + half * stride, stride, inside, half)


@triton.jit
def _add_slices(sums, out, numbers, SLICES: tl.constexpr, SIZE: tl.constexpr):
    """`sums` fp32 [SLICES, numbers], which the kernel before writes, to out [numbers]."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < numbers
    gdc_wait()
    total = _tree(sums + at, tl.cast(numbers, tl.int64), inside, SLICES)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


_MOST_ROWS = 1024
"""Of which the slices' sums are in memory at a time: 235 MB of eight slices with 7168 columns."""


class Tile(NamedTuple):
    """Rows, columns and depth of a CTA's tile, and how it is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def choose_tile(rows: int) -> Tile:
    """A bf16 tile for `rows` rows of x; any choice gives the same bits."""
    if rows <= 16:
        return Tile(16, 64, 128, 4, 3)
    if rows <= 32:
        return Tile(32, 64, 128, 4, 3)
    if rows <= 64:
        return Tile(64, 128, 64, 4, 4)
    if rows <= 128:
        return Tile(128, 128, 64, 8, 3)
    return Tile(128, 256, 64, 8, 3)


def choose_fp8_tile(rows: int) -> Tile:
    """An fp8 tile for `rows` tokens; any choice gives the same bits."""
    if rows <= 32:
        return Tile(max(16, triton.next_power_of_2(rows)), 64, FP8_BLOCK, 4, 3)
    if rows <= 128:
        return Tile(64, 128, FP8_BLOCK, 4, 3)
    return Tile(128, 128, FP8_BLOCK, 8, 3)


@implements(contracts.sliced_linear)
def sliced_linear(
    x: torch.Tensor, weight: torch.Tensor, slices: int, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x bf16 [M, K], weight bf16 [N, K], K in `slices` slices, to [M, N] of bf16, or of fp32 if `out_dtype` says so.

    Raises `InputError`.
    """
    out_dtype = linear.check(x, weight, out_dtype)
    depth, columns = x.shape[1], weight.shape[0]
    require_slices("sliced_linear", depth, slices)

    def write(sums: torch.Tensor, part: slice) -> None:
        rows = sums.shape[1]
        tile = choose_tile(rows)
        _sliced_linear[_grid(sums, tile)](
            x[part],
            weight,
            sums,
            rows,
            columns,
            depth,
            depth // slices,
            tile.rows,
            tile.columns,
            tile.depth,
            BAND=8,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    return _sum_slices(write, torch.empty(len(x), columns, dtype=out_dtype, device=x.device), slices)


@implements(contracts.sliced_fp8_linear)
def sliced_fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    slices: int,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x e4m3 [M, K] with x_scale fp32 [M, K / 128], weight e4m3 [N, K] with weight_scale fp32 [ceil(N / 128), K / 128],
    K in `slices` slices, to [M, N] of bf16 or fp32. Raises `InputError`.
    """
    op = "sliced_fp8_linear"
    fp8_linear.check(op, x, x_scale, weight, weight_scale)
    require(out_dtype in (torch.bfloat16, torch.float32), op, f"out_dtype is {out_dtype}, not bf16 or fp32")
    depth, columns = x.shape[1], weight.shape[0]
    require_slices(op, depth, slices, FP8_BLOCK)

    def write(sums: torch.Tensor, part: slice) -> None:
        rows = sums.shape[1]
        tile = choose_fp8_tile(rows)
        _sliced_fp8_linear[_grid(sums, tile)](
            x[part],
            x_scale[part],
            weight,
            weight_scale,
            sums,
            rows,
            columns,
            depth,
            depth // (slices * FP8_BLOCK),
            *x_scale.stride(),
            tile.rows,
            tile.columns,
            WEIGHT_FIRST=tile.rows <= 64,
            BAND=8,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    return _sum_slices(write, torch.empty(len(x), columns, dtype=out_dtype, device=x.device), slices)


def _grid(sums: torch.Tensor, tile: Tile) -> tuple[int, int]:
    slices, rows, columns = sums.shape
    return triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), slices


def _sum_slices(write: Callable[[torch.Tensor, slice], None], out: torch.Tensor, slices: int) -> torch.Tensor:
    """out [M, N], filled with the sums [slices, rows, N] that `write` makes of some rows at a time: those of a single
    slice where they belong, those of several in fp32, to be added.
    """
    for start in range(0, len(out), _MOST_ROWS):
        part = slice(start, min(start + _MOST_ROWS, len(out)))
        if slices == 1:
            write(out[part].unsqueeze(0), part)
        else:
            _sum_several(write, out[part], part, slices)
    return out


def _sum_several(write: Callable[[torch.Tensor, slice], None], out: torch.Tensor, part: slice, slices: int) -> None:
    sums = torch.empty(slices, *out.shape, dtype=torch.float32, device=out.device)
    write(sums, part)
    size = 1024
    _add_slices[(triton.cdiv(out.numel(), size),)](sums, out, out.numel(), slices, size, launch_pdl=True)
