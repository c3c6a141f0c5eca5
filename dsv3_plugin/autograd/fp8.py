"""Training through block-scaled FP8: straight-through gradients.

The layer holds a master weight in the profile's dtype. Each pass quantizes it and the activations and multiplies with
the bound FP8 kernel, so the forward is the server's on the quantized checkpoint. The gradient is that of the product
of the two dequantized operands, and rounding counts as the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.fp8_linear import fp8_linear, grouped_fp8_linear
from dsv3_plugin.ops.linear import product_gradients, split_by_expert
from dsv3_plugin.ops.operation import BoundKernels
from dsv3_plugin.ops.quantize import dequantize_weight, quantize_fp8, quantize_weight
from dsv3_plugin.ops.sliced_linear import sliced_fp8_linear
from dsv3_plugin.profile import ScaleFormat
from dsv3_plugin.registry import Ops


class MasterWeights:
    """The uses of a master weight, with the kernels of `ops`: what `Ops.master_weights` is in training."""

    def __init__(self, ops: Ops) -> None:
        self.ops, self.scale_format = ops, ops.scale_format

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [M, K], weight [N, K] to bf16 [M, N]."""
        return _Linear.apply(self.ops, self.scale_format, self.ops[fp8_linear], x, weight)

    def sliced_linear(
        self, x: torch.Tensor, weight: torch.Tensor, slices: int, *, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """The same with K in `slices` slices, to bf16 or fp32."""
        product = partial(self.ops[sliced_fp8_linear], slices=slices, out_dtype=out_dtype)
        return _Linear.apply(self.ops, self.scale_format, product, x, weight)

    def grouped_linear(self, x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [M, K] sorted by expert, expert_counts [E], weight [E, N, K] to [M, N]."""
        return _GroupedLinear.apply(self.ops, self.scale_format, x, expert_counts, weight)

    def quantized(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [N, K] to the numbers that it stands for once quantized, in its own dtype."""
        return _Quantized.apply(self.scale_format, weight)


def _dequantize_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 activations [M, K] with scales [M, K / 128] to fp32."""
    return x.float() * scale.repeat_interleave(FP8_BLOCK, 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: BoundKernels,
        scale_format: ScaleFormat,
        product: Callable[..., torch.Tensor],
        x: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        operands = *ops[quantize_fp8](x, scale_format), *quantize_weight(weight, scale_format)
        ctx.save_for_backward(*operands)
        ctx.dtypes = x.dtype, weight.dtype
        return product(*operands)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        gradients = product_gradients(grad, _dequantize_rows(x, x_scale), dequantize_weight(weight, weight_scale))
        return None, None, None, gradients[0].to(ctx.dtypes[0]), gradients[1].to(ctx.dtypes[1])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: BoundKernels,
        scale_format: ScaleFormat,
        x: torch.Tensor,
        expert_counts: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        quantized, scale = ops[quantize_fp8](x, scale_format)
        weights, weight_scales = zip(*(quantize_weight(w, scale_format) for w in weight), strict=True)
        operands = quantized, scale, expert_counts, torch.stack(weights), torch.stack(weight_scales)
        ctx.save_for_backward(*operands)
        ctx.dtypes = x.dtype, weight.dtype
        return ops[grouped_fp8_linear](*operands)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, x_scale, expert_counts, weight, weight_scale = ctx.saved_tensors
        rows = _dequantize_rows(x, x_scale)
        grad_x = torch.zeros(x.shape, dtype=ctx.dtypes[0], device=x.device)
        grad_weight = torch.zeros(weight.shape, dtype=ctx.dtypes[1], device=x.device)
        op = "grouped_fp8_linear"
        places = dict(split_by_expert(op, grad_x, expert_counts))
        grads = dict(split_by_expert(op, grad, expert_counts))
        for e, of_expert in split_by_expert(op, rows, expert_counts):
            dequantized = dequantize_weight(weight[e], weight_scale[e])
            of_rows, grad_weight[e] = product_gradients(grads[e], of_expert, dequantized)
            places[e].copy_(of_rows)
        return None, None, grad_x, None, grad_weight


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale_format: ScaleFormat, weight: torch.Tensor) -> torch.Tensor:
        return dequantize_weight(*quantize_weight(weight, scale_format)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, grad
