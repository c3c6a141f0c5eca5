"""A fused operation has the bits of its parts, one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import FLOATS, normal, same_bits

from dsv3_plugin.ops import permute, quantize
from dsv3_plugin.ops import rms_norm as norms
from dsv3_plugin.ops import silu_and_mul as swiglu
from dsv3_plugin.ops.absorb import absorb
from dsv3_plugin.ops.linear import head_linear, head_linear_fp8
from dsv3_plugin.ops.rms_norm import rms_norm
from dsv3_plugin.ops.rope import rope
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

    x, by_head = normal(9, 3, 40, dtype=torch.bfloat16), normal(3, 128, 40, seed=1, dtype=torch.bfloat16)
    found, expected = head_linear_fp8(x, by_head, "float32"), head_linear(x, by_head).flatten(1)
    expected = quantize.quantize_fp8(expected, "float32")
    assert same_bits(found[0].view(torch.uint8), expected[0].view(torch.uint8)) and same_bits(found[1], expected[1])
    unrounded = head_linear(x.float(), by_head.float()).flatten(1)
    assert not torch.equal(quantize.quantize_fp8(unrounded, "float32")[1], found[1])

    rows = torch.tensor([3, 0, 3, 8])
    assert same_bits(permute.permute(total, rows), total[[3, 0, 3, 8]])
    moved = permute.permute_fp8(values, scales, rows)
    assert same_bits(moved[0].float(), values.float()[rows]) and same_bits(moved[1], scales[rows])

    router, bias = normal(16, 384, seed=3, dtype=torch.bfloat16), normal(16, seed=4) * 0.1
    found = moe_router(total, router, bias, **ROUTE)
    expected = route(router_linear(total, router), bias, **ROUTE)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_attention_reads_is_its_parts(dtype: torch.dtype) -> None:
    """The twin: a weight of the norm, or an angle, that is another changes its own part and no other."""
    nope, rank, rotary, tokens, count = 24, 32, 8, 5, 3
    heads, latent = (
        normal(tokens, count, nope + rotary, dtype=dtype),
        normal(tokens, rank + rotary, seed=1, dtype=dtype),
    )
    w_uk, weight = normal(count, rank, nope, seed=2, dtype=dtype), normal(rank, seed=3, dtype=dtype)
    angles = normal(tokens, rotary // 2, seed=4)
    cos, sin = angles.cos(), angles.sin()
    q, cached = absorb(heads, w_uk, latent, weight, 1e-6, cos, sin)
    assert same_bits(q[..., :rank], head_linear(heads[..., :nope], w_uk))
    assert same_bits(q[..., rank:], rope(heads[..., nope:], cos, sin))
    assert same_bits(cached[:, :rank], rms_norm(latent[:, :rank].contiguous(), weight, 1e-6))
    assert same_bits(cached[:, rank:], rope(latent[:, None, rank:], cos, sin)[:, 0])

    other_q, other_cached = absorb(heads, w_uk, latent, weight * 2, 1e-6, sin, cos)
    assert torch.equal(other_q[..., :rank], q[..., :rank]) and torch.equal(other_cached[:, :rank], 2 * cached[:, :rank])
    assert not torch.equal(other_q, q) and not torch.equal(other_cached[:, rank:], cached[:, rank:])
