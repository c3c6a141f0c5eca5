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
be told apart; who computes which split, and where, cannot either. A key that is not selected is as one after the query.
"""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dsv3_plugin.ops.attention_gradients import attention_gradients
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.drawing import MOST_PRODUCTS, Case, Sizes, numbers, size_of_numbers
from dsv3_plugin.ops.elementary import LOG2_E, exp2_of_nonpositive, fma, fold_sum
from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.operation import BoundKernels, matrix_operation
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.products import Products

KEY_BLOCK = 64
SPLIT_KEYS = 1024
MAXIMUM_STEP = 8
"""Maxima, in units of log 2, are multiples of it."""


@matrix_operation(
    version=4,
    summary="absorbed causal attention, online softmax over 64-key blocks in splits of 1024 keys, maxima at multiples"
    " of 8",
    dims=("kv_lora_rank", "qk_rope_head_dim"),
    page_sizes=(1, 32, 64),  # SGLang's, the suite's and vLLM's
)
def mla_attention(
    products: Products,
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    batch: PagedBatch,
    keys: KeySelection = ALL_KEYS,
    *,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    """Attend the last tokens of several requests to their cached prefixes.

    Args:
        q: [T, H, C], absorbed queries of all requests one after the other; C = kv_lora_rank + qk_rope_head_dim.
        latent_cache: [num_blocks, block_size, C] of q's dtype, with the queries' own tokens already written.
        batch: the requests, on q's device.
        keys: which of the keys a query attends to, of those up to its own; at least one.
        kv_lora_rank: of the C numbers, how many are value too.
        scale: factor of the scores before the softmax, positive.

    Returns [T, H, kv_lora_rank] of q's dtype. Raises `InputError` where the arguments do not fit each other.
    """
    require_inputs(q, latent_cache, batch, keys, scale)
    starts = batch.read_query_start_loc()
    outputs = []
    for request, length in enumerate(batch.read_seq_lens()):
        rows = slice(starts[request], starts[request + 1])
        if rows.start == rows.stop:
            continue
        blocks = batch.block_table[request, : -(-length // batch.block_size)].long()
        cached = latent_cache[blocks].flatten(0, 1)[:length]
        outputs.append(attend(products, q[rows], cached, kv_lora_rank, scale, keys.mask(rows, length)))
    return torch.cat(outputs) if outputs else q.new_empty(0, q.shape[1], kv_lora_rank)


def require_inputs(
    q: torch.Tensor, latent_cache: torch.Tensor, batch: PagedBatch, keys: KeySelection, scale: float
) -> None:
    """Raise `InputError` unless the arguments of `mla_attention` fit each other; no number on a device is read."""
    op = mla_attention.name
    require(q.dim() == 3, op, f"q has shape {tuple(q.shape)}, expected [tokens, heads, dim]")
    require(len(q) == batch.num_tokens, op, f"q has {len(q)} tokens, the batch {batch.num_tokens}")
    require(
        latent_cache.shape == (batch.num_blocks, batch.block_size, q.shape[2]),
        op,
        f"latent_cache has shape {tuple(latent_cache.shape)}, the batch {batch.num_blocks} blocks of"
        f" {batch.block_size}, q dim {q.shape[2]}",
    )
    require(latent_cache.dtype == q.dtype, op, f"latent_cache is {latent_cache.dtype}, q is {q.dtype}")
    require(batch.device == q.device, op, f"the batch is on {batch.device}, q is on {q.device}")
    require(scale > 0, op, f"scale is {scale}, expected a positive number")
    if keys.positions is not None:
        count = len(keys.positions)
        require(count == len(q), op, f"the selection of keys is for {count} queries, q has {len(q)}")


def attend(
    products: Products,
    queries: torch.Tensor,
    keys: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
    selected: torch.Tensor | None = None,
) -> torch.Tensor:
    """queries [T, H, C] are the last T tokens of keys [L, C], selected bool [T, L]; to [T, H, kv_lora_rank]."""
    tokens, heads, _ = queries.shape
    first_position = len(keys) - tokens
    if selected is not None:
        blind = ~selected.tril(first_position).any(1)
        require(not blind.any(), mla_attention.name, "a query selects none of the keys up to its own")
        selected = F.pad(selected, (0, -len(keys) % KEY_BLOCK))
    rows = queries.flatten(0, 1)
    keys = F.pad(keys, (0, 0, 0, -len(keys) % KEY_BLOCK))
    folded: Triple | None = None
    for start in range(0, len(keys), SPLIT_KEYS):
        # Rows before `skip` see nothing of this split: leaving them out saves the work and changes no bit.
        skip = max(0, start - first_position) * heads
        split = keys[start : start + SPLIT_KEYS]
        first = max(0, first_position - start)
        chosen = None if selected is None else selected[skip // heads :, start : start + SPLIT_KEYS]
        triple = attend_split(products, rows[skip:], heads, first, split, kv_lora_rank, scale, chosen)
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

    def where(self, rows: torch.Tensor, other: Triple) -> Triple:
        """`other` in the place of the rows where rows [R, 1] is False."""
        return Triple(*(torch.where(rows, x, y) for x, y in zip(self, other, strict=True)))


def fold(a: Triple, b: Triple) -> Triple:
    """The triple of two ranges of keys, b behind a. A range of which a row sees no key leaves the other as it is."""
    maximum = torch.maximum(a.maximum, b.maximum)
    of_a, of_b = exp2_of_nonpositive(a.maximum - maximum), exp2_of_nonpositive(b.maximum - maximum)
    both = Triple(maximum, a.total * of_a + b.total * of_b, a.output * of_a + b.output * of_b)
    # A sum is zero only without a key: the largest probability of a row is far above the smallest number.
    return a.where(b.total == 0, b.where(a.total == 0, both))


def step_above(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The smallest multiple of MAXIMUM_STEP in fp32 that is not below x * y, of fp32 numbers: rounded up twice."""
    exact = x.double() * y.double()
    product = exact.float()
    product = torch.where(product < exact, torch.nextafter(product, torch.full_like(product, torch.inf)), product)
    return torch.ceil(product / MAXIMUM_STEP) * MAXIMUM_STEP


def attend_split(
    products: Products,
    rows: torch.Tensor,
    heads: int,
    first_position: int,
    keys: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
    selected: torch.Tensor | None = None,
) -> Triple:
    """rows [R, C] of tokens from `first_position` on, keys [n * KEY_BLOCK, C], of which selected bool
    [R / heads, n * KEY_BLOCK]; positions count from the first key.
    """
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
        scores = products.linear(rows[skip:], block, torch.float32)
        key_positions = torch.arange(start, start + KEY_BLOCK, device=keys.device)
        unseen = key_positions > positions[skip:]
        if selected is not None:
            chosen = selected[skip // heads :, start : start + KEY_BLOCK]
            unseen = unseen | ~chosen.repeat_interleave(heads, 0)
        scores = scores.masked_fill(unseen, -torch.inf)
        maximum = torch.maximum(old.maximum, step_above(scores.amax(1, keepdim=True), factor))
        p = exp2_of_nonpositive(fma(scores, factor, -maximum)).to(rows.dtype)
        alpha = exp2_of_nonpositive(old.maximum - maximum)
        total = old.total * alpha + fold_sum(p.float(), KEY_BLOCK)
        output = products.add_product(old.output * alpha, p, block[:, :kv_lora_rank])
        new = Triple(maximum, total, output)
        if selected is not None:
            new = old.where(unseen.all(1, keepdim=True), new)
        triple = triple.replace_tail(skip, new)
    return triple


class _MLAAttention(torch.autograd.Function):
    """Recomputed request by request, tile by tile (`attention_gradients`). The gradient of the cache has all its pages;
    a selection of keys is a constant.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ops: BoundKernels,
        q: torch.Tensor,
        latent_cache: torch.Tensor,
        batch: PagedBatch,
        keys: KeySelection,
        kv_lora_rank: int,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, latent_cache)
        ctx.batch, ctx.keys, ctx.kv_lora_rank, ctx.scale = batch, keys, kv_lora_rank, scale
        return ops[mla_attention](q, latent_cache, batch, keys, kv_lora_rank=kv_lora_rank, scale=scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, latent_cache = ctx.saved_tensors
        batch: PagedBatch = ctx.batch
        grad_q = torch.zeros_like(q)
        grad_cache = torch.zeros_like(latent_cache, dtype=torch.float32)
        starts = batch.read_query_start_loc()
        for request, length in enumerate(batch.read_seq_lens()):
            rows = slice(starts[request], starts[request + 1])
            if rows.start == rows.stop:
                continue
            blocks = batch.block_table[request, : -(-length // batch.block_size)].long()
            cached = latent_cache[blocks].flatten(0, 1)[:length]
            selected = ctx.keys.mask(rows, length)
            grad_q[rows], of_keys = attention_gradients(
                grad[rows], q[rows], cached, ctx.kv_lora_rank, ctx.scale, selected
            )
            padded = F.pad(of_keys, (0, 0, 0, len(blocks) * batch.block_size - length))
            grad_cache.index_add_(0, blocks, padded.unflatten(0, (-1, batch.block_size)))
        return None, grad_q, grad_cache.to(latent_cache.dtype), None, None, None, None


@mla_attention.gradient
def _differentiable(
    ops: BoundKernels,
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    batch: PagedBatch,
    keys: KeySelection = ALL_KEYS,
    *,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    return _MLAAttention.apply(ops, q, latent_cache, batch, keys, kv_lora_rank, scale)


@mla_attention.cases
def _case(rng: random.Random, at: Sizes) -> Case:
    """Requests of prefill, verify and decode together, shuffled pages, unwritten memory behind each."""
    heads, (rank, rotary) = rng.choice(at.heads), rng.choice(at.latents)
    block_size = rng.choice((1, 16, 32, 64))
    lengths, queries = [], []
    budget = MOST_PRODUCTS // (heads * (2 * rank + rotary))
    for _ in range(rng.choice(at.requests)):
        count = min(rng.choice((1, 1, 2, 5, 70)), max(1, budget // 512), at.keys // 16)
        # Few are long: the model takes its time for each block of keys.
        length = count + int(max(0, min(at.keys, budget // count // 2 - count)) * rng.random() ** 3)
        if budget < count * length:
            break
        budget -= count * length
        queries.append(count)
        lengths.append(length)
    if not queries:
        queries, lengths = [1], [rng.randint(1, 64)]
    blocks = [-(-length // block_size) for length in lengths]
    pages = list(range(sum(blocks) + 3))
    rng.shuffle(pages)
    table = torch.zeros(len(blocks), max(blocks) + 1, dtype=torch.int32)
    for request, count in enumerate(blocks):
        table[request, :count] = torch.tensor([pages.pop() for _ in range(count)])
    cache = numbers(rng, sum(blocks) + 3, block_size, rank + rotary) * size_of_numbers(rng)
    # What no request has written yet may hold anything.
    for request, length in enumerate(lengths):
        if length % block_size:
            cache[table[request, blocks[request] - 1], length % block_size :] = math.nan
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    q = numbers(rng, sum(queries), heads, rank + rotary) * 0.3
    batch = PagedBatch.of(q, cache, table, torch.tensor(lengths, dtype=torch.int32), starts)
    return mla_attention.case(q, cache, batch, kv_lora_rank=rank, scale=(rank + rotary) ** -0.5)
