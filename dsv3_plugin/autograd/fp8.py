"""Training through block-scaled FP8, as DeepSeek's report does (section 3.3).

The layer holds a master weight in the profile's dtype. Each pass quantizes it and the activations and multiplies with
the bound FP8 kernel, so the forward is the server's on the quantized checkpoint. Rounding counts as the identity; the
products of the backward pass are FP8 like the forward's, with promoted sums and scales made online:

* **dgrad**, dX = dY W, is the forward's own product: the gradient in 1x128 tiles times the weight that the forward
  multiplied with, transposed, which is exact in 128x128 blocks. It is quantized again, so that none is kept.
* **wgrad**, dW = dY^T X, is `ops.fp8_wgrad`: gradient and activation in 128x1 tiles. The activation is kept for it as
  the forward multiplied it, one byte a number, and no copy in the profile's dtype.

All orders of sums are those operations' contracts, so a step repeats bit for bit. All experts take one call.

As in the report, embedding, head, router, norms and attention stay in the profile's dtype. Here that includes the
absorbed halves of `kv_b_proj`, whose weight is quantized all the same (`quantized`). SwiGLU keeps its input in the
profile's dtype, where the report stores it in FP8: its derivative is then that of what was computed. The report stores
`o_proj`'s input in E5M6, because its attention's backward reads it; here that one does not, and the input is e4m3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.ops.fp8_linear import fp8_linear, grouped_fp8_linear
from dsv3_plugin.ops.fp8_weight import quantize_fp8_weight
from dsv3_plugin.ops.fp8_wgrad import fp8_wgrad, quantize_fp8_columns
from dsv3_plugin.ops.operation import BoundKernels
from dsv3_plugin.ops.quantize import dequantize_weight, quantize_fp8
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
        return _Quantized.apply(self.ops, self.scale_format, weight)


def _quantized_rows(
    ops: BoundKernels, scale_format: ScaleFormat, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient [M, N] in 1x128 tiles, N filled up to whole blocks: what dgrad multiplies."""
    if missing := -grad.shape[1] % FP8_BLOCK:
        grad = F.pad(grad, (0, missing))
    return ops[quantize_fp8](grad.contiguous(), scale_format)


def _weight_gradient(
    ops: BoundKernels,
    scale_format: ScaleFormat,
    grad: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """grad [M, N], x e4m3 [M, K] as the forward multiplied it, sorted by expert; to [E, N, K]."""
    of_grad = ops[quantize_fp8_columns](grad.contiguous(), None, expert_counts, scale_format)
    of_x = ops[quantize_fp8_columns](x, x_scale, expert_counts, scale_format)
    return ops[fp8_wgrad](*of_grad, *of_x, expert_counts, out_dtype=dtype)


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
        rows = ops[quantize_fp8](x, scale_format)
        ctx.save_for_backward(*rows, weight)
        ctx.ops, ctx.scale_format = ops, scale_format
        return product(*rows, *ops[quantize_fp8_weight](weight, scale_format))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, x_scale, weight = ctx.saved_tensors
        ops, scale_format = ctx.ops, ctx.scale_format
        transposed = ops[quantize_fp8_weight](weight, scale_format, transposed=True)
        grad_x = ops[fp8_linear](*_quantized_rows(ops, scale_format, grad), *transposed)
        all_rows = torch.full((1,), len(x), device=x.device)
        grad_weight = _weight_gradient(ops, scale_format, grad, x, x_scale, all_rows, weight.dtype)
        return None, None, None, grad_x, grad_weight[0]


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
        rows = ops[quantize_fp8](x, scale_format)
        ctx.save_for_backward(*rows, expert_counts, weight)
        ctx.ops, ctx.scale_format = ops, scale_format
        return ops[grouped_fp8_linear](*rows, expert_counts, *ops[quantize_fp8_weight](weight, scale_format))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, x_scale, expert_counts, weight = ctx.saved_tensors
        ops, scale_format = ctx.ops, ctx.scale_format
        transposed = ops[quantize_fp8_weight](weight, scale_format, transposed=True)
        grad_x = ops[grouped_fp8_linear](*_quantized_rows(ops, scale_format, grad), expert_counts, *transposed)
        grad_weight = _weight_gradient(ops, scale_format, grad, x, x_scale, expert_counts, weight.dtype)
        return None, None, grad_x, None, grad_weight


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: BoundKernels, scale_format: ScaleFormat, weight: torch.Tensor) -> torch.Tensor:
        return dequantize_weight(*ops[quantize_fp8_weight](weight, scale_format)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, None, grad
