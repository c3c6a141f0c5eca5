"""SwiGLU against float64 and as its contract writes it out."""

from __future__ import annotations

import torch
from bits import normal, same_bits

from dsv3_plugin.ops.elementary import sigmoid
from dsv3_plugin.ops.silu_and_mul import silu_and_mul


def test_silu_and_mul_against_float64() -> None:
    gate_up = normal(50, 512) * 4
    gate, up = gate_up.double().chunk(2, 1)
    exact = gate * gate.sigmoid() * up
    assert ((silu_and_mul(gate_up) - exact).abs() / exact.abs()).max() < 7 * 2**-24
    written_out = torch.from_numpy(gate_up[:, :256].numpy() * sigmoid(gate_up[:, :256]).numpy()) * gate_up[:, 256:]
    assert same_bits(silu_and_mul(gate_up), written_out)
    rounded_once = silu_and_mul(gate_up.bfloat16().float()).bfloat16()
    assert same_bits(silu_and_mul(gate_up.bfloat16()), rounded_once)
    swapped = torch.cat(gate_up.chunk(2, 1)[::-1], 1)
    assert not torch.equal(silu_and_mul(swapped), silu_and_mul(gate_up))
