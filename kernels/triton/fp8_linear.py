"""Block-scaled fp8 products, dense and by expert: the choice of a kernel, and kernels in Triton for any shape.

For each 128 of K four `wgmma` instructions run from zero, and their sum enters the accumulator by one fused
multiply-add with the rounded product of the scales. Fewer than 64 rows on the instruction's first side would make the
compiler leave `wgmma` for another instruction with other bits; the side with fewer rows, down to 16, goes second. The
bits do not depend on which operand is which.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.kernels import selection
from dsv3_plugin.kernels.cuda import fp8_gemm
from dsv3_plugin.kernels.selection import Choice
from dsv3_plugin.kernels.triton import fp8_gluon
from dsv3_plugin.kernels.triton.tiles import find_group
from dsv3_plugin.ops import fp8_linear as contracts
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3


class Tile(NamedTuple):
    """Tokens and weight rows of a CTA's tile, which operand comes first, and how it is launched."""

    rows: int
    columns: int
    weight_first: bool
    warps: int
    stages: int


@triton.jit
def _scaled_dot(
    x,
    x_scale,
    weight,
    weight_scale,
    row,
    row_inside,
    column,
    columns,
    depth,
    row_stride,
    block_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    """fp32 sums of rows `row` [ROWS] of x and rows `column` [COLUMNS] of weight, all inside one 128-row scale block.

    [COLUMNS, ROWS] if WEIGHT_FIRST, else [ROWS, COLUMNS].
    """
    k = tl.arange(0, 128)
    blocks = depth // 128
    weight_scale += tl.min(column, 0) // 128 * blocks
    x_tile = x + row[:, None].to(tl.int64) * depth + k[None, :]
    w_tile = weight + column[:, None].to(tl.int64) * depth + k[None, :]
    x_scale += row.to(tl.int64) * row_stride
    acc = tl.zeros((COLUMNS, ROWS) if WEIGHT_FIRST else (ROWS, COLUMNS), tl.float32)
    # The compiler pipelines the operands' loads but not the scales', which are therefore read one block ahead.
    next_x = tl.load(x_scale, mask=row_inside, other=0)
    next_weight = tl.load(weight_scale)
    for block in range(blocks):
        a = tl.load(x_tile, mask=row_inside[:, None], other=0.0)
        b = tl.load(w_tile, mask=(column < columns)[:, None], other=0.0)
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
    return acc


@triton.jit
def _store(acc, out, row, row_inside, column, columns, WEIGHT_FIRST: tl.constexpr):
    """Write bf16 sums to out [rows, columns]."""
    if WEIGHT_FIRST:
        target = out + row[None, :].to(tl.int64) * columns + column[:, None]
        inside = row_inside[None, :] & (column < columns)[:, None]
    else:
        target = out + row[:, None].to(tl.int64) * columns + column[None, :]
        inside = row_inside[:, None] & (column < columns)[None, :]
    tl.store(target, acc.to(tl.bfloat16), mask=inside)


@triton.jit
def _fp8_linear(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    rows,
    columns,
    depth,
    row_stride,
    block_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    BAND: tl.constexpr,
):
    tile = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    band = tile // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = tile % (BAND * column_tiles)
    row = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
    column = (within // height) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    acc = _scaled_dot(
        x,
        x_scale,
        weight,
        weight_scale,
        row,
        inside,
        column,
        columns,
        depth,
        row_stride,
        block_stride,
        ROWS,
        COLUMNS,
        WEIGHT_FIRST,
    )
    _store(acc, out, row, inside, column, columns, WEIGHT_FIRST)


@triton.jit
def _grouped_fp8_linear(
    x,
    x_scale,
    counts,
    weight,
    weight_scale,
    out,
    columns,
    depth,
    row_stride,
    block_stride,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    group, first_row, rows, tile = find_group(counts, tl.program_id(1), GROUPS, PADDED, ROWS)
    if group < GROUPS:
        local = tile * ROWS + tl.arange(0, ROWS)
        row = first_row + local
        inside = local < rows
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        weight += group.to(tl.int64) * columns * depth
        weight_scale += group * tl.cdiv(columns, 128) * (depth // 128)
        acc = _scaled_dot(
            x,
            x_scale,
            weight,
            weight_scale,
            row,
            inside,
            column,
            columns,
            depth,
            row_stride,
            block_stride,
            ROWS,
            COLUMNS,
            WEIGHT_FIRST,
        )
        _store(acc, out, row, inside, column, columns, WEIGHT_FIRST)


def choose_tile(rows: int, columns: int) -> Tile:
    """A tile for `rows` tokens and `columns` weight rows in all; any choice gives the same bits."""
    if rows <= 64:
        return Tile(max(16, triton.next_power_of_2(rows)), 64 if columns <= 16384 else 128, True, 4, 4)
    if rows <= 128:
        return Tile(64, 128, True, 4, 4)
    return Tile(128, 128, False, 8, 4)


def check(op: str, x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    """Refuse what the kernels cannot read; weight and weight_scale may have a leading dimension of experts."""
    require_matrix(op, "x", x, (E4M3,))
    require(x_scale.dtype == torch.float32, op, f"x_scale is {x_scale.dtype}, expected torch.float32")
    depth = x.shape[1]
    require(weight.dtype == E4M3, op, f"weight is {weight.dtype}, expected {E4M3}")
    require(weight_scale.dtype == torch.float32, op, f"weight_scale is {weight_scale.dtype}, expected torch.float32")
    require(weight.is_contiguous(), op, f"weight of shape {tuple(weight.shape)} is not contiguous")
    require(weight_scale.is_contiguous(), op, f"weight_scale of shape {tuple(weight_scale.shape)} is not contiguous")
    require(depth % FP8_BLOCK == 0, op, f"K={depth} is not a multiple of {FP8_BLOCK}")
    require(weight.shape[-1] == depth, op, f"x has K={depth}, weight has K={weight.shape[-1]}")
    blocks = depth // FP8_BLOCK
    expected = (*weight.shape[:-2], triton.cdiv(weight.shape[-2], FP8_BLOCK), blocks)
    require(tuple(x_scale.shape) == (len(x), blocks), op, f"x_scale has shape {tuple(x_scale.shape)}")
    require(tuple(weight_scale.shape) == expected, op, f"weight_scale has shape {tuple(weight_scale.shape)}")


OWN_BACKENDS = ("cuda", "gluon", "triton")
"""The kernels of this package for these products: fp8_gemm.cu, fp8_gluon.py, and the ones of this module."""


def backends(columns: int, grouped: bool) -> tuple[str, ...]:
    """Those of `OWN_BACKENDS` that support a product with `columns` rows of the weight."""
    able = {
        "cuda": fp8_gemm.serves(columns),
        "gluon": fp8_gluon.serves(columns, grouped),
        "triton": True,
    }
    return tuple(backend for backend in OWN_BACKENDS if able[backend])


@implements(contracts.fp8_linear)
def fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x e4m3 [M, K] with x_scale fp32 [M, K / 128], weight e4m3 [N, K] with weight_scale fp32 [ceil(N / 128), K / 128],
    to bf16 [M, N], by the kernel that `selection` finds. Raises `InputError`.
    """
    require(out_dtype == torch.bfloat16, "fp8_linear", f"out_dtype is {out_dtype}, expected torch.bfloat16")
    return fp8_linear_by(None, x, x_scale, weight, weight_scale)


def fp8_linear_by(
    choice: Choice | None, x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`fp8_linear` by the given kernel."""
    check("fp8_linear", x, x_scale, weight, weight_scale)
    (rows, depth), columns = x.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=x.device)
    if rows:
        choice = choice or selection.choose(0, columns, depth, rows, backends(columns, grouped=False))
        if choice.config is not None:
            fp8_gemm.launch(x, x_scale, weight, weight_scale, None, out, choice.config)
        elif choice.backend == "gluon":
            fp8_gluon.launch(x, x_scale, weight, weight_scale, None, out)
        else:
            _launch(x, x_scale, weight, weight_scale, out)
    return out


def _launch(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out: torch.Tensor
) -> None:
    (rows, depth), columns = x.shape, weight.shape[0]
    tile = choose_tile(rows, columns)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)
    _fp8_linear[grid](
        x,
        x_scale,
        weight,
        weight_scale,
        out,
        rows,
        columns,
        depth,
        *x_scale.stride(),
        tile.rows,
        tile.columns,
        tile.weight_first,
        BAND=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@implements(contracts.grouped_fp8_linear)
def grouped_fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    """x e4m3 [M, K] sorted by expert with x_scale fp32 [M, K / 128], expert_counts integers [E], weight e4m3 [E, N, K]
    with weight_scale fp32 [E, ceil(N / 128), K / 128], to bf16 [M, N], by the kernel that `selection` finds.

    Raises `InputError`. That the counts sum to M is not checked: they stay on the device.
    """
    return grouped_fp8_linear_by(None, x, x_scale, expert_counts, weight, weight_scale)


def grouped_fp8_linear_by(
    choice: Choice | None,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    """`grouped_fp8_linear` by the given kernel."""
    op = "grouped_fp8_linear"
    require(weight.dim() == 3, op, f"weight has shape {tuple(weight.shape)}, expected three dimensions")
    check(op, x, x_scale, weight, weight_scale)
    (rows, depth), (groups, columns, _) = x.shape, weight.shape
    require(tuple(expert_counts.shape) == (groups,), op, f"expert_counts has shape {tuple(expert_counts.shape)}")
    require(
        expert_counts.dtype in (torch.int32, torch.int64), op, f"expert_counts is {expert_counts.dtype}, not integers"
    )
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=x.device)
    if rows:
        mean_rows = -(-rows // groups)
        choice = choice or selection.choose(groups, columns, depth, mean_rows, backends(columns, grouped=True))
        if choice.config is not None:
            fp8_gemm.launch(x, x_scale, weight, weight_scale, expert_counts, out, choice.config)
        elif choice.backend == "gluon":
            fp8_gluon.launch(x, x_scale, weight, weight_scale, expert_counts, out)
        else:
            _launch_grouped(x, x_scale, expert_counts, weight, weight_scale, out)
    return out


def by_backend(backend: str, grouped: bool, *args: torch.Tensor) -> torch.Tensor:
    """`fp8_linear` or `grouped_fp8_linear` by one of `OWN_BACKENDS`, whichever is the fastest; fp8_gemm.cu with one of
    the tile configurations that serve, drawn by the shapes. Raises `InputError` for a shape that it does not take.
    """
    weight = args[-2]
    op = "grouped_fp8_linear" if grouped else "fp8_linear"
    able = backend in backends(weight.shape[-2], grouped)
    require(able, op, f"{selection.IMPLEMENTATIONS[backend]} does not take {weight.shape[-2]} columns")
    draw = random.Random(str([tuple(x.shape) for x in args]))
    config = draw.choice(selection.configs_to_check(grouped))._replace(groups=len(weight) if grouped else 1).filled()
    choice = Choice(backend, config if backend == "cuda" else None)
    return grouped_fp8_linear_by(choice, *args) if grouped else fp8_linear_by(choice, *args)


def _launch_grouped(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    (rows, depth), (groups, columns, _) = x.shape, weight.shape
    tile = choose_tile(max(1, rows // groups), columns * groups)
    grid = (triton.cdiv(columns, tile.columns), rows // tile.rows + min(groups, rows))
    _grouped_fp8_linear[grid](
        x,
        x_scale,
        expert_counts,
        weight,
        weight_scale,
        out,
        columns,
        depth,
        *x_scale.stride(),
        groups,
        triton.next_power_of_2(groups),
        tile.rows,
        tile.columns,
        tile.weight_first,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
