"""Absorbed attention over the paged latent cache, of any latent. V3's has a kernel of its own: `mla_hopper`.

A CTA takes 64 rows (token, head) of one request, one head-major tile after the other, and walks its keys in blocks
of 64 and splits of 1024 at absolute positions, in order. A split's output stays in the second product's accumulator.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.kernels import mla_inputs
from dsv3_plugin.kernels.triton.elementary import EXACT, divide, exp2_of_nonpositive, fold_sum
from dsv3_plugin.ops import mla_attention as contracts
from dsv3_plugin.ops.elementary import LOG2_E
from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.mla_attention import KEY_BLOCK, MAXIMUM_STEP, SPLIT_KEYS
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.paged_batch import PagedBatch

_ROWS = 64


@triton.jit
def _find_request(query_start_loc, tile, heads, REQUESTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """(request, its first query, its queries, the tile's number in it); request is REQUESTS behind the last tile."""
    index = tl.arange(0, PADDED)
    inside = index < REQUESTS
    first = tl.load(query_start_loc + index, mask=inside, other=0).to(tl.int32)
    queries = tl.load(query_start_loc + index + 1, mask=inside, other=0).to(tl.int32) - first
    tiles = tl.where(inside, (queries * heads + ROWS - 1) // ROWS, 0)
    request = tl.sum((inside & (tl.cumsum(tiles, 0) <= tile)).to(tl.int32), 0)
    own = index == request
    local = tile - tl.sum(tl.where(index < request, tiles, 0), 0)
    return request, tl.sum(tl.where(own, first, 0), 0), tl.sum(tl.where(own, queries, 0), 0), local


@triton.jit
def _step_above(x, y, STEP: tl.constexpr):
    """x * y, rounded up to a multiple of STEP, a power of two."""
    product = tl.inline_asm_elementwise("mul.rp.f32 $0, $1, $2;", "=r,r,r", [x, y], tl.float32, is_pure=True, pack=1)
    return tl.math.ceil(product * (1 / STEP)) * STEP


@triton.jit
def _mla_attention(
    q,
    cache,
    block_table,
    seq_lens,
    query_start_loc,
    out,
    scale,
    heads,
    block_stride,
    token_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    REQUESTS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    ROPE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    STEP: tl.constexpr,
):
    request, first, queries, tile = _find_request(query_start_loc, tl.program_id(0), heads, REQUESTS, PADDED, ROWS)
    if request < REQUESTS:
        row = tile * ROWS + tl.arange(0, ROWS)
        row_inside = row < queries * heads
        position = tl.load(seq_lens + request).to(tl.int32) - queries + row // heads
        # Keys that some row of this tile sees. The rest of the last block is read as zero: its probability is zero too.
        visible = tl.max(tl.where(row_inside, position, -1), 0) + 1
        rank, rope = tl.arange(0, RANK_PADDED), tl.arange(0, ROPE_PADDED)
        q_row = q + (first.to(tl.int64) * heads + row)[:, None] * (RANK + ROPE)
        q_rank = tl.load(q_row + rank[None, :], mask=row_inside[:, None] & (rank < RANK)[None, :], other=0)
        q_rope = tl.load(q_row + RANK + rope[None, :], mask=row_inside[:, None] & (rope < ROPE)[None, :], other=0)

        # What the splits so far come to; every row sees the first one.
        maximum = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        output = tl.zeros((ROWS, RANK_PADDED), tl.float32)
        for split in range(0, visible, SPLIT):
            split_maximum = tl.full((ROWS,), float("-inf"), tl.float32)
            split_total = tl.zeros((ROWS,), tl.float32)
            split_output = tl.zeros((ROWS, RANK_PADDED), tl.float32)
            for start in range(split, tl.minimum(split + SPLIT, visible), KEYS):
                key = start + tl.arange(0, KEYS)
                key_inside = key < visible
                block = tl.load(block_table + request * table_stride + key // BLOCK_SIZE, mask=key_inside, other=0)
                source = cache + (block.to(tl.int64) * block_stride + key % BLOCK_SIZE * token_stride)[:, None]
                latent = tl.load(source + rank[None, :], mask=key_inside[:, None] & (rank < RANK)[None, :], other=0)
                k_rope = tl.load(
                    source + RANK + rope[None, :], mask=key_inside[:, None] & (rope < ROPE)[None, :], other=0
                )
                scores = tl.dot(q_rank, tl.trans(latent))
                scores = tl.dot(q_rope, tl.trans(k_rope), scores)
                scores = tl.where(key[None, :] > position[:, None], float("-inf"), scores)
                new_maximum = tl.maximum(split_maximum, _step_above(tl.max(scores, 1), scale, STEP))
                p = exp2_of_nonpositive(tl.fma(scores, scale, -new_maximum[:, None])).to(latent.dtype)
                alpha = exp2_of_nonpositive(split_maximum - new_maximum)
                split_total = split_total * alpha + fold_sum(p.to(tl.float32), ROWS, KEYS)
                split_output = tl.dot(p, latent, split_output * alpha[:, None])
                split_maximum = new_maximum
            both = tl.maximum(maximum, split_maximum)
            of_old, of_new = exp2_of_nonpositive(maximum - both), exp2_of_nonpositive(split_maximum - both)
            combined_total = total * of_old + split_total * of_new
            combined_output = output * of_old[:, None] + split_output * of_new[:, None]
            if split == 0:
                total, output = split_total, split_output
            else:
                sees = position >= split
                total = tl.where(sees, combined_total, total)
                output = tl.where(sees[:, None], combined_output, output)
            maximum = both

        target = out + (first.to(tl.int64) * heads + row)[:, None] * RANK + rank[None, :]
        result = output * divide(1.0, total)[:, None]
        tl.store(target, result.to(out.dtype.element_ty), mask=row_inside[:, None] & (rank < RANK)[None, :])


@implements(contracts.mla_attention)
def mla_attention(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    batch: PagedBatch,
    keys: KeySelection = ALL_KEYS,
    *,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    """q bf16 [T, H, C], latent_cache bf16 [num_blocks, block_size, C] with any strides but 1 in C, all of whose keys
    are attended to; to bf16 [T, H, kv_lora_rank].

    Raises `InputError`.
    """
    mla_inputs.check(q, latent_cache, batch, keys, kv_lora_rank, scale)
    requests = batch.num_reqs
    tokens, heads, dim = q.shape
    out = q.new_empty(tokens, heads, kv_lora_rank)
    if out.numel():
        # Not more tiles than this: each request adds at most one that is not full.
        grid = (tokens * heads // _ROWS + min(requests, tokens),)
        _mla_attention[grid](
            q,
            latent_cache,
            *batch.tensors,
            out,
            scale * LOG2_E,
            heads,
            latent_cache.stride(0),
            latent_cache.stride(1),
            batch.block_table.stride(0),
            batch.block_size,
            requests,
            triton.next_power_of_2(requests),
            kv_lora_rank,
            dim - kv_lora_rank,
            max(16, triton.next_power_of_2(kv_lora_rank)),
            max(16, triton.next_power_of_2(dim - kv_lora_rank)),
            _ROWS,
            KEY_BLOCK,
            SPLIT_KEYS,
            MAXIMUM_STEP,
            num_warps=8,
            num_stages=2,
            **EXACT,
        )
    return out
