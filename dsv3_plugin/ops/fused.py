"""Operations that are by definition others one after the other, which a device may make one kernel; and moves of data.

Contract: the bits of the composition that is written here, rounding to the profile's dtype between its parts included.
A kernel saves launches and the way through memory, never a rounding.
"""

from __future__ import annotations

import torch

from dsv3_plugin.ops.contract import Contract, require
from dsv3_plugin.ops.fp8 import quantize_fp8
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.ops.silu_and_mul import silu_and_mul
from dsv3_plugin.profile import ScaleFormat

ADD_RMS_NORM = Contract("add_rms_norm", 1, "residual sum, then rms_norm")
RMS_NORM_FP8 = Contract("rms_norm_fp8", 1, "rms_norm, then quantize_fp8")
ADD_RMS_NORM_FP8 = Contract("add_rms_norm_fp8", 1, "residual sum, then rms_norm, then quantize_fp8")
SILU_AND_MUL_FP8 = Contract("silu_and_mul_fp8", 1, "silu_and_mul, then quantize_fp8")
PERMUTE = Contract("permute", 1, "rows of activations")
PERMUTE_FP8 = Contract("permute_fp8", 1, "rows of quantized activations and their scales")


def add_rms_norm(
    x: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, addend [M, K], weight [K] of one dtype, to (x + addend, its `rms_norm`), [M, K] of that dtype each."""
    op = "add_rms_norm"
    require(x.shape == addend.shape, op, f"x has shape {tuple(x.shape)}, addend {tuple(addend.shape)}")
    require(x.dtype == addend.dtype, op, f"x is {x.dtype}, addend is {addend.dtype}")
    total = x + addend
    return total, rms_norm(total, weight, eps)


def rms_norm_fp8(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], weight [K] of one dtype, to (e4m3 [M, K], fp32 scales [M, K / 128])."""
    return quantize_fp8(rms_norm(x, weight, eps), scale_format)


def add_rms_norm_fp8(
    x: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor, eps: float, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, addend [M, K], weight [K] of one dtype, to what `add_rms_norm` gives and its second part quantized: (e4m3 [M,
    K], fp32 scales [M, K / 128]).
    """
    total, normalised = add_rms_norm(x, addend, weight, eps)
    return total, normalised, *quantize_fp8(normalised, scale_format)


def silu_and_mul_fp8(gate_up: torch.Tensor, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [M, 2 I], the gate in the first I columns, to (e4m3 [M, I], fp32 scales [M, I / 128])."""
    return quantize_fp8(silu_and_mul(gate_up), scale_format)


def permute(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [M, K] and row numbers int64 [S] to those rows, [S, K]."""
    return x[rows]


def permute_fp8(values: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values e4m3 [M, K], scales fp32 [M, K / 128] and row numbers int64 [S], to rows of both, [S, ...]."""
    return values.view(torch.uint8)[rows].view(values.dtype), scales[rows]
