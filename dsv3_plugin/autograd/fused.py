"""Fused operations in training: their parts one after the other, each with its gradient.

The bits stay: a fused kernel has those of its parts by contract.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., Any]


def composed_moe_router(router_linear: Kernel, route: Kernel) -> Kernel:
    """`ops.router.moe_router` of differentiable parts."""

    def moe_router(
        x: torch.Tensor, weight: torch.Tensor, e_score_correction_bias: torch.Tensor, **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return route(router_linear(x, weight), e_score_correction_bias, **settings)  # type: ignore[no-any-return]

    return moe_router


def composed_add_rms_norm(rms_norm: Kernel) -> Kernel:
    """`ops.fused.add_rms_norm` of differentiable parts."""

    def add_rms_norm(
        x: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + addend
        return total, rms_norm(total, weight, eps)

    return add_rms_norm
