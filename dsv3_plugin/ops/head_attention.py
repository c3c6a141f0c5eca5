"""Causal attention with keys and values of each head: MLA before it is absorbed (DeepSeek-V2 report, section 2.1).

The tokens of prompts take this form in the `two_form` profile. In DeepSeek-V3's sizes a query and a key take 320
multiplications a head, where `mla_attention` takes 1,088. A key of a head is its own numbers, then the rotary ones,
which all heads share.

Contract: causal, fp32. Each head of each sequence by itself is an online softmax over blocks of 128 keys, in order, at
absolute positions 0, 128, 256, ..., from m = -inf, sum = output = 0. The running maximum m, in units of log 2, is a
multiple of 8, so that factors between maxima are powers of two, mostly one. In a block, with f = scale * log2 e in
fp32:

    s = q . key, own numbers first, then rotary ones; keys after the query at -inf
    m' = max(m, the smallest multiple of 8 in fp32 that is not below the largest s * f)
    p = 2**(s * f - m') in the profile's dtype, the exponent a fused multiply-add
    sum = sum * 2**(m - m') + p summed by halves (i and i + 64, then i and i + 32, ...)
    output = output * 2**(m - m') + p . values

At the end output * (1 / sum), one rounding to the profile's dtype. 2**x is `elementary.exp2_of_nonpositive`. Scores
stay below 2**30 in units of log 2, as in `mla_attention`.

A block that a query does not see leaves it as it is, bit for bit, and keys after a query count for nothing: so where
a prompt is cut into chunks, and what is computed beside it, cannot be told. There are no splits: prompts have rows
enough to keep a card busy, and a second output would take the registers that a tile of 128 rows needs.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.drawing import MOST_PRODUCTS, Case, Sizes, numbers, size_of_numbers
from dsv3_plugin.ops.elementary import LOG2_E, exp2_of_nonpositive, fma, fold_sum
from dsv3_plugin.ops.head_attention_gradients import head_attention_gradients
from dsv3_plugin.ops.mla_attention import step_above
from dsv3_plugin.ops.operation import BoundKernels, matrix_operation
from dsv3_plugin.ops.products import Products

KEY_BLOCK = 128
_NAME = "head_attention"


@matrix_operation(
    version=1,
    summary="causal attention of each head's keys and values, online softmax over 128-key blocks, maxima at multiples"
    " of 8",
    two_form=True,
)
def head_attention(
    products: Products,
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Attend the last tokens of several sequences to all tokens of theirs.

    Args:
        q: [T, H, N + P], the queries of all sequences one after the other.
        k: [K, H, N] of q's dtype, the heads' own part of the keys, likewise.
        k_rope: [K, P] of q's dtype, the part that the heads share.
        v: [K, H, V] of q's dtype.
        query_starts: int32 or int64 [sequences + 1], where each sequence's queries start; from 0 to T.
        key_starts: the same of keys; from 0 to K. A sequence has no fewer keys than queries, which are its last tokens.
        scale: factor of the scores before the softmax, positive.

    Returns [T, H, V] of q's dtype. Raises `InputError` where the arguments do not fit each other.
    """
    require_inputs(q, k, k_rope, v, query_starts, key_starts, scale)
    of_queries, of_keys = query_starts.tolist(), key_starts.tolist()
    require_starts(of_queries, of_keys, len(q), len(k))
    out = q.new_empty(*q.shape[:2], v.shape[2])
    for queries, keys in zip(pairwise(of_queries), pairwise(of_keys), strict=True):
        rows, seen = slice(*queries), slice(*keys)
        for head in range(q.shape[1] if rows.start < rows.stop else 0):
            key = torch.cat((k[seen, head], k_rope[seen]), 1)
            out[rows, head] = attend_head(products, q[rows, head].contiguous(), key, v[seen, head], scale)
    return out


def require_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    scale: float,
) -> None:
    """Raise `InputError` unless the arguments fit each other; no number on a device is read."""
    require(q.dim() == 3, _NAME, f"q has shape {tuple(q.shape)}, expected [tokens, heads, dim]")
    keys, heads = len(k), q.shape[1]
    fits = k.dim() == 3 and k_rope.dim() == 2 and (keys, heads) == tuple(k.shape[:2]) and len(k_rope) == keys
    told = f"k of shape {tuple(k.shape)} and k_rope of shape {tuple(k_rope.shape)}"
    fits = fits and k.shape[2] + k_rope.shape[1] == q.shape[2]
    require(fits, _NAME, f"{told} do not fit q of shape {tuple(q.shape)}")
    fits = v.dim() == 3 and tuple(v.shape[:2]) == (keys, heads)
    require(fits, _NAME, f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}")
    for name, x in (("k", k), ("k_rope", k_rope), ("v", v)):
        require(x.dtype == q.dtype, _NAME, f"{name} is {x.dtype}, q is {q.dtype}")
    for name, starts in (("query_starts", query_starts), ("key_starts", key_starts)):
        is_right = starts.dim() == 1 and starts.dtype in (torch.int32, torch.int64)
        require(is_right, _NAME, f"{name} is {starts.dtype} of shape {tuple(starts.shape)}, expected integers")
        require(starts.device == q.device, _NAME, f"{name} is on {starts.device}, q is on {q.device}")
    fits = len(query_starts) == len(key_starts) > 0
    require(fits, _NAME, f"{len(query_starts)} query_starts, {len(key_starts)} key_starts")
    require(scale > 0, _NAME, f"scale is {scale}, expected a positive number")


def require_starts(of_queries: list[int], of_keys: list[int], tokens: int, keys: int) -> None:
    """Raise `InputError` unless the starts are those of so many queries and keys."""
    for name, starts, total in (("query_starts", of_queries, tokens), ("key_starts", of_keys, keys)):
        fits = starts[0] == 0 and starts[-1] == total and starts == sorted(starts)
        require(fits, _NAME, f"{name} {starts} do not ascend from 0 to {total}")
    for sequence, ((a, b), (c, d)) in enumerate(zip(pairwise(of_queries), pairwise(of_keys), strict=True)):
        require(b - a <= d - c, _NAME, f"sequence {sequence} has {b - a} queries and {d - c} keys")


def attend_head(
    products: Products, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """queries [T, D] are of the last T tokens of keys [L, D] and values [L, V]; to [T, V] of their dtype."""
    first_position = len(keys) - len(queries)
    positions = first_position + torch.arange(len(queries), device=queries.device).unsqueeze(1)
    keys, values = (F.pad(x, (0, 0, 0, -len(x) % KEY_BLOCK)) for x in (keys, values))
    factor = torch.tensor(scale * LOG2_E, dtype=torch.float32, device=queries.device)
    maximum = torch.full_like(positions, -torch.inf, dtype=torch.float32)
    total = torch.zeros_like(maximum)
    output = total.new_zeros(len(queries), values.shape[1])
    for start in range(0, len(keys), KEY_BLOCK):
        # Rows before the first see nothing of this block: leaving them out saves the work and changes no bit.
        rows, block = slice(max(0, start - first_position), None), slice(start, start + KEY_BLOCK)
        scores = products.linear(queries[rows], keys[block], torch.float32)
        key_positions = torch.arange(start, start + KEY_BLOCK, device=keys.device)
        scores = scores.masked_fill(key_positions > positions[rows], -torch.inf)
        new_maximum = torch.maximum(maximum[rows], step_above(scores.amax(1, keepdim=True), factor))
        p = exp2_of_nonpositive(fma(scores, factor, -new_maximum)).to(queries.dtype)
        alpha = exp2_of_nonpositive(maximum[rows] - new_maximum)
        total[rows] = total[rows] * alpha + fold_sum(p.float(), KEY_BLOCK)
        output[rows] = products.add_product(output[rows] * alpha, p, values[block])
        maximum[rows] = new_maximum
    return (output * (1.0 / total)).to(queries.dtype)


class _HeadAttention(torch.autograd.Function):
    """By `head_attention_gradients`, which takes whole sequences: tokens without a query get one whose gradient is
    zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ops: BoundKernels,
        q: torch.Tensor,
        k: torch.Tensor,
        k_rope: torch.Tensor,
        v: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, k_rope, v, query_starts, key_starts)
        ctx.scale = scale
        return ops[head_attention](q, k, k_rope, v, query_starts, key_starts, scale=scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, k_rope, v, query_starts, key_starts = ctx.saved_tensors
        lengths = key_starts.diff()
        # The last queries of each sequence are those of its last keys.
        shift = key_starts[1:] - query_starts[1:]
        places = torch.arange(len(q), device=q.device) + shift.repeat_interleave(query_starts.diff())
        whole_q = q.new_zeros(len(k), *q.shape[1:]).index_copy_(0, places, q)
        whole_grad = v.new_zeros(v.shape).index_copy_(0, places, grad.to(v.dtype))
        keys = torch.cat((k, k_rope.unsqueeze(1).expand(-1, k.shape[1], -1)), 2)
        grad_q, grad_k, grad_v = head_attention_gradients(
            whole_grad, whole_q, keys, v, lengths.tolist(), ctx.scale, repeats=True
        )
        own, shared = grad_k.split([k.shape[2], k_rope.shape[1]], 2)
        of_rope = shared.sum(1, dtype=torch.float32).to(k_rope.dtype)
        return None, grad_q[places], own, of_rope, grad_v, None, None, None


@head_attention.gradient
def _differentiable(
    ops: BoundKernels,
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    return _HeadAttention.apply(ops, q, k, k_rope, v, query_starts, key_starts, scale)


@head_attention.cases
def _case(rng: random.Random, at: Sizes) -> Case:
    """V3's heads and smaller ones; whole prompts, chunks behind others, sequences without queries; keys and values are
    views with gaps, as of pages and of products that have other columns too.
    """
    heads, (rank, rope) = rng.choice(at.heads), rng.choice(at.latents)
    nope = min(128, rank)
    width = rng.choice((nope, nope, nope // 2))
    queries, keys = [], []
    budget = MOST_PRODUCTS // (heads * (nope + rope + width))
    for _ in range(rng.choice(at.requests)):
        count = min(rng.choice(at.rows), max(1, int(budget**0.5)), at.keys)
        before = int(max(0, min(at.keys, budget // count) - count) * rng.random() ** 2)
        # Of some, all that there is is a chunk; of others nothing is asked.
        queries.append(rng.choice((count,) * 7 + (0,)))
        keys.append(count + rng.choice((0, before)))
        budget = max(1, budget - count * keys[-1])
    starts = [torch.tensor([0, *counts]).cumsum(0).to(torch.int32) for counts in (queries, keys)]
    size = size_of_numbers(rng)
    q = numbers(rng, sum(queries), heads, nope + rope) * 0.3
    up = numbers(rng, sum(keys), heads, nope + width) * size
    latent = numbers(rng, sum(keys), rank + rope)
    k, v = up.split([nope, width], -1)
    return head_attention.case(q, k, latent[:, rank:], v, *starts, scale=(nope + rope) ** -0.5)
