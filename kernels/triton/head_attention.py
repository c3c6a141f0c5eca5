"""Attention with keys and values of each head: as flash attention does it, in the order of the contract.

A CTA takes 128 queries of one head of one sequence and walks its keys in blocks of 128, in order. Two warpgroups have
64 rows each; scores, probabilities and output stay in their registers.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.kernels.triton.elementary import EXACT, divide, exp2_of_nonpositive, fold_sum
from dsv3_plugin.ops import head_attention as contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.elementary import LOG2_E
from dsv3_plugin.ops.head_attention import KEY_BLOCK, require_inputs
from dsv3_plugin.ops.mla_attention import MAXIMUM_STEP
from dsv3_plugin.ops.operation import implements

_ROWS = 128
_DEPTH = 16
"""Of the tensor core's instruction: numbers of a head and rotary ones do not meet in one."""


@triton.jit
def _find_sequence(query_starts, tile, sequences, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """(sequence, its first query, its queries, the tile's number in it); `sequences` behind the last tile."""
    index = tl.arange(0, PADDED)
    inside = index < sequences
    first = tl.load(query_starts + index, mask=inside, other=0).to(tl.int32)
    queries = tl.load(query_starts + index + 1, mask=inside, other=0).to(tl.int32) - first
    tiles = (queries + ROWS - 1) // ROWS
    sequence = tl.sum((inside & (tl.cumsum(tiles, 0) <= tile)).to(tl.int32), 0)
    own = index == sequence
    local = tile - tl.sum(tl.where(index < sequence, tiles, 0), 0)
    return sequence, tl.sum(tl.where(own, first, 0), 0), tl.sum(tl.where(own, queries, 0), 0), local


@triton.jit
def _step_above(x, y, STEP: tl.constexpr):
    """x * y, rounded up to a multiple of STEP, a power of two."""
    product = tl.inline_asm_elementwise("mul.rp.f32 $0, $1, $2;", "=r,r,r", [x, y], tl.float32, is_pure=True, pack=1)
    return tl.math.ceil(product * (1 / STEP)) * STEP


@triton.jit
def _head_attention(
    q,
    k,
    k_rope,
    v,
    query_starts,
    key_starts,
    out,
    scale,
    sequences,
    heads,
    k_stride,
    k_head_stride,
    k_rope_stride,
    v_stride,
    v_head_stride,
    PADDED: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    WIDTH: tl.constexpr,
    NOPE_PADDED: tl.constexpr,
    ROPE_PADDED: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
):
    sequence, first, queries, tile = _find_sequence(query_starts, tl.program_id(0), sequences, PADDED, ROWS)
    if sequence < sequences:
        head = tl.program_id(1).to(tl.int64)
        first_key = tl.load(key_starts + sequence).to(tl.int64)
        keys = tl.load(key_starts + sequence + 1).to(tl.int32) - first_key.to(tl.int32)
        row = tile * ROWS + tl.arange(0, ROWS)
        row_inside = row < queries
        position = keys - queries + row
        # Keys that some row of this tile sees. The rest of the last block is read as zero: its probability is zero too.
        visible = tl.minimum(keys, keys - queries + (tile + 1) * ROWS)
        nope, rope, column = tl.arange(0, NOPE_PADDED), tl.arange(0, ROPE_PADDED), tl.arange(0, WIDTH_PADDED)
        out_row = (first.to(tl.int64) + row) * heads + head
        q_row = q + out_row[:, None] * (NOPE + ROPE)
        q_nope = tl.load(q_row + nope[None, :], mask=row_inside[:, None] & (nope < NOPE)[None, :], other=0)
        q_rope = tl.load(q_row + NOPE + rope[None, :], mask=row_inside[:, None] & (rope < ROPE)[None, :], other=0)
        k += first_key * k_stride + head * k_head_stride
        k_rope += first_key * k_rope_stride
        v += first_key * v_stride + head * v_head_stride

        maximum = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        output = tl.zeros((ROWS, WIDTH_PADDED), tl.float32)
        for start in range(0, visible, KEYS):
            key = start + tl.arange(0, KEYS)
            key_inside = (key < visible)[:, None]
            key_row = key.to(tl.int64)[:, None]
            own = tl.load(k + key_row * k_stride + nope[None, :], mask=key_inside & (nope < NOPE)[None, :], other=0)
            shared = tl.load(
                k_rope + key_row * k_rope_stride + rope[None, :], mask=key_inside & (rope < ROPE)[None, :], other=0
            )
            value = tl.load(
                v + key_row * v_stride + column[None, :], mask=key_inside & (column < WIDTH)[None, :], other=0
            )
            scores = tl.dot(q_nope, tl.trans(own))
            scores = tl.dot(q_rope, tl.trans(shared), scores)
            scores = tl.where(key[None, :] > position[:, None], float("-inf"), scores)
            new_maximum = tl.maximum(maximum, _step_above(tl.max(scores, 1), scale, STEP))
            p = exp2_of_nonpositive(tl.fma(scores, scale, -new_maximum[:, None])).to(value.dtype)
            alpha = exp2_of_nonpositive(maximum - new_maximum)
            total = total * alpha + fold_sum(p.to(tl.float32), ROWS, KEYS)
            output = tl.dot(p, value, output * alpha[:, None])
            maximum = new_maximum

        result = output * divide(1.0, total)[:, None]
        target = out + out_row[:, None] * WIDTH + column[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=row_inside[:, None] & (column < WIDTH)[None, :])


@implements(contracts.head_attention)
def head_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """q bf16 [T, H, N + P], contiguous; k bf16 [K, H, N], k_rope bf16 [K, P] and v bf16 [K, H, V] with any strides but
    1 in the last dimension; N and P whole instructions' depths of 16; to bf16 [T, H, V].

    Raises `InputError`. That the starts fit the tensors is not checked: they stay on the device.
    """
    op = "head_attention"
    require_inputs(q, k, k_rope, v, query_starts, key_starts, scale)
    require(q.dtype == torch.bfloat16, op, f"q is {q.dtype}, expected torch.bfloat16")
    require(q.is_contiguous(), op, f"q of shape {tuple(q.shape)} is not contiguous")
    for name, x in (("k", k), ("k_rope", k_rope), ("v", v)):
        require(x.stride(-1) == 1, op, f"{name} has stride {x.stride(-1)} in its last dimension")
    nope, rope, width = k.shape[2], k_rope.shape[1], v.shape[2]
    fits = nope % _DEPTH == rope % _DEPTH == 0
    require(fits, op, f"keys of {nope} and {rope} numbers, expected multiples of {_DEPTH}")
    tokens, heads, _ = q.shape
    sequences = len(query_starts) - 1
    out = q.new_empty(tokens, heads, width)
    if out.numel():
        # Not more tiles than this: each sequence adds at most one that is not full.
        grid = (tokens // _ROWS + min(sequences, tokens), heads)
        _head_attention[grid](
            q,
            k,
            k_rope,
            v,
            query_starts.contiguous(),
            key_starts.contiguous(),
            out,
            scale * LOG2_E,
            sequences,
            heads,
            *k.stride()[:2],
            k_rope.stride(0),
            *v.stride()[:2],
            triton.next_power_of_2(sequences),
            nope,
            rope,
            width,
            max(16, triton.next_power_of_2(nope)),
            max(16, triton.next_power_of_2(rope)),
            max(16, triton.next_power_of_2(width)),
            _ROWS,
            KEY_BLOCK,
            MAXIMUM_STEP,
            num_warps=8,
            num_stages=2,
            **EXACT,
        )
    return out
