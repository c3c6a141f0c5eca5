"""The router: its logits, and the choice: sigmoid scores, aux-loss-free bias, group-limited top-k (DeepSeek-V3 report,
equations 12 to 16).

Contract of the logits: K is cut into slices of `SLICE` products at absolute positions. Each slice is summed from zero,
as in `linear`, and kept in fp32; the slices are added to zero in ascending order. So a device may sum them at the same
time, and few tokens need not wait for one long chain.

Contract of the choice: fp32 logits and bias. score = `elementary.sigmoid`(logit). For the *choice only*, bias is added;
a group's score is the sum of its two best biased scores; groups outside the best `topk_group` get -inf (not 0: a biased
score may be negative); the best `num_experts_per_tok` of what is left are chosen. Ties go to the lower index. The
weights are the unbiased scores of the chosen experts, divided by their sum (added in ascending order of expert) +
1e-20, then times `routed_scaling_factor`. Experts are returned in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv3_plugin.ops.contract import Contract, require, require_matrix
from dsv3_plugin.ops.elementary import sigmoid
from dsv3_plugin.ops.tile import tiled_linear_fp32

ROUTER_LINEAR = Contract("router_linear", 1, "x @ weight.T in slices of 512 of K, added in ascending order in fp32")
ROUTE = Contract("route", 2, "group-limited, bias-corrected sigmoid top-k")
MOE_ROUTER = Contract("moe_router", 1, "router_linear, then route")

SLICE = 512


def router_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K], weight [E, K] of one dtype, fp32 or bf16, to logits fp32 [T, E]."""
    require_matrix("router_linear", "x", x, (torch.float32, torch.bfloat16))
    require_matrix("router_linear", "weight", weight, (x.dtype,))
    require(x.shape[1] == weight.shape[1], "router_linear", f"x has K={x.shape[1]}, weight has K={weight.shape[1]}")
    return sum_slices(x, weight, tiled_linear_fp32)


def sum_slices(
    x: torch.Tensor, weight: torch.Tensor, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Slices of K by `product`, which takes contiguous x [T, S] and weight [E, S] to fp32 [T, E], added in order."""
    total = torch.zeros(len(x), len(weight), dtype=torch.float32, device=x.device)
    for part, rows in zip(x.split(SLICE, 1), weight.split(SLICE, 1), strict=True):
        total = total + product(part.contiguous(), rows.contiguous())
    return total


def moe_router(
    x: torch.Tensor, weight: torch.Tensor, e_score_correction_bias: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K], weight [E, K], bias fp32 [E] and the settings of `route`, to its result."""
    return route(router_linear(x, weight), e_score_correction_bias, **settings)


def route(
    logits: torch.Tensor,
    e_score_correction_bias: torch.Tensor,
    *,
    num_experts_per_tok: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits fp32 [M, E], bias fp32 [E], to (topk_ids int64 [M, k] ascending, topk_weights fp32 [M, k])."""
    require(logits.dim() == 2, "route", f"logits has shape {tuple(logits.shape)}, expected two dimensions")
    require(logits.dtype == torch.float32, "route", f"logits is {logits.dtype}, expected torch.float32")
    require(
        e_score_correction_bias.dtype == torch.float32 and e_score_correction_bias.shape == logits.shape[1:],
        "route",
        f"e_score_correction_bias is {e_score_correction_bias.dtype} of shape {tuple(e_score_correction_bias.shape)}",
    )
    scores = sigmoid(logits)
    choice = scores + e_score_correction_bias
    if topk_group < n_group:
        groups = choice.unflatten(1, (n_group, -1))
        best = _descending(groups)[0]
        group_ids = _descending(best[..., 0] + best[..., 1])[1][:, :topk_group]
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, group_ids, True)
        choice = groups.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
    topk_ids = _descending(choice)[1][:, :num_experts_per_tok].sort(dim=1).values
    weights = scores.gather(1, topk_ids)
    if norm_topk_prob:
        total = weights[:, 0]
        for i in range(1, num_experts_per_tok):
            total = total + weights[:, i]
        weights = weights / (total + 1e-20).unsqueeze(1)
    return topk_ids, weights * routed_scaling_factor


def _descending(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices of the last dimension from large to small; stable, so that ties keep ascending indices."""
    return torch.sort(x, dim=-1, descending=True, stable=True)
