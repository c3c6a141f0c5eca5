"""MLA's gradient in the form of its heads (DeepSeek-V2 report, section 2.1), whatever the forward pass has (`mla`).

In DeepSeek-V3's sizes a head's keys have 192 numbers and its values 128, where the latent vectors, which the forward
pass reads, have 576 and 512. So a gradient by heads needs 3.3 times less arithmetic, and torch's own attention serves
it. It is the derivative of the same function, and no bit of the forward pass depends on it. Kept for it are the heads'
queries and the latent vectors, before rotation and norm; keys and values are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv3_plugin.layers.two_form import rotated
from dsv3_plugin.ops.head_attention_gradients import head_attention_gradients
from dsv3_plugin.registry import Ops


def heads_of(
    ops: Ops,
    heads: torch.Tensor,
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `absorb` takes, with w_uv [H, V, R], to queries and keys [T, H, N + P] and values [T, H, V] of each head."""
    count, rank, nope = w_uk.shape
    q, cached = rotated(ops, heads, latent, norm_weight, w_uk, eps, cos, sin)
    compressed, k_pe = ops.slices.enter(cached).split([rank, heads.shape[2] - nope], dim=-1)
    k_nope = (compressed @ w_uk.transpose(0, 1).flatten(1)).unflatten(1, (count, nope))
    k = torch.cat((k_nope, k_pe.unsqueeze(1).expand(-1, count, -1)), dim=-1)
    v = (compressed @ w_uv.flatten(0, 1).t()).unflatten(1, (count, -1))
    return q, k, v


class GradientByHeads(torch.autograd.Function):
    """What `form` computes, with the gradient of attention over what `by_heads` computes of the same operands."""

    @staticmethod
    def forward(
        ctx: Any,
        form: Callable[..., torch.Tensor],
        by_heads: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        seq_lens: Sequence[int],
        scale: float,
        repeats: bool,
        *operands: torch.Tensor,
    ) -> torch.Tensor:
        """Operands to [T, H * V]; `by_heads` takes them to q, k and v of whole sequences of `seq_lens` tokens."""
        ctx.save_for_backward(*operands)
        ctx.by_heads, ctx.attention = by_heads, (seq_lens, scale, repeats)
        return form(*operands)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Of the operands."""
        operands = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            q, k, v = ctx.by_heads(*operands)
        of_heads = head_attention_gradients(grad.view_as(v), q, k, v, *ctx.attention)
        return None, None, None, None, None, *torch.autograd.grad((q, k, v), operands, of_heads)
