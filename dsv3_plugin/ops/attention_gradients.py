"""The gradients of attention over latent vectors, in memory that does not grow with queries times keys.

With p = softmax(q k^T * scale) and v the first `kv_lora_rank` numbers of k: dp = do v^T, ds = p (dp - sum(dp p)),
dq = ds k * scale, and a key, which is key and value at once, gets ds^T q * scale and, in its value part, p^T do.

Tiles of queries are taken in order, each with all keys up to its last query, so that a tile's rows of scores are whole
and are computed once. A tile has as many queries as hold `MOST_SCORES` scores with all keys, at least one: how a sum
over queries is cut follows from the numbers of heads and keys alone, and a step repeats bit for bit on one device.

Products are of the queries' dtype, p and ds rounded to it as the forward rounds p; their sums, the softmax and what is
added up over tiles are fp32.
"""

from __future__ import annotations

import torch

MOST_SCORES = 1 << 23
"""Of a tile, of all heads: 32 MiB in fp32, of which three are held at a time. With 128 heads and 4,096 keys they are
those of 16 queries."""


def attention_gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
    selected: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [T, H, kv_lora_rank], q [T, H, C], the last T tokens of keys [L, C], selected bool [T, L] or None for all;
    to (dq [T, H, C] of q's dtype, dk fp32 [L, C]).
    """
    tokens, heads, _ = q.shape
    first_position = len(keys) - tokens
    grad_q, grad_keys = torch.empty_like(q), torch.zeros_like(keys, dtype=torch.float32)
    tile = max(1, MOST_SCORES // (heads * len(keys)))
    for start in range(0, tokens, tile):
        rows = slice(start, min(start + tile, tokens))
        seen = first_position + rows.stop
        positions = torch.arange(first_position + start, seen, device=q.device)
        unseen = torch.arange(seen, device=q.device) > positions.unsqueeze(1)
        if selected is not None:
            unseen |= ~selected[rows, :seen]
        _add_tile(
            grad[rows].to(q.dtype), q[rows], keys[:seen], unseen, kv_lora_rank, scale, grad_q[rows], grad_keys[:seen]
        )
    return grad_q, grad_keys


def _add_tile(
    grad: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    unseen: torch.Tensor,
    rank: int,
    scale: float,
    grad_q: torch.Tensor,
    grad_keys: torch.Tensor,
) -> None:
    """Write a tile's dq to `grad_q` and add its dk to `grad_keys`; unseen bool [T, L]."""
    tokens, heads, _ = q.shape
    q, grad = q.flatten(0, 1), grad.flatten(0, 1)
    scores = _product(q, keys.t()).mul_(scale)
    scores.view(tokens, heads, -1).masked_fill_(unseen.unsqueeze(1), -torch.inf)
    p = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    p.div_(p.sum(-1, keepdim=True))
    grad_scores = _product(grad, keys[:, :rank].t())
    grad_keys[:, :rank] += _product(p.to(q.dtype).t(), grad)
    grad_scores.sub_((grad_scores * p).sum(-1, keepdim=True)).mul_(p).mul_(scale)
    rounded = grad_scores.to(q.dtype)
    grad_q.copy_(_product(rounded, keys).view_as(grad_q))
    grad_keys += _product(rounded.t(), q)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [M, K] times y [K, N] of one dtype, to fp32 [M, N]; a GPU keeps the sums of its bf16 products."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()
