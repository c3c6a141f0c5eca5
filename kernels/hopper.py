"""What the providers of kernels for a Hopper card share: what they ask of a setting, and where certificates lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dsv3_plugin.hooks import SUPPORTED, IsSupported, Setting, Support, unsupported

CERTIFICATES = Path(__file__).with_name("certificates.json")
"""Those that this package ships: written on a card by `dsv3 kernels check --certify`, never by hand."""

V3_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def on_hopper_with(missing: Callable[[], str | None]) -> IsSupported:
    """A kernel that serves a Hopper card in bf16 or fp8 unless something is `missing`: what, and what to install."""

    def is_supported(setting: Setting) -> Support:
        if (setting.device_type, setting.arithmetic) != ("cuda", "sm90"):
            return unsupported(f"computes arithmetic sm90 on a GPU, not {setting.arithmetic} on {setting.device_type}")
        if setting.capability != (9, 0):
            return unsupported(f"needs compute capability 9.0, this card has {setting.capability}")
        if setting.profile.dtype != torch.bfloat16:
            dtype = setting.profile.dtype
            return unsupported(f"the tensor core multiplies bf16 or fp8, the profile computes in {dtype}")
        if lacking := missing():
            return unsupported(lacking)
        return SUPPORTED

    return is_supported


def for_v3_latent(is_supported: IsSupported) -> IsSupported:
    """The same, of an attention kernel that reads V3's latent only."""

    def with_v3_latent(setting: Setting) -> Support:
        return is_supported(setting) and _reads_v3(setting)

    return with_v3_latent


def for_other_latents(is_supported: IsSupported) -> IsSupported:
    """The same, of an attention kernel that leaves V3's latent to another."""

    def with_another_latent(setting: Setting) -> Support:
        return is_supported(setting) and _leaves_v3(setting)

    return with_another_latent


def _reads_v3(setting: Setting) -> Support:
    found = _latent(setting)
    return SUPPORTED if found == V3_LATENT else unsupported(f"attends with {V3_LATENT}, the model has {found}")


def _leaves_v3(setting: Setting) -> Support:
    return unsupported("leaves V3's latent to mla_hopper") if _latent(setting) == V3_LATENT else SUPPORTED


def _latent(setting: Setting) -> dict[str, int | None]:
    return {name: setting.dims.get(name) for name in V3_LATENT}
