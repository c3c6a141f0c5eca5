"""Gradient of the router: through the chosen experts' unbiased weights only.

The choice is a constant and so is the bias. With s the chosen sigmoids, T their sum and c the scaling factor, the
weights are w = c s / T, so ds = (c / T) (dw - sum(dw s) / T); without normalisation ds = c dw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., Any]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, logits: torch.Tensor, bias: torch.Tensor, settings: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        topk_ids, topk_weights = kernel(logits, bias, **settings)
        ctx.save_for_backward(logits, topk_ids)
        ctx.settings = settings
        ctx.mark_non_differentiable(topk_ids)
        return topk_ids, topk_weights

    @staticmethod
    def backward(ctx: Any, _grad_ids: Any, grad: torch.Tensor) -> Any:
        logits, topk_ids = ctx.saved_tensors
        scores = torch.sigmoid(logits.gather(1, topk_ids))
        grad_scores = grad * ctx.settings["routed_scaling_factor"]
        if ctx.settings["norm_topk_prob"]:
            total = scores.sum(1, keepdim=True)
            grad_scores = (grad_scores - (grad_scores * scores).sum(1, keepdim=True) / total) / total
        grad_logits = torch.zeros_like(logits).scatter(1, topk_ids, grad_scores * scores * (1 - scores))
        return None, grad_logits, None, None


def differentiable_route(kernel: Kernel) -> Kernel:
    """`ops.router.route` by `kernel`."""

    def route(
        logits: torch.Tensor, e_score_correction_bias: torch.Tensor, **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _Route.apply(kernel, logits, e_score_correction_bias, settings)

    return route
