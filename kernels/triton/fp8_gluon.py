"""Block-scaled fp8 products, dense and by expert, written for Hopper's asynchronous units.

A CTA makes a tile of 128 x N sums. A producer warp copies 128-deep K-blocks of both operands by TMA into a ring of
stages; two consumer warpgroups take 64 of the 128 rows each: while the tensor core works for one, the other's raw sums
enter its accumulator by their fused multiply-add. With many tokens they are the 128 rows and the weight has N = 128
columns; with few the weight is first and the tokens, N = 16 to 64, second. Rows of the next expert or behind the last
that a tile copies along are computed and not stored.
"""

# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_FIRST = gl.constexpr(128)
_HALF = gl.constexpr(64)
_DEPTH = gl.constexpr(128)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _produce(first, second, first_row, second_row, blocks, first_s, second_s, full, empty, STAGES: gl.constexpr):
    """Copy K-block after K-block of both operands."""
    for block in range(blocks):
        stage = block % STAGES
        mbarrier.wait(empty.index(stage), ((block // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), (_FIRST + second_s.shape[1]) * _DEPTH)
        tma.async_copy_global_to_shared(first, [first_row, block * _DEPTH], full.index(stage), first_s.index(2 * stage))
        tma.async_copy_global_to_shared(
            first, [first_row + _HALF, block * _DEPTH], full.index(stage), first_s.index(2 * stage + 1)
        )
        tma.async_copy_global_to_shared(second, [second_row, block * _DEPTH], full.index(stage), second_s.index(stage))


@gluon.jit
def _consume(WHO: gl.constexpr, TOKENS_FIRST: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, place, scales, ring):
    """Sums of rows WHO * 64 and on of the first operand."""
    out, row0, row_end, column0, columns = place
    x_scale, weight_scale, row_stride, block_stride, blocks = scales
    first_s, second_s, full, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    first_index = WHO * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(1, layout))
    second_index = gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    if TOKENS_FIRST:
        token = row0 + first_index
    else:
        token = row0 + second_index
    inside = token < row_end
    scale_of = x_scale + token * row_stride
    acc = gl.zeros((_HALF, N), gl.float32, layout)

    # Scales are read one K-block ahead of their use.
    next_x = gl.load(scale_of, mask=inside, other=0)
    next_weight = gl.load(weight_scale)
    zero = gl.zeros((_HALF, N), gl.float32, layout)
    for block in range(blocks):
        stage = block % STAGES
        mbarrier.wait(full.index(stage), (block // STAGES) & 1)
        raw = warpgroup_mma(
            first_s.index(2 * stage + WHO), second_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        scale = next_x * next_weight
        following = gl.minimum(block + 1, blocks - 1)
        next_x = gl.load(scale_of + following * block_stride, mask=inside, other=0)
        next_weight = gl.load(weight_scale + following)
        raw = warpgroup_mma_wait(0, deps=[raw])
        mbarrier.arrive(empty.index(stage), count=1)
        wide = gl.broadcast(scale[:, None] if TOKENS_FIRST else scale[None, :], acc)[0]
        acc = gl.fma(raw, wide, acc)

    if TOKENS_FIRST:
        column = column0 + second_index
        target = out + token.to(gl.int64)[:, None] * columns + column[None, :]
        gl.store(target, acc.to(gl.bfloat16), mask=inside[:, None] & (column < columns)[None, :])
    else:
        column = column0 + first_index
        target = out + token.to(gl.int64)[None, :] * columns + column[:, None]
        gl.store(target, acc.to(gl.bfloat16), mask=inside[None, :] & (column < columns)[:, None])


@gluon.jit
def _linear(
    x,
    weight,
    x_scale,
    weight_scale,
    counts,
    out,
    rows,
    columns,
    blocks,
    row_stride,
    block_stride,
    GROUPS: gl.constexpr,
    PADDED: gl.constexpr,
    N: gl.constexpr,
    TOKENS_FIRST: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    """GROUPS == 0: one dense product. Else `counts` [GROUPS] rows of x belong to each expert, one after the other."""
    row_tile: gl.constexpr = _FIRST if TOKENS_FIRST else N
    column_tile: gl.constexpr = N if TOKENS_FIRST else _FIRST
    column_tiles = gl.cdiv(columns, column_tile)
    if GROUPS == 0:
        # Bands of row tiles, so that CTAs that run together share their K-blocks in the L2 cache.
        row_tiles = gl.cdiv(rows, row_tile)
        band = gl.program_id(0) // (BAND * column_tiles)
        height = gl.minimum(row_tiles - band * BAND, BAND)
        within = gl.program_id(0) % (BAND * column_tiles)
        row0 = (band * BAND + within % height) * row_tile
        column0 = within // height * column_tile
        row_end = rows
        weight_row = column0
        scale_row = column0 // 128
        some = row0 < rows
    else:
        tile = gl.program_id(0) // column_tiles
        column0 = gl.program_id(0) % column_tiles * column_tile
        index = gl.arange(0, PADDED, layout=gl.BlockedLayout([(PADDED + 127) // 128], [32], [4], [0]))
        count = gl.load(counts + index, mask=index < GROUPS, other=0).to(gl.int32)
        tiles = (count + row_tile - 1) // row_tile
        group = gl.sum((gl.associative_scan(tiles, 0, _add) <= tile).to(gl.int32), 0)
        before = index < group
        first_row = gl.sum(gl.where(before, count, 0), 0)
        row0 = first_row + (tile - gl.sum(gl.where(before, tiles, 0), 0)) * row_tile
        row_end = first_row + gl.sum(gl.where(index == group, count, 0), 0)
        some = group < GROUPS
        weight_row = group * columns + column0
        scale_row = group * gl.cdiv(columns, 128) + column0 // 128
    if some:
        element: gl.constexpr = gl.float8e4nv
        first_s = gl.allocate_shared_memory(element, [2 * STAGES, _HALF, _DEPTH], x.layout)
        second_s = gl.allocate_shared_memory(element, [STAGES, N, _DEPTH], x.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=2)
        fence_async_shared()
        place = (out, row0, row_end, column0, columns)
        scales = (x_scale, weight_scale + scale_row * blocks, row_stride, block_stride, blocks)
        ring = (first_s, second_s, full, empty)
        if TOKENS_FIRST:
            source = (x, weight, row0, weight_row, blocks, first_s, second_s, full, empty, STAGES)
        else:
            source = (weight, x, weight_row, row0, blocks, first_s, second_s, full, empty, STAGES)
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), TOKENS_FIRST, N, STAGES, place, scales, ring)),
                (_consume, (gl.constexpr(1), TOKENS_FIRST, N, STAGES, place, scales, ring)),
                (_produce, source),
            ],
            [4, 1],
            [232, 24],
        )


def serves(columns: int, grouped: bool) -> bool:
    """Whether the kernel can make this product: a tile of weight rows must not reach into the next expert's."""
    return not grouped or columns % 128 == 0


class Tile(NamedTuple):
    """Which operand has the 128 rows, how many the other has, and how many K-blocks are in flight."""

    tokens_first: bool
    second: int
    stages: int


def choose_tile(rows: int, columns: int, groups: int) -> Tile:
    """A tile for `rows` tokens (of one expert, on average) and `columns` weight rows; any gives the same bits."""
    if rows <= 16 or (groups and rows <= 64):
        return Tile(False, max(16, triton.next_power_of_2(rows)), 8)
    if groups or rows > 64 or columns > 16384:
        return Tile(True, 128, 6)
    # Enough CTAs for every multiprocessor matter more here than the tile's shape.
    return Tile(True, 64, 8)


def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    expert_counts: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write out bf16 [M, N] from checked operands; weight is [N, K], or [E, N, K] with expert_counts [E]."""
    (rows, depth), columns = x.shape, weight.shape[-2]
    groups = 0 if expert_counts is None else len(expert_counts)
    tile = choose_tile(-(-rows // max(1, groups)), columns, groups)
    row_tile, column_tile = (128, tile.second) if tile.tokens_first else (tile.second, 128)
    row_tiles = rows // row_tile + min(groups, rows) if groups else triton.cdiv(rows, row_tile)
    x_rows, weight_rows = (64, tile.second) if tile.tokens_first else (tile.second, 64)
    layout = gl.NVMMASharedLayout(128, 8, 2)
    flat = weight.view(-1, depth)
    _linear[(row_tiles * triton.cdiv(columns, column_tile),)](
        TensorDescriptor(x, [rows, depth], [depth, 1], [x_rows, 128], layout),
        TensorDescriptor(flat, [flat.shape[0], depth], [depth, 1], [weight_rows, 128], layout),
        x_scale,
        weight_scale,
        expert_counts,
        out,
        rows,
        columns,
        depth // 128,
        *x_scale.stride(),
        GROUPS=groups,
        PADDED=triton.next_power_of_2(max(1, groups)),
        N=tile.second,
        TOKENS_FIRST=tile.tokens_first,
        STAGES=tile.stages,
        BAND=8,
        num_warps=4,
    )
