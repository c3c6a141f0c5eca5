"""What both attention kernels ask of their arguments before a launch."""

from __future__ import annotations

import torch

from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.key_selection import KeySelection
from dsv3_plugin.ops.mla_attention import require_inputs
from dsv3_plugin.ops.paged_batch import PagedBatch


def check(
    q: torch.Tensor, latent_cache: torch.Tensor, batch: PagedBatch, keys: KeySelection, kv_lora_rank: int, scale: float
) -> None:
    """Raise `InputError` for what the kernels cannot read; the batch has checked its numbers itself."""
    op = "mla_attention"
    require(keys.positions is None, op, "this kernel attends to all keys, not to a selection of them")
    require_inputs(q, latent_cache, batch, keys, scale)
    require(q.dtype == torch.bfloat16, op, f"q is {q.dtype}, expected torch.bfloat16")
    require(q.is_contiguous(), op, f"q of shape {tuple(q.shape)} is not contiguous")
    require(q.shape[2] > kv_lora_rank, op, f"q has dim {q.shape[2]}, kv_lora_rank is {kv_lora_rank}")
    require(latent_cache.stride(2) == 1, op, f"latent_cache has stride {latent_cache.stride(2)} in its last dimension")
    for name, x in zip(("block_table", "seq_lens", "query_start_loc"), batch.tensors, strict=True):
        require(x.stride(-1) == 1, op, f"{name} has stride {x.stride(-1)} in its last dimension")
