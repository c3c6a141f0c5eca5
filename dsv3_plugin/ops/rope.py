"""Rotary position embedding on interleaved pairs, with YaRN's frequencies.

Contract: elements 2i and 2i + 1 of the rotary part are one complex number, rotated by the angle `position *
inv_freq[i]`: (a cos - b sin, a sin + b cos) in fp32, products and differences rounded one by one, then one rounding
to the input's dtype. The table is built once for the model's full length, never for what a run needs, so that no
length can change it.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from dsv3_plugin.config import DeepseekV3Config, YarnScaling
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.drawing import Case, Sizes, generator, numbers
from dsv3_plugin.ops.operation import BoundKernels, operation


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature for a context that is `factor` times the original."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_inv_freq(config: DeepseekV3Config) -> torch.Tensor:
    """fp32 [qk_rope_head_dim / 2]: radians a position, YaRN's blend of original and stretched frequencies."""
    dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    original = 1.0 / (base**exponents)
    if yarn is None:
        return original.float()
    low, high = yarn.correction_range(dim, base)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return (original / yarn.factor * ramp + original * (1 - ramp)).float()


def rope_table(config: DeepseekV3Config) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (cos, sin), each [max_position_embeddings, qk_rope_head_dim / 2].

    The angle is the fp32 product of position and frequency, as in every published implementation; its cosine and sine
    are taken in fp64 and rounded, which makes the table the same on every machine.
    """
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, rope_inv_freq(config)).double()
    yarn = config.rope_scaling
    scale = _table_scale(yarn) if yarn else 1.0
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()


def _table_scale(yarn: YarnScaling) -> float:
    return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(config: DeepseekV3Config) -> float:
    """1 / sqrt(qk_head_dim), times the square of YaRN's temperature where `mscale_all_dim` asks for it."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


@operation(version=1, summary="interleaved rotation in fp32, one rounding")
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [M, H, P]; cos, sin fp32 [M, P / 2], the table's rows at the tokens' positions; to [M, H, P] of x's dtype."""
    require(
        x.dim() == 3 and tuple(cos.shape) == tuple(sin.shape) == (x.shape[0], x.shape[2] // 2),
        "rope",
        f"x of shape {tuple(x.shape)} does not fit cos of shape {tuple(cos.shape)} and sin of shape {tuple(sin.shape)}",
    )
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class _Rope(torch.autograd.Function):
    """The transposed rotation, by the negative angle. The table is a constant."""

    @staticmethod
    def forward(ctx: Any, ops: BoundKernels, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernel = ops[rope]
        return ctx.kernel(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return None, ctx.kernel(grad.contiguous(), cos, -sin), None, None


@rope.gradient
def _differentiable(ops: BoundKernels, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _Rope.apply(ops, x, cos, sin)


@rope.cases
def _case(rng: random.Random, at: Sizes) -> Case:
    """x is a view with gaps, as the layers pass it."""
    rows, heads, pairs = rng.choice(at.rows), rng.choice(at.heads), rng.choice((16, 32))
    angles = torch.rand(rows, pairs, generator=generator(rng)) * 7
    wide = numbers(rng, rows, heads, 128 + 2 * pairs)
    return rope.case(wide[..., 128:], angles.cos(), angles.sin())
