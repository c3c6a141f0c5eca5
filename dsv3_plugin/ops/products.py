"""A machine's matrix products: all in which one arithmetic differs from another.

Everything else that operations are made of are IEEE operations, each rounded, on every machine. So a reference that
takes these products as its first argument defines an operation for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsv3_plugin.ops.tile import tiled_linear, tiled_linear_fp32


@dataclass(frozen=True)
class Products:
    """How one machine multiplies matrices. The operations check the operands."""

    dtypes: tuple[torch.dtype, ...]
    """Of operands that are not quantized."""
    linear: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]
    """x [M, K] and weight [N, K] of one of `dtypes`, to x @ weight.T [M, N]: in x's dtype, rounded once, or in fp32,
    which keeps the sum."""
    add_product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """fp32 [M, N] plus x [M, K] @ y [K, N], fp32."""
    fp8_linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """x e4m3 [M, 128] and weight e4m3 [N, 128], to x @ weight.T, fp32 [M, N]."""


def _linear(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return tiled_linear(x, weight) if out_dtype == x.dtype else tiled_linear_fp32(x, weight)


def _add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return total + tiled_linear(x.float(), y.float().t().contiguous())


def _fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # 128 products of e4m3 values need 43 bits, which fp64 holds: the exact sum, rounded once.
    return F.linear(x.double(), weight.double()).float()


CPU = Products((torch.float32, torch.bfloat16), _linear, _add_product, _fp8_linear)
"""Those of a CPU: sums over K are the library's for a tile of `tile.ROWS` rows, in FP8 exact."""
