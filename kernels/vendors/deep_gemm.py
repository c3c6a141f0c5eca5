"""DeepGEMM as a provider of products: its sums are the contract's (one fma per 128 of K, no split).

Its bf16 product was the fastest or equal in every shape measured. Its fp8 products are at most some percent faster than
this package's own (SELECTION.md), and slower with few tokens; each form of them is compiled by nvcc for seconds when a
server starts. So they serve where they are asked for by name only.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from dsv3_plugin.hooks import Implementation, Kernel, versions_of
from dsv3_plugin.kernels import own
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.hopper import on_hopper_with
from dsv3_plugin.kernels.installed import version_of
from dsv3_plugin.kernels.vendors.third_party import Offer, kernels_of
from dsv3_plugin.ops import fp8_linear as fp8_contracts
from dsv3_plugin.ops import linear as contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3

PROVIDER = "deep-gemm"
_DISTRIBUTIONS = ("sgl-deep-gemm", "deep-gemm", "deep_gemm")


def version() -> str | None:
    """The installed version, or None."""
    return version_of(*_DISTRIBUTIONS)


@implements(fp8_contracts.fp8_linear)
def fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x e4m3 [M, K] with x_scale fp32 [M, K / 128], weight e4m3 [N, K] with weight_scale fp32 [ceil(N / 128), K / 128],
    to bf16 [M, N]. Raises `InputError`.
    """
    require(out_dtype == torch.bfloat16, "fp8_linear", f"out_dtype is {out_dtype}, expected torch.bfloat16")
    import deep_gemm

    from dsv3_plugin.kernels.triton import fp8_linear as ours

    ours.check("fp8_linear", x, x_scale, weight, weight_scale)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16, device=x.device)
    deep_gemm.fp8_gemm_nt((x, x_scale), (weight, weight_scale), out)
    return out


@implements(fp8_contracts.grouped_fp8_linear)
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

    from dsv3_plugin.kernels.triton import fp8_linear as ours

    ours.check("grouped_fp8_linear", x, x_scale, weight, weight_scale)
    rows, columns, experts = len(x), weight.shape[1], len(weight)
    align = deep_gemm.get_mk_alignment_for_contiguous_layout()
    padded_rows = (rows + experts * (align - 1)) // align * align
    ends = expert_counts.cumsum(0)
    padded = (expert_counts + align - 1) // align * align
    row = torch.arange(rows, device=x.device)
    expert = torch.searchsorted(ends, row, right=True)
    place = row + (padded.cumsum(0) - padded - ends + expert_counts)[expert]
    # Blocks of rows that belong to no expert are passed over.
    experts_of_rows = torch.full((padded_rows,), -1, dtype=torch.int32, device=x.device)
    experts_of_rows[place] = expert.to(torch.int32)
    values = torch.zeros(padded_rows, x.shape[1], dtype=torch.uint8, device=x.device)
    values[place] = x.view(torch.uint8)
    scales = torch.zeros(padded_rows, x_scale.shape[1], dtype=torch.float32, device=x.device)
    scales[place] = x_scale
    out = torch.empty(padded_rows, columns, dtype=torch.bfloat16, device=x.device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (values.view(E4M3), scales), (weight, weight_scale), out, experts_of_rows
    )
    return out[place]


@implements(contracts.linear)
def linear(x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """x bf16 [M, K], weight bf16 [N, K], to [M, N] of bf16, or of fp32 if `out_dtype` says so; by DeepGEMM where rows
    are whole 16 bytes, else by this package's own kernel. Raises `InputError`.
    """
    from dsv3_plugin.kernels.triton import linear as ours

    out_dtype = ours.check(x, weight, out_dtype)
    if not _takes(x, weight):
        return ours.linear(x, weight, out_dtype=out_dtype)
    return _bf16_product(x, weight, out_dtype)


def _takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    columns, depth = weight.shape
    return len(x) > 0 and depth % 8 == 0 and columns % 8 == 0


def _bf16_product(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    import deep_gemm

    out = torch.empty(len(x), len(weight), dtype=out_dtype, device=x.device)
    deep_gemm.bf16_gemm_nt(x, weight, out)
    return out


def linear_alone(x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """`linear` by DeepGEMM. Raises `InputError` for a shape that it does not take."""
    require(_takes(x, weight), "linear", f"DeepGEMM takes whole 16 bytes a row, not {tuple(weight.shape)}")
    return _bf16_product(x, weight, out_dtype or x.dtype)


def _nvcc() -> Path:
    """DeepGEMM's own compiler, where it looks for it."""
    from torch.utils.cpp_extension import CUDA_HOME

    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or CUDA_HOME or "/usr/local/cuda"
    return Path(home) / "bin" / "nvcc"


@functools.cache
def missing() -> str | None:
    """What DeepGEMM lacks on this machine, and what to install; None if nothing. Imports it."""
    if importlib.util.find_spec("deep_gemm") is None:
        return "DeepGEMM is not installed: pip install sgl-deep-gemm"
    if not _nvcc().exists():
        return f"DeepGEMM compiles with nvcc, which {_nvcc()} is not: install the CUDA toolkit, or name it in CUDA_HOME"
    try:
        import deep_gemm  # noqa: F401
    except Exception as error:  # it builds and loads a library when it is imported
        return f"DeepGEMM does not load: {type(error).__name__}: {error}"
    return None


@functools.cache
def _compiler() -> str:
    """The version of the compiler that DeepGEMM runs."""
    if os.environ.get("DG_JIT_USE_NVRTC", "0") not in ("", "0"):
        return f"nvrtc {compiler.versions().get('nvrtc', 'absent')}"
    told = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\bV(\d[\d.]*)", told)
    return f"nvcc {found[1]}" if found else "absent"


def versions() -> dict[str, str]:
    """Of what makes its bits."""
    name = next((name for name in _DISTRIBUTIONS if version_of(name)), _DISTRIBUTIONS[0])
    return versions_of(name)() | {"DeepGEMM's compiler": _compiler()}


def _part(name: str, run: Any, function: str, shapes: str, *without: str) -> Implementation:
    entry = f"{__name__}:{function}"
    return Implementation(f"deep_gemm.{name}", run, entry, without, versions=versions, shapes=shapes)


def kernels() -> list[Kernel]:
    """The bf16 product, preferred to this package's own, and those of fp8, which are not."""
    package = "dsv3_plugin.kernels"
    dense = _part("fp8_gemm_nt", fp8_linear, "fp8_linear", "every shape")
    grouped = _part("m_grouped_fp8_gemm_nt_contiguous", grouped_fp8_linear, "grouped_fp8_linear", "every shape")
    bf16 = _part("bf16_gemm_nt", linear_alone, "linear", "N and K in whole eights", f"{package}.triton.linear:linear")
    own_bf16 = own.parts(contracts.linear, shapes="other shapes")
    return kernels_of(
        PROVIDER,
        version(),
        on_hopper_with(missing),
        Offer(fp8_contracts.fp8_linear, fp8_linear, (dense,), priority=-1),
        Offer(fp8_contracts.grouped_fp8_linear, grouped_fp8_linear, (grouped,), priority=-1),
        Offer(contracts.linear, linear, (bf16, *own_bf16), priority=10),
    )
