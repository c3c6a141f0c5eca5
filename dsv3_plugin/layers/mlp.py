"""The dense MLP, which is also the shared expert."""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.layers.linear import Activation, ColumnLinear, Quantized, RowLinear
from dsv3_plugin.ops.silu_and_mul import silu_and_mul, silu_and_mul_fp8
from dsv3_plugin.registry import Ops


class MLP(nn.Module):
    """SwiGLU with gate and up as one projection, the gate's rows first."""

    def __init__(self, ops: Ops, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = ColumnLinear(ops, hidden_size, 2 * intermediate_size, fused=2)
        self.down_proj = RowLinear(ops, intermediate_size, hidden_size)

    def forward(self, x: Activation) -> torch.Tensor:
        """x [T, hidden] to [T, hidden]."""
        return self.down_proj(swiglu(self.ops, self.gate_up_proj(x)))


def swiglu(ops: Ops, gate_up: torch.Tensor) -> Activation:
    """gate_up [T, 2 I] to [T, I], as the projection behind it reads it."""
    if ops.quantizes_ahead:
        return Quantized(*ops[silu_and_mul_fp8](gate_up, ops.scale_format))
    return ops[silu_and_mul](gate_up)
