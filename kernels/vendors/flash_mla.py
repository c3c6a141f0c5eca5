"""FlashMLA's dense decode, as vLLM ships it, as a provider of attention. Fast mode only.

Its split-KV follows the batch: as many partials as the card has multiprocessors, so a token's bits depend on its batch.
"""

from __future__ import annotations

import importlib.util
from importlib.machinery import PathFinder
from itertools import pairwise

import torch

from dsv3_plugin.hooks import Kernel
from dsv3_plugin.kernels.hopper import V3_LATENT, for_v3_latent, on_hopper_with
from dsv3_plugin.kernels.installed import version_of
from dsv3_plugin.kernels.vendors.third_party import Offer, kernels_of
from dsv3_plugin.ops import mla_attention as contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.key_selection import ALL_KEYS, KeySelection
from dsv3_plugin.ops.mla_attention import require_inputs
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.paged_batch import PagedBatch

PROVIDER = "flash-mla"
PAGE = 64


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
    """q bf16 [T, H, 576], latent_cache bf16 [num_blocks, 64, 576], all of whose keys are attended to; to bf16
    [T, H, 512].

    FlashMLA wants as many queries of every request. So requests with equal counts go together, and the counts are read
    from the device if the engine gave no copy and there are several requests. Raises `InputError`.
    """
    op = "mla_attention"
    require(keys.positions is None, op, "FlashMLA's dense decode attends to all keys, not to a selection of them")
    require_inputs(q, latent_cache, batch, keys, scale)
    require(batch.block_size == PAGE, op, f"FlashMLA reads pages of {PAGE} keys, these have {batch.block_size}")
    require(kv_lora_rank == V3_LATENT["kv_lora_rank"], op, f"FlashMLA reads a latent of 512, this has {kv_lora_rank}")
    tables, lengths = batch.block_table.to(torch.int32), batch.seq_lens.to(torch.int32)
    if len(lengths) == 1:
        return _attend(q.unsqueeze(0), latent_cache, tables, lengths, scale).squeeze(0)
    out = q.new_empty(*q.shape[:2], kv_lora_rank)
    starts = batch.query_start_loc[:-1]
    counts = [end - start for start, end in pairwise(batch.read_query_start_loc())]
    for count in sorted(set(counts) - {0}):
        alike = torch.tensor([i for i, own in enumerate(counts) if own == count], device=q.device)
        rows = starts[alike, None] + torch.arange(count, device=q.device)
        out[rows] = _attend(q[rows], latent_cache, tables[alike], lengths[alike], scale)
    return out


def _attend(
    q: torch.Tensor, latent_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [num_reqs, queries, H, 576], to [num_reqs, queries, H, 512]."""
    from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache, get_mla_metadata

    schedule, splits = get_mla_metadata()
    pages = latent_cache.unsqueeze(2)
    return flash_mla_with_kvcache(
        q, pages, block_table, seq_lens, V3_LATENT["kv_lora_rank"], schedule, splits, scale, causal=True
    )[0]


def missing() -> str | None:
    """What is, if it is not vLLM with FlashMLA in it; vLLM is not imported."""
    vllm = importlib.util.find_spec("vllm")
    found = vllm is not None and PathFinder.find_spec("_flashmla_C", vllm.submodule_search_locations) is not None
    return None if found else "vLLM with FlashMLA is not installed"


def kernels() -> list[Kernel]:
    """Attention."""
    attention = Offer(
        contracts.mla_attention,
        mla_attention,
        uncertified="its split-KV follows the batch: of 150 requests together 147 answer otherwise alone",
    )
    is_supported = for_v3_latent(on_hopper_with(missing))
    return kernels_of(PROVIDER, version_of("vllm"), is_supported, attention)
