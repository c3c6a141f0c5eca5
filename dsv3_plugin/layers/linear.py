"""Projections, in the profile's dtype or block-scaled FP8.

`ColumnLinear` and `RowLinear` are those that tensor-parallel ranks share: each rank builds them with its own part of
the sizes. How they are cut into slices is `dsv3_plugin.ops.slices`; on one rank with one slice they are a `Linear`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.fp8_linear import fp8_linear, grouped_fp8_linear
from dsv3_plugin.ops.linear import grouped_linear, linear
from dsv3_plugin.ops.quantize import E4M3, dequantize_weight, quantize_fp8
from dsv3_plugin.ops.sliced_linear import sliced_fp8_linear, sliced_linear
from dsv3_plugin.registry import Ops


class Quantized(NamedTuple):
    """An activation in FP8: `values` e4m3 [T, K], `scale` fp32 [T, K / 128]."""

    values: torch.Tensor
    scale: torch.Tensor


Activation = torch.Tensor | Quantized
"""What a projection reads: the profile's dtype [T, K], or quantized ahead (`Ops.quantizes_ahead`)."""


def quantize(ops: Ops, x: Activation) -> Quantized:
    """x [T, K] as an FP8 product reads it."""
    if isinstance(x, Quantized):
        return x
    return Quantized(*ops[quantize_fp8](x, ops.scale_format))


def _unquantized(x: Activation) -> torch.Tensor:
    """x [T, K] as any other product reads it: nothing quantizes ahead for that one."""
    assert isinstance(x, torch.Tensor)
    return x


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

    def forward(self, x: Activation) -> torch.Tensor:
        """x [T, in_features] to [T, out_features]."""
        if not self.is_fp8:
            return self.ops[linear](_unquantized(x), self.weight)
        if self.masters is not None:
            return self.masters.linear(_unquantized(x), self.weight)
        return self.ops[fp8_linear](*quantize(self.ops, x), self.weight, self.weight_scale_inv)

    def dequantize(self) -> torch.Tensor:
        """The weight in the profile's dtype: FP8 values times their scales, rounded."""
        if not self.is_fp8:
            return self.weight
        if self.masters is not None:
            return self.masters.quantized(self.weight)
        return dequantize_weight(self.weight, self.weight_scale_inv).to(self.ops.setting.profile.dtype)


class ColumnLinear(Linear):
    """A projection whose outputs are cut into slices: heads, or features of an MLP."""

    def __init__(
        self, ops: Ops, in_features: int, out_features: int, *, quantized: bool = True, fused: int = 1
    ) -> None:
        """`fused`: the number of projections, each cut on its own, whose rows `weight` holds one after the other."""
        super().__init__(ops, in_features, out_features, quantized=quantized)
        self.fused = fused

    def forward(self, x: Activation) -> torch.Tensor:
        """x [T, in_features] to [T, out_features]."""
        if isinstance(x, Quantized):
            return super().forward(x)
        x = self.ops.slices.enter(x)
        if self.is_fp8 or self.ops.setting.profile.reduction_slices == 1:
            return super().forward(x)
        return linear_in_slices(self.ops, x, self.weight, self.fused * self.ops.slices.held)


class RowLinear(Linear):
    """A projection whose inputs are cut into slices: the outputs of a `ColumnLinear`."""

    def forward(self, x: Activation) -> torch.Tensor:
        """x [T, in_features] to [T, out_features]."""
        profile, slices = self.ops.setting.profile, self.ops.slices
        if profile.reduction_slices == 1:
            return super().forward(x)
        if slices.held == profile.reduction_slices:
            return self._sum_of_slices(x, profile.dtype)
        return slices.fold(self._sum_of_slices(x, torch.float32)).to(profile.dtype)

    def _sum_of_slices(self, x: Activation, out_dtype: torch.dtype) -> torch.Tensor:
        """x [T, in_features] to the sum of the slices held here, [T, out_features]."""
        held = self.ops.slices.held
        if not self.is_fp8:
            if held == 1:  # the same, by faster kernels
                return self.ops[linear](_unquantized(x), self.weight, out_dtype=out_dtype)
            return self.ops[sliced_linear](_unquantized(x), self.weight, held, out_dtype=out_dtype)
        if self.masters is not None:
            return self.masters.sliced_linear(_unquantized(x), self.weight, held, out_dtype=out_dtype)
        weight = self.weight, self.weight_scale_inv
        return self.ops[sliced_fp8_linear](*quantize(self.ops, x), *weight, held, out_dtype=out_dtype)


def linear_in_slices(
    ops: Ops, x: torch.Tensor, weight: torch.Tensor, slices: int, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, K] times weight [N, K], each of `slices` equal slices of N as a product of its own, to [T, N]."""
    if slices == 1 or ops.columns_are_alone:
        return ops[linear](x, weight, out_dtype=out_dtype)
    return torch.cat([ops[linear](x, rows, out_dtype=out_dtype) for rows in weight.chunk(slices)], dim=1)


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

    def forward(self, x: Activation, expert_counts: torch.Tensor) -> torch.Tensor:
        """x [S, in_features] sorted by expert, expert_counts [num_experts], to [S, out_features]."""
        if not self.is_fp8:
            return self.ops[grouped_linear](_unquantized(x), expert_counts, self.weight)
        if self.masters is not None:
            return self.masters.grouped_linear(_unquantized(x), expert_counts, self.weight)
        return self.ops[grouped_fp8_linear](*quantize(self.ops, x), expert_counts, self.weight, self.weight_scale_inv)
