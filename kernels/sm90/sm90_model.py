"""The Hopper arithmetic on a CPU: every operation with the tensor core's sums modelled, bit for bit what a GPU prints.

This is the contract of arithmetic `sm90` as executable text. Only matrix products differ from `dsv3_plugin.ops`;
elementwise operations are IEEE fp32 operations, each rounded, on either machine. It is slow (some ns a product): meant
for tiny models, for tests without a GPU, and for reading. Given CUDA tensors it runs on their card, which `check` uses,
and prints the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dsv3_plugin.config import FP8_BLOCK
from dsv3_plugin.hooks import Kernel, Setting, Support, unsupported, whole_sums_only
from dsv3_plugin.kernels.sm90 import tensor_core
from dsv3_plugin.ops import combine, elementary, fp8, fused, linear, mla_attention, rms_norm, rope, router, silu_and_mul
from dsv3_plugin.ops.contract import Contract, require, require_matrix
from dsv3_plugin.version import __version__

PROVIDER = "sm90-model"


def bf16_linear(x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """`linear`: x bf16 [M, K], weight bf16 [N, K], to [M, N] of bf16 or fp32; one accumulator over ascending K."""
    require_matrix("linear", "x", x, (torch.bfloat16,))
    require_matrix("linear", "weight", weight, (torch.bfloat16,))
    require(x.shape[1] == weight.shape[1], "linear", f"x has K={x.shape[1]}, weight has K={weight.shape[1]}")
    return tensor_core.dot(tensor_core.BF16, x, weight).to(out_dtype or x.dtype)


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`head_linear`: x bf16 [M, H, K], weight bf16 [H, N, K], to bf16 [M, H, N]."""
    return torch.stack([bf16_linear(x[:, h].contiguous(), weight[h]) for h in range(x.shape[1])], dim=1)


def grouped_linear(x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`grouped_linear`: x bf16 [M, K] sorted by expert, expert_counts [E], weight bf16 [E, N, K], to bf16 [M, N]."""
    groups = linear.split_by_expert("grouped_linear", x, expert_counts)
    outputs = [bf16_linear(rows, weight[e]) for e, rows in groups]
    return torch.cat(outputs) if outputs else x.new_empty(0, weight.shape[1])


def fp8_linear(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`fp8_linear`: for each 128 of K a chain from zero, acc = fma(raw, x_scale * weight_scale, acc); bf16 [M, N]."""
    require_matrix("fp8_linear", "x", x, (fp8.E4M3,))
    require_matrix("fp8_linear", "weight", weight, (fp8.E4M3,))
    blocks = x.shape[1] // FP8_BLOCK
    require(x.shape[1] % FP8_BLOCK == 0, "fp8_linear", f"K={x.shape[1]} is not a multiple of {FP8_BLOCK}")
    require(x_scale.shape == (len(x), blocks), "fp8_linear", f"x_scale has shape {tuple(x_scale.shape)}")
    column_scale = weight_scale.repeat_interleave(FP8_BLOCK, 0)[: len(weight)]
    acc = torch.zeros(len(x), len(weight), dtype=torch.float32, device=x.device)
    for k in range(blocks):
        span = slice(k * FP8_BLOCK, (k + 1) * FP8_BLOCK)
        raw = tensor_core.dot(tensor_core.FP8, x[:, span], weight[:, span])
        acc = elementary.fma(raw, x_scale[:, k, None] * column_scale[None, :, k], acc)
    return acc.to(torch.bfloat16)


def grouped_fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    expert_counts: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    """`grouped_fp8_linear`: `fp8_linear` of each expert over its rows of x [M, K], to bf16 [M, N]."""
    op = "grouped_fp8_linear"
    rows = linear.split_by_expert(op, x, expert_counts)
    scales = linear.split_by_expert(op, x_scale, expert_counts)
    outputs = [
        fp8_linear(row, scale, weight[e], weight_scale[e]) for (e, row), (_, scale) in zip(rows, scales, strict=True)
    ]
    return torch.cat(outputs) if outputs else x.new_empty(0, weight.shape[1], dtype=torch.bfloat16)


def router_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`router_linear`: x bf16 [T, K], weight bf16 [E, K], to fp32 [T, E]; a chain from zero for each slice."""
    require_matrix("router_linear", "x", x, (torch.bfloat16,))
    require_matrix("router_linear", "weight", weight, (torch.bfloat16,))
    require(x.shape[1] == weight.shape[1], "router_linear", f"x has K={x.shape[1]}, weight has K={weight.shape[1]}")
    return router.sum_slices(x, weight, partial(tensor_core.dot, tensor_core.BF16))


def moe_router(
    x: torch.Tensor, weight: torch.Tensor, e_score_correction_bias: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`moe_router`, arguments as there."""
    return router.route(router_linear(x, weight), e_score_correction_bias, **settings)


def _scores(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return tensor_core.dot(tensor_core.BF16, rows, keys)


def _add_values(output: torch.Tensor, p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return tensor_core.dot(tensor_core.BF16, p, values.t(), output)


# The scaled output is where the second product's accumulator starts.
attention = partial(mla_attention.mla_attention, products=mla_attention.Products(_scores, _add_values))


def is_supported(setting: Setting) -> Support:
    """Serves a CPU that is asked for Hopper's arithmetic in bf16 or fp8."""
    if (setting.device_type, setting.arithmetic) != ("cpu", "sm90"):
        return unsupported(f"models arithmetic sm90 on a CPU, not {setting.arithmetic} on {setting.device_type}")
    if setting.profile.dtype != torch.bfloat16:
        dtype = setting.profile.dtype
        return unsupported(f"the tensor core multiplies bf16 or fp8, the profile computes in {dtype}")
    return whole_sums_only(setting)


_OPERATIONS: tuple[tuple[Contract, Callable[..., Any]], ...] = (
    (linear.LINEAR, bf16_linear),
    (linear.HEAD_LINEAR, head_linear),
    (linear.GROUPED_LINEAR, grouped_linear),
    (fp8.QUANTIZE_FP8, fp8.quantize_fp8),
    (fp8.FP8_LINEAR, fp8_linear),
    (fp8.GROUPED_FP8_LINEAR, grouped_fp8_linear),
    (rms_norm.RMS_NORM, rms_norm.rms_norm),
    (rope.ROPE, rope.rope),
    (silu_and_mul.SILU_AND_MUL, silu_and_mul.silu_and_mul),
    (router.ROUTER_LINEAR, router_linear),
    (router.ROUTE, router.route),
    (router.MOE_ROUTER, moe_router),
    (combine.COMBINE, combine.combine),
    (mla_attention.MLA_ATTENTION, attention),
    (fused.ADD_RMS_NORM, fused.add_rms_norm),
    (fused.RMS_NORM_FP8, fused.rms_norm_fp8),
    (fused.ADD_RMS_NORM_FP8, fused.add_rms_norm_fp8),
    (fused.SILU_AND_MUL_FP8, fused.silu_and_mul_fp8),
    (fused.PERMUTE, fused.permute),
    (fused.PERMUTE_FP8, fused.permute_fp8),
)


def kernels() -> list[Kernel]:
    """One kernel an operation."""
    return [
        Kernel(
            op=contract.op,
            contract_version=contract.version,
            provider=PROVIDER,
            version=__version__,
            run=run,
            is_supported=is_supported,
        )
        for contract, run in _OPERATIONS
    ]
