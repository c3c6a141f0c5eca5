"""The gradients of attention over latent vectors, in memory that does not grow with queries times keys.

With p = softmax(q k^T * scale) and v the first `kv_lora_rank` numbers of k: dp = do v^T, ds = p (dp - sum(dp p)),
dq = ds k * scale, and a key, which is key and value at once, gets ds^T q * scale and, in its value part, p^T do.

Tiles of queries are taken in order, each with all keys up to its last query, so that a tile's rows of scores are whole
and are computed once. A tile has as many queries as hold `MOST_SCORES` scores with all keys, at least one: how a sum
over queries is cut follows from the numbers of heads and keys alone, and a step repeats bit for bit on one device.
Scores are what costs time, by their number and the bytes of each: they are written and read as seldom as torch allows.

Products are of the queries' dtype, p and ds rounded to it as the forward rounds p; their sums, the softmax and what is
added up over tiles are fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

MOST_SCORES = 1 << 26
"""Of a tile, of all heads: 256 MiB in fp32, of which three are held at a time. With 128 heads and 4,096 keys they are
those of 128 queries: many enough for a product to keep a card busy."""


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
        # Every query sees all keys before the tile's.
        positions = torch.arange(first_position + start, seen, device=q.device)
        unseen = positions > positions.unsqueeze(1)
        if selected is not None:
            unseen = F.pad(unseen, (seen - len(positions), 0)) | ~selected[rows, :seen]
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
    """Write a tile's dq to `grad_q` and add its dk to `grad_keys`; unseen bool [T, n] of the last n keys."""
    tokens, heads, _ = q.shape
    q, grad = q.flatten(0, 1), grad.flatten(0, 1)
    scores = _product(q, keys.t()).mul_(scale)
    last = scores.view(tokens, heads, -1)[..., len(keys) - unseen.shape[1] :]
    last.masked_fill_(unseen.unsqueeze(1), -torch.inf)
    p = scores.softmax(-1)
    del scores
    grad_keys[:, :rank] += _product(p.to(q.dtype).t(), grad)
    grad_p = _product(grad, keys[:, :rank].t())
    # p (dp - sum(dp p)) in one pass.
    grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, torch.float32).to(q.dtype)
    grad_q.copy_(_product(grad_scores, keys).mul_(scale).view_as(grad_q))
    grad_keys += _product(grad_scores.t(), q).mul_(scale)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [M, K] times y [K, N] of one dtype, to fp32 [M, N]; a GPU keeps the sums of its bf16 products."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()
