"""RMSNorm in plain fp32, and where it rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import FLOATS, normal, same_bits
from plain import plain_row_sum

from dsv3_plugin.ops.rms_norm import rms_norm


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
