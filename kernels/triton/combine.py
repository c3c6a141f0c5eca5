"""Weighted sum of a token's experts in ascending order, the shared expert last; and its gradients.

A CTA of the gradients takes a token, whose own gradient stays in registers while its experts' rows come by.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.kernels.triton.elementary import EXACT, sum_row, widen
from dsv3_plugin.ops import combine as contracts
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.operation import implements

_COLUMNS = 1024
_GRADIENT_WARPS = 8


@triton.jit
def _combine(expert_out, slots, weights, shared_out, out, width, TOPK: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    acc = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(TOPK):
        slot = tl.load(slots + token * TOPK + k).to(tl.int64)
        row = tl.load(expert_out + slot * width + column, mask=inside, other=0).to(tl.float32)
        term = tl.load(weights + token * TOPK + k) * row
        # The contract starts from the first product: a sum with +0 would turn its -0 into +0.
        acc = term if k == 0 else acc + term
    acc += tl.load(shared_out + token * width + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * width + column, acc.to(out.dtype.element_ty), mask=inside)


@implements(contracts.combine)
def combine(
    expert_out: torch.Tensor, slots: torch.Tensor, topk_weights: torch.Tensor, shared_out: torch.Tensor
) -> torch.Tensor:
    """expert_out bf16 [S, N], slots integers [M, k], topk_weights fp32 [M, k], shared_out bf16 [M, N], to bf16 [M, N].

    Raises `InputError`.
    """
    op = "combine"
    require_matrix(op, "expert_out", expert_out, (torch.bfloat16,))
    require_matrix(op, "shared_out", shared_out, (torch.bfloat16,))
    require_matrix(op, "slots", slots, (torch.int64, torch.int32))
    require_matrix(op, "topk_weights", topk_weights, (torch.float32,))
    require(slots.shape == topk_weights.shape, op, f"slots {slots.shape}, topk_weights {topk_weights.shape}")
    require(len(slots) == len(shared_out), op, f"{len(slots)} rows of slots, {len(shared_out)} of shared_out")
    require(
        expert_out.shape[1] == shared_out.shape[1],
        op,
        f"expert_out has N={expert_out.shape[1]}, shared_out has N={shared_out.shape[1]}",
    )
    out = torch.empty_like(shared_out)
    rows, width = out.shape
    if rows:
        grid = (rows, triton.cdiv(width, _COLUMNS))
        _combine[grid](
            expert_out, slots, topk_weights, shared_out, out, width, slots.shape[1], _COLUMNS, num_warps=4, **EXACT
        )
    return out


@triton.jit
def _combine_gradient(
    grad, expert_out, slots, weights, of_rows, of_weights, width, TOPK: tl.constexpr, SIZE: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < width
    wide = widen(tl.load(grad + token * width + column, mask=inside, other=0))
    for k in range(TOPK):
        pair = token * TOPK + k
        slot = tl.load(slots + pair)
        row = widen(tl.load(expert_out + slot * width + column, mask=inside, other=0))
        of_row = tl.load(weights + pair) * wide
        tl.store(of_rows + slot * width + column, of_row.to(of_rows.dtype.element_ty), mask=inside)
        tl.store(of_weights + pair + tl.arange(0, 1), sum_row(row * wide, SIZE))


@implements(contracts.combine_gradient)
def combine_gradient(
    grad: torch.Tensor, expert_out: torch.Tensor, slots: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad bf16 [M, N], expert_out bf16 [S, N], slots int64 [M, k], no two of one row, topk_weights fp32 [M, k], to the
    gradients of expert_out, bf16 [S, N], and of topk_weights, fp32 [M, k]. Raises `InputError`.
    """
    contracts.require_gradient(grad, expert_out, slots, topk_weights, (torch.bfloat16,))
    # Where there are as many rows as slots, each is in one.
    of_rows = (torch.empty_like if len(expert_out) == slots.numel() else torch.zeros_like)(expert_out)
    of_weights = torch.empty_like(topk_weights)
    rows, width = grad.shape
    if slots.numel():
        _combine_gradient[(rows,)](
            grad,
            expert_out,
            slots,
            topk_weights,
            of_rows,
            of_weights,
            width,
            slots.shape[1],
            triton.next_power_of_2(width),
            num_warps=_GRADIENT_WARPS,
            **EXACT,
        )
    return of_rows, of_weights
