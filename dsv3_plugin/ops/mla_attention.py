"""Absorbed multi-head latent attention over a paged latent cache: one form for prefill, decode, verify and training.

Every head reads the same cached vector of a token: `kv_lora_rank` compressed numbers, which are key and value at
once, and `qk_rope_head_dim` rotary numbers, which are key only (DeepSeek-V2 report, section 2.1).

Contract: causal, fp32. The keys are cut into splits of 1024 at absolute positions 0, 1024, 2048, ..., so a query's
splits depend on its position alone. A split is an online softmax over blocks of 64 keys, in order, and ends as a triple
(maximum, sum, output), fp32. Its maximum, in units of log 2, is a multiple of 8 not below the largest score, so that
factors between maxima are powers of two, mostly one. In a block, with f = scale * log2 e in fp32:

    s = q . key, keys after the query at -inf
    m' = max(m, the smallest multiple of 8 in fp32 that is not below the largest s * f)
    p = 2**(s * f - m') in the profile's dtype, the exponent a fused multiply-add
    sum = sum * 2**(m - m') + p summed by halves (i and i + 32, then i and i + 16, ...)
    output = output * 2**(m - m') + p . values

Triples are folded in order, the first as it is: m = max(m_a, m_b), sum and output = of a * 2**(m_a - m) +
of b * 2**(m_b - m), every product and sum rounded. At the end output * (1 / sum), one rounding to the profile's dtype.
2**x is `elementary.exp2_of_nonpositive`. Scores stay below 2**30 in units of log 2; beyond, neighbouring fp32 numbers
are further apart than 2**x reaches, and a row may be NaN.

A block or a split that a query does not see leaves it as it is, bit for bit, so chunks, batches and cache hits cannot
be told apart; who computes which split, and where, cannot either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dsv3_plugin.ops.contract import Contract
from dsv3_plugin.ops.elementary import LOG2_E, exp2_of_nonpositive, fma, fold_sum
from dsv3_plugin.ops.paged_batch import require_paged_batch
from dsv3_plugin.ops.tile import tiled_linear

MLA_ATTENTION = Contract(
    "mla_attention",
    3,
    "absorbed causal attention, online softmax over 64-key blocks in splits of 1024 keys, maxima at multiples of 8",
)

KEY_BLOCK = 64
SPLIT_KEYS = 1024
MAXIMUM_STEP = 8
"""Maxima, in units of log 2, are multiples of it."""


class Products(NamedTuple):
    """The two matrix products: what differs between a CPU and a tensor core."""

    scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Rows [R, C] and keys [KEY_BLOCK, C] to fp32 [R, KEY_BLOCK]."""
    add_values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """Output fp32 [R, V], probabilities [R, KEY_BLOCK] and values [KEY_BLOCK, V] to fp32 [R, V]."""


def _scores(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return tiled_linear(rows.float(), keys.float())


def _add_values(output: torch.Tensor, p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return output + tiled_linear(p.float(), values.float().t().contiguous())


CPU_PRODUCTS = Products(_scores, _add_values)


def mla_attention(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
    products: Products = CPU_PRODUCTS,
) -> torch.Tensor:
    """Attend the last tokens of several requests to their cached prefixes.

    Args:
        q: [T, H, C], absorbed queries of all requests one after the other; C = kv_lora_rank + qk_rope_head_dim.
        latent_cache: [num_blocks, block_size, C] of q's dtype, with the queries' own tokens already written.
        block_table: integers [num_reqs, max_blocks], the blocks of each request in order.
        seq_lens: integers [num_reqs], tokens of each request including its queries.
        query_start_loc: integers [num_reqs + 1], where each request's queries start in q.
        kv_lora_rank: of the C numbers, how many are value too.
        scale: factor of the scores before the softmax, positive.
        products: the machine's.

    Returns [T, H, kv_lora_rank] of q's dtype. Raises `InputError` where shapes, lengths or pages do not fit.
    """
    require_paged_batch(MLA_ATTENTION.op, q, latent_cache, block_table, seq_lens, query_start_loc, scale)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    block_size = latent_cache.shape[1]
    outputs = []
    for request, length in enumerate(lengths):
        queries = q[starts[request] : starts[request + 1]]
        if len(queries) == 0:
            continue
        blocks = block_table[request, : -(-length // block_size)].long()
        keys = latent_cache[blocks].flatten(0, 1)[:length]
        outputs.append(attend(queries, keys, kv_lora_rank, scale, products))
    return torch.cat(outputs) if outputs else q.new_empty(0, q.shape[1], kv_lora_rank)


def attend(
    queries: torch.Tensor, keys: torch.Tensor, kv_lora_rank: int, scale: float, products: Products
) -> torch.Tensor:
    """queries [T, H, C] are the last T tokens of keys [L, C]; to [T, H, kv_lora_rank]."""
    tokens, heads, _ = queries.shape
    first_position = len(keys) - tokens
    rows = queries.flatten(0, 1)
    keys = F.pad(keys, (0, 0, 0, -len(keys) % KEY_BLOCK))
    folded: Triple | None = None
    for start in range(0, len(keys), SPLIT_KEYS):
        # Rows before `skip` see nothing of this split: leaving them out saves the work and changes no bit.
        skip = max(0, start - first_position) * heads
        split = keys[start : start + SPLIT_KEYS]
        first = max(0, first_position - start)
        triple = attend_split(rows[skip:], heads, first, split, kv_lora_rank, scale, products)
        folded = triple if folded is None else folded.replace_tail(skip, fold(folded.tail(skip), triple))
    assert folded is not None
    return (folded.output * (1.0 / folded.total)).to(queries.dtype).unflatten(0, (tokens, heads))


class Triple(NamedTuple):
    """What a range of keys comes to, for R rows; fp32."""

    maximum: torch.Tensor
    """[R, 1], of the scores in units of log 2, rounded up to a multiple of MAXIMUM_STEP; -inf without a key."""
    total: torch.Tensor
    """[R, 1], of the probabilities."""
    output: torch.Tensor
    """[R, kv_lora_rank], not yet divided."""

    def tail(self, first: int) -> Triple:
        """Rows from `first` on."""
        return Triple(*(x[first:] for x in self))

    def replace_tail(self, first: int, tail: Triple) -> Triple:
        """`tail` in the place of the rows from `first` on."""
        return Triple(*(torch.cat((x[:first], y)) for x, y in zip(self, tail, strict=True)))


def fold(a: Triple, b: Triple) -> Triple:
    """The triple of two neighbouring ranges of keys, b behind a."""
    maximum = torch.maximum(a.maximum, b.maximum)
    of_a, of_b = exp2_of_nonpositive(a.maximum - maximum), exp2_of_nonpositive(b.maximum - maximum)
    return Triple(maximum, a.total * of_a + b.total * of_b, a.output * of_a + b.output * of_b)


def step_above(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The smallest multiple of MAXIMUM_STEP in fp32 that is not below x * y, of fp32 numbers: rounded up twice."""
    exact = x.double() * y.double()
    product = exact.float()
    product = torch.where(product < exact, torch.nextafter(product, torch.full_like(product, torch.inf)), product)
    return torch.ceil(product / MAXIMUM_STEP) * MAXIMUM_STEP


def attend_split(
    rows: torch.Tensor,
    heads: int,
    first_position: int,
    keys: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
    products: Products,
) -> Triple:
    """rows [R, C] of tokens from `first_position` on, keys [n * KEY_BLOCK, C]; positions count from the first key."""
    positions = (first_position + torch.arange(len(rows), device=rows.device) // heads).unsqueeze(1)
    triple = Triple(
        rows.new_full((len(rows), 1), -torch.inf, dtype=torch.float32),
        rows.new_zeros(len(rows), 1, dtype=torch.float32),
        rows.new_zeros(len(rows), kv_lora_rank, dtype=torch.float32),
    )
    factor = torch.tensor(scale * LOG2_E, dtype=torch.float32, device=rows.device)
    for start in range(0, len(keys), KEY_BLOCK):
        skip = max(0, start - first_position) * heads
        old = triple.tail(skip)
        block = keys[start : start + KEY_BLOCK]
        scores = products.scores(rows[skip:], block)
        key_positions = torch.arange(start, start + KEY_BLOCK, device=keys.device)
        scores = scores.masked_fill(key_positions > positions[skip:], -torch.inf)
        maximum = torch.maximum(old.maximum, step_above(scores.amax(1, keepdim=True), factor))
        p = exp2_of_nonpositive(fma(scores, factor, -maximum)).to(rows.dtype)
        alpha = exp2_of_nonpositive(old.maximum - maximum)
        total = old.total * alpha + fold_sum(p.float(), KEY_BLOCK)
        output = products.add_values(old.output * alpha, p, block[:, :kv_lora_rank])
        triple = triple.replace_tail(skip, Triple(maximum, total, output))
    return triple
