"""Gradient of absorbed attention, recomputed request by request in fp32.

Correct, not fast: the probabilities [H, T, L] of one request are held at once. With p = softmax(q k^T * scale) and v
the first `kv_lora_rank` numbers of k: dp = do v^T, ds = p (dp - sum(dp p)), dq = ds k * scale, and a key, which is key
and value at once, gets ds^T q * scale and, in its value part, p^T do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., Any]


class _MLAAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, q: torch.Tensor, latent_cache: torch.Tensor, batch: tuple[torch.Tensor, ...], kv: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(q, latent_cache, *batch)
        ctx.kv = kv
        return kernel(q, latent_cache, *batch, **kv)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, latent_cache, block_table, seq_lens, query_start_loc = ctx.saved_tensors
        rank, scale = ctx.kv["kv_lora_rank"], ctx.kv["scale"]
        block_size = latent_cache.shape[1]
        grad_q = torch.zeros_like(q)
        grad_cache = torch.zeros_like(latent_cache, dtype=torch.float32)
        starts = query_start_loc.tolist()
        for request, length in enumerate(seq_lens.tolist()):
            rows = slice(starts[request], starts[request + 1])
            blocks = block_table[request, : -(-length // block_size)].long()
            keys = latent_cache[blocks].flatten(0, 1)[:length].float()
            of_queries, of_keys = _attention_gradients(grad[rows].float(), q[rows].float(), keys, rank, scale)
            grad_q[rows] = of_queries.to(q.dtype)
            padded = torch.nn.functional.pad(of_keys, (0, 0, 0, len(blocks) * block_size - length))
            grad_cache.index_add_(0, blocks, padded.unflatten(0, (-1, block_size)))
        return None, grad_q, grad_cache.to(latent_cache.dtype), None, None


def _attention_gradients(
    grad: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, rank: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [T, H, rank], q [T, H, C], the last T tokens of keys [L, C]; to (dq [T, H, C], dk [L, C]); all fp32."""
    scores = torch.einsum("thc,lc->htl", q, keys) * scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1 + len(keys) - len(q))
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    grad_p = torch.einsum("thr,lr->htl", grad, keys[:, :rank])
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * scale
    grad_keys = torch.einsum("htl,thc->lc", grad_scores, q)
    grad_keys[:, :rank] += torch.einsum("htl,thr->lr", p, grad)
    return torch.einsum("htl,lc->thc", grad_scores, keys), grad_keys


def differentiable_mla_attention(kernel: Kernel) -> Kernel:
    """`ops.mla_attention.mla_attention` by `kernel`. The gradient of the cache has all its pages."""

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
        batch = block_table, seq_lens, query_start_loc
        return _MLAAttention.apply(kernel, q, latent_cache, batch, {"kv_lora_rank": kv_lora_rank, "scale": scale})

    return mla_attention
