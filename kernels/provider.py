"""The entry point of this package's kernels. Importing it imports neither Triton nor any other GPU library."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from dsv3_plugin.hooks import Implementation, IsSupported, Kernel, hookimpl
from dsv3_plugin.kernels import own, selection
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.hopper import CERTIFICATES, for_other_latents, for_v3_latent, on_hopper_with
from dsv3_plugin.kernels.sm90 import sm90_model
from dsv3_plugin.kernels.vendors import cublas, deep_gemm, flash_mla, transformer_engine
from dsv3_plugin.ops.fp8_linear import fp8_linear, grouped_fp8_linear
from dsv3_plugin.ops.mla_attention import mla_attention
from dsv3_plugin.ops.operation import Operation, operations
from dsv3_plugin.version import __version__

PROVIDER = "triton"
CUDA_PROVIDER = "cuda"
OTHERS = (deep_gemm, cublas, transformer_engine, flash_mla)
"""The modules that offer other people's kernels."""

is_supported = on_hopper_with(own.missing)


def own_kernel(op: Operation[..., Any]) -> Kernel:
    """A kernel of this package in Triton; fp8 products choose CUDA C++ where it can be compiled and is faster, and
    attention by heads where it takes their shape.
    """
    supported = for_other_latents(is_supported) if op is mla_attention else is_supported
    kernel = _kernel(op, PROVIDER, own.front_module(op), supported, own.parts(op))
    if op in (fp8_linear, grouped_fp8_linear):
        return replace(kernel, served=partial(selection.served, op is grouped_fp8_linear))
    return kernel


def v3_attention() -> Kernel:
    """Attention with V3's latent, in CUDA C++."""
    supported = for_v3_latent(on_hopper_with(compiler.missing))
    return _kernel(mla_attention, CUDA_PROVIDER, "cuda.mla_hopper", supported, (own.mla_hopper(),))


def _kernel(
    op: Operation[..., Any], name: str, module: str, supported: IsSupported, parts: tuple[Implementation, ...]
) -> Kernel:
    return Kernel(
        op=op.name,
        contract_version=op.version,
        provider=name,
        version=__version__,
        run=own.on_first_call(module, op.name),
        is_supported=supported,
        implementations=parts,
        certificates=CERTIFICATES,
    )


@hookimpl
def dsv3_kernels() -> list[Kernel]:
    """The model of Hopper on a CPU, and the kernels for Hopper itself."""
    own_kernels = [own_kernel(op) for op in operations().values()]
    others = [kernel for module in OTHERS for kernel in module.kernels()]
    return [*sm90_model.kernels(), v3_attention(), *own_kernels, *others]
