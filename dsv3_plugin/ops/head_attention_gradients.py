"""The gradients of causal attention with keys and values of each head, in memory that grows with tokens alone.

torch's flash attention holds no scores: its backward pass computes them again, tile by tile, from the maxima and sums
that its forward pass leaves. So that runs first. Of torch's attentions without scores in memory it is the one that
repeats bit for bit, in torch's deterministic mode, which is on around it. It wants values as wide as keys, so zeros
stand behind them. Where nothing needs to repeat, cuDNN's serves on a GPU: it takes a third of the time, and adds up in
the order in which its parts are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv3_plugin.ops.checks import require


def has_head_gradients(q: torch.Tensor, v_head_dim: int) -> bool:
    """Whether `head_attention_gradients` serves queries [T, H, D]: of a GPU's, not of fp32 nor of wide heads."""
    if v_head_dim > q.shape[2]:
        return False
    by_head = q.transpose(0, 1).unsqueeze(0)
    return not q.is_cuda or can_use_flash_attention(SDPAParams(by_head, by_head, by_head, None, 0.0, True, False))


def head_attention_gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: Sequence[int],
    scale: float,
    repeats: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [T, H, V] of what the queries q [T, H, D] find in keys k [T, H, D] and values v [T, H, V], V at most D, all
    of one dtype: whole sequences of `seq_lens` tokens, one after the other; to (dq, dk, dv), of the operands' shapes.
    Where it `repeats`, equal operands give equal bits.

    Raises `InputError` where the lengths are not those of all tokens, and torch's `RuntimeError` where it has no flash
    attention for the operands.
    """
    told = f"sequences of {sum(seq_lens)} tokens together, q has {len(q)}"
    require(sum(seq_lens) == len(q), "head_attention_gradients", told)
    operands = q.detach(), k.detach(), v.detach(), grad
    found: list[tuple[torch.Tensor, ...]] = []
    start = 0
    # Neighbours of one length are one batch.
    for length, alike in groupby(filter(None, seq_lens)):
        rows = slice(start, start + length * len(list(alike)))
        q, k, v, grad = (x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in operands)
        attention = _flash if repeats or not _has_cudnn(q, k, v) else _cudnn
        found.append(tuple(x.transpose(1, 2).flatten(0, 1) for x in attention(q, k, v, grad, scale)))
        start = rows.stop
    if not found:
        found.append(tuple(torch.empty_like(x) for x in operands[:3]))
    # Of sequences that are all of one length nothing is copied.
    grad_q, grad_k, grad_v = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    return grad_q, grad_k, grad_v


def _has_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    return q.is_cuda and can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, False))


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient of their attention, [B, H, L, width] each, to dq, dk, dv."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _gradients(q, k, v, grad, scale)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    """See `_cudnn`; these repeat."""
    padding = 0, q.shape[3] - v.shape[3]
    with _deterministic(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        grad_q, grad_k, grad_v = _gradients(q, k, F.pad(v, padding), F.pad(grad, padding), scale)
    return grad_q, grad_k, grad_v[..., : v.shape[3]]


def _gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return torch.autograd.grad(out, inputs, grad)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
