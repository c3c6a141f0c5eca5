"""Weighted sum of a token's experts in ascending order, the shared expert last."""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.kernels.triton.elementary import EXACT
from dsv3_plugin.ops import combine as contracts
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.operation import implements

_COLUMNS = 1024


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
