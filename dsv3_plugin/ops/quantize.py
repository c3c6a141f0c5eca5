"""Block-scaled FP8 numbers (DeepSeek-V3 report, section 3.3), and activations quantized online: `quantize_fp8`.

Values are e4m3. An activation has one scale for each 1x128 group of a row, a weight one for each 128x128 block; a
value times its scale is the number that it stands for. With `ue8m0` scales are powers of two, so that scaling is
exact and all such kernels agree; with `float32` they are any fp32 number, as in the released V3 checkpoints.

Contract: the scale is `scale_for` of a block's largest magnitude; a number divided by it, correctly rounded, then
rounded to e4m3, nearest even, saturating.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.drawing import Case, Sizes, numbers
from dsv3_plugin.ops.elementary import divide
from dsv3_plugin.ops.operation import operation
from dsv3_plugin.profile import ScaleFormat

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# The smallest scale: below it a power of two is no longer a normal fp32 number.
_MIN_SCALE = 2.0**-126


@operation(version=1, summary="1x128 activations to e4m3", fp8=True)
def quantize_fp8(x: torch.Tensor, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] of bf16 or fp32, K a multiple of 128, to (e4m3 [M, K], fp32 scales [M, K / 128])."""
    require_matrix("quantize_fp8", "x", x, (torch.bfloat16, torch.float32))
    require(x.shape[1] % FP8_BLOCK == 0, "quantize_fp8", f"K={x.shape[1]} is not a multiple of {FP8_BLOCK}")
    blocks = x.float().unflatten(1, (-1, FP8_BLOCK))
    scale = scale_for(blocks.abs().amax(-1), scale_format)
    return to_e4m3(blocks / scale.unsqueeze(-1)).flatten(1), scale


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


def quantize_weight(weight: torch.Tensor, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight [..., N, K] to (e4m3 [..., N, K], fp32 `weight_scale_inv` [..., ceil(N / 128), ceil(K / 128)]);
    experts may lead.
    """
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    scale = scale_for(blocks.abs().amax((-3, -1)), scale_format)
    quantized = to_e4m3(blocks / scale[..., :, None, :, None])
    return quantized.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous(), scale


def expand_scale(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Repeat block scales [ceil(N / 128), ceil(K / 128)] to one scale an element [N, K]."""
    return scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers [N, K] that an e4m3 weight [N, K] and its `weight_scale_inv` stand for."""
    return weight.float() * expand_scale(scale, *weight.shape)


@quantize_fp8.cases
def _quantize_case(rng: random.Random, at: Sizes) -> Case:
    """From subnormal to near overflow, both scale formats."""
    x = numbers(rng, rng.choice(at.rows), rng.choice(at.depths))
    x = x * 2.0 ** rng.choice((-130, -20, 0, 0, 0, 20, 100))
    return quantize_fp8.case(x if rng.random() < 0.8 else x.float(), rng.choice(at.scale_formats))
