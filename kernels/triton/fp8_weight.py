"""A master weight to e4m3 in 128x128 blocks: a CTA takes a block, and stores it either way round."""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.kernels.triton.elementary import EXACT
from dsv3_plugin.kernels.triton.quantize import quantize_groups
from dsv3_plugin.ops import fp8_weight as contracts
from dsv3_plugin.ops.fp8_weight import require_weight
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import ScaleFormat


@triton.jit
def _quantize_weight(weight, values, scales, rows, columns, padded_rows, TRANSPOSED: tl.constexpr, UE8M0: tl.constexpr):
    block_column, block_row, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = block_row * 128 + tl.arange(0, 128)
    column = block_column * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None]
    tile = weight + expert * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
    wide = tl.load(tile, mask=inside, other=0.0).to(tl.float32)
    # A block is a group of 128 * 128 numbers.
    quantized, scale = quantize_groups(tl.reshape(wide, (1, 128 * 128)), weight.dtype.element_ty == tl.bfloat16, UE8M0)
    quantized = tl.reshape(quantized, (128, 128))
    row_blocks, column_blocks = tl.cdiv(rows, 128), columns // 128
    if TRANSPOSED:
        target = values + expert * columns * padded_rows + column[:, None].to(tl.int64) * padded_rows + row[None, :]
        tl.store(target, tl.trans(quantized))
        place = block_column * row_blocks + block_row
    else:
        target = values + expert * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(target, quantized, mask=inside)
        place = block_row * column_blocks + block_column
    tl.store(scales + expert * row_blocks * column_blocks + place + tl.arange(0, 1), scale)


@implements(contracts.quantize_fp8_weight)
def quantize_fp8_weight(
    weight: torch.Tensor, scale_format: ScaleFormat, *, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] or [E, N, K] of bf16 or fp32, K a multiple of 128, to (e4m3 of its shape, fp32 scales
    [..., ceil(N / 128), K / 128]); `transposed` to (e4m3 [..., K, N], N filled up to whole blocks with zeros, scales
    [..., K / 128, ceil(N / 128)]). Raises `InputError`.
    """
    require_weight(weight)
    *lead, rows, columns = weight.shape
    blocks = triton.cdiv(rows, FP8_BLOCK), columns // FP8_BLOCK
    padded = blocks[0] * FP8_BLOCK
    shape, of_scales = ((columns, padded), blocks[::-1]) if transposed else ((rows, columns), blocks)
    values = torch.empty(*lead, *shape, dtype=E4M3, device=weight.device)
    scales = torch.empty(*lead, *of_scales, dtype=torch.float32, device=weight.device)
    if weight.numel():
        grid = (blocks[1], blocks[0], lead[0] if lead else 1)
        _quantize_weight[grid](
            weight, values, scales, rows, columns, padded, transposed, scale_format == "ue8m0", num_warps=8, **EXACT
        )
    return values, scales
