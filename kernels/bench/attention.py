"""Absorbed attention over pages, and attention of prompts by heads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from dsv3_plugin.kernels.bench import peers
from dsv3_plugin.kernels.bench.case import DEVICE, MOST_ROWS, Case, Contenders, bf16, peer
from dsv3_plugin.kernels.bench.measure import Rows
from dsv3_plugin.kernels.cuda import head_hopper, mla_hopper
from dsv3_plugin.ops.paged_batch import PagedBatch


def attention_cases() -> Iterator[Case]:
    """Absorbed MLA over pages of 64: decode, verify of two tokens, one long request."""
    rows = {heads: partial(_attention_rows, heads) for heads in (16, 128)}
    for requests, keys, heads, queries in (
        (128, 4096, 128, 1),
        (128, 4096, 16, 1),
        (128, 4096, 128, 2),
        (1, 65536, 128, 1),
        (1, 8192, 128, 512),
    ):

        def make(requests: int = requests, keys: int = keys, heads: int = heads, queries: int = queries) -> Contenders:
            pages = keys // 64
            cache = bf16(requests * pages, 64, 576) * 0.3
            table = torch.randperm(requests * pages, device=DEVICE).to(torch.int32).view(requests, pages)
            lengths = torch.full((requests,), keys, device=DEVICE, dtype=torch.int32)
            starts = torch.arange(requests + 1, device=DEVICE, dtype=torch.int32) * queries
            q = bf16(requests * queries, heads, 576)
            scale = 192**-0.5
            batch = PagedBatch.of(q, cache, table, lengths, starts)
            paged = cache, table, lengths, scale
            return Contenders(
                lambda: mla_hopper.mla_attention(q, cache, batch, kv_lora_rank=512, scale=scale),
                {"FlashMLA": peer(peers.vllm_flash_mla, q.view(requests, queries, heads, 576), *paged)},
                {"vLLM (Triton, one split)": peer(peers.vllm_one_split, q, *paged)},
            )

        moved = requests * keys * 1152 + requests * queries * heads * 1088 * 2
        name = f"MLA B={requests} S={keys} h={heads} s_q={queries}"
        operations = 2 * requests * queries * heads * 1088 * (keys - (queries - 1) / 2)
        yield Case(name, make, moved, bf16_operations=operations, rows=rows[heads])


def _attention_rows(heads: int) -> Rows:
    """512 queries of each of eight requests: decoded one by one, or as chunks of 512."""
    chunk, requests, pages = 512, MOST_ROWS // 512, 141
    q, cache = bf16(MOST_ROWS, heads, 576), bf16(requests * pages, 64, 576) * 0.3
    table = torch.randperm(requests * pages, device=DEVICE).to(torch.int32).view(requests, pages)
    lengths = torch.randint(chunk, pages * 64, (requests,), device=DEVICE, dtype=torch.int32)
    seen = (lengths[:, None] - torch.arange(chunk - 1, -1, -1, device=DEVICE, dtype=torch.int32)).flatten()
    request = torch.arange(MOST_ROWS, device=DEVICE) // chunk
    attend = partial(mla_hopper.mla_attention, kv_lora_rank=512, scale=192**-0.5)

    def decode(rows: torch.Tensor) -> torch.Tensor:
        starts = torch.arange(len(rows) + 1, device=DEVICE, dtype=torch.int32)
        own = q[rows]
        return attend(own, cache, PagedBatch.of(own, cache, table[request[rows]], seen[rows], starts))

    starts = torch.arange(requests + 1, device=DEVICE, dtype=torch.int32) * chunk
    return Rows(MOST_ROWS, decode, partial(attend, q, cache, PagedBatch.of(q, cache, table, lengths, starts)))


def prompt_cases() -> Iterator[Case]:
    """Attention by 128 heads, causal: whole prompts, and the last chunk of a long one."""
    heads, nope, rope, value = 128, 128, 64, 128
    for requests, queries, keys in ((8, 4096, 4096), (1, 32768, 32768), (1, 8192, 32768)):

        def make(requests: int = requests, queries: int = queries, keys: int = keys) -> Contenders:
            q = bf16(requests * queries, heads, nope + rope)
            k, k_rope = bf16(requests * keys, heads, nope), bf16(requests * keys, rope)
            v = bf16(requests * keys, heads, value)
            numbers = torch.arange(requests + 1, device=DEVICE, dtype=torch.int32)
            starts, scale = (numbers * queries, numbers * keys), (nope + rope) ** -0.5
            whole = torch.cat((k, k_rope.unsqueeze(1).expand(-1, heads, -1)), -1)
            return Contenders(
                lambda: head_hopper.head_attention(q, k, k_rope, v, *starts, scale=scale),
                {"FlashAttention 3": peer(peers.vllm_flash_attention, q, whole, v, starts, (queries, keys), scale)},
            )

        numbers = requests * heads * (queries * (nope + rope + value) + keys * (nope + value))
        moved = 2 * (numbers + requests * keys * rope)
        operations = 2 * requests * queries * heads * (nope + rope + value) * (keys - (queries - 1) / 2)
        name = f"by heads B={requests} s_q={queries} S={keys}"
        yield Case(name, make, moved, bf16_operations=operations, rows=_prompt_rows)


def _prompt_rows() -> Rows:
    """Prompts of 512 tokens: whole, or each token as the last one of a chunk of its own, with keys of its own."""
    length, heads = 512, 2
    request, seen = (
        torch.arange(MOST_ROWS, device=DEVICE) // length,
        torch.arange(MOST_ROWS, device=DEVICE) % length + 1,
    )
    q, k = bf16(MOST_ROWS, heads, 192), bf16(MOST_ROWS, heads, 128)
    k_rope, v = bf16(MOST_ROWS, 64), bf16(MOST_ROWS, heads, 128)
    attend = partial(head_hopper.head_attention, scale=192**-0.5)

    def chunks(rows: torch.Tensor) -> torch.Tensor:
        ends = seen[rows].cumsum(0)
        starts = torch.cat((ends.new_zeros(1), ends))
        first = torch.repeat_interleave(request[rows] * length - starts[:-1], seen[rows])
        keys = first + torch.arange(len(first), device=DEVICE)
        queries = torch.arange(len(rows) + 1, device=DEVICE, dtype=torch.int32)
        return attend(q[rows], k[keys], k_rope[keys], v[keys], queries, starts.to(torch.int32))

    starts = torch.arange(0, MOST_ROWS + 1, length, device=DEVICE, dtype=torch.int32)
    return Rows(MOST_ROWS, chunks, partial(attend, q, k, k_rope, v, starts, starts))
