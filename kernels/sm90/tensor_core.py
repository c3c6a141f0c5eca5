"""What a Hopper tensor core prints, computed on a CPU or on any GPU (`tensor_core_gpu`).

One `wgmma` instruction adds `depth` products and the accumulator as fixed-point numbers: every term is cut off
(towards zero) a fixed number of bits below the largest exponent, the integers are summed exactly, and the sum is cut
off to the accumulator's width. A zero has no exponent, and a sum of nothing is +0: the core prints no -0. A dot product
chains instructions over ascending K. Nothing else enters, so a tile's shape, its neighbours and the order of the
operands leave every bit alone. (Model: MMA-Sim, arXiv 2511.10909; equal to an H200 in every output tried, those near
the smallest numbers included.)

Inputs are finite. No library product is used: the terms are integers in floating point, added exactly in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

# Terms of one instruction that are held at a time: its temporaries should stay in the cache.
_TILE_TERMS = 1 << 17
_TILE_COLUMNS = 512
MIN_EXPONENT = -126
# Below every exponent, and the sum of two is still an int16.
NO_EXPONENT = -10_000
SMALLEST = 2.0**-149


@dataclass(frozen=True)
class Instruction:
    """One tensor-core instruction: how many products it adds, and how many bits it keeps."""

    depth: int
    fraction_bits: int
    """Bits kept below the largest exponent while summing."""
    result_bits: int
    """Fraction bits of the accumulator."""
    operand_exponent: int
    """Smallest exponent of the operands' format: that of its subnormal numbers."""
    dtype: torch.dtype
    """A float that holds the sum of `depth + 1` terms as an integer."""
    floor: int
    """Terms are cut off as if one of them had at least this exponent."""


BF16 = Instruction(16, 25, 23, MIN_EXPONENT, torch.float64, -133)
# Products of e4m3 start at 2**-18 and the accumulator starts from zero, so fp32 holds every term, and a higher floor
# keeps the scaling inside it and cuts off nothing.
FP8 = Instruction(32, 13, 13, -6, torch.float32, -64)


def dot(instruction: Instruction, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
    """a [M, K] times b [N, K] transposed, added to c fp32 [M, N] (zero if None), to fp32 [M, N].

    K is zero-padded to whole instructions: a zero product changes no bit.
    """
    out = torch.zeros(len(a), len(b), dtype=torch.float32, device=a.device) if c is None else c.clone()
    if a.is_cuda:
        from dsv3_plugin.kernels.sm90 import tensor_core_gpu

        return tensor_core_gpu.dot(instruction, a, b, out)
    padding = -a.shape[1] % instruction.depth
    a, b = (pad(x.to(instruction.dtype), (0, padding)) for x in (a, b))
    tile_rows = max(1, _TILE_TERMS // (instruction.depth * min(b.shape[0], _TILE_COLUMNS)))
    b_tiles = [_Operand(instruction, tile) for tile in b.split(_TILE_COLUMNS)]
    for a_rows, out_rows in zip(a.split(tile_rows), out.split(tile_rows), strict=True):
        a_tile = _Operand(instruction, a_rows)
        for b_tile, out_tile in zip(b_tiles, out_rows.split(_TILE_COLUMNS, dim=1), strict=True):
            _chain(instruction, a_tile, b_tile, out_tile)
    return out


class _Operand:
    """A tile's values [K, R] and their exponents, K first so that sums over K run along whole rows."""

    def __init__(self, instruction: Instruction, x: torch.Tensor) -> None:
        self.values = x.t().contiguous()
        self.exponents = _exponent(self.values, instruction.operand_exponent)


def _chain(instruction: Instruction, a: _Operand, b: _Operand, out: torch.Tensor) -> None:
    """Add the products of a [K, M] and b [K, N] to `out` [M, N], one instruction after the other."""
    shape = instruction.depth, a.values.shape[1], b.values.shape[1]
    terms = torch.empty(shape, dtype=instruction.dtype, device=out.device)
    exponents = torch.empty(shape, dtype=torch.int16, device=out.device)
    acc = out.to(instruction.dtype)
    for k in range(0, a.values.shape[0], instruction.depth):
        span = slice(k, k + instruction.depth)
        torch.add(a.exponents[span, :, None], b.exponents[span, None, :], out=exponents)
        largest = torch.maximum(exponents.amax(0), _exponent(acc, MIN_EXPONENT)).clamp_min_(instruction.floor)
        unit = _power_of_two(instruction.fraction_bits - largest, instruction.dtype)
        torch.mul(a.values[span, :, None], b.values[span, None, :], out=terms)
        total = terms.mul_(unit).trunc_().sum(0)
        total += (acc * unit).trunc_()
        acc = _cut_off(total.div_(unit), instruction.result_bits)
    out.copy_(acc)


def _exponent(x: torch.Tensor, smallest: int) -> torch.Tensor:
    """int16 exponents e of |x| = m 2**e, 1 <= m < 2; `smallest` for subnormal numbers; none for zero."""
    if x.dtype == torch.float64:
        exponent = ((x.view(torch.int64) >> 52) & 0x7FF) - 1023
    else:
        exponent = ((x.view(torch.int32) >> 23) & 0xFF) - 127
    return exponent.to(torch.int16).clamp_min_(smallest).masked_fill_(x == 0, NO_EXPONENT)


def _power_of_two(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2**exponent, exact."""
    if dtype == torch.float64:
        return ((exponent.long() + 1023) << 52).view(dtype)
    return ((exponent.int() + 127) << 23).view(dtype)


def _cut_off(x: torch.Tensor, fraction_bits: int) -> torch.Tensor:
    """x rounded towards zero to `fraction_bits` bits below its leading one, and to what fp32 holds; +0 for -0."""
    if x.dtype == torch.float32:  # sums of e4m3's products are far above the smallest fp32 number
        return (x.view(torch.int32) & -(1 << (23 - fraction_bits))).view(x.dtype) + 0
    cut = (x.view(torch.int64) & -(1 << (52 - fraction_bits))).view(x.dtype)
    return (cut / SMALLEST).trunc_().mul_(SMALLEST).add_(0)
