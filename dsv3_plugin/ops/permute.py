"""Rows of activations in another order, experts' tokens one after the other: as they are, or quantized with scales.

Contract: nothing is computed. `sort_by_expert` says which order: by expert, and by token within an expert.
"""

from __future__ import annotations

import random

import torch

from dsv3_plugin.ops.checks import require_matrix
from dsv3_plugin.ops.drawing import Case, Sizes, generator, numbers
from dsv3_plugin.ops.operation import BoundKernels, operation
from dsv3_plugin.ops.quantize import quantize_fp8


@operation(version=1, summary="rows of activations")
def permute(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [M, K] and row numbers int64 [S] to those rows, [S, K]."""
    return x[rows]


@operation(version=1, summary="rows of quantized activations and their scales", fp8=True)
def permute_fp8(values: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values e4m3 [M, K], scales fp32 [M, K / 128] and row numbers int64 [S], to rows of both, [S, ...]."""
    return values.view(torch.uint8)[rows].view(values.dtype), scales[rows]


@operation(version=1, summary="(token, expert) pairs by expert, and by token within an expert")
def sort_by_expert(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """topk_ids integers [T, k], each below `num_experts`, to (rows int64 [T k], the token of each sorted pair; slots
    int64 [T, k], where each token's pairs went; expert_counts int64 [num_experts]).
    """
    require_matrix("sort_by_expert", "topk_ids", topk_ids, (torch.int64, torch.int32))
    experts, order = torch.sort(topk_ids.flatten(), stable=True)
    slots = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    # Not `bincount`, which a CUDA graph cannot hold.
    ends = torch.searchsorted(experts, torch.arange(num_experts, device=experts.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    return order // topk_ids.shape[1], slots.view_as(topk_ids), counts


@sort_by_expert.cases
def _sort_case(rng: random.Random, at: Sizes) -> Case:
    """The routers of V3, Kimi-K2, Moonlight and a tiny one, and the one expert of each row that another rank sent; in
    some cases a few experts get all tokens.
    """
    experts, topk = rng.choice(((256, 8), (384, 8), (64, 6), (16, 4), (32, 1)))
    favour = torch.zeros(experts)
    if rng.random() < 0.3:
        favour[rng.sample(range(experts), topk + 1)] = 1
    drawn = torch.rand(rng.choice(at.rows), experts, generator=generator(rng)) + favour
    return sort_by_expert.case(drawn.topk(topk).indices.sort(1).values, experts)


@sort_by_expert.gradient
def _of_integers(
    ops: BoundKernels, topk_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return ops[sort_by_expert](topk_ids, num_experts)  # which have none


@permute.gradient
def _differentiable(ops: BoundKernels, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return permute(x, rows)  # which torch differentiates


@permute.cases
def _case(rng: random.Random, at: Sizes) -> Case:
    """Rows in any order, some never, some several times."""
    x = numbers(rng, rng.choice(at.rows), rng.choice(at.depths) + rng.choice((0, 72)))
    drawn = generator(rng)
    return permute.case(x, torch.randint(len(x), (rng.choice(at.rows),), generator=drawn))


@permute_fp8.cases
def _fp8_case(rng: random.Random, at: Sizes) -> Case:
    """The same with scales."""
    values, scales = quantize_fp8(
        numbers(rng, rng.choice(at.rows), rng.choice(at.depths)), rng.choice(at.scale_formats)
    )
    drawn = generator(rng)
    return permute_fp8.case(values, scales, torch.randint(len(values), (rng.choice(at.rows),), generator=drawn))
