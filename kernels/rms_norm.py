"""RMSNorm: one program a row, its squares summed in 512 lanes as the contract says."""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.kernels.triton_math import EXACT, divide, fold_sum
from dsv3_plugin.ops.contract import require, require_matrix

_LANES = 512


@triton.jit
def _rms_norm(x, weight, out, eps, K: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * K
    lane = tl.arange(0, LANES)
    squares = tl.zeros((LANES,), tl.float32)
    for start in tl.static_range(0, K, LANES):
        wide = tl.load(x + row + start + lane, mask=start + lane < K, other=0).to(tl.float32)
        squares += wide * wide
    total = fold_sum(tl.reshape(squares, (1, LANES)), 1, LANES)
    factor = divide(1.0, tl.math.sqrt_rn(divide(total, K * 1.0) + eps))
    for start in tl.static_range(0, K, LANES):
        inside = start + lane < K
        wide = tl.load(x + row + start + lane, mask=inside, other=0).to(tl.float32)
        scaled = wide * factor * tl.load(weight + start + lane, mask=inside, other=0).to(tl.float32)
        tl.store(out + row + start + lane, scaled.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x bf16 [M, K], weight bf16 [K], to bf16 [M, K]. Raises `InputError`."""
    require_matrix("rms_norm", "x", x, (torch.bfloat16,))
    require(weight.dtype == x.dtype, "rms_norm", f"weight is {weight.dtype}, x is {x.dtype}")
    require(tuple(weight.shape) == (x.shape[1],), "rms_norm", f"weight has shape {tuple(weight.shape)}")
    out = torch.empty_like(x)
    if len(x):
        _rms_norm[(len(x),)](x, weight, out, eps, x.shape[1], _LANES, num_warps=8, **EXACT)
    return out
