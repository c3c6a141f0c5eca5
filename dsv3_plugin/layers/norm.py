"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.layers.linear import Activation, Quantized
from dsv3_plugin.ops.rms_norm import add_rms_norm, add_rms_norm_fp8, rms_norm, rms_norm_fp8
from dsv3_plugin.registry import Ops


class RMSNorm(nn.Module):
    """`weight` [size] in the profile's dtype."""

    def __init__(self, ops: Ops, size: int, eps: float) -> None:
        super().__init__()
        self.ops = ops
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=ops.setting.profile.dtype), requires_grad=False)

    def forward(self, x: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, size], or its sum with addend [T, size], normalised."""
        if addend is None:
            return self.ops[rms_norm](x, self.weight, self.eps)
        return self.ops[add_rms_norm](x, addend, self.weight, self.eps)[1]

    def for_projection(self, x: torch.Tensor) -> Activation:
        """x [T, size], normalised, as projections read it."""
        if not self.ops.quantizes_ahead:
            return self(x)  # type: ignore[no-any-return]
        return Quantized(*self.ops[rms_norm_fp8](x, self.weight, self.eps, self.ops.scale_format))

    def of_sum(self, x: torch.Tensor, addend: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Activation]:
        """x, addend [T, size] to their sum, it normalised, and that as projections read it."""
        if not self.ops.quantizes_ahead:
            total, normalised = self.ops[add_rms_norm](x, addend, self.weight, self.eps)
            return total, normalised, normalised
        fused = self.ops[add_rms_norm_fp8](x, addend, self.weight, self.eps, self.ops.scale_format)
        total, normalised, values, scale = fused
        return total, normalised, Quantized(values, scale)
