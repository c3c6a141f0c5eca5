"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.registry import Ops


class RMSNorm(nn.Module):
    """`weight` [size] in the profile's dtype."""

    def __init__(self, ops: Ops, size: int, eps: float) -> None:
        super().__init__()
        self.ops = ops
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=ops.setting.profile.dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, size] to [T, size]."""
        return self.ops.rms_norm(x, self.weight, self.eps)
