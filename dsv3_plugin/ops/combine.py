"""Putting a token's experts together.

Contract: in fp32, starting from the lowest chosen expert, `acc = acc + weight * expert_out` in ascending order of
expert, each product and each sum rounded; the shared expert is added last; one rounding to the profile's dtype. The
order is by expert, not by arrival, so that no dispatch and no expert-parallel size can change it.
"""

from __future__ import annotations

import torch

from dsv3_plugin.ops.contract import Contract, require

COMBINE = Contract("combine", 1, "weighted experts in ascending order, shared expert last, one rounding")


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
