"""Gradients of products: y = x W^T gives dx = dy W and dW = dy^T x.

Sums run over the wider of the two operands' dtypes, so that fp32 logits have fp32 products; each gradient is rounded
once, to its operand's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dsv3_plugin.ops.linear import split_by_expert

Kernel = Callable[..., Any]


def product_gradients(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [M, N], x [M, K], weight [N, K] to (dx [M, K] and dW [N, K], of the dtype of grad, x and weight that is
    widest)."""
    dtype = torch.promote_types(grad.dtype, torch.promote_types(x.dtype, weight.dtype))
    grad = grad.to(dtype)
    return grad @ weight.to(dtype), grad.t() @ x.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return kernel(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = product_gradients(grad, x, weight)
        return None, grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def differentiable_linear(kernel: Kernel) -> Kernel:
    """`ops.linear.linear` by `kernel`."""

    def linear(x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return _Linear.apply(partial(kernel, out_dtype=out_dtype), x, weight)

    return linear


def differentiable_router_linear(kernel: Kernel) -> Kernel:
    """`ops.router.router_linear` by `kernel`: the gradient is that of `linear`, however the sum is cut."""

    def router_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(kernel, x, weight)

    return router_linear


class _HeadLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return kernel(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        by_head = grad.transpose(0, 1)
        return None, (by_head @ weight).transpose(0, 1), by_head.transpose(1, 2) @ x.transpose(0, 1)


def differentiable_head_linear(kernel: Kernel) -> Kernel:
    """`ops.linear.head_linear` by `kernel`."""

    def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _HeadLinear.apply(kernel, x, weight)

    return head_linear


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, expert_counts, weight)
        return kernel(x, expert_counts, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, expert_counts, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        grads = dict(split_by_expert("grouped_linear", grad, expert_counts))
        places = dict(split_by_expert("grouped_linear", grad_x, expert_counts))
        for e, rows in split_by_expert("grouped_linear", x, expert_counts):
            of_rows, grad_weight[e] = product_gradients(grads[e], rows, weight[e])
            places[e].copy_(of_rows)
        return None, grad_x, None, grad_weight


def differentiable_grouped_linear(kernel: Kernel) -> Kernel:
    """`ops.linear.grouped_linear` by `kernel`."""

    def grouped_linear(x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _GroupedLinear.apply(kernel, x, expert_counts, weight)

    return grouped_linear
