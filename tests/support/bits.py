"""Numbers drawn from a seed, and the comparison of bits."""

from __future__ import annotations

import torch

from dsv3_plugin.profile import ScaleFormat

Tensor = torch.Tensor
FLOATS = (torch.float32, torch.bfloat16)
SCALE_FORMATS: tuple[ScaleFormat, ...] = ("ue8m0", "float32")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns, so that zeros keep their signs and NaN equals itself."""
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
