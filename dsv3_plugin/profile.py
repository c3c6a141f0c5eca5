"""Numerics profiles: which numbers flow between operations.

A profile fixes the dtype of activations and weights, the kind of FP8 scales, the form of attention and the number of
slices of the sums that tensor-parallel ranks share; the order of every sum is fixed by each operation's contract
(`dsv3_plugin.ops`). Two programs that run the same profile on the same kind of device print the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch

from dsv3_plugin.config import FP8_BLOCK, DeepseekV3Config
from dsv3_plugin.errors import ConfigError, EngineError
from dsv3_plugin.variables import wrong_variables

ScaleFormat = Literal["ue8m0", "float32"]
Attention = Literal["absorbed", "two_form"]
SLICES_VARIABLE = "DSV3_REDUCTION_SLICES"
ATTENTION_VARIABLE = "DSV3_ATTENTION"


@dataclass(frozen=True)
class Profile:
    """Name and dtypes of one arithmetic."""

    name: Literal["fp32", "bf16", "fp8"]
    dtype: torch.dtype
    """Dtype of activations, norms, embedding, router, attention and head."""
    scale_format: ScaleFormat | None = None
    """Format of FP8 scales; None where linears are not quantized."""
    reduction_slices: int = 1
    """Slices of the products that tensor-parallel ranks share (`dsv3_plugin.ops.slices`): a power of two. Any
    tensor-parallel size that divides it gives the same bits.
    """
    attention: Attention = "absorbed"
    """`absorbed`: every token's by `mla_attention`. `two_form`: that of a prompt's tokens by `head_attention`, which is
    the same function in a third of the arithmetic, with other bits. Which of them a token is follows from its request
    alone (`dsv3_plugin.ops.prompt_batch`).
    """

    @property
    def is_fp8(self) -> bool:
        """Whether the projections and experts are block-scaled FP8."""
        return self.scale_format is not None

    def __str__(self) -> str:
        """`bf16`, or `bf16 two_form in 2 reduction slices`: what logs and reports call this arithmetic."""
        form = "" if self.attention == "absorbed" else f" {self.attention}"
        slices = "" if self.reduction_slices == 1 else f" in {self.reduction_slices} reduction slices"
        return f"{self.name}{form}{slices}"


FP32 = Profile("fp32", torch.float32)
BF16 = Profile("bf16", torch.bfloat16)
FP8_UE8M0 = Profile("fp8", torch.bfloat16, "ue8m0")
FP8_FLOAT32 = Profile("fp8", torch.bfloat16, "float32")


def profile_for(config: DeepseekV3Config, dtype: torch.dtype | None = None) -> Profile:
    """The profile that a checkpoint's configuration, `DSV3_REDUCTION_SLICES` and `DSV3_ATTENTION` ask for.

    `dtype` is an engine's explicit choice (`--dtype`). Raises `ConfigError` where no profile has that dtype, the model
    cannot be cut into so many slices, or a variable is misspelled.
    """
    if wrong := "; ".join(wrong_variables()):
        raise ConfigError(wrong)
    profile = _profile_of_dtype(config, dtype or getattr(torch, config.torch_dtype))
    attention, slices = attention_from_environment(), reduction_slices_from_environment()
    if attention != profile.attention:
        profile = replace(profile, attention=attention)
    if slices == 1:
        return profile
    _require_divisible(config, slices, FP8_BLOCK if profile.is_fp8 else 1)
    return replace(profile, reduction_slices=slices)


def require_one_form(profile: Profile, program: str) -> None:
    """Raise `EngineError` where `program` is asked for two forms of attention, which it does not know yet."""
    if profile.attention != "absorbed":
        raise EngineError(f"{ATTENTION_VARIABLE}={profile.attention} is not yet served by {program}: unset it")


def reduction_slices_from_environment(variables: Mapping[str, str] = os.environ) -> int:
    """`DSV3_REDUCTION_SLICES`, 1 where unset. Raises `ConfigError` for anything but a power of two."""
    text = variables.get(SLICES_VARIABLE, "1")
    if not text.isdecimal() or int(text).bit_count() != 1:
        raise ConfigError(f"{SLICES_VARIABLE}={text!r}; use a power of two")
    return int(text)


def attention_from_environment(variables: Mapping[str, str] = os.environ) -> Attention:
    """`DSV3_ATTENTION`, `absorbed` where unset. Raises `ConfigError` for another word than a form of attention."""
    text = variables.get(ATTENTION_VARIABLE, "absorbed")
    if text not in get_args(Attention):
        raise ConfigError(f"{ATTENTION_VARIABLE}={text!r}; use {' or '.join(get_args(Attention))}")
    return cast(Attention, text)


def _profile_of_dtype(config: DeepseekV3Config, dtype: torch.dtype) -> Profile:
    if config.quantization_config is not None:
        if dtype != torch.bfloat16:
            raise ConfigError(f"an fp8 checkpoint computes in bfloat16, but dtype={dtype} was asked for")
        return FP8_UE8M0 if config.quantization_config.scale_fmt == "ue8m0" else FP8_FLOAT32
    for profile in (FP32, BF16):
        if profile.dtype == dtype:
            return profile
    raise ConfigError(f"dtype={dtype} has no numerics profile; use float32 or bfloat16")


def _require_divisible(config: DeepseekV3Config, slices: int, block: int) -> None:
    """Raise `ConfigError` unless every shared product has `slices` slices of whole heads and whole FP8 blocks."""
    heads = config.num_attention_heads
    sizes = {
        "num_attention_heads": (heads, 1),
        "vocab_size": (config.vocab_size, 1),
        "hidden_size": (config.hidden_size, 1),
        "num_attention_heads * v_head_dim": (heads * config.v_head_dim, block),
        "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)": (heads * config.qk_head_dim, block),
        "num_attention_heads * (qk_nope_head_dim + v_head_dim)": (
            heads * (config.qk_nope_head_dim + config.v_head_dim),
            block,
        ),
        "intermediate_size": (config.intermediate_size, block),
        "n_shared_experts * moe_intermediate_size": (config.shared_intermediate_size, block),
    }
    for name, (size, whole) in sizes.items():
        if size % (slices * whole):
            blocks = f" of whole blocks of {whole}" if whole > 1 else ""
            raise ConfigError(f"{SLICES_VARIABLE}={slices}: {name}={size} has no {slices} equal slices{blocks}")
