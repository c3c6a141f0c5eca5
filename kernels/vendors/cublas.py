"""cuBLAS through torch as a provider: bf16 products, and the block-scaled fp8 product of cuBLASLt. Fast mode only.

Its kernel, and with it the split of K, depends on the number of rows, so a token's bits depend on its batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.functional import ScalingType, scaled_mm

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.hooks import Kernel
from dsv3_plugin.kernels.hopper import on_hopper_with
from dsv3_plugin.kernels.vendors.third_party import Offer, kernels_of
from dsv3_plugin.ops import fp8_linear as fp8_contracts
from dsv3_plugin.ops import linear as contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.operation import implements

PROVIDER = "cublas"
# cuBLASLt's fp8 kernels store 16 columns at a time and read rows' scales in 16 bytes.
_COLUMNS, _ROWS = 16, 4


@implements(contracts.linear)
def linear(x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """x bf16 [M, K], weight bf16 [N, K], to [M, N] of bf16, or of fp32 if `out_dtype` says so."""
    if out_dtype in (None, x.dtype):
        return F.linear(x, weight)
    return torch.mm(x, weight.t(), out_dtype=out_dtype)


@implements(contracts.head_linear)
def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x bf16 [M, H, K], weight bf16 [H, N, K], to bf16 [M, H, N]."""
    out = x.new_empty(len(x), *weight.shape[:2])
    torch.bmm(x.transpose(0, 1), weight.transpose(1, 2), out=out.transpose(0, 1))
    return out


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
    to bf16 [M, N]; N is a multiple of 16. Raises `InputError`.
    """
    require(out_dtype == torch.bfloat16, "fp8_linear", f"out_dtype is {out_dtype}, expected torch.bfloat16")
    op, columns, blocks = "fp8_linear", weight.shape[0], x.shape[1] // FP8_BLOCK
    require(columns % _COLUMNS == 0, op, f"cuBLASLt needs weight rows in multiples of {_COLUMNS}, not {columns}")
    return product(*whole_rows(x, x_scale), weight, F.pad(weight_scale, (0, -blocks % 4)))[: len(x)]


def whole_rows(x: torch.Tensor, x_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The operands of `fp8_linear` with rows of zeros up to a multiple of 4, and the scales column by column."""
    missing = -len(x) % _ROWS
    values = F.pad(x.view(torch.uint8), (0, 0, 0, missing)).view(x.dtype) if missing else x
    return values, F.pad(x_scale.t(), (0, missing)).contiguous().t()


def product(x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """cuBLASLt's own product, of `whole_rows` and a weight whose scales fill rows of whole 16 bytes."""
    return scaled_mm(
        x,
        weight.t(),
        x_scale,
        ScalingType.BlockWise1x128,
        weight_scale.t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def kernels() -> list[Kernel]:
    """The bf16 products and the dense fp8 product."""
    version = torch.version.cuda
    return kernels_of(
        PROVIDER,
        version,
        on_hopper_with(lambda: None if version else "this torch is built without CUDA"),
        Offer(
            contracts.linear,
            linear,
            uncertified="splits K at few rows: of 128 x 256 outputs over K = 7168 0.3 % differ",
        ),
        Offer(
            contracts.head_linear,
            head_linear,
            uncertified="equal where drawn, but its kernel depends on the number of rows",
        ),
        Offer(
            fp8_contracts.fp8_linear,
            fp8_linear,
            uncertified="differs in 0.027 % of the outputs at 16 rows",
            priority=-1,
        ),
    )
