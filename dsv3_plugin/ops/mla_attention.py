"""Absorbed multi-head latent attention over a paged latent cache: one form for prefill, decode, verify and training.

Every head reads the same cached vector of a token: `kv_lora_rank` compressed numbers, which are key and value at
once, and `qk_rope_head_dim` rotary numbers, which are key only (DeepSeek-V2 report, section 2.1).

Contract: causal, fp32 online softmax over blocks of 64 keys at absolute positions 0, 64, 128, ..., in order. In a
block: scores = (q . key) * scale, keys after the query at -inf; m' = max(m, scores); p = exp(scores - m'); the old
sum and output are multiplied by exp(m - m'); p is summed by halves (i and i + 32, then 16, ...) and added to the sum;
p, rounded to the profile's dtype, times the values is added to the output. At the end output / sum, one rounding. A
block that a query does not see leaves it as it is, bit for bit, so chunks, batches and cache hits cannot be told
apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv3_plugin.ops.contract import Contract, require
from dsv3_plugin.ops.elementary import exp, fold_sum
from dsv3_plugin.ops.tile import tiled_linear

MLA_ATTENTION = Contract("mla_attention", 1, "absorbed causal attention, online softmax over 64-key blocks")

KEY_BLOCK = 64


def mla_attention(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    """Attend the last tokens of several requests to their cached prefixes.

    Args:
        q: [T, H, C], absorbed queries of all requests one after the other; C = kv_lora_rank + qk_rope_head_dim.
        latent_cache: [num_blocks, block_size, C] of q's dtype, with the queries' own tokens already written.
        block_table: integers [num_reqs, max_blocks], the blocks of each request in order.
        seq_lens: integers [num_reqs], tokens of each request including its queries.
        query_start_loc: integers [num_reqs + 1], where each request's queries start in q.

    Returns [T, H, kv_lora_rank] of q's dtype.
    """
    op = "mla_attention"
    require(q.dim() == 3, op, f"q has shape {tuple(q.shape)}, expected [tokens, heads, dim]")
    require(
        latent_cache.dim() == 3 and latent_cache.shape[2] == q.shape[2],
        op,
        f"latent_cache has shape {tuple(latent_cache.shape)}, q has dim {q.shape[2]}",
    )
    require(latent_cache.dtype == q.dtype, op, f"latent_cache is {latent_cache.dtype}, q is {q.dtype}")
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    require(len(starts) == len(lengths) + 1, op, f"{len(lengths)} seq_lens, {len(starts)} query_start_loc")
    require(starts[-1] == q.shape[0], op, f"query_start_loc ends at {starts[-1]}, q has {q.shape[0]} tokens")
    require(starts[0] == 0 and starts == sorted(starts), op, f"query_start_loc {starts} does not ascend from 0")
    block_size = latent_cache.shape[1]
    outputs = []
    for request, length in enumerate(lengths):
        queries = q[starts[request] : starts[request + 1]]
        if len(queries) == 0:
            continue
        require(length >= len(queries), op, f"request {request} has seq_len {length} and {len(queries)} queries")
        blocks = block_table[request, : -(-length // block_size)].long()
        require(
            len(blocks) * block_size >= length and bool(((blocks >= 0) & (blocks < latent_cache.shape[0])).all()),
            op,
            f"request {request} of {length} tokens has blocks {blocks.tolist()} of {latent_cache.shape[0]}",
        )
        keys = latent_cache[blocks].flatten(0, 1)[:length]
        outputs.append(_attend(queries, keys, kv_lora_rank, scale))
    return torch.cat(outputs) if outputs else q.new_empty(0, q.shape[1], kv_lora_rank)


def _attend(queries: torch.Tensor, keys: torch.Tensor, kv_lora_rank: int, scale: float) -> torch.Tensor:
    """queries [T, H, C] are the last T tokens of keys [L, C]; to [T, H, kv_lora_rank]."""
    tokens, heads, _ = queries.shape
    first_position = len(keys) - tokens
    rows = queries.flatten(0, 1).float()
    positions = torch.arange(first_position, len(keys), device=keys.device).repeat_interleave(heads).unsqueeze(1)
    keys = F.pad(keys, (0, 0, 0, -len(keys) % KEY_BLOCK)).float()

    maximum = rows.new_full((len(rows), 1), -torch.inf)
    total = rows.new_zeros(len(rows), 1)
    output = rows.new_zeros(len(rows), kv_lora_rank)
    for start in range(0, len(keys), KEY_BLOCK):
        # Rows before `skip` see nothing of this block: leaving them out saves the work and changes no bit.
        skip = max(0, start - first_position) * heads
        block = keys[start : start + KEY_BLOCK]
        scores = tiled_linear(rows[skip:], block) * scale
        key_positions = torch.arange(start, start + KEY_BLOCK, device=keys.device)
        scores = scores.masked_fill(key_positions > positions[skip:], -torch.inf)
        new_maximum = torch.maximum(maximum[skip:], scores.amax(1, keepdim=True))
        p = exp(scores - new_maximum)
        alpha = exp(maximum[skip:] - new_maximum)
        values = block[:, :kv_lora_rank].t().contiguous()
        weighted = tiled_linear(p.to(queries.dtype).float(), values)
        total = torch.cat((total[:skip], total[skip:] * alpha + fold_sum(p, KEY_BLOCK)))
        output = torch.cat((output[:skip], output[skip:] * alpha + weighted))
        maximum = torch.cat((maximum[:skip], new_maximum))
    return (output / total).to(queries.dtype).unflatten(0, (tokens, heads))
