"""What attention reads: queries with the key half of `kv_b_proj` folded in, and latent vectors as they are cached.

The product writes where the rotary part joins it, so that nothing is copied. With few tokens one more kernel does the
rest of both. With many it has the latent vectors alone: what the product's CTAs read of a query is next to its rotary
part in memory, so they rotate it as well.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.kernels.triton.elementary import EXACT, widen
from dsv3_plugin.kernels.triton.linear import multiply_heads, require_heads
from dsv3_plugin.kernels.triton.rms_norm import inverse_rms
from dsv3_plugin.kernels.triton.rope import rotate
from dsv3_plugin.ops import absorb as contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.operation import implements

# From so many tokens on the product's CTAs rotate as well. Any choice gives the same bits.
_MANY_TOKENS = 128
_HEADS = 16
_ROWS, _COLUMNS = 128, 64


@triton.jit
def _multiply_and_rotate(
    queries,
    w_uk,
    cos,
    sin,
    q,
    tokens,
    heads,
    NOPE: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A CTA has ROWS queries of a head, which stay; the head's weight passes by. NOPE is padded to DEPTH."""
    head = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = (token.to(tl.int64) * heads + head)[:, None]
    queries += row * (NOPE + 2 * PAIRS)
    q += row * (RANK + 2 * PAIRS)
    inside = (token < tokens)[:, None]

    k = tl.arange(0, DEPTH)
    x = tl.load(queries + k[None, :], mask=inside & (k < NOPE)[None, :], other=0)
    w_uk += head.to(tl.int64) * RANK * NOPE
    for first in tl.range(0, RANK, COLUMNS, num_stages=3):
        column = first + tl.arange(0, COLUMNS)
        weight = tl.load(
            w_uk + column[None, :] * NOPE + k[:, None], mask=(column < RANK)[None, :] & (k < NOPE)[:, None], other=0
        )
        out = tl.dot(x, weight).to(q.dtype.element_ty)
        tl.store(q + column[None, :], out, mask=inside & (column < RANK)[None, :])

    element, pair = tl.arange(0, 2 * WIDTH)[None, :], tl.arange(0, WIDTH)[None, :]
    rotary = tl.load(queries + NOPE + element, mask=inside & (element < 2 * PAIRS), other=0).to(tl.float32)
    even, odd = tl.split(tl.reshape(rotary, (ROWS, WIDTH, 2)))
    at = token[:, None] * PAIRS + pair
    c = tl.load(cos + at, mask=inside & (pair < PAIRS), other=0)
    s = tl.load(sin + at, mask=inside & (pair < PAIRS), other=0)
    rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, 2 * WIDTH))
    tl.store(q + RANK + element, rotated.to(q.dtype.element_ty), mask=inside & (element < 2 * PAIRS))


@triton.jit
def _norm_and_rotate(
    queries,
    latent,
    weight,
    cos,
    sin,
    q,
    out,
    eps,
    heads,
    latent_stride,
    NOPE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The first CTA of a token has its latent vector, RANK numbers as BLOCKS of 128, the others HEADS queries each."""
    token = tl.program_id(0).to(tl.int64)
    cos += token * PAIRS
    sin += token * PAIRS
    query_size: tl.constexpr = NOPE + 2 * PAIRS
    latent_size: tl.constexpr = RANK + 2 * PAIRS
    if tl.program_id(1) == 0:
        column = tl.arange(0, BLOCKS)[:, None] * 128 + tl.arange(0, 128)[None, :]
        inside = column < RANK
        latent += token * latent_stride
        out += token * latent_size
        wide = widen(tl.load(latent + column, mask=inside, other=0))
        weights = tl.load(weight + column, mask=inside, other=0)
        rotate(latent + RANK, out + RANK, cos, sin, tl.arange(0, 1), 1, 0, 0, PAIRS, WIDTH)
        scaled = wide * inverse_rms(wide, eps, RANK, BLOCKS) * widen(weights)
        tl.store(out + column, scaled.to(out.dtype.element_ty), mask=inside)
    else:
        head = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
        queries += token * heads * query_size + NOPE
        q += token * heads * latent_size + RANK
        rotate(queries, q, cos, sin, head, heads, query_size, latent_size, PAIRS, WIDTH)


@implements(contracts.absorb)
def absorb(
    heads: torch.Tensor,
    w_uk: torch.Tensor,
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """heads bf16 [T, H, N + P], w_uk bf16 [H, R, N], latent bf16 [T, R + P] of any row stride, norm_weight bf16 [R],
    cos and sin fp32 [T, P / 2], to q bf16 [T, H, R + P] and bf16 [T, R + P]. Raises `InputError`.
    """
    op = "absorb"
    contracts.require_sizes(heads, w_uk, latent)
    (tokens, count, size), (_, rank, nope) = heads.shape, w_uk.shape
    rotary = size - nope
    require_heads(op, heads[..., :nope], w_uk)
    require(heads.is_contiguous(), op, f"heads of shape {tuple(heads.shape)} are not contiguous")
    require(latent.stride(1) == 1, op, f"latent has stride {latent.stride(1)} in its last dimension, expected 1")
    is_bf16 = latent.dtype == norm_weight.dtype == torch.bfloat16
    require(is_bf16, op, f"latent is {latent.dtype}, norm_weight is {norm_weight.dtype}, expected bf16")
    require(tuple(norm_weight.shape) == (rank,), op, f"norm_weight has shape {tuple(norm_weight.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        fits = tuple(table.shape) == (tokens, rotary // 2) and table.is_contiguous() and table.dtype == torch.float32
        require(fits, op, f"{name} is {table.dtype} of shape {tuple(table.shape)}, expected contiguous fp32 [T, P / 2]")
    q, out = heads.new_empty(tokens, count, rank + rotary), heads.new_empty(tokens, rank + rotary)
    if tokens:
        pairs, width = rotary // 2, triton.next_power_of_2(rotary // 2)
        of_queries = 0
        if tokens < _MANY_TOKENS:
            multiply_heads(heads[..., :nope], w_uk, q[..., :rank])
            of_queries = triton.cdiv(count, _HEADS)
        else:
            _multiply_and_rotate[(triton.cdiv(tokens, _ROWS), count)](
                heads,
                w_uk,
                cos,
                sin,
                q,
                tokens,
                count,
                nope,
                max(16, triton.next_power_of_2(nope)),
                rank,
                pairs,
                width,
                _ROWS,
                _COLUMNS,
                num_warps=8,
                **EXACT,
            )
        _norm_and_rotate[(tokens, 1 + of_queries)](
            heads,
            latent,
            norm_weight,
            cos,
            sin,
            q,
            out,
            eps,
            count,
            latent.stride(0),
            nope,
            rank,
            triton.next_power_of_2(triton.cdiv(rank, 128)),
            pairs,
            width,
            _HEADS,
            num_warps=4,
            **EXACT,
        )
    return q, out
