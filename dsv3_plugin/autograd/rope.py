"""Gradient of the rotation: the transposed one, by the negative angle. The table is a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., Any]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernel = kernel
        return kernel(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return None, ctx.kernel(grad.contiguous(), cos, -sin), None, None


def differentiable_rope(kernel: Kernel) -> Kernel:
    """`ops.rope.rope` by `kernel`."""

    def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return _Rope.apply(kernel, x, cos, sin)

    return rope
