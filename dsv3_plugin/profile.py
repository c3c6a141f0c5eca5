"""Numerics profiles: which numbers flow between operations.

A profile fixes the dtype of activations and weights and the kind of FP8 scales; the order of every sum is
fixed by each operation's contract (`dsv3_plugin.ops`). Two programs that run the same profile on the same
kind of device print the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import ConfigError

ScaleFormat = Literal["ue8m0", "float32"]


@dataclass(frozen=True)
class Profile:
    """Name and dtypes of one arithmetic."""

    name: Literal["fp32", "bf16", "fp8"]
    dtype: torch.dtype
    """Dtype of activations, norms, embedding, router, attention and head."""
    scale_format: ScaleFormat | None = None
    """Format of FP8 scales; None where linears are not quantised."""

    @property
    def is_fp8(self) -> bool:
        """Whether the projections and experts are block-scaled FP8."""
        return self.scale_format is not None


FP32 = Profile("fp32", torch.float32)
BF16 = Profile("bf16", torch.bfloat16)
FP8_UE8M0 = Profile("fp8", torch.bfloat16, "ue8m0")
FP8_FLOAT32 = Profile("fp8", torch.bfloat16, "float32")


def profile_for(config: DeepseekV3Config, dtype: torch.dtype | None = None) -> Profile:
    """The profile that a checkpoint's configuration asks for.

    `dtype` is an engine's explicit choice (`--dtype`). Raises `ConfigError` where no profile has that dtype.
    """
    dtype = dtype or getattr(torch, config.torch_dtype)
    if config.quantization_config is not None:
        if dtype != torch.bfloat16:
            raise ConfigError(f"an fp8 checkpoint computes in bfloat16, but dtype={dtype} was asked for")
        return FP8_UE8M0 if config.quantization_config.scale_fmt == "ue8m0" else FP8_FLOAT32
    for profile in (FP32, BF16):
        if profile.dtype == dtype:
            return profile
    raise ConfigError(f"dtype={dtype} has no numerics profile; use float32 or bfloat16")
