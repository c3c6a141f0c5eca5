"""The router's choice in one kernel: a program takes one token and keeps all its experts in registers.

Experts stand as [groups, experts a group], both padded to powers of two with -inf, so that every choice is a maximum
over an axis; among equal maxima the lower index wins.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.kernels.triton_math import EXACT, divide, sigmoid
from dsv3_plugin.ops.contract import require


@triton.jit
def _route(
    logits,
    bias,
    ids,
    weights,
    scaling,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_CHOSEN: tl.constexpr,
    TOPK: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = EXPERTS // GROUPS
    group = tl.arange(0, GROUPS_PADDED)
    member = tl.arange(0, SIZE_PADDED)
    expert = group[:, None] * size + member[None, :]
    inside = (group < GROUPS)[:, None] & (member < size)[None, :]
    scores = sigmoid(tl.load(logits + token * EXPERTS + expert, mask=inside, other=0))
    choice = scores + tl.load(bias + expert, mask=inside, other=0)
    choice = tl.where(inside, choice, float("-inf"))

    if GROUPS_CHOSEN < GROUPS:
        best, where = tl.max(choice, 1, return_indices=True, return_indices_tie_break_left=True)
        rest = tl.where(member[None, :] == where[:, None], float("-inf"), choice)
        group_score = best + tl.max(rest, 1)
        allowed = tl.zeros((GROUPS_PADDED,), tl.int32)
        for _ in tl.static_range(GROUPS_CHOSEN):
            _, winner = tl.max(
                tl.where(allowed > 0, float("-inf"), group_score),
                0,
                return_indices=True,
                return_indices_tie_break_left=True,
            )
            allowed = tl.where(group == winner, 1, allowed)
        choice = tl.where((allowed > 0)[:, None], choice, float("-inf"))

    flat: tl.constexpr = GROUPS_PADDED * SIZE_PADDED
    position = tl.arange(0, flat)
    choice = tl.reshape(choice, (flat,))
    scores = tl.reshape(scores, (flat,))
    chosen = tl.zeros((flat,), tl.int32)
    for _ in tl.static_range(TOPK):
        _, winner = tl.max(choice, 0, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(position == winner, 1, chosen)
        choice = tl.where(position == winner, float("-inf"), choice)

    # The chosen experts in ascending order, their scores added one by one.
    slot = tl.arange(0, TOPK_PADDED)
    picked = tl.zeros((TOPK_PADDED,), tl.float32)
    picked_ids = tl.zeros((TOPK_PADDED,), tl.int32)
    total = 0.0
    for k in tl.static_range(TOPK):
        lowest = tl.min(tl.where(chosen > 0, position, flat), 0)
        chosen = tl.where(position == lowest, 0, chosen)
        score = tl.sum(tl.where(position == lowest, scores, 0.0), 0)
        picked = tl.where(slot == k, score, picked)
        picked_ids = tl.where(slot == k, (lowest // SIZE_PADDED) * size + lowest % SIZE_PADDED, picked_ids)
        total += score
    if NORMALISE:
        picked = divide(picked, total + 1e-20)
    tl.store(ids + token * TOPK + slot, picked_ids.to(tl.int64), mask=slot < TOPK)
    tl.store(weights + token * TOPK + slot, picked * scaling, mask=slot < TOPK)


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
    require(logits.is_contiguous(), "route", f"logits of shape {tuple(logits.shape)} is not contiguous")
    require(
        e_score_correction_bias.dtype == torch.float32 and e_score_correction_bias.shape == logits.shape[1:],
        "route",
        f"e_score_correction_bias is {e_score_correction_bias.dtype} of shape {tuple(e_score_correction_bias.shape)}",
    )
    tokens, experts = logits.shape
    require(experts % n_group == 0, "route", f"{experts} experts do not divide into n_group={n_group} groups")
    ids = torch.empty(tokens, num_experts_per_tok, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, num_experts_per_tok, dtype=torch.float32, device=logits.device)
    if tokens:
        _route[(tokens,)](
            logits,
            e_score_correction_bias,
            ids,
            weights,
            routed_scaling_factor,
            experts,
            n_group,
            topk_group,
            num_experts_per_tok,
            norm_topk_prob,
            triton.next_power_of_2(n_group),
            triton.next_power_of_2(experts // n_group),
            triton.next_power_of_2(num_experts_per_tok),
            num_warps=1,
            **EXACT,
        )
    return ids, weights
