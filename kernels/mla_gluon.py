"""Absorbed attention for the V3 latent (512 + 64), written for Hopper's asynchronous units.

A program takes 64 rows (token, head) of one request, as `mla` does, with three partitions. A producer warp copies key
blocks through the tensor memory accelerator into two stages. Two consumer warpgroups take turns: one computes the
scores and probabilities of the even blocks, the other those of the odd ones, and hands maximum, sum and probabilities
to its neighbour; each holds 256 columns of the output and adds every block to them, in order. While one does its
softmax the other keeps the tensor core busy. The arithmetic is the contract's, step by step.

A stage's rotary keys are read by the scores alone, so the probabilities, of the same shape, are written in their place.
"""

# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

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

from dsv3_plugin.kernels import triton_math

RANK = gl.constexpr(512)
ROPE = gl.constexpr(64)
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(64)
_HALF = gl.constexpr(256)

_exp = gluon.jit(triton_math.exp_of_nonpositive.fn)


@gluon.jit
def _fold_sum(x, LANES: gl.constexpr):
    """`elementary.fold_sum` of x [ROWS, LANES], to [ROWS]."""
    if LANES == 1:
        return x.reshape((ROWS,))
    else:
        return _fold_sum(gl.sum(x.reshape((ROWS, 2, LANES // 2)), 1), LANES // 2)


@gluon.jit
def _produce(q_half, q_rope, k_half, k_rope, table, q_row, visible, block_size, buffers):
    """Copy the queries, then key block after key block; `table` is this request's row of the block table."""
    q_s, qr_s, k_s, kr_s, _, q_full, full, empty, _ = buffers
    mbarrier.expect(q_full, ROWS * (RANK + ROPE) * 2)
    tma.async_copy_global_to_shared(q_half, [q_row, 0], q_full, q_s.index(0))
    tma.async_copy_global_to_shared(q_half, [q_row, _HALF], q_full, q_s.index(1))
    tma.async_copy_global_to_shared(q_rope, [q_row, RANK], q_full, qr_s)
    page = gl.load(table).to(gl.int32)
    for start in range(0, visible, KEYS):
        row = page * block_size + start % block_size
        page = gl.load(table + gl.minimum(start + KEYS, visible - 1) // block_size).to(gl.int32)
        stage = (start // KEYS) % 2
        phase = (start // (2 * KEYS)) & 1
        mbarrier.wait(empty.index(2 * stage), phase ^ 1)
        mbarrier.expect(full.index(2 * stage), KEYS * _HALF * 2)
        tma.async_copy_global_to_shared(k_half, [row, 0], full.index(2 * stage), k_s.index(2 * stage))
        mbarrier.wait(empty.index(2 * stage + 1), phase ^ 1)
        mbarrier.expect(full.index(2 * stage + 1), KEYS * (_HALF + ROPE) * 2)
        tma.async_copy_global_to_shared(k_half, [row, _HALF], full.index(2 * stage + 1), k_s.index(2 * stage + 1))
        tma.async_copy_global_to_shared(k_rope, [row, RANK], full.index(2 * stage + 1), kr_s.index(stage))


@gluon.jit
def _clear_unwritten(values, inside):
    """Zero the rows of values [KEYS, 256] that hold no key yet: what lies there may be NaN, and 0 times NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    for column in gl.static_range(0, _HALF, 64):
        part = values.slice(column, 64, dim=1)
        part.store(gl.where((row < inside)[:, None], part.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _start_scores(stage, phase, scores, q_s, qr_s, k_s, kr_s, full):
    """Start queries times keys of a stage; K ascends over its left half, its right half and the rotary part."""
    mbarrier.wait(full.index(2 * stage), phase)
    left = k_s.index(2 * stage).permute((1, 0))
    scores = warpgroup_mma(q_s.index(0), left, scores, use_acc=False, is_async=True)
    mbarrier.wait(full.index(2 * stage + 1), phase)
    right = k_s.index(2 * stage + 1).permute((1, 0))
    scores = warpgroup_mma(q_s.index(1), right, scores, is_async=True)
    return warpgroup_mma(qr_s, kr_s.index(stage).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _mask(scores, start, position, lowest, scale):
    """Scaled scores with keys behind `position` [ROWS] at -inf; no row's position is below `lowest`."""
    layout: gl.constexpr = scores.type.layout
    scores = scores * scale
    if start + KEYS > lowest + 1:
        key = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
        scores = gl.where(key[None, :] > position[:, None], float("-inf"), scores)
    return scores


@gluon.jit
def _publish(stage, scores, maximum, new_maximum, total, kr_s, stats, ready):
    """Hand a block's probabilities, maximum, sum and factor to the neighbour; returns (sum, factor)."""
    layout: gl.constexpr = maximum.type.layout
    p = _exp(scores - new_maximum[:, None])
    factor = _exp(maximum - new_maximum)
    total = total * factor + gl.convert_layout(_fold_sum(p, KEYS), layout)
    kr_s.index(stage).store(p.to(gl.bfloat16))
    stats.index(stage * 3).store(new_maximum)
    stats.index(stage * 3 + 1).store(total)
    stats.index(stage * 3 + 2).store(factor)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(ready.index(stage), count=1)
    return total, factor


@gluon.jit
def _consume(WHO: gl.constexpr, rows, buffers):
    """Probabilities of blocks WHO, WHO + 2, ...; output columns WHO * 256 and on of all blocks."""
    out, first_position, tile_row, rows_inside, heads, visible, scale = rows
    q_s, qr_s, k_s, kr_s, stats, q_full, full, empty, ready = buffers
    other: gl.constexpr = 1 - WHO
    own_half: gl.constexpr = 3 * WHO
    other_half: gl.constexpr = 2 * other + WHO
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _HALF, 16])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    blocks = (visible + KEYS - 1) // KEYS
    row = gl.arange(0, ROWS, layout=s_row)
    # Rows behind the last one see what the last one sees; nobody stores them.
    position = first_position + (tile_row + gl.minimum(row, rows_inside - 1)) // heads
    lowest = first_position + tile_row // heads
    maximum = gl.full((ROWS,), float("-inf"), gl.float32, s_row)
    total = gl.zeros((ROWS,), gl.float32, s_row)
    scores = gl.zeros((ROWS, KEYS), gl.float32, s_layout)
    output = gl.zeros((ROWS, _HALF), gl.float32, o_layout)
    mbarrier.wait(q_full, 0)

    if WHO == 0:
        scores = _start_scores(0, 0, scores, q_s, qr_s, k_s, kr_s, full)
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = _mask(scores, 0, position, lowest, scale)
        new_maximum = gl.maximum(maximum, gl.max(scores, 1))
        total, factor = _publish(0, scores, maximum, new_maximum, total, kr_s, stats, ready)
        maximum = new_maximum
        if visible < KEYS:
            _clear_unwritten(k_s.index(0), visible)
        output = warpgroup_mma(kr_s.index(0), k_s.index(0), output)
        mbarrier.arrive(empty.index(0), count=1)

    for block in range(2 - WHO, blocks, 2):
        phase = (block // 2) & 1
        other_phase = ((block - 1) // 2) & 1
        start = block * KEYS
        # The scores do not wait for the neighbour; its probabilities are multiplied right behind them.
        scores = _start_scores(WHO, phase, scores, q_s, qr_s, k_s, kr_s, full)
        mbarrier.wait(ready.index(other), other_phase)
        maximum = stats.index(other * 3).load(s_row)
        total = stats.index(other * 3 + 1).load(s_row)
        output = output * stats.index(other * 3 + 2).load(o_row)[:, None]
        mbarrier.wait(full.index(other_half), other_phase)
        output = warpgroup_mma(kr_s.index(other), k_s.index(other_half), output, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        scores = _mask(scores, start, position, lowest, scale)
        new_maximum = gl.maximum(maximum, gl.max(scores, 1))
        output = warpgroup_mma_wait(0, deps=[output])
        mbarrier.arrive(empty.index(other_half), count=1)
        # Without the barrier the compiler moves the arrival behind the exponentials, and the next copy starts late.
        gl.thread_barrier()
        total, factor = _publish(WHO, scores, maximum, new_maximum, total, kr_s, stats, ready)
        maximum = new_maximum
        if start + KEYS > visible:
            _clear_unwritten(k_s.index(own_half), visible - start)
        output = output * gl.convert_layout(factor, o_row)[:, None]
        output = warpgroup_mma(kr_s.index(WHO), k_s.index(own_half), output)
        mbarrier.arrive(empty.index(own_half), count=1)

    if blocks % 2 == WHO:
        # The last block was the neighbour's.
        other_phase = ((blocks - 1) // 2) & 1
        mbarrier.wait(ready.index(other), other_phase)
        total = stats.index(other * 3 + 1).load(s_row)
        mbarrier.wait(full.index(other_half), other_phase)
        if blocks * KEYS > visible:
            _clear_unwritten(k_s.index(other_half), visible - (blocks - 1) * KEYS)
        output = output * stats.index(other * 3 + 2).load(o_row)[:, None]
        output = warpgroup_mma(kr_s.index(other), k_s.index(other_half), output)

    row = gl.arange(0, ROWS, layout=o_row)
    target = out + WHO * _HALF + row[:, None] * RANK + gl.arange(0, _HALF, layout=gl.SliceLayout(0, o_layout))[None, :]
    sums = gl.convert_layout(total, o_row)[:, None]
    result = gl.div_rn(output, gl.broadcast(sums, output)[0])
    gl.store(target, result.to(gl.bfloat16), mask=(row < rows_inside)[:, None])


@gluon.jit
def _mla_attention(
    q_half,
    q_rope,
    k_half,
    k_rope,
    block_table,
    seq_lens,
    query_start_loc,
    out,
    scale,
    heads,
    table_stride,
    block_size,
    REQUESTS: gl.constexpr,
    PADDED: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    # Request r's tiles start at slot first_row // ROWS + r: never earlier than the end of the previous request's.
    slot = gl.program_id(0)
    index = gl.arange(0, PADDED, layout=gl.BlockedLayout([1], [32], [4], [0]))
    inside = index < REQUESTS
    first_row = gl.load(query_start_loc + index, mask=inside, other=0).to(gl.int32) * heads
    request = gl.sum((inside & (first_row // ROWS + index <= slot)).to(gl.int32), 0) - 1
    first = gl.load(query_start_loc + request).to(gl.int32)
    queries = gl.load(query_start_loc + request + 1).to(gl.int32) - first
    tile_row = (slot - first * heads // ROWS - request) * ROWS
    rows_inside = queries * heads - tile_row
    if rows_inside > 0:
        length = gl.load(seq_lens + request).to(gl.int32)
        first_position = length - queries
        visible = first_position + (tile_row + gl.minimum(rows_inside, ROWS) - 1) // heads + 1
        table = block_table + request * table_stride
        q_row = first * heads + tile_row

        half: gl.constexpr = k_half.layout
        rope: gl.constexpr = k_rope.layout
        q_s = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, _HALF], half)
        qr_s = gl.allocate_shared_memory(gl.bfloat16, [ROWS, ROPE], rope)
        k_s = gl.allocate_shared_memory(gl.bfloat16, [4, KEYS, _HALF], half)
        kr_s = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], rope)
        # A stage's maximum, sum and factor.
        stats = gl.allocate_shared_memory(gl.float32, [6, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        mbarrier.init(q_full, count=1)
        for i in gl.static_range(4):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        for i in gl.static_range(2):
            mbarrier.init(ready.index(i), count=1)
        fence_async_shared()
        target = out + q_row.to(gl.int64) * RANK
        rows = (target, first_position, tile_row, rows_inside, heads, visible, scale)
        buffers = (q_s, qr_s, k_s, kr_s, stats, q_full, full, empty, ready)
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), rows, buffers)),
                (_consume, (gl.constexpr(1), rows, buffers)),
                (_produce, (q_half, q_rope, k_half, k_rope, table, q_row, visible, block_size, buffers)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


def serves(latent_cache: torch.Tensor, kv_lora_rank: int) -> bool:
    """Whether the kernel can read this cache: V3's latent, pages of whole key blocks, no gap between pages."""
    _, block_size, dim = latent_cache.shape
    return (
        kv_lora_rank == RANK.value
        and dim == RANK.value + ROPE.value
        and block_size % KEYS.value == 0
        and latent_cache.stride(0) == block_size * latent_cache.stride(1)
        and latent_cache.stride(1) % 8 == 0
    )


def mla_attention(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Attend q bf16 [T, H, 576] to a cache that `serves` accepts and write out bf16 [T, H, 512]; inputs are checked."""
    tokens, heads, dim = q.shape
    pages, block_size, _ = latent_cache.shape
    requests = len(seq_lens)
    half_shape, rope_shape = [ROWS.value, RANK.value // 2], [ROWS.value, ROPE.value]
    layout = gl.NVMMASharedLayout(128, 16, 2)
    q_shape, q_strides = [tokens * heads, dim], [dim, 1]
    k_shape, k_strides = [pages * block_size, dim], [latent_cache.stride(1), 1]
    _mla_attention[(tokens * heads // ROWS.value + min(requests, tokens),)](
        TensorDescriptor(q, q_shape, q_strides, half_shape, layout),
        TensorDescriptor(q, q_shape, q_strides, rope_shape, layout),
        TensorDescriptor(latent_cache, k_shape, k_strides, half_shape, layout),
        TensorDescriptor(latent_cache, k_shape, k_strides, rope_shape, layout),
        block_table,
        seq_lens,
        query_start_loc,
        out,
        scale,
        heads,
        block_table.stride(0),
        block_size,
        requests,
        triton.next_power_of_2(requests),
        REGISTERS=240,
        num_warps=4,
        **triton_math.EXACT,
    )
