"""Making a model's bound kernels differentiable."""

from __future__ import annotations

from dataclasses import replace

from dsv3_plugin.autograd.combine import differentiable_combine
from dsv3_plugin.autograd.fp8 import master_weights
from dsv3_plugin.autograd.fused import composed_add_rms_norm, composed_moe_router
from dsv3_plugin.autograd.linear import (
    differentiable_grouped_linear,
    differentiable_head_linear,
    differentiable_linear,
    differentiable_router_linear,
)
from dsv3_plugin.autograd.mla_attention import differentiable_mla_attention
from dsv3_plugin.autograd.rms_norm import differentiable_rms_norm
from dsv3_plugin.autograd.rope import differentiable_rope
from dsv3_plugin.autograd.router import differentiable_route
from dsv3_plugin.autograd.silu_and_mul import differentiable_silu_and_mul
from dsv3_plugin.ops.fused import permute
from dsv3_plugin.registry import Ops


def differentiable(ops: Ops) -> Ops:
    """`ops` with a backward pass for each operation; what they compute, and their provenance, stays.

    In the FP8 profile layers built with the result hold their weights in the profile's dtype and quantize them in each
    pass (`Ops.master_weights`).
    """
    rms_norm, route = differentiable_rms_norm(ops.rms_norm), differentiable_route(ops.route)
    router_linear = differentiable_router_linear(ops.router_linear)
    return replace(
        ops,
        linear=differentiable_linear(ops.linear),
        head_linear=differentiable_head_linear(ops.head_linear),
        grouped_linear=differentiable_grouped_linear(ops.grouped_linear),
        rms_norm=rms_norm,
        add_rms_norm=composed_add_rms_norm(rms_norm),
        rope=differentiable_rope(ops.rope),
        silu_and_mul=differentiable_silu_and_mul(ops.silu_and_mul),
        router_linear=router_linear,
        route=route,
        permute=permute,
        moe_router=composed_moe_router(router_linear, route),
        combine=differentiable_combine(ops.combine),
        mla_attention=differentiable_mla_attention(ops.mla_attention),
        master_weights=master_weights(ops) if ops.setting.profile.is_fp8 else None,
    )
