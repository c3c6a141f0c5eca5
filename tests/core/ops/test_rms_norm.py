"""RMSNorm in plain fp32, where it rounds, and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import FLOATS, normal, same_bits
from plain import plain_row_sum

from dsv3_plugin.ops.rms_norm import ROW_CHUNK, rms_norm, rms_norm_gradient


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm_in_plain_fp32(dtype: torch.dtype) -> None:
    eps, x, weight = 1e-6, normal(5, 700, dtype=dtype), normal(700, seed=1, dtype=dtype)
    out = rms_norm(x, weight, eps)
    for row, result in zip(x.float(), out, strict=True):
        values = list(row.numpy())
        mean = plain_row_sum([value * value for value in values]) / np.float32(700)
        factor = np.float32(1) / np.sqrt(mean + np.float32(eps))
        expected = [value * factor * w for value, w in zip(values, weight.float().numpy(), strict=True)]
        assert same_bits(result, torch.tensor(np.array(expected)).to(dtype))
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + eps).sqrt() * weight.double()
    assert ((out - exact).abs() / exact.abs()).max() < (2**-8 if dtype == torch.bfloat16 else 2**-21)


def test_rms_norm_rounds_once() -> None:
    """The twin: rounding to bf16 before the weight is multiplied, as Hugging Face does, gives other bits."""
    x, weight = normal(8, 512, dtype=torch.bfloat16), normal(512, seed=1, dtype=torch.bfloat16)
    twice = rms_norm(x, torch.ones_like(weight), 1e-6) * weight
    assert int((rms_norm(x, weight, 1e-6) != twice).sum()) > 100


def test_rms_norm_of_zeros_is_zero() -> None:
    assert rms_norm(torch.zeros(2, 64), torch.ones(64), 1e-6).tolist() == [[0.0] * 64] * 2


def gradients_in_plain_fp32(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, and the weight's over the chunks of rows."""
    wide, of_out, w = (each.float().numpy() for each in (x, grad, weight))
    of_x, sums = np.zeros_like(wide), []
    for i, (row, dy) in enumerate(zip(wide, of_out, strict=True)):
        mean = plain_row_sum([value * value for value in row]) / np.float32(len(row))
        factor = np.float32(1) / np.sqrt(mean + np.float32(eps))
        normalised, h = row * factor, dy * w
        mean = plain_row_sum(list(h * normalised)) / np.float32(len(row))
        of_x[i] = factor * (h - normalised * mean)
        if i % ROW_CHUNK == 0:
            sums.append(np.zeros_like(w))
        sums[-1] = sums[-1] + dy * normalised
    total = np.zeros_like(w)
    for each in sums:
        total = total + each
    return of_x, total


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_its_gradients_in_plain_fp32(dtype: torch.dtype) -> None:
    rows, width, eps = 2 * ROW_CHUNK + 3, 70, 1e-6
    grad, x = (normal(rows, width, seed=i, dtype=dtype) for i in (0, 1))
    weight = normal(width, seed=2, dtype=dtype)
    of_x, of_weight = rms_norm_gradient(grad, x, weight, eps)
    expected = gradients_in_plain_fp32(grad, x, weight, eps)
    assert same_bits(of_x, torch.tensor(expected[0]).to(dtype))
    assert same_bits(of_weight, torch.tensor(expected[1]).to(dtype))
    operands = [each.double().requires_grad_() for each in (x, weight)]
    out = operands[0] / (operands[0].square().mean(1, keepdim=True) + eps).sqrt() * operands[1]
    for found, exact in zip((of_x, of_weight), torch.autograd.grad(out, operands, grad.double()), strict=True):
        assert (found - exact).abs().max() < (2**-8 if dtype == torch.bfloat16 else 2**-21) * exact.abs().max()
    if dtype == torch.float32:
        # The twins: rows in another order, of which only the weight's sum knows, and a smaller chunk.
        moved = rms_norm_gradient(grad.flip(0), x.flip(0), weight, eps)
        assert same_bits(moved[0], of_x.flip(0)) and not same_bits(moved[1], of_weight)


def test_the_gradients_of_no_rows_are_zeros() -> None:
    none = torch.zeros(0, 64)
    of_x, of_weight = rms_norm_gradient(none, none, torch.ones(64), 1e-6)
    assert of_x.shape == (0, 64) and of_weight.tolist() == [0.0] * 64
