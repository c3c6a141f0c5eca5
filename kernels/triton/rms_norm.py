"""RMSNorm: one CTA a row, which stays in registers; its squares are folded as the contract says.

Fused with what stands before and behind it in a layer: the residual sum, and quantization to e4m3. Of its gradient the
rows are CTAs as well; then the weight's is summed down the columns, a CTA a chunk of rows, and chunk by chunk.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.kernels.triton.elementary import EXACT, divide, round_to_bf16, sum_row, widen
from dsv3_plugin.kernels.triton.quantize import quantize_groups
from dsv3_plugin.kernels.triton.scales import empty_scales
from dsv3_plugin.ops import rms_norm as contracts
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import ScaleFormat

_WARPS = 4
# Up to so many rows the weight is loaded with the row, lest a CTA wait for it; with more rows when it is needed,
# which leaves registers for more CTAs.
_FEW_ROWS = 1024
_GRADIENT_WARPS = 8
_COLUMNS = 256


@triton.jit
def inverse_rms(wide, eps, K: tl.constexpr, BLOCKS: tl.constexpr):
    """1 / sqrt(mean + eps) [1, 1] of the squares of a row of K numbers, fp32 [BLOCKS, 128], zero behind them."""
    total = sum_row(tl.reshape(wide * wide, (BLOCKS * 128,)), BLOCKS * 128)
    return tl.reshape(divide(1.0, tl.math.sqrt_rn(divide(total, K * 1.0) + eps)), (1, 1))


@triton.jit
def _rms_norm(
    x,
    addend,
    weight,
    total_out,
    out,
    values,
    scales,
    eps,
    scale_stride,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    UE8M0: tl.constexpr,
    PRELOAD: tl.constexpr,
):
    """A row as BLOCKS of 128. `addend`, `total_out`, `out` and `values` are each None where they are not wanted."""
    row = tl.program_id(0).to(tl.int64) * K
    block = tl.arange(0, BLOCKS)
    column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < K
    wide = widen(tl.load(x + row + column, mask=inside, other=0))
    if PRELOAD:
        weights = tl.load(weight + column, mask=inside, other=0)
    if addend is not None:
        other = tl.load(addend + row + column, mask=inside, other=0)
        wide = round_to_bf16(wide + widen(other))
        tl.store(total_out + row + column, wide.to(x.dtype.element_ty), mask=inside)
    factor = inverse_rms(wide, eps, K, BLOCKS)
    if not PRELOAD:
        weights = tl.load(weight + column, mask=inside, other=0)
    scaled = wide * factor * widen(weights)
    if out is not None:
        tl.store(out + row + column, scaled.to(x.dtype.element_ty), mask=inside)
    if values is not None:
        quantized, scale = quantize_groups(round_to_bf16(scaled), True, UE8M0)
        # As many numbers a thread as it holds of bf16, lest they change places.
        tl.store(values + row + tl.max_contiguous(column, (1, 8)), quantized, mask=inside)
        tl.store(scales + tl.program_id(0) + block.to(tl.int64) * scale_stride, scale, mask=block < K // 128)


@implements(contracts.rms_norm)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x bf16 [M, K], weight bf16 [K], to bf16 [M, K]. Raises `InputError`."""
    _require("rms_norm", x, weight)
    out = torch.empty_like(x)
    _launch(x, None, weight, None, out, None, None, eps, "float32")
    return out


@implements(contracts.rms_norm_fp8)
def rms_norm_fp8(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_fp8` of `rms_norm`: x bf16 [M, K], weight bf16 [K], to (e4m3 [M, K], fp32 scales [M, K / 128]).

    Raises `InputError`.
    """
    _require("rms_norm_fp8", x, weight, FP8_BLOCK)
    values, scales = torch.empty_like(x, dtype=E4M3), empty_scales(x.shape[0], x.shape[1], x.device)
    _launch(x, None, weight, None, None, values, scales, eps, scale_format)
    return values, scales


@implements(contracts.add_rms_norm)
def add_rms_norm(
    x: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, addend bf16 [M, K], weight bf16 [K], to their sum and its `rms_norm`, bf16 [M, K]. Raises `InputError`."""
    _require("add_rms_norm", x, weight)
    _require("add_rms_norm", addend, weight, rows=len(x))
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, addend, weight, total, out, None, None, eps, "float32")
    return total, out


@implements(contracts.add_rms_norm_fp8)
def add_rms_norm_fp8(
    x: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor, eps: float, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, addend bf16 [M, K], weight bf16 [K], to their sum, its `rms_norm`, and that quantized: bf16 [M, K] twice, e4m3
    [M, K], fp32 scales [M, K / 128]. Raises `InputError`.
    """
    _require("add_rms_norm_fp8", x, weight, FP8_BLOCK)
    _require("add_rms_norm_fp8", addend, weight, rows=len(x))
    total, out = torch.empty_like(x), torch.empty_like(x)
    values, scales = torch.empty_like(x, dtype=E4M3), empty_scales(x.shape[0], x.shape[1], x.device)
    _launch(x, addend, weight, total, out, values, scales, eps, scale_format)
    return total, out, values, scales


@triton.jit
def _rms_norm_gradient(grad, x, weight, out, factors, eps, K: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * K
    column = tl.arange(0, BLOCKS)[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < K
    wide = widen(tl.load(x + row + column, mask=inside, other=0))
    h = widen(tl.load(grad + row + column, mask=inside, other=0))
    h *= widen(tl.load(weight + column, mask=inside, other=0))
    factor = inverse_rms(wide, eps, K, BLOCKS)
    normalised = wide * factor
    total = sum_row(tl.reshape(h * normalised, (BLOCKS * 128,)), BLOCKS * 128)
    mean = tl.reshape(divide(total, K * 1.0), (1, 1))
    tl.store(out + row + column, (factor * (h - normalised * mean)).to(out.dtype.element_ty), mask=inside)
    tl.store(factors + tl.program_id(0) + tl.arange(0, 1), tl.reshape(factor, (1,)))


@triton.jit
def _sum_of_chunk(grad, x, factors, sums, rows, width, ROW_CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in tl.range(ROW_CHUNK, loop_unroll_factor=8):
        row = (chunk * ROW_CHUNK + i).to(tl.int64)
        inside = (column < width) & (row < rows)
        of_out = widen(tl.load(grad + row * width + column, mask=inside, other=0))
        wide = widen(tl.load(x + row * width + column, mask=inside, other=0))
        total += of_out * (wide * tl.load(factors + row, mask=row < rows, other=0))
    tl.store(sums + chunk.to(tl.int64) * width + column, total, mask=column < width)


@triton.jit
def _add_chunks(sums, out, chunks, width, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    place = sums + column
    for _ in range(chunks):
        total += tl.load(place, mask=column < width, other=0)
        place += width
    tl.store(out + column, total.to(out.dtype.element_ty), mask=column < width)


@implements(contracts.rms_norm_gradient)
def rms_norm_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad, x bf16 [M, K], weight bf16 [K], to the gradients of x and weight, bf16. Raises `InputError`."""
    contracts.require_gradient(grad, x, weight, (torch.bfloat16,))
    rows, width = x.shape
    of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
    chunks = triton.cdiv(rows, contracts.ROW_CHUNK)
    factors = torch.empty(rows, dtype=torch.float32, device=x.device)
    sums = torch.empty(chunks, width, dtype=torch.float32, device=x.device)
    blocks, tiles = triton.next_power_of_2(triton.cdiv(width, FP8_BLOCK)), triton.cdiv(width, _COLUMNS)
    if rows:
        _rms_norm_gradient[(rows,)](
            grad, x, weight, of_x, factors, eps, width, blocks, num_warps=_GRADIENT_WARPS, **EXACT
        )
        _sum_of_chunk[(tiles, chunks)](
            grad, x, factors, sums, rows, width, contracts.ROW_CHUNK, _COLUMNS, num_warps=1, **EXACT
        )
    _add_chunks[(tiles,)](sums, of_weight, chunks, width, _COLUMNS, num_warps=1, **EXACT)
    return of_x, of_weight


def _require(op: str, x: torch.Tensor, weight: torch.Tensor, multiple: int = 1, *, rows: int | None = None) -> None:
    require_matrix(op, "x", x, (torch.bfloat16,))
    require(weight.dtype == x.dtype, op, f"weight is {weight.dtype}, x is {x.dtype}")
    require(tuple(weight.shape) == (x.shape[1],), op, f"weight has shape {tuple(weight.shape)}")
    require(x.shape[1] % multiple == 0, op, f"K={x.shape[1]} is not a multiple of {multiple}")
    require(rows is None or len(x) == rows, op, f"the addend has {len(x)} rows, x has {rows}")


def _launch(
    x: torch.Tensor,
    addend: torch.Tensor | None,
    weight: torch.Tensor,
    total: torch.Tensor | None,
    out: torch.Tensor | None,
    values: torch.Tensor | None,
    scales: torch.Tensor | None,
    eps: float,
    scale_format: ScaleFormat,
) -> None:
    if not len(x):
        return
    stride = 0 if scales is None else scales.stride(1)
    blocks = triton.next_power_of_2(triton.cdiv(x.shape[1], FP8_BLOCK))
    preload = len(x) <= _FEW_ROWS
    pointers = x, addend, weight, total, out, values, scales
    _rms_norm[(len(x),)](
        *pointers,
        eps,
        stride,
        x.shape[1],
        blocks,
        scale_format == "ue8m0",
        preload,
        num_warps=_WARPS,
        **EXACT,
    )
