"""A fused operation has the bits of its parts, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from bits import normal, same_bits

from dsv3_plugin.ops import permute, quantize
from dsv3_plugin.ops import rms_norm as norms
from dsv3_plugin.ops import silu_and_mul as swiglu
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.ops.router import moe_router, route, router_linear
from dsv3_plugin.ops.silu_and_mul import silu_and_mul

ROUTE: dict[str, Any] = {
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def test_a_fused_operation_is_its_parts() -> None:
    """Each composition written out, and the rounding between its parts left away."""
    x, addend = normal(9, 384, dtype=torch.bfloat16), normal(9, 384, seed=1, dtype=torch.bfloat16)
    weight = normal(384, seed=2, dtype=torch.bfloat16)
    total, normalised, values, scales = norms.add_rms_norm_fp8(x, addend, weight, 1e-6, "float32")
    assert same_bits(total, (x.float() + addend.float()).bfloat16())
    assert same_bits(normalised, rms_norm(total, weight, 1e-6))
    expected = quantize.quantize_fp8(normalised, "float32")
    assert same_bits(values.view(torch.uint8), expected[0].view(torch.uint8)) and same_bits(scales, expected[1])
    found = norms.add_rms_norm(x, addend, weight, 1e-6)
    assert same_bits(found[0], total) and same_bits(found[1], normalised)
    assert same_bits(norms.rms_norm_fp8(total, weight, 1e-6, "float32")[1], scales)
    unrounded = rms_norm(x.float() + addend.float(), weight.float(), 1e-6)
    assert not torch.equal(quantize.quantize_fp8(unrounded, "float32")[1], scales)

    gate_up = normal(9, 512, dtype=torch.bfloat16)
    found, expected = swiglu.silu_and_mul_fp8(gate_up, "ue8m0"), quantize.quantize_fp8(silu_and_mul(gate_up), "ue8m0")
    assert same_bits(found[0].view(torch.uint8), expected[0].view(torch.uint8)) and same_bits(found[1], expected[1])

    rows = torch.tensor([3, 0, 3, 8])
    assert same_bits(permute.permute(x, rows), x[[3, 0, 3, 8]])
    moved = permute.permute_fp8(values, scales, rows)
    assert same_bits(moved[0].float(), values.float()[rows]) and same_bits(moved[1], scales[rows])

    router, bias = normal(16, 384, seed=3, dtype=torch.bfloat16), normal(16, seed=4) * 0.1
    found = moe_router(x, router, bias, **ROUTE)
    expected = route(router_linear(x, router), bias, **ROUTE)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
