"""What the providers of kernels for a Hopper card share: what they ask of a setting, and where certificates lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dsv3_plugin.hooks import Setting, whole_sums_only

Refusal = Callable[[Setting], str | None]
"""Why a kernel cannot serve a setting, or None if it can."""

CERTIFICATES = Path(__file__).with_name("certificates.json")
"""Those that this package ships: written on a card by `dsv3 kernels check --certify`, never by hand."""

V3_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def on_hopper_with(missing: Callable[[], str | None]) -> Refusal:
    """A kernel that serves a Hopper card in bf16 or fp8 unless something is `missing`: what, and what to install."""

    def refuses(setting: Setting) -> str | None:
        if (setting.device_type, setting.arithmetic) != ("cuda", "sm90"):
            return f"computes arithmetic sm90 on a GPU, not {setting.arithmetic} on {setting.device_type}"
        if setting.capability != (9, 0):
            return f"needs compute capability 9.0, this card has {setting.capability}"
        if setting.profile.dtype != torch.bfloat16:
            return f"the tensor core multiplies bf16 or fp8, the profile computes in {setting.profile.dtype}"
        return missing() or whole_sums_only(setting)

    return refuses


def for_v3_latent(refuses: Refusal) -> Refusal:
    """The same, of an attention kernel that reads V3's latent only."""

    def refuses_others(setting: Setting) -> str | None:
        found = _latent(setting)
        return refuses(setting) or (None if found == V3_LATENT else f"attends with {V3_LATENT}, the model has {found}")

    return refuses_others


def for_other_latents(refuses: Refusal) -> Refusal:
    """The same, of an attention kernel that leaves V3's latent to another."""

    def refuses_v3(setting: Setting) -> str | None:
        return refuses(setting) or ("leaves V3's latent to mla_hopper" if _latent(setting) == V3_LATENT else None)

    return refuses_v3


def _latent(setting: Setting) -> dict[str, int | None]:
    return {name: setting.dims.get(name) for name in V3_LATENT}
