"""DeepGEMM as a provider of products: its sums are the contract's (one fma per 128 of K, no split).

Its dense fp8 product is taken for the shapes for which it was measured to be the fastest (`selection`), else a kernel
of this package is; its bf16 product was the fastest or equal in every shape measured. All print the same bits, so that
the choice is one of speed alone.
"""

from __future__ import annotations

import importlib.util

import torch

from dsv3_plugin.hooks import Kernel
from dsv3_plugin.kernels.hopper import on_hopper_with
from dsv3_plugin.kernels.third_party import Offer, kernels_of, version_of
from dsv3_plugin.ops.fp8 import E4M3, FP8_LINEAR, GROUPED_FP8_LINEAR
from dsv3_plugin.ops.linear import LINEAR

PROVIDER = "deep-gemm"
_DISTRIBUTIONS = ("sgl-deep-gemm", "deep-gemm", "deep_gemm")
_CERTIFIED = "0.1.5.post1"
_CERTIFICATE = "equal to sm90-model in every bit on an H200 (dsv3 kernels check)"


def version() -> str | None:
    """The installed version, or None."""
    return version_of(*_DISTRIBUTIONS)


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


def grouped_fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    """x e4m3 [M, K] sorted by expert with x_scale fp32 [M, K / 128], expert_counts integers [E], weight e4m3 [E, N, K]
    with weight_scale fp32 [E, ceil(N / 128), K / 128], to bf16 [M, N]. Raises `InputError`.

    DeepGEMM wants each expert's rows to begin at a multiple of its alignment: rows are copied there and back.
    """
    import deep_gemm

    from dsv3_plugin.kernels import fp8_linear as own

    own.check(GROUPED_FP8_LINEAR.op, x, x_scale, weight, weight_scale)
    rows, columns, experts = len(x), weight.shape[1], len(weight)
    align = deep_gemm.get_mk_alignment_for_contiguous_layout()
    room = (rows + experts * (align - 1)) // align * align
    ends = expert_counts.cumsum(0)
    padded = (expert_counts + align - 1) // align * align
    row = torch.arange(rows, device=x.device)
    expert = torch.searchsorted(ends, row, right=True)
    place = row + (padded.cumsum(0) - padded - ends + expert_counts)[expert]
    # Blocks of rows that belong to no expert are passed over.
    experts_of_rows = torch.full((room,), -1, dtype=torch.int32, device=x.device)
    experts_of_rows[place] = expert.to(torch.int32)
    values = torch.zeros(room, x.shape[1], dtype=torch.uint8, device=x.device)
    values[place] = x.view(torch.uint8)
    scales = torch.zeros(room, x_scale.shape[1], dtype=torch.float32, device=x.device)
    scales[place] = x_scale
    out = torch.empty(room, columns, dtype=torch.bfloat16, device=x.device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (values.view(E4M3), scales), (weight, weight_scale), out, experts_of_rows
    )
    return out[place]


def linear(x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """x bf16 [M, K], weight bf16 [N, K], to [M, N] of bf16, or of fp32 if `out_dtype` says so; by DeepGEMM where rows
    are whole 16 bytes, else by this package's own kernel. Raises `InputError`.
    """
    from dsv3_plugin.kernels import bf16_linear as own

    out_dtype = own.check(x, weight, out_dtype)
    columns, depth = weight.shape
    if not len(x) or depth % 8 or columns % 8:
        return own.linear(x, weight, out_dtype=out_dtype)
    import deep_gemm

    out = torch.empty(len(x), columns, dtype=out_dtype, device=x.device)
    deep_gemm.bf16_gemm_nt(x, weight, out)
    return out


def kernels() -> list[Kernel]:
    """The dense fp8 and bf16 products, preferred to this package's own, and those of experts, which are slower."""
    installed = version()
    certificate = _CERTIFICATE if installed == _CERTIFIED else None
    uncertified = None if certificate else f"only version {_CERTIFIED} was compared with the contract"
    return kernels_of(
        PROVIDER,
        installed,
        on_hopper_with("DeepGEMM", lambda: importlib.util.find_spec("deep_gemm") is not None),
        Offer(FP8_LINEAR, fp8_linear, certificate, uncertified, priority=10),
        Offer(GROUPED_FP8_LINEAR, grouped_fp8_linear, certificate, uncertified, priority=-1),
        Offer(LINEAR, linear, certificate, uncertified, priority=10 if certificate else -1),
    )
