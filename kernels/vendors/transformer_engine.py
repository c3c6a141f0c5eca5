"""TransformerEngine as a provider of block-scaled fp8, as its recipe `Float8BlockScaling` uses it.

Its products are cuBLASLt's. Where K is one sum they are the contract's, `acc = fma(raw, scale_a * scale_b, acc)`, with
any scales (wgrad's, whose operands both have a scale a row, with powers of two only); a deeper K it sums in parts where
there are few tiles, so that bits depend on the shape. Sums of 8-bit products with power-of-two
scales are nearly always exact, which hides that: one of a thousand shapes showed it. So a deep product goes to another
kernel.

Its quantizer takes `scale = 448 / amax`, correctly rounded, e4m3 of `x * scale`, and keeps `1 / scale`; for powers of
two it cuts off the mantissa of `scale`. Where `448 / amax` overflows it takes the input dtype's largest number. So its
powers of two are the contract's but for an amax below 2**-118, and its fp32 scales are others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dsv3_plugin.hooks import SUPPORTED, Implementation, Kernel, Setting, Support, unsupported, versions_of
from dsv3_plugin.kernels import own
from dsv3_plugin.kernels.hopper import on_hopper_with
from dsv3_plugin.kernels.installed import version_of
from dsv3_plugin.kernels.vendors.third_party import Offer, kernels_of
from dsv3_plugin.ops import fp8_linear as contracts
from dsv3_plugin.ops import fp8_wgrad as wgrad_contracts
from dsv3_plugin.ops import quantize as quantize_contracts
from dsv3_plugin.ops.checks import require
from dsv3_plugin.ops.operation import implements
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import ScaleFormat

PROVIDER = "transformer-engine"
_DISTRIBUTION = "transformer-engine-torch"
_VERSIONS = versions_of(_DISTRIBUTION, "transformer-engine", "nvidia-cublas", "nvidia-cublas-cu12")
# Its products take whole 8 rows, and scales in rows of whole 16 bytes.
_ROWS, _SCALES = 8, 4
# The largest K that it was seen to sum in order, whatever M and N; of 7168 it sums two halves where M * N is small.
_DEEPEST = 4096


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
    to bf16 [M, N]; by TransformerEngine where K is one sum, else by this package's own kernel. Raises `InputError`.
    """
    if x.shape[1] <= _DEEPEST:
        return linear_alone(x, x_scale, weight, weight_scale, out_dtype=out_dtype)
    from dsv3_plugin.kernels.triton import fp8_linear as ours

    return ours.fp8_linear(x, x_scale, weight, weight_scale, out_dtype=out_dtype)


def linear_alone(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`fp8_linear` by TransformerEngine. Raises `InputError` for a shape that it does not take."""
    op = "fp8_linear"
    require(out_dtype == torch.bfloat16, op, f"out_dtype is {out_dtype}, expected torch.bfloat16")
    require(x.shape[1] <= _DEEPEST, op, f"TransformerEngine sums up to {_DEEPEST} products in order, not {x.shape[1]}")
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    missing = -len(x) % _ROWS
    values = F.pad(x.view(torch.uint8), (0, 0, 0, missing))
    transposed = F.pad(x_scale.t(), (0, missing)).contiguous()
    padded = F.pad(weight_scale, (0, -weight_scale.shape[1] % _SCALES)).contiguous()
    out = general_gemm(_tensor(weight, padded, 2), _tensor(values, transposed, 1), out_dtype=torch.bfloat16)[0]
    return out[: len(x)]


@implements(wgrad_contracts.fp8_wgrad)
def fp8_wgrad(
    grad: torch.Tensor,
    grad_scale: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Of `quantize_fp8_columns`: grad e4m3 [N, B * 128] with scales fp32 [N, B] and x e4m3 [K, B * 128] with scales
    fp32 [K, B], expert_counts [E], to [E, N, K] of bf16 or fp32; by TransformerEngine for one weight of whole 8 rows,
    else by this package's own kernel. Raises `InputError`.
    """
    if _takes(grad, expert_counts):
        return wgrad_alone(grad, grad_scale, x, x_scale, expert_counts, out_dtype=out_dtype)
    from dsv3_plugin.kernels.triton import fp8_wgrad as ours

    return ours.fp8_wgrad(grad, grad_scale, x, x_scale, expert_counts, out_dtype=out_dtype)


def _takes(grad: torch.Tensor, expert_counts: torch.Tensor) -> bool:
    return len(expert_counts) == 1 and 0 < grad.shape[1] <= _DEEPEST and len(grad) % _ROWS == 0


def wgrad_alone(
    grad: torch.Tensor,
    grad_scale: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`fp8_wgrad` by TransformerEngine. Raises `InputError` for a shape that it does not take."""
    require(
        _takes(grad, expert_counts),
        "fp8_wgrad",
        f"TransformerEngine takes one weight of whole 8 rows and up to {_DEEPEST} tokens, not {len(expert_counts)} of"
        f" {len(grad)} rows and {grad.shape[1]} tokens",
    )
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    of_grad, of_x = (_tensor(values, _by_blocks(scale), 1) for values, scale in ((grad, grad_scale), (x, x_scale)))
    return general_gemm(of_x, of_grad, out_dtype=out_dtype)[0].unsqueeze(0)


def _by_blocks(scale: torch.Tensor) -> torch.Tensor:
    """Scales [R, B] block by block, in rows of whole 16 bytes."""
    return F.pad(scale.t(), (0, -len(scale) % _SCALES)).contiguous()


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
    """The quantizer, and the products of one weight."""
    version = version_of(_DISTRIBUTION)
    on_hopper = on_hopper_with(lambda: None if version else "TransformerEngine for torch is not installed")

    def with_powers_of_two(setting: Setting) -> Support:
        return on_hopper(setting) and _powers_of_two(setting)

    quantizer = Offer(
        quantize_contracts.quantize_fp8,
        quantize_fp8,
        uncertified="its fp32 scales are others, and its powers of two where an amax is below 2**-118",
        priority=-1,
    )
    own_wgrad = own.parts(wgrad_contracts.fp8_wgrad, shapes="experts, other rows, more tokens")
    product = Offer(
        contracts.fp8_linear,
        fp8_linear,
        (_part(linear_alone, f"K up to {_DEEPEST}"), *own.parts(contracts.fp8_linear)),
        priority=-2,
    )
    wgrad = Offer(
        wgrad_contracts.fp8_wgrad,
        fp8_wgrad,
        (_part(wgrad_alone, f"one weight of whole 8 rows, up to {_DEEPEST} tokens"), *own_wgrad),
        priority=-2,
    )
    return [
        *kernels_of(PROVIDER, version, on_hopper, quantizer, product),
        *kernels_of(PROVIDER, version, with_powers_of_two, wgrad),
    ]


def _part(run: Callable[..., torch.Tensor], shapes: str) -> Implementation:
    entry = f"{__name__}:{run.__name__}"
    return Implementation("transformer_engine.general_gemm", run, entry, versions=_VERSIONS, shapes=shapes)


def _powers_of_two(setting: Setting) -> Support:
    scale_format = setting.profile.scale_format
    if scale_format in (None, "ue8m0"):
        return SUPPORTED
    return unsupported(f"keeps the contract with power-of-two scales, the profile has {scale_format} ones")
