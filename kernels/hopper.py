"""What every provider of kernels for a Hopper card asks of the setting that it shall serve."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv3_plugin.hooks import Setting, whole_sums_only

Refusal = Callable[[Setting], str | None]
"""Why a kernel cannot serve a setting, or None if it can."""

V3_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def on_hopper_with(name: str, installed: Callable[[], bool]) -> Refusal:
    """A kernel that serves a Hopper card in bf16 or fp8 where `name` is installed."""

    def refuses(setting: Setting) -> str | None:
        if (setting.device_type, setting.arithmetic) != ("cuda", "sm90"):
            return f"computes arithmetic sm90 on a GPU, not {setting.arithmetic} on {setting.device_type}"
        if setting.capability != (9, 0):
            return f"needs compute capability 9.0, this card has {setting.capability}"
        if setting.profile.dtype != torch.bfloat16:
            return f"the tensor core multiplies bf16 or fp8, the profile computes in {setting.profile.dtype}"
        if not installed():
            return f"{name} is not installed"
        return whole_sums_only(setting)

    return refuses


def for_v3_latent(refuses: Refusal) -> Refusal:
    """The same, of an attention kernel that reads V3's latent only."""

    def refuses_others(setting: Setting) -> str | None:
        found = {name: setting.dims.get(name) for name in V3_LATENT}
        return refuses(setting) or (None if found == V3_LATENT else f"attends with {V3_LATENT}, the model has {found}")

    return refuses_others
