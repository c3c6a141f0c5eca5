"""A trainer's weight as FP8 products read it, forward and backward: `quantize_fp8_weight`.

Contract: by definition `quantize.quantize_weight`, whose 128x128 blocks hold the same numbers either way round. So
dgrad's weight, transposed, is made of the master weight again when it is needed, and nothing of it is kept.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.drawing import MOST_PRODUCTS, Case, Sizes, numbers
from dsv3_plugin.ops.operation import operation
from dsv3_plugin.ops.quantize import quantize_weight
from dsv3_plugin.profile import ScaleFormat


@operation(version=1, summary="128x128 blocks of a master weight to e4m3, either way round", fp8=True, training=True)
def quantize_fp8_weight(
    weight: torch.Tensor, scale_format: ScaleFormat, *, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] or [E, N, K] of bf16 or fp32, K a multiple of 128, to (e4m3 of its shape, fp32 scales
    [..., ceil(N / 128), K / 128]); `transposed` to (e4m3 [..., K, N], N filled up to whole blocks with zeros, scales
    [..., K / 128, ceil(N / 128)]).
    """
    require_weight(weight)
    values, scale = quantize_weight(weight, scale_format)
    if not transposed:
        return values, scale
    rows = F.pad(values.view(torch.uint8), (0, 0, 0, -values.shape[-2] % FP8_BLOCK))
    return rows.transpose(-1, -2).contiguous().view(values.dtype), scale.transpose(-1, -2).contiguous()


def require_weight(weight: torch.Tensor) -> None:
    """Require a contiguous weight, or experts', with rows of whole blocks."""
    op, shape = "quantize_fp8_weight", tuple(weight.shape)
    require(weight.dim() in (2, 3), op, f"weight has shape {shape}, expected two or three dimensions")
    require(weight.dtype in (torch.bfloat16, torch.float32), op, f"weight is {weight.dtype}")
    require(weight.is_contiguous(), op, f"weight of shape {shape} is not contiguous")
    require(shape[-1] % FP8_BLOCK == 0, op, f"K={shape[-1]} is not a multiple of {FP8_BLOCK}")


@quantize_fp8_weight.cases
def _case(rng: random.Random, at: Sizes) -> Case:
    """One weight and experts', rows that fill no block, from subnormal to near overflow."""
    depth = rng.choice(at.depths)
    rows = rng.choice(at.columns) - rng.choice((0, 0, 8))
    most = max(1, MOST_PRODUCTS // (4 * rows * depth))
    lead = rng.choice(((), (min(rng.choice(at.groups), most),)))
    weight = numbers(rng, *lead, rows, depth) * 2.0 ** rng.choice((-130, -20, 0, 0, 0, 20, 100))
    weight = weight if rng.random() < 0.8 else weight.float()
    return quantize_fp8_weight.case(weight, rng.choice(at.scale_formats), transposed=rng.random() < 0.5)
