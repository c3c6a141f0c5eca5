"""Training through block-scaled FP8: straight-through gradients.

The layer holds a master weight in the profile's dtype. Each pass quantizes it and the activations and multiplies with
the bound FP8 kernel, so the forward is the server's on the quantized checkpoint. The gradient is that of the product
of the two dequantized operands, and rounding counts as the identity.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_plugin.autograd.linear import product_gradients
from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.fp8 import dequantize_weight, quantize_weight
from dsv3_plugin.ops.linear import split_by_expert
from dsv3_plugin.registry import MasterWeights, Ops


def master_weights(ops: Ops) -> MasterWeights:
    """The three uses of a master weight, with the kernels of `ops`."""
    scale_format = ops.setting.profile.scale_format
    assert scale_format is not None

    def linear(x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return _Linear.apply(ops, x, weight, out_dtype)

    def grouped_linear(x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _GroupedLinear.apply(ops, x, expert_counts, weight)

    def quantized(weight: torch.Tensor) -> torch.Tensor:
        return _Quantized.apply(scale_format, weight)

    return MasterWeights(linear, grouped_linear, quantized)


def _dequantize_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 activations [M, K] with scales [M, K / 128] to fp32."""
    return x.float() * scale.repeat_interleave(FP8_BLOCK, 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, x: torch.Tensor, weight: torch.Tensor, out_dtype: Any) -> torch.Tensor:
        scale_format = ops.setting.profile.scale_format
        assert scale_format is not None
        operands = *ops.quantize_fp8(x, scale_format), *quantize_weight(weight, scale_format)
        ctx.save_for_backward(*operands)
        ctx.dtypes = x.dtype, weight.dtype
        return ops.fp8_linear(*operands) if out_dtype is None else ops.fp8_linear(*operands, out_dtype=out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        gradients = product_gradients(grad, _dequantize_rows(x, x_scale), dequantize_weight(weight, weight_scale))
        return None, gradients[0].to(ctx.dtypes[0]), gradients[1].to(ctx.dtypes[1]), None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale_format = ops.setting.profile.scale_format
        assert scale_format is not None
        quantized, scale = ops.quantize_fp8(x, scale_format)
        weights, weight_scales = zip(*(quantize_weight(w, scale_format) for w in weight), strict=True)
        operands = quantized, scale, expert_counts, torch.stack(weights), torch.stack(weight_scales)
        ctx.save_for_backward(*operands)
        ctx.dtypes = x.dtype, weight.dtype
        return ops.grouped_fp8_linear(*operands)

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
        return None, grad_x, None, grad_weight


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale_format: Any, weight: torch.Tensor) -> torch.Tensor:
        return dequantize_weight(*quantize_weight(weight, scale_format)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, grad
