"""The entry point of this package's kernels. Importing it imports neither Triton nor any other GPU library."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from dsv3_plugin.hooks import Implementation, IsSupported, Kernel, hookimpl
from dsv3_plugin.kernels import own, selection
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.hopper import CERTIFICATES, for_other_latents, for_v3_latent, on_hopper_with
from dsv3_plugin.kernels.sm90 import sm90_model
from dsv3_plugin.kernels.vendors import cublas, deep_gemm, flash_mla, transformer_engine
from dsv3_plugin.ops.contract import Contract
from dsv3_plugin.ops.fp8 import FP8_LINEAR, GROUPED_FP8_LINEAR
from dsv3_plugin.ops.mla_attention import MLA_ATTENTION
from dsv3_plugin.registry import CONTRACTS
from dsv3_plugin.version import __version__

PROVIDER = "triton"
CUDA_PROVIDER = "cuda"
OTHERS = (deep_gemm, cublas, transformer_engine, flash_mla)
"""The modules that offer other people's kernels."""

is_supported = on_hopper_with(own.missing)


def own_kernel(contract: Contract) -> Kernel:
    """A kernel of this package in Triton; fp8 products choose CUDA C++ where it can be compiled and is faster."""
    supported = for_other_latents(is_supported) if contract is MLA_ATTENTION else is_supported
    kernel = _kernel(contract, PROVIDER, own.MODULES[contract.op], supported, own.parts(contract.op))
    if contract in (FP8_LINEAR, GROUPED_FP8_LINEAR):
        return replace(kernel, served=partial(selection.served, contract is GROUPED_FP8_LINEAR))
    return kernel


def v3_attention() -> Kernel:
    """Attention with V3's latent, in CUDA C++."""
    supported = for_v3_latent(on_hopper_with(compiler.missing))
    return _kernel(MLA_ATTENTION, CUDA_PROVIDER, "cuda.mla_hopper", supported, (own.mla_hopper(),))


def _kernel(
    contract: Contract, name: str, module: str, supported: IsSupported, parts: tuple[Implementation, ...]
) -> Kernel:
    return Kernel(
        op=contract.op,
        contract_version=contract.version,
        provider=name,
        version=__version__,
        run=own.on_first_call(module, contract.op),
        is_supported=supported,
        implementations=parts,
        certificates=CERTIFICATES,
    )


@hookimpl
def dsv3_kernels() -> list[Kernel]:
    """The model of Hopper on a CPU, and the kernels for Hopper itself."""
    own_kernels = [own_kernel(contract) for contract in CONTRACTS]
    others = [kernel for module in OTHERS for kernel in module.kernels()]
    return [*sm90_model.kernels(), v3_attention(), *own_kernels, *others]
