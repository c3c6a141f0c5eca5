"""Gradient of SwiGLU's elementwise part, in fp32: with s = sigmoid(g), d(g s u) = u (s + g s (1 - s)) dg + g s du."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., Any]


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return kernel(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.float().chunk(2, dim=1)
        grad, s = grad.float(), torch.sigmoid(gate)
        grad_gate, grad_up = grad * up * s * (1 + gate * (1 - s)), grad * gate * s
        return None, torch.cat((grad_gate, grad_up), dim=1).to(gate_up.dtype)


def differentiable_silu_and_mul(kernel: Kernel) -> Kernel:
    """`ops.silu_and_mul.silu_and_mul` by `kernel`."""

    def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
        return _SiluAndMul.apply(kernel, gate_up)

    return silu_and_mul
