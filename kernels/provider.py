"""The entry point of this package's kernels. Importing it imports neither Triton nor any other GPU library."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from dsv3_plugin.hooks import Kernel, Setting, hookimpl, whole_sums_only
from dsv3_plugin.kernels import certificates, cublas, deep_gemm, flash_mla, sm90_model, transformer_engine
from dsv3_plugin.ops.contract import Contract
from dsv3_plugin.ops.mla_attention import MLA_ATTENTION
from dsv3_plugin.registry import CONTRACTS
from dsv3_plugin.version import __version__

PROVIDER = "triton"
OTHERS = (deep_gemm, cublas, transformer_engine, flash_mla)
"""The modules that offer other people's kernels."""

# Operation to the module that serves it; the function has the operation's name.
OWN_MODULES = {
    "linear": "bf16_linear",
    "head_linear": "bf16_linear",
    "grouped_linear": "bf16_linear",
    "quantize_fp8": "quantize",
    "fp8_linear": "fp8_linear",
    "grouped_fp8_linear": "fp8_linear",
    "rms_norm": "rms_norm",
    "rope": "rope",
    "silu_and_mul": "silu_and_mul",
    "router_linear": "router",
    "route": "router",
    "moe_router": "router",
    "combine": "combine",
    "mla_attention": "mla",
    "add_rms_norm": "rms_norm",
    "rms_norm_fp8": "rms_norm",
    "add_rms_norm_fp8": "rms_norm",
    "silu_and_mul_fp8": "silu_and_mul",
    "permute": "permute",
    "permute_fp8": "permute",
}
_V3_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def on_first_call(module: str, function: str) -> Callable[..., Any]:
    """`function` of a module of this package that is imported when it is first called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"dsv3_plugin.kernels.{module}"), function)(*args, **kwargs)

    return call


def refuses(setting: Setting) -> str | None:
    """Serves a Hopper card in bf16 or fp8."""
    if (setting.device_type, setting.arithmetic) != ("cuda", "sm90"):
        return f"computes arithmetic sm90 on a GPU, not {setting.arithmetic} on {setting.device_type}"
    if setting.capability != (9, 0):
        return f"needs compute capability 9.0, this card has {setting.capability}"
    if setting.profile.dtype != torch.bfloat16:
        return f"the tensor core multiplies bf16 or fp8, the profile computes in {setting.profile.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return whole_sums_only(setting)


def refuses_other_latents(setting: Setting) -> str | None:
    """Attention's kernel for the latent of V3 (mla_hopper.cu)."""
    found = {name: setting.dims.get(name) for name in _V3_LATENT}
    return refuses(setting) or (None if found == _V3_LATENT else f"attends with {_V3_LATENT}, the model has {found}")


def own_kernel(contract: Contract, name: str, refusal: Callable[[Setting], str | None], *, priority: int = 0) -> Kernel:
    """A kernel of this package, under the provider `name`."""
    module = OWN_MODULES[contract.op]
    certificate, uncertified = certificates.certified(contract, module)
    return Kernel(
        op=contract.op,
        contract_version=contract.version,
        provider=name,
        version=__version__,
        run=on_first_call(module, contract.op),
        refuses=refusal,
        certificate=certificate,
        uncertified=uncertified,
        priority=priority,
    )


@hookimpl
def dsv3_kernels() -> list[Kernel]:
    """The model of Hopper on a CPU, and the kernels for Hopper itself."""
    own = [own_kernel(contract, PROVIDER, refuses) for contract in CONTRACTS]
    v3_attention = own_kernel(MLA_ATTENTION, "cuda", refuses_other_latents, priority=1)
    others = [kernel for module in OTHERS for kernel in module.kernels()]
    return [*sm90_model.kernels(), v3_attention, *own, *others]
