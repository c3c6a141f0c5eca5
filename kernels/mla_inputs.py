"""What both attention kernels ask of their arguments before a launch."""

from __future__ import annotations

import torch

from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.paged_batch import require_paged_batch


def check(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
) -> None:
    """Raise `InputError` for what the kernels cannot read, page numbers and lengths too: see `paged_batch`."""
    op = "mla_attention"
    require_paged_batch(op, q, latent_cache, block_table, seq_lens, query_start_loc, scale)
    require(q.dtype == torch.bfloat16, op, f"q is {q.dtype}, expected torch.bfloat16")
    require(q.is_contiguous(), op, f"q of shape {tuple(q.shape)} is not contiguous")
    require(q.shape[2] > kv_lora_rank, op, f"q has dim {q.shape[2]}, kv_lora_rank is {kv_lora_rank}")
    require(latent_cache.stride(2) == 1, op, f"latent_cache has stride {latent_cache.stride(2)} in its last dimension")
    for name, x in (("block_table", block_table), ("seq_lens", seq_lens), ("query_start_loc", query_start_loc)):
        require(x.stride(-1) == 1, op, f"{name} has stride {x.stride(-1)} in its last dimension")
