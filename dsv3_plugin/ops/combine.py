"""Putting a token's experts together.

Contract: in fp32, starting from the lowest chosen expert, `acc = acc + weight * expert_out` in ascending order of
expert, each product and each sum rounded; the shared expert is added last; one rounding to the profile's dtype. The
order is by expert, not by arrival, so that no dispatch and no expert-parallel size can change it.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.drawing import Case, Sizes, generator, numbers
from dsv3_plugin.ops.operation import BoundKernels, operation
from dsv3_plugin.ops.permute import permute


@operation(version=1, summary="weighted experts in ascending order, shared expert last, one rounding")
def combine(
    expert_out: torch.Tensor, slots: torch.Tensor, topk_weights: torch.Tensor, shared_out: torch.Tensor
) -> torch.Tensor:
    """expert_out [S, N] (one row a token and expert), slots int64 [M, k] (the rows of each token, experts ascending),
    topk_weights fp32 [M, k], shared_out [M, N] of expert_out's dtype, to [M, N] of that dtype."""
    require(slots.shape == topk_weights.shape, "combine", f"slots {slots.shape}, topk_weights {topk_weights.shape}")
    require(topk_weights.dtype == torch.float32, "combine", f"topk_weights is {topk_weights.dtype}")
    acc = topk_weights[:, 0, None] * expert_out[slots[:, 0]].float()
    for k in range(1, slots.shape[1]):
        acc = acc + topk_weights[:, k, None] * expert_out[slots[:, k]].float()
    return (acc + shared_out.float()).to(shared_out.dtype)


class _Combine(torch.autograd.Function):
    """In fp32, each gradient rounded once. Rows are moved as `permute` moves them, in their dtype: theirs is the
    largest memory of a mixture of experts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ops: BoundKernels,
        expert_out: torch.Tensor,
        slots: torch.Tensor,
        topk_weights: torch.Tensor,
        shared_out: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(expert_out, slots, topk_weights)
        ctx.ops = ops
        return ops[combine](expert_out, slots, topk_weights, shared_out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        expert_out, slots, topk_weights = ctx.saved_tensors
        ops: BoundKernels = ctx.ops
        # No two pairs of a token and an expert share a row; a row that belongs to none has the weight 0.
        (tokens, k), rows = slots.shape, slots.flatten()
        token = torch.arange(tokens, device=rows.device).repeat_interleave(k)
        token_of_row = rows.new_zeros(len(expert_out)).scatter_(0, rows, token)
        weight_of_row = topk_weights.new_zeros(len(expert_out)).scatter_(0, rows, topk_weights.flatten())
        grad_expert = ops[permute](grad.contiguous(), token_of_row).mul_(weight_of_row.unsqueeze(1))
        of_tokens = ops[permute](expert_out, rows).view(tokens, k, -1)
        return None, grad_expert, None, _products(of_tokens, grad), grad


def _products(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """rows [T, k, N] times x [T, N] of one dtype, summed over N: fp32 [T, k]."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.bmm(rows, x.unsqueeze(2), out_dtype=torch.float32).squeeze(2)
    return (rows * x.float().unsqueeze(1)).sum(2)


@combine.gradient
def _differentiable(
    ops: BoundKernels,
    expert_out: torch.Tensor,
    slots: torch.Tensor,
    topk_weights: torch.Tensor,
    shared_out: torch.Tensor,
) -> torch.Tensor:
    return _Combine.apply(ops, expert_out, slots, topk_weights, shared_out)


@combine.cases
def _case(rng: random.Random, at: Sizes) -> Case:
    """Experts in any order of rows."""
    rows, topk, width = rng.choice(at.rows), rng.choice((1, 4, 8)), rng.choice(at.depths) + rng.choice((0, 72))
    drawn = generator(rng)
    slots = torch.randperm(rows * topk, generator=drawn).view(rows, topk)
    weights = torch.rand(rows, topk, generator=drawn)
    return combine.case(numbers(rng, rows * topk, width), slots, weights, numbers(rng, rows, width))
