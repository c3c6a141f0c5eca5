"""SwiGLU's elementwise part."""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_plugin.kernels.triton_math import EXACT, sigmoid
from dsv3_plugin.ops.contract import require, require_matrix

_COLUMNS = 512


@triton.jit
def _silu_and_mul(gate_up, out, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0).to(tl.float32)
    product = gate * sigmoid(gate) * up
    tl.store(out + row * width + column, product.to(out.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up bf16 [M, 2 I], the gate in the first I columns, to bf16 [M, I]. Raises `InputError`."""
    require_matrix("silu_and_mul", "gate_up", gate_up, (torch.bfloat16,))
    require(gate_up.shape[1] % 2 == 0, "silu_and_mul", f"gate_up has an odd width {gate_up.shape[1]}")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        _silu_and_mul[(rows, triton.cdiv(width, _COLUMNS))](gate_up, out, width, _COLUMNS, num_warps=2, **EXACT)
    return out
