"""SwiGLU's elementwise part.

Contract: silu(gate) * up with silu(g) = g * `elementary.sigmoid`(g), in fp32 from inputs of the profile's dtype, one
rounding.
"""

from __future__ import annotations

import torch

from dsv3_plugin.ops.contract import Contract, require, require_matrix
from dsv3_plugin.ops.elementary import sigmoid

SILU_AND_MUL = Contract("silu_and_mul", 2, "silu(gate) * up in fp32, one rounding")


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [M, 2 I], the gate in the first I columns, to [M, I] of the same dtype."""
    require_matrix("silu_and_mul", "gate_up", gate_up, (torch.float32, torch.bfloat16))
    require(gate_up.shape[1] % 2 == 0, "silu_and_mul", f"gate_up has an odd width {gate_up.shape[1]}")
    gate, up = gate_up.float().chunk(2, dim=1)
    return (gate * sigmoid(gate) * up).to(gate_up.dtype)
