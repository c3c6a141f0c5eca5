"""`tensor_core.dot` where its operands are on a GPU: the same steps, an output a lane instead of a tile an operation.

Terms are exact in fp64 and summed as 64-bit integers; nothing is left to round but what the model cuts off.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.kernels.sm90 import tensor_core
from dsv3_plugin.kernels.triton.elementary import EXACT

_TILE = 16
_MIN_EXPONENT, _NO_EXPONENT = tl.constexpr(tensor_core.MIN_EXPONENT), tl.constexpr(tensor_core.NO_EXPONENT)
_SMALLEST, _PER_SMALLEST = tl.constexpr(tensor_core.SMALLEST), tl.constexpr(1 / tensor_core.SMALLEST)
_SMALLEST_NORMAL = tl.constexpr(2.0**tensor_core.MIN_EXPONENT)


@triton.jit
def _exponent(x, smallest):
    """Exponents of fp64 numbers, `smallest` for subnormal ones of their format, none for zero."""
    exponent = ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023
    return tl.where(x == 0, _NO_EXPONENT, tl.maximum(exponent, smallest))


@triton.jit
def _power_of_two(exponent):
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["rows", "columns", "depth"])
def _dot(
    a,
    b,
    start,
    out,
    rows,
    columns,
    depth,
    DEPTH: tl.constexpr,
    FRACTION_BITS: tl.constexpr,
    RESULT_BITS: tl.constexpr,
    OPERAND_EXPONENT: tl.constexpr,
    FLOOR: tl.constexpr,
    TILE: tl.constexpr,
):
    row, column = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[:, None]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    acc = tl.load(start + at, mask=inside, other=0).to(tl.float64)
    k = 0
    while k < depth:
        step = k + tl.arange(0, DEPTH)[None, :]
        x = tl.load(a + row[:, None].to(tl.int64) * depth + step, mask=row_inside & (step < depth), other=0)
        y = tl.load(b + column[:, None].to(tl.int64) * depth + step, mask=column_inside & (step < depth), other=0)
        x, y = x.to(tl.float64), y.to(tl.float64)
        exponents = _exponent(x, OPERAND_EXPONENT)[:, None, :] + _exponent(y, OPERAND_EXPONENT)[None, :, :]
        largest = tl.maximum(tl.maximum(tl.max(exponents, 2), _exponent(acc, _MIN_EXPONENT)), FLOOR)
        unit = _power_of_two(FRACTION_BITS - largest)
        # To an integer is towards zero.
        total = tl.sum((x[:, None, :] * y[None, :, :] * unit[:, :, None]).to(tl.int64), 2) + (acc * unit).to(tl.int64)
        value = total.to(tl.float64) * _power_of_two(largest - FRACTION_BITS)
        cut = (value.to(tl.int64, bitcast=True) & -(1 << (52 - RESULT_BITS))).to(tl.float64, bitcast=True)
        # Subnormal numbers of fp32 are whole multiples of the smallest one.
        subnormal = tl.abs(cut) < _SMALLEST_NORMAL
        whole = (tl.where(subnormal, cut, 0) * _PER_SMALLEST).to(tl.int64).to(tl.float64) * _SMALLEST
        acc = tl.where(subnormal, whole, cut)
        k += DEPTH
    tl.store(out + at, acc.to(tl.float32), mask=inside)


def dot(instruction: tensor_core.Instruction, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a [M, K] times b [N, K] transposed, bf16 or e4m3, added to c fp32 [M, N], to fp32 [M, N]."""
    c = c.contiguous()
    out = torch.empty_like(c)
    if out.numel():
        grid = (triton.cdiv(len(a), _TILE), triton.cdiv(len(b), _TILE))
        _dot[grid](
            a.float().contiguous(),
            b.float().contiguous(),
            c,
            out,
            len(a),
            len(b),
            a.shape[1],
            instruction.depth,
            instruction.fraction_bits,
            instruction.result_bits,
            instruction.operand_exponent,
            instruction.floor,
            _TILE,
            **EXACT,
        )
    return out
