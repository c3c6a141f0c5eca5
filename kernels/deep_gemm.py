"""DeepGEMM as a provider of the dense fp8 product: its sums are the contract's (one fma per 128 of K, no split).

It is taken for the shapes for which it was measured to be the fastest (`selection`), else a kernel of this package is.
All print the same bits, so that the choice is one of speed alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

from dsv3_plugin.hooks import Kernel, Setting, whole_sums_only
from dsv3_plugin.ops.fp8 import FP8_LINEAR

PROVIDER = "deep-gemm"
_DISTRIBUTIONS = ("sgl-deep-gemm", "deep-gemm", "deep_gemm")
_CERTIFIED = "0.1.5.post1"
_CERTIFICATE = "equal to sm90-model in every bit on an H200 (dsv3 kernels check)"


def version() -> str | None:
    """The installed version, or None."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def fp8_linear(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """x e4m3 [M, K] with x_scale fp32 [M, K / 128], weight e4m3 [N, K] with weight_scale fp32 [ceil(N / 128), K / 128],
    to bf16 [M, N]. Raises `InputError`.
    """
    from dsv3_plugin.kernels import fp8_linear as own
    from dsv3_plugin.kernels import selection

    own.check("fp8_linear", x, x_scale, weight, weight_scale)
    (rows, depth), columns = x.shape, weight.shape[0]
    makers = (PROVIDER, *own.makers(columns, grouped=False))
    choice = selection.choose(0, columns, depth, max(1, rows), makers)
    if choice.maker != PROVIDER:
        return own.fp8_linear(x, x_scale, weight, weight_scale, choice=choice)
    return product(x, x_scale, weight, weight_scale)


def product(x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """DeepGEMM's own product of checked operands, whatever the shape."""
    import deep_gemm

    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16, device=x.device)
    deep_gemm.fp8_gemm_nt((x, x_scale), (weight, weight_scale), out)
    return out


def refuses(setting: Setting) -> str | None:
    """Serves a Hopper card where DeepGEMM is installed."""
    if (setting.device_type, setting.arithmetic, setting.capability) != ("cuda", "sm90", (9, 0)):
        return f"computes arithmetic sm90 on Hopper, not {setting.arithmetic} on {setting.device_type}"
    if importlib.util.find_spec("deep_gemm") is None:
        return "DeepGEMM is not installed"
    return whole_sums_only(setting)


def kernels() -> list[Kernel]:
    """The dense product, preferred to this package's own."""
    return [
        Kernel(
            op=FP8_LINEAR.op,
            contract_version=FP8_LINEAR.version,
            provider=PROVIDER,
            version=version() or "absent",
            run=fp8_linear,
            refuses=refuses,
            certificate=_CERTIFICATE if version() == _CERTIFIED else None,
            priority=10,
        )
    ]
