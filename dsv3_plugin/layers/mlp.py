"""The dense MLP, which is also the shared expert."""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.layers.linear import ColumnLinear, RowLinear
from dsv3_plugin.registry import Ops


class MLP(nn.Module):
    """SwiGLU with gate and up as one projection, the gate's rows first."""

    def __init__(self, ops: Ops, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = ColumnLinear(ops, hidden_size, 2 * intermediate_size, fused=2)
        self.down_proj = RowLinear(ops, intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] to [T, hidden]."""
        return self.down_proj(self.ops.silu_and_mul(self.gate_up_proj(x)))
