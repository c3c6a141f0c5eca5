"""The order in memory of an activation's fp8 scales [M, K / 128]: columns contiguous, as TMA reads."""

from __future__ import annotations

import torch

from dsv3_plugin.config import FP8_BLOCK


def empty_scales(rows: int, depth: int, device: torch.device) -> torch.Tensor:
    """Unwritten fp32 scales [rows, depth / 128], each column at a multiple of 16 bytes."""
    return torch.empty(depth // FP8_BLOCK, rows + -rows % 4, dtype=torch.float32, device=device).t()[:rows]


def with_contiguous_columns(x_scale: torch.Tensor) -> torch.Tensor:
    """Scales in this order, as `quantize_fp8` gives them; scales in another order are copied."""
    rows, blocks = x_scale.shape
    if x_scale.stride(0) == 1 and x_scale.stride(1) % 4 == 0 and x_scale.data_ptr() % 16 == 0:
        return x_scale
    return empty_scales(rows, FP8_BLOCK * blocks, x_scale.device).copy_(x_scale)
