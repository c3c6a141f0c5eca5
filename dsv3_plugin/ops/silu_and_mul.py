"""SwiGLU's elementwise part, and the same with its result quantized.

Contract: silu(gate) * up with silu(g) = g * `elementary.sigmoid`(g), in fp32 from inputs of the profile's dtype, one
rounding. `silu_and_mul_fp8` is by definition `silu_and_mul`, then `quantize_fp8`, the rounding between them included.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from dsv3_plugin.ops.checks import require, require_matrix
from dsv3_plugin.ops.drawing import Case, Sizes, numbers
from dsv3_plugin.ops.elementary import sigmoid
from dsv3_plugin.ops.operation import BoundKernels, operation
from dsv3_plugin.ops.quantize import quantize_fp8
from dsv3_plugin.profile import ScaleFormat


@operation(version=2, summary="silu(gate) * up in fp32, one rounding")
def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [M, 2 I], the gate in the first I columns, to [M, I] of the same dtype."""
    require_matrix("silu_and_mul", "gate_up", gate_up, (torch.float32, torch.bfloat16))
    require(gate_up.shape[1] % 2 == 0, "silu_and_mul", f"gate_up has an odd width {gate_up.shape[1]}")
    gate, up = gate_up.float().chunk(2, dim=1)
    return (gate * sigmoid(gate) * up).to(gate_up.dtype)


@operation(version=1, summary="silu_and_mul, then quantize_fp8", fp8=True)
def silu_and_mul_fp8(gate_up: torch.Tensor, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [M, 2 I], the gate in the first I columns, to (e4m3 [M, I], fp32 scales [M, I / 128])."""
    return quantize_fp8(silu_and_mul(gate_up), scale_format)


class _SiluAndMul(torch.autograd.Function):
    """In fp32: with s = sigmoid(g), d(g s u) = u (s + g s (1 - s)) dg + g s du."""

    @staticmethod
    def forward(ctx: Any, ops: BoundKernels, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return ops[silu_and_mul](gate_up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.float().chunk(2, dim=1)
        grad, s = grad.float(), torch.sigmoid(gate)
        grad_gate, grad_up = grad * up * s * (1 + gate * (1 - s)), grad * gate * s
        return None, torch.cat((grad_gate, grad_up), dim=1).to(gate_up.dtype)


@silu_and_mul.gradient
def _differentiable(ops: BoundKernels, gate_up: torch.Tensor) -> torch.Tensor:
    return _SiluAndMul.apply(ops, gate_up)


@silu_and_mul.cases
def _case(rng: random.Random, at: Sizes) -> Case:
    """Widths of an expert and of no power of two."""
    return silu_and_mul.case(numbers(rng, rng.choice(at.rows), 2 * (rng.choice(at.depths) + rng.choice((0, 64)))))


@silu_and_mul_fp8.cases
def _fp8_case(rng: random.Random, at: Sizes) -> Case:
    """Widths of whole scale blocks, both scale formats."""
    width = rng.choice(at.depths) + rng.choice((0, 128))
    return silu_and_mul_fp8.case(numbers(rng, rng.choice(at.rows), 2 * width), rng.choice(at.scale_formats))
