"""What attention reads: queries with the key half of `kv_b_proj` folded in, and latent vectors as they are cached.

The product writes where the rotary part joins it, so that nothing is copied; one more kernel does the rest of both.
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

# Heads of a CTA: with many tokens there are CTAs enough.
_HEADS, _HEADS_OF_MANY_TOKENS = 16, 128
_MANY_TOKENS = 1024


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
        multiply_heads(heads[..., :nope], w_uk, q[..., :rank])
        heads_of_cta = _HEADS if tokens < _MANY_TOKENS else _HEADS_OF_MANY_TOKENS
        _norm_and_rotate[(tokens, 1 + triton.cdiv(count, heads_of_cta))](
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
            rotary // 2,
            triton.next_power_of_2(rotary // 2),
            heads_of_cta,
            num_warps=4,
            **EXACT,
        )
    return q, out
