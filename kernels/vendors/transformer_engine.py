"""TransformerEngine as a provider of block-scaled fp8, as its recipe `Float8BlockScaling` uses it. Fast mode only.

Its product is cuBLASLt's; its quantizer agrees with the contract in power-of-two scales.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dsv3_plugin.hooks import Kernel
from dsv3_plugin.kernels.hopper import on_hopper_with
from dsv3_plugin.kernels.installed import version_of
from dsv3_plugin.kernels.vendors.third_party import Offer, kernels_of
from dsv3_plugin.ops import fp8_linear as contracts
from dsv3_plugin.ops import quantize as quantize_contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import ScaleFormat

PROVIDER = "transformer-engine"
_DISTRIBUTION = "transformer-engine-torch"
# Its products take whole 8 rows, and scales in rows of whole 16 bytes.
_ROWS, _SCALES = 8, 4


@implements(quantize_contracts.quantize_fp8)
def quantize_fp8(x: torch.Tensor, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """x bf16 or fp32 [M, K] to (e4m3 [M, K], fp32 scales [M, K / 128], a transposed view)."""
    quantized = _quantizer(scale_format == "ue8m0", block_scaling_dim=1).quantize(x)
    return quantized._rowwise_data.view(E4M3), quantized._rowwise_scale_inv[:, : len(x)].t()


@implements(contracts.fp8_linear)
def fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x e4m3 [M, K] with x_scale fp32 [M, K / 128], weight e4m3 [N, K] with weight_scale fp32 [ceil(N / 128), K / 128],
    to bf16 [M, N].
    """
    require(out_dtype == torch.bfloat16, "fp8_linear", f"out_dtype is {out_dtype}, expected torch.bfloat16")
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    missing = -len(x) % _ROWS
    values = F.pad(x.view(torch.uint8), (0, 0, 0, missing))
    transposed = F.pad(x_scale.t(), (0, missing)).contiguous()
    padded = F.pad(weight_scale, (0, -weight_scale.shape[1] % _SCALES)).contiguous()
    out = general_gemm(_tensor(weight, padded, 2), _tensor(values, transposed, 1), out_dtype=torch.bfloat16)[0]
    return out[: len(x)]


def _quantizer(powers_of_two: bool, block_scaling_dim: int) -> Any:
    import transformer_engine.pytorch  # noqa: F401 (loads the next one)
    import transformer_engine_torch  # type: ignore[import-not-found]
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    return Float8BlockQuantizer(
        transformer_engine_torch.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=False,
        force_pow_2_scales=powers_of_two,
        block_scaling_dim=block_scaling_dim,
    )


def _tensor(values: torch.Tensor, scales: torch.Tensor, block_scaling_dim: int) -> Any:
    """Values and scales as TransformerEngine's own tensor; nothing is copied."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor

    quantizer = _quantizer(False, block_scaling_dim)
    return Float8BlockwiseQTensor(
        shape=values.shape,
        dtype=torch.bfloat16,
        fp8_dtype=quantizer.dtype,
        rowwise_data=values.view(torch.uint8),
        rowwise_scale_inv=scales,
        columnwise_data=None,
        columnwise_scale_inv=None,
        quantizer=quantizer,
        is_2D_scaled=block_scaling_dim == 2,
    )


def kernels() -> list[Kernel]:
    """The quantizer and the dense product."""
    version = version_of(_DISTRIBUTION)
    return kernels_of(
        PROVIDER,
        version,
        on_hopper_with(lambda: None if version else "TransformerEngine for torch is not installed"),
        Offer(
            quantize_contracts.quantize_fp8,
            quantize_fp8,
            uncertified="differs with fp32 scales, and far from 1",
            priority=-1,
        ),
        Offer(
            contracts.fp8_linear,
            fp8_linear,
            uncertified="is cuBLASLt's product, which differs at few rows",
            priority=-2,
        ),
    )
