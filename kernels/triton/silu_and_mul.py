"""SwiGLU's elementwise part, the same with its result quantized to e4m3, and its gradient."""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.kernels.triton.elementary import EXACT, round_to_bf16, sigmoid, widen
from dsv3_plugin.kernels.triton.quantize import quantize_groups
from dsv3_plugin.kernels.triton.scales import empty_scales
from dsv3_plugin.ops import silu_and_mul as contracts
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import ScaleFormat

_COLUMNS, _COLUMNS_FP8 = 1024, 2048
_WARPS = 4


@triton.jit
def _silu_and_mul(
    gate_up, out, scales, width, scale_stride, COLUMNS: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * (COLUMNS // 128) + tl.arange(0, COLUMNS // 128)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < width
    gate = widen(tl.load(gate_up + row * 2 * width + column, mask=inside, other=0))
    up = widen(tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0))
    product = gate * sigmoid(gate) * up
    if FP8:
        quantized, scale = quantize_groups(round_to_bf16(product), True, UE8M0)
        tl.store(out + row * width + column, quantized, mask=inside)
        tl.store(scales + row + group.to(tl.int64) * scale_stride, scale, mask=group < width // 128)
    else:
        tl.store(out + row * width + column, product.to(gate_up.dtype.element_ty), mask=inside)


@implements(contracts.silu_and_mul)
def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up bf16 [M, 2 I], the gate in the first I columns, to bf16 [M, I]. Raises `InputError`."""
    rows, width = _require("silu_and_mul", gate_up)
    out = gate_up.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, _COLUMNS))
        _silu_and_mul[grid](gate_up, out, None, width, 0, _COLUMNS, False, False, num_warps=_WARPS, **EXACT)
    return out


@implements(contracts.silu_and_mul_fp8)
def silu_and_mul_fp8(gate_up: torch.Tensor, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_fp8` of `silu_and_mul`: gate_up bf16 [M, 2 I] to (e4m3 [M, I], fp32 scales [M, I / 128]).

    Raises `InputError`.
    """
    op = "silu_and_mul_fp8"
    rows, width = _require(op, gate_up)
    require(width % FP8_BLOCK == 0, op, f"I={width} is not a multiple of {FP8_BLOCK}")
    values = gate_up.new_empty(rows, width, dtype=E4M3)
    scales = empty_scales(rows, width, gate_up.device)
    if rows:
        grid = (rows, triton.cdiv(width, _COLUMNS_FP8))
        ue8m0 = scale_format == "ue8m0"
        _silu_and_mul[grid](
            gate_up, values, scales, width, scales.stride(1), _COLUMNS_FP8, True, ue8m0, num_warps=_WARPS, **EXACT
        )
    return values, scales


@triton.jit
def _silu_and_mul_gradient(grad, gate_up, out, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    of_gate, of_up = row * 2 * width + column, row * 2 * width + width + column
    gate = widen(tl.load(gate_up + of_gate, mask=inside, other=0))
    up = widen(tl.load(gate_up + of_up, mask=inside, other=0))
    wide = widen(tl.load(grad + row * width + column, mask=inside, other=0))
    s = sigmoid(gate)
    tl.store(out + of_gate, (wide * up * s * (1 + gate * (1 - s))).to(out.dtype.element_ty), mask=inside)
    tl.store(out + of_up, (wide * gate * s).to(out.dtype.element_ty), mask=inside)


@implements(contracts.silu_and_mul_gradient)
def silu_and_mul_gradient(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """grad bf16 [M, I] and gate_up bf16 [M, 2 I] to bf16 [M, 2 I]. Raises `InputError`."""
    contracts.require_gradient(grad, gate_up, (torch.bfloat16,))
    rows, width = grad.shape
    out = torch.empty_like(gate_up)
    if rows:
        grid = (rows, triton.cdiv(width, _COLUMNS))
        _silu_and_mul_gradient[grid](grad, gate_up, out, width, _COLUMNS, num_warps=_WARPS, **EXACT)
    return out


def _require(op: str, gate_up: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the result."""
    require_matrix(op, "gate_up", gate_up, (torch.bfloat16,))
    require(gate_up.shape[1] % 2 == 0, op, f"gate_up has an odd width {gate_up.shape[1]}")
    return gate_up.shape[0], gate_up.shape[1] // 2
