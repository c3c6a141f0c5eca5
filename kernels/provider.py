"""The entry point of this package's kernels. Importing it imports neither Triton nor any other GPU library."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from dsv3_plugin.hooks import Kernel, hookimpl
from dsv3_plugin.kernels import certificates, cublas, deep_gemm, flash_mla, sm90_model, transformer_engine
from dsv3_plugin.kernels.hopper import Refusal, for_v3_latent, on_hopper_with
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


def on_first_call(module: str, function: str) -> Callable[..., Any]:
    """`function` of a module of this package that is imported when it is first called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"dsv3_plugin.kernels.{module}"), function)(*args, **kwargs)

    return call


refuses = on_hopper_with("Triton", lambda: importlib.util.find_spec("triton") is not None)


def own_kernel(contract: Contract, name: str, refusal: Refusal, *, priority: int = 0) -> Kernel:
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
    v3_attention = own_kernel(MLA_ATTENTION, "cuda", for_v3_latent(refuses), priority=1)
    others = [kernel for module in OTHERS for kernel in module.kernels()]
    return [*sm90_model.kernels(), v3_attention, *own, *others]
