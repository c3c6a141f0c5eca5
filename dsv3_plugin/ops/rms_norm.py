"""Root-mean-square normalisation.

Contract: fp32 throughout. The squares are summed by `elementary.sum_row`; the factor is 1 / sqrt(mean + eps), a
square root and a division, both correctly rounded; x times factor, times weight, one rounding to the input's dtype.
(Hugging Face rounds x * factor to bf16 before the weight: two roundings.)
"""

from __future__ import annotations

import torch

from dsv3_plugin.ops.contract import Contract, require, require_matrix
from dsv3_plugin.ops.elementary import divide, sum_row

RMS_NORM = Contract("rms_norm", 2, "x / rms(x) * weight in fp32, one rounding")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [M, K], weight [K] of one dtype, to [M, K] of that dtype."""
    require_matrix("rms_norm", "x", x, (torch.float32, torch.bfloat16))
    require(weight.dtype == x.dtype, "rms_norm", f"weight is {weight.dtype}, x is {x.dtype}")
    require(tuple(weight.shape) == (x.shape[1],), "rms_norm", f"weight has shape {tuple(weight.shape)}")
    wide = x.float()
    mean = divide(sum_row(wide * wide), x.shape[1])
    # In fp64: ATen's vectorised fp32 root is off by an ulp in 0.6 % of its results.
    root = torch.sqrt((mean + eps).double()).float()
    return (wide * (1.0 / root) * weight.float()).to(x.dtype)
