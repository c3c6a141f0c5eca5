"""Putting a token's experts together, and the gradients of that.

Contract: in fp32, starting from the lowest chosen expert, `acc = acc + weight * expert_out` in ascending order of
expert, each product and each sum rounded; the shared expert is added last; one rounding to the profile's dtype. The
order is by expert, not by arrival, so that no dispatch and no expert-parallel size can change it.

Contract of `combine_gradient`: in fp32, a row's gradient is its weight times its token's, rounded to the profile's
dtype; a weight's is `elementary.sum_row` of the products of its row and its token's gradient.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.drawing import Case, Sizes, generator, numbers
from dsv3_plugin.ops.elementary import sum_row
from dsv3_plugin.ops.operation import BoundKernels, operation


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


@operation(version=1, summary="the gradients of combine's rows and weights", training=True)
def combine_gradient(
    grad: torch.Tensor, expert_out: torch.Tensor, slots: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [M, N] of `combine`'s result and expert_out [S, N], slots int64 [M, k] and topk_weights fp32 [M, k] as it
    took them, no two slots of one row, to the gradients of expert_out [S, N], zero in a row that is in no slot, and of
    topk_weights [M, k].
    """
    require_gradient(grad, expert_out, slots, topk_weights, (torch.float32, torch.bfloat16))
    wide, of_rows, of_weights = grad.float(), torch.zeros_like(expert_out), torch.empty_like(topk_weights)
    for k in range(slots.shape[1]):
        of_rows[slots[:, k]] = (topk_weights[:, k, None] * wide).to(expert_out.dtype)
        of_weights[:, k] = sum_row(expert_out[slots[:, k]].float() * wide)[:, 0]
    return of_rows, of_weights


def require_gradient(
    grad: torch.Tensor,
    expert_out: torch.Tensor,
    slots: torch.Tensor,
    topk_weights: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Require what `combine_gradient` takes, of one of these dtypes."""
    op = "combine_gradient"
    require_matrix(op, "expert_out", expert_out, dtypes)
    require_matrix(op, "grad", grad, (expert_out.dtype,))
    require_matrix(op, "slots", slots, (torch.int64,))
    require_matrix(op, "topk_weights", topk_weights, (torch.float32,))
    require(slots.shape == topk_weights.shape, op, f"slots {slots.shape}, topk_weights {topk_weights.shape}")
    require(len(slots) == len(grad), op, f"{len(slots)} rows of slots, {len(grad)} of grad")
    fits = grad.shape[1] == expert_out.shape[1]
    require(fits, op, f"grad has N={grad.shape[1]}, expert_out has N={expert_out.shape[1]}")


class _Combine(torch.autograd.Function):
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
        of_rows, of_weights = ctx.ops[combine_gradient](grad.contiguous(), *ctx.saved_tensors)
        return None, of_rows, None, of_weights, grad


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


@combine_gradient.cases
def _gradient_case(rng: random.Random, at: Sizes) -> Case:
    """In half of them some rows are in no slot; gradients of the sizes that losses have."""
    (expert_out, slots, weights, shared_out), _ = combine.draw(rng, at)
    grad = numbers(rng, *shared_out.shape) * 2.0 ** rng.choice((0, 0, -20))
    if len(grad) > 1 and rng.random() < 0.5:
        grad, slots, weights = grad[1:], slots[1:], weights[1:]
    return combine_gradient.case(grad, expert_out, slots, weights)
