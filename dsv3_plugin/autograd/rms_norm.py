"""Gradient of RMSNorm, in fp32.

With r = 1 / rms(x) and h = dy * w: dx = r h - x r^3 mean(h x), and dw = sum of dy x r over the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., Any]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return kernel(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        factor = (wide.square().mean(1, keepdim=True) + ctx.eps).rsqrt()
        normalised, h = wide * factor, grad * weight.float()
        grad_x = factor * (h - normalised * (h * normalised).mean(1, keepdim=True))
        return None, grad_x.to(x.dtype), (grad * normalised).sum(0).to(weight.dtype), None


def differentiable_rms_norm(kernel: Kernel) -> Kernel:
    """`ops.rms_norm.rms_norm` by `kernel`."""

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return _RMSNorm.apply(kernel, x, weight, eps)

    return rms_norm
