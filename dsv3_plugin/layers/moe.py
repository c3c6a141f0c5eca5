"""DeepSeekMoE: a router, routed experts, and a shared expert that every token takes."""

from __future__ import annotations

import torch
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layers.beside import beside
from dsv3_plugin.layers.linear import Activation, GroupedLinear, Quantized
from dsv3_plugin.layers.mlp import MLP, swiglu
from dsv3_plugin.layout import WHOLE, Layout
from dsv3_plugin.ops.combine import combine
from dsv3_plugin.ops.permute import permute, permute_fp8, sort_by_expert
from dsv3_plugin.ops.router import moe_router
from dsv3_plugin.registry import Ops


class Router(nn.Module):
    """`weight` [E, hidden] in the profile's dtype and `e_score_correction_bias` [E] in fp32.

    The bias only chooses and never weighs.
    """

    def __init__(self, ops: Ops, config: DeepseekV3Config) -> None:
        super().__init__()
        self.ops = ops
        self.config = config
        shape = config.n_routed_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(shape, dtype=ops.setting.profile.dtype), requires_grad=False)
        bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] to (topk_ids int64 [T, k] ascending, topk_weights fp32 [T, k])."""
        return self.ops[moe_router](
            x,
            self.weight,
            self.e_score_correction_bias,
            num_experts_per_tok=self.config.num_experts_per_tok,
            n_group=self.config.n_group,
            topk_group=self.config.topk_group,
            norm_topk_prob=self.config.norm_topk_prob,
            routed_scaling_factor=self.config.routed_scaling_factor,
        )


class Experts(nn.Module):
    """The routed experts' MLPs, stacked."""

    def __init__(self, ops: Ops, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = GroupedLinear(ops, num_experts, hidden_size, 2 * intermediate_size)
        self.down_proj = GroupedLinear(ops, num_experts, intermediate_size, hidden_size)

    def forward(self, x: Activation, expert_counts: torch.Tensor) -> torch.Tensor:
        """x [S, hidden] sorted by expert, expert_counts [num_experts], to [S, hidden]."""
        return self.down_proj(swiglu(self.ops, self.gate_up_proj(x, expert_counts)), expert_counts)


class MoE(nn.Module):
    """A mixture-of-experts layer. No token is dropped."""

    def __init__(self, ops: Ops, config: DeepseekV3Config, layer_idx: int, layout: Layout = WHOLE) -> None:
        super().__init__()
        self.ops = ops
        self.gate = Router(ops, config)
        own_experts, hidden = len(layout.own_experts(config, layer_idx)), config.hidden_size
        self.experts = Experts(ops, own_experts, hidden, config.moe_intermediate_size)
        self.shared_experts = MLP(ops, hidden, config.shared_intermediate_size // layout.tensor.size)

    def forward(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """x [T, hidden] for the router, and the same as projections read it, to [T, hidden]."""
        shared_out = beside(lambda: self.shared_experts(activation), x.device)
        topk_ids, topk_weights = self.gate(x)
        rows, slots, expert_counts = self.ops[sort_by_expert](topk_ids, self.gate.config.n_routed_experts)
        expert_out = self.experts(permute_activation(self.ops, activation, rows), expert_counts)
        return self.ops[combine](expert_out, slots, topk_weights, shared_out())


def permute_activation(ops: Ops, x: Activation, rows: torch.Tensor) -> Activation:
    """The rows of x [M, K] that `rows`, int64 [S], names: [S, K]."""
    if isinstance(x, Quantized):
        return Quantized(*ops[permute_fp8](*x, rows))
    return ops[permute](x, rows)
