"""SwiGLU and its gradient against float64 and as the contract writes them out."""

from __future__ import annotations

import torch
from bits import generator, normal, same_bits

from dsv3_plugin.ops.elementary import sigmoid
from dsv3_plugin.ops.silu_and_mul import silu_and_mul, silu_and_mul_gradient


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


def test_its_gradient_against_float64() -> None:
    gate_up, grad = normal(50, 512) * 4, normal(50, 256, seed=1)
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, 1)
    (exact,) = torch.autograd.grad(gate * gate.sigmoid() * up, wide, grad.double())
    found = silu_and_mul_gradient(grad, gate_up)
    assert (found - exact).abs().max() < 8 * 2**-24 * exact.abs().max()
    gate, up = (x.numpy() for x in gate_up.chunk(2, 1))
    s, one = sigmoid(gate_up[:, :256]).numpy(), gate.dtype.type(1)
    written_out = grad.numpy() * up * s * (one + gate * (one - s)), grad.numpy() * gate * s
    assert same_bits(found, torch.cat([torch.from_numpy(x) for x in written_out], 1))
    narrow = grad.bfloat16(), gate_up.bfloat16()
    rounded_once = silu_and_mul_gradient(*(x.float() for x in narrow)).bfloat16()
    assert same_bits(silu_and_mul_gradient(*narrow), rounded_once)
    order = torch.randperm(50, generator=generator(2))
    assert same_bits(silu_and_mul_gradient(grad[order], gate_up[order]), found[order])
    # The twin: the derivative of gate * up * a constant.
    wrong = torch.cat((grad * gate_up[:, 256:] * sigmoid(gate_up[:, :256]), found[:, 256:]), 1)
    assert (wrong - exact).abs().max() > 0.1 * exact.abs().max()
