"""Gradient of the weighted sum of experts, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., Any]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        expert_out: torch.Tensor,
        slots: torch.Tensor,
        topk_weights: torch.Tensor,
        shared_out: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(expert_out, slots, topk_weights)
        return kernel(expert_out, slots, topk_weights, shared_out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        expert_out, slots, topk_weights = ctx.saved_tensors
        wide = grad.float().unsqueeze(1)
        grad_expert = torch.zeros_like(expert_out)
        # No two pairs of a token and an expert share a row.
        grad_expert[slots] = (topk_weights.unsqueeze(2) * wide).to(expert_out.dtype)
        grad_weights = (expert_out[slots].float() * wide).sum(2)
        return None, grad_expert, None, grad_weights, grad


def differentiable_combine(kernel: Kernel) -> Kernel:
    """`ops.combine.combine` by `kernel`."""

    def combine(
        expert_out: torch.Tensor, slots: torch.Tensor, topk_weights: torch.Tensor, shared_out: torch.Tensor
    ) -> torch.Tensor:
        return _Combine.apply(kernel, expert_out, slots, topk_weights, shared_out)

    return combine
