"""A projection, in the profile's dtype or block-scaled FP8."""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.fp8 import E4M3, dequantize_weight
from dsv3_plugin.registry import Ops


def _ceil_blocks(size: int) -> int:
    return -(-size // FP8_BLOCK)


class Linear(nn.Module):
    """`weight` [out_features, in_features]; with FP8 also `weight_scale_inv` [out / 128, in / 128], rounded up.

    A trainer's FP8 layer has a master weight in the profile's dtype instead (`Ops.master_weights`).
    """

    def __init__(self, ops: Ops, in_features: int, out_features: int, *, quantized: bool = True) -> None:
        super().__init__()
        self.ops = ops
        profile = ops.setting.profile
        self.is_fp8 = quantized and profile.is_fp8
        self.masters = ops.master_weights if self.is_fp8 else None
        holds_fp8 = self.is_fp8 and self.masters is None
        dtype = E4M3 if holds_fp8 else profile.dtype
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        if holds_fp8:
            scales = torch.empty(_ceil_blocks(out_features), _ceil_blocks(in_features), dtype=torch.float32)
            self.weight_scale_inv = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in_features] to [T, out_features]."""
        if not self.is_fp8:
            return self.ops.linear(x, self.weight)
        if self.masters is not None:
            return self.masters.linear(x, self.weight)
        quantized, scale = self.ops.quantize_fp8(x, self.ops.setting.profile.scale_format)
        return self.ops.fp8_linear(quantized, scale, self.weight, self.weight_scale_inv)

    def numbers(self) -> torch.Tensor:
        """The weight's numbers in the profile's dtype: FP8 values times their scales, rounded."""
        if not self.is_fp8:
            return self.weight
        if self.masters is not None:
            return self.masters.quantized(self.weight)
        return dequantize_weight(self.weight, self.weight_scale_inv).to(self.ops.setting.profile.dtype)


class GroupedLinear(nn.Module):
    """One projection an expert: `weight` [num_experts, out_features, in_features], scales likewise."""

    def __init__(self, ops: Ops, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.ops = ops
        profile = ops.setting.profile
        self.is_fp8 = profile.is_fp8
        self.masters = ops.master_weights
        holds_fp8 = self.is_fp8 and self.masters is None
        dtype = E4M3 if holds_fp8 else profile.dtype
        weight = torch.empty(num_experts, out_features, in_features, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if holds_fp8:
            shape = num_experts, _ceil_blocks(out_features), _ceil_blocks(in_features)
            self.weight_scale_inv = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor, expert_counts: torch.Tensor) -> torch.Tensor:
        """x [S, in_features] sorted by expert, expert_counts [num_experts], to [S, out_features]."""
        if not self.is_fp8:
            return self.ops.grouped_linear(x, expert_counts, self.weight)
        if self.masters is not None:
            return self.masters.grouped_linear(x, expert_counts, self.weight)
        quantized, scale = self.ops.quantize_fp8(x, self.ops.setting.profile.scale_format)
        return self.ops.grouped_fp8_linear(quantized, scale, expert_counts, self.weight, self.weight_scale_inv)
