"""SwiGLU's elementwise part, the same with its result quantized, and its gradient.

Contract: silu(gate) * up with silu(g) = g * `elementary.sigmoid`(g), in fp32 from inputs of the profile's dtype, one
rounding. `silu_and_mul_fp8` is by definition `silu_and_mul`, then `quantize_fp8`, the rounding between them included.

Contract of `silu_and_mul_gradient`: in fp32, with s = sigmoid(gate), grad * up * s * (1 + gate * (1 - s)) for the gate
and grad * gate * s for up, each product and sum rounded, from left to right; one rounding to the inputs' dtype.
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


@operation(version=1, summary="the gradient of silu_and_mul in fp32, one rounding", training=True)
def silu_and_mul_gradient(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """grad [M, I] of `silu_and_mul`'s result, gate_up [M, 2 I] as it took them, of one dtype, to [M, 2 I] of it."""
    require_gradient(grad, gate_up, (torch.float32, torch.bfloat16))
    gate, up = gate_up.float().chunk(2, dim=1)
    wide, s = grad.float(), sigmoid(gate)
    of_gate, of_up = wide * up * s * (1 + gate * (1 - s)), wide * gate * s
    return torch.cat((of_gate, of_up), dim=1).to(gate_up.dtype)


def require_gradient(grad: torch.Tensor, gate_up: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Require what `silu_and_mul_gradient` takes, of one of these dtypes."""
    op = "silu_and_mul_gradient"
    require_matrix(op, "gate_up", gate_up, dtypes)
    require_matrix(op, "grad", grad, (gate_up.dtype,))
    fits = gate_up.shape == (len(grad), 2 * grad.shape[1])
    require(fits, op, f"grad has shape {tuple(grad.shape)}, gate_up {tuple(gate_up.shape)}")


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: BoundKernels, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.ops = ops
        return ops[silu_and_mul](gate_up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        return None, ctx.ops[silu_and_mul_gradient](grad.contiguous(), gate_up)


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


@silu_and_mul_gradient.cases
def _gradient_case(rng: random.Random, at: Sizes) -> Case:
    """Gradients of the sizes that losses have."""
    (gate_up,), _ = silu_and_mul.draw(rng, at)
    grad = numbers(rng, len(gate_up), gate_up.shape[1] // 2) * 2.0 ** rng.choice((0, 0, -20))
    return silu_and_mul_gradient.case(grad, gate_up)
