"""Absorbed attention over pages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from dsv3_plugin.kernels.bench import peers
from dsv3_plugin.kernels.bench.case import DEVICE, MOST_ROWS, Case, Contenders, bf16, peer
from dsv3_plugin.kernels.bench.measure import Rows
from dsv3_plugin.kernels.cuda import mla_hopper
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
