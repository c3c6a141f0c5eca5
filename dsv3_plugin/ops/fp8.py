"""Block-scaled FP8 (DeepSeek-V3 report, section 3.3): quantizers and products.

Values are e4m3. An activation has one scale for each 1x128 slice of a row, a weight one for each 128x128 block; a
value times its scale is the number that it stands for. With `ue8m0` scales are powers of two, so that scaling is
exact and every maker of such kernels agrees; with `float32` they are any fp32 number, as in the released V3
checkpoints.

Product: for each 128 of K in ascending order, `raw` is the dot product from zero, and then
`acc = fma(raw, scale_a * scale_b, acc)` in fp32 (the scales' product is rounded first); one rounding at the end.
On a CPU `raw` is the exact sum rounded once to fp32: 128 products of e4m3 values need 43 bits, which fp64 holds, so
neither tile nor thread nor library can change it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.contract import Contract, require, require_matrix
from dsv3_plugin.ops.elementary import divide, fma
from dsv3_plugin.ops.linear import split_by_expert
from dsv3_plugin.profile import ScaleFormat

QUANTIZE_FP8 = Contract("quantize_fp8", 1, "1x128 activations to e4m3")
FP8_LINEAR = Contract("fp8_linear", 1, "block-scaled e4m3 product, 1x128 by 128x128")
GROUPED_FP8_LINEAR = Contract("grouped_fp8_linear", 1, "one fp8_linear for each expert over its rows")

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# The smallest scale: below it a power of two is no longer a normal fp32 number.
_MIN_SCALE = 2.0**-126


def scale_for(amax: torch.Tensor, scale_format: ScaleFormat) -> torch.Tensor:
    """Scales of blocks whose largest magnitudes are `amax` (fp32, any shape): 1 for a zero block.

    float32: amax / 448. ue8m0: the smallest power of two that is at least amax / 448, found without a rounding, because
    448 is 1.75 * 2**8: a mantissa up to 1.75 fits, a larger one needs the next power.
    """
    if scale_format == "float32":
        scale = divide(amax, E4M3_MAX)
    else:
        bits = amax.contiguous().view(torch.int32)
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(torch.int32)
        scale = (exponent.clamp(1, 254) << 23).view(torch.float32)
    return torch.where(amax == 0, torch.ones_like(scale), scale.clamp_min(_MIN_SCALE))


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round fp32 to e4m3, nearest even, saturating: clamped first, because torch versions differ on overflow."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def quantize_fp8(x: torch.Tensor, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations online: x [M, K], K a multiple of 128, to (e4m3 [M, K], fp32 scales [M, K / 128])."""
    require_matrix("quantize_fp8", "x", x, (torch.bfloat16, torch.float32))
    require(x.shape[1] % FP8_BLOCK == 0, "quantize_fp8", f"K={x.shape[1]} is not a multiple of {FP8_BLOCK}")
    blocks = x.float().unflatten(1, (-1, FP8_BLOCK))
    scale = scale_for(blocks.abs().amax(-1), scale_format)
    return to_e4m3(blocks / scale.unsqueeze(-1)).flatten(1), scale


def quantize_weight(weight: torch.Tensor, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight [N, K] to (e4m3 [N, K], fp32 `weight_scale_inv` [ceil(N / 128), ceil(K / 128)])."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    scale = scale_for(blocks.abs().amax((1, 3)), scale_format)
    quantized = to_e4m3(blocks / scale[:, None, :, None])
    return quantized.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale


def expand_scale(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Repeat block scales [ceil(N / 128), ceil(K / 128)] to one scale an element [N, K]."""
    return scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers [N, K] that an e4m3 weight [N, K] and its `weight_scale_inv` stand for."""
    return weight.float() * expand_scale(scale, *weight.shape)


def fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Quantized x [M, K] with scales [M, K / 128] times weight [N, K] with scales [ceil(N / 128), K / 128], to [M, N]
    of bf16, or of fp32, which keeps the unrounded sum (`dsv3_plugin.ops.slices`).
    """
    op = "fp8_linear"
    require_matrix(op, "x", x, (E4M3,))
    require_matrix(op, "weight", weight, (E4M3,))
    rows, depth = x.shape
    require(depth % FP8_BLOCK == 0, op, f"K={depth} is not a multiple of {FP8_BLOCK}")
    require(weight.shape[1] == depth, op, f"x has K={depth}, weight has K={weight.shape[1]}")
    blocks = depth // FP8_BLOCK
    expected = (-(-weight.shape[0] // FP8_BLOCK), blocks)
    require(tuple(x_scale.shape) == (rows, blocks), op, f"x_scale has shape {tuple(x_scale.shape)}")
    require(tuple(weight_scale.shape) == expected, op, f"weight_scale has shape {tuple(weight_scale.shape)}")
    require(out_dtype in (torch.bfloat16, torch.float32), op, f"out_dtype is {out_dtype}")

    column_scale = weight_scale.repeat_interleave(FP8_BLOCK, 0)[: weight.shape[0]]
    acc = torch.zeros(rows, weight.shape[0], dtype=torch.float32, device=x.device)
    for k in range(blocks):
        span = slice(k * FP8_BLOCK, (k + 1) * FP8_BLOCK)
        raw = F.linear(x[:, span].double(), weight[:, span].double()).float()
        acc = fma(raw, x_scale[:, k, None] * column_scale[None, :, k], acc)
    return acc.to(out_dtype)


def grouped_fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    """x [M, K] sorted by expert with scales [M, K / 128], expert_counts [E], weight [E, N, K] with scales [E, N /
    128, K / 128].
    """
    op = "grouped_fp8_linear"
    groups = zip(split_by_expert(op, x, expert_counts), split_by_expert(op, x_scale, expert_counts), strict=True)
    outputs = [fp8_linear(rows, scales, weight[e], weight_scale[e]) for (e, rows), (_, scales) in groups]
    return torch.cat(outputs) if outputs else x.new_empty(0, weight.shape[1], dtype=torch.bfloat16)
